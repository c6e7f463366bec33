"""The parts of the launcher that need no Ray: signals, proxies, failures, losses, addresses, attempts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from gptj_dist.errors import CheckpointError, ConfigurationError, StageFailedError
from gptj_dist.operate.launch import local_ray, watch
from gptj_dist.operate.launch.announcement import example_command, needs_noproxy
from gptj_dist.operate.launch.application import RayGoneError, failure_in, within
from gptj_dist.operate.launch.cluster import split_address
from gptj_dist.operate.launch.environment import LAUNCHER_VARIABLE, bypass_proxies
from gptj_dist.operate.launch.local_ray import LocalRay
from gptj_dist.operate.launch.processes import descendants, end_all, environments, is_running, kill, marked
from gptj_dist.operate.launch.session_room import SessionRoom
from gptj_dist.operate.launch.terminal import open_console
from gptj_dist.operate.launch.watch import LossReporter, Watcher
from gptj_dist.serving.pipeline import PipelineStatus
from gptj_dist.stages.loss import StageLoss
from tests.waiting import wait_until

LIMIT_S = 20.0

LAUNCHER = """
import os, subprocess, sys, time
from gptj_dist.operate.launch.signals import StopSignals

def clean_up():
    if sys.argv[1] == "starting badly":
        raise OSError("Too many open files")

signals = StopSignals(clean_up)
signals.start()
child = subprocess.Popen(["sleep", "60"])
if sys.argv[1] == "serving":
    signals.let_finish()
print(child.pid, flush=True)
if signals.requested.wait(60):
    print("requested", flush=True)
time.sleep(60)
"""

FAILING_LAUNCHER = """
import sys, threading, time
from gptj_dist.operate.launch.signals import StopSignals

has_begun = threading.Event()

def clean_up():
    has_begun.set()
    time.sleep(1)
    print("cleaned up", flush=True)

StopSignals(clean_up).start()
print("started", flush=True)
has_begun.wait()
sys.exit("Ray is gone")
"""

BUSY_LAUNCHER = """
import os, subprocess
from gptj_dist.operate.launch.processes import descendants, end_all
from gptj_dist.operate.launch.signals import StopSignals

StopSignals(lambda: end_all(lambda: descendants(os.getpid()))).start()
while True:
    print(subprocess.Popen(["sleep", "60"], preexec_fn=lambda: None).pid, flush=True)
"""


@pytest.fixture(autouse=True)
def _hears_of_a_closed_terminal() -> Iterator[None]:
    """Children inherit that a signal is ignored, as it is if nohup started the tests."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@contextmanager
def launcher(phase: str, *wrapper: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that takes signals as the launcher does, in a group of its own, and its child."""
    command = [*wrapper, sys.executable, "-c", LAUNCHER, phase]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, process_group=0)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        yield process, child
    finally:
        kill([process.pid, child])
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_whole_group_asks_the_launcher_to_stop_and_leaves_its_children_alone(number: int) -> None:
    with launcher("serving") as (process, child):
        os.killpg(process.pid, number)
        assert process.stdout is not None
        assert process.stdout.readline() == "requested\n"
        assert is_running(child)
        assert process.poll() is None


def test_ctrl_c_reaches_a_launcher_that_a_script_has_started_in_its_background() -> None:
    """A shell that is not interactive has it ignore SIGINT."""
    script = [sys.executable, "-c", LAUNCHER, "serving"]
    command = ["sh", "-c", '"$@" & wait', "sh", *script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, process_group=0) as shell:
        assert shell.stdout is not None
        child = int(shell.stdout.readline())
        try:
            os.killpg(shell.pid, signal.SIGINT)
            assert shell.stdout.readline() == "requested\n"
            assert is_running(child)
        finally:
            os.killpg(shell.pid, signal.SIGKILL)


def test_a_second_signal_stops_at_once() -> None:
    with launcher("serving") as (process, _):
        os.killpg(process.pid, signal.SIGTERM)
        assert process.stdout is not None
        process.stdout.readline()

        def ends() -> bool:
            os.kill(process.pid, signal.SIGINT)
            return process.poll() is not None

        wait_until(ends, "the second signal counts", LIMIT_S)
        assert process.returncode == 128 + signal.SIGINT


def test_signals_that_are_sent_twice_by_the_same_hand_count_as_one() -> None:
    """As `timeout` does, and a terminal that closes."""
    with launcher("serving") as (process, _):
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP, signal.SIGHUP):
            os.kill(process.pid, number)
        assert process.stdout is not None
        assert process.stdout.readline() == "requested\n"
        os.kill(process.pid, signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_while_it_starts_the_first_signal_stops_at_once(number: int) -> None:
    with launcher("starting") as (process, _):
        os.killpg(process.pid, number)
        assert process.wait(LIMIT_S) == 128 + number


def test_a_clean_up_that_fails_does_not_keep_the_process() -> None:
    with launcher("starting badly") as (process, _):
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(LIMIT_S) == 128 + signal.SIGTERM


def test_a_main_thread_that_fails_meanwhile_cuts_no_clean_up_short() -> None:
    command = [sys.executable, "-c", FAILING_LAUNCHER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == "cleaned up\n"
        assert process.wait(LIMIT_S) == 128 + signal.SIGINT


def test_under_nohup_a_closed_terminal_is_no_reason_to_stop() -> None:
    with launcher("starting", "nohup") as (process, _):
        os.kill(process.pid, signal.SIGHUP)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(LIMIT_S) == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"no_proxy": "127.0.0.1,h", "NO_PROXY": "127.0.0.1,h"}),
        ({"no_proxy": "a.b, c"}, {"no_proxy": "a.b,c,127.0.0.1,h", "NO_PROXY": "a.b,c,127.0.0.1,h"}),
        ({"NO_PROXY": "x"}, {"no_proxy": "127.0.0.1,h", "NO_PROXY": "x,127.0.0.1,h"}),
        ({"no_proxy": "*", "NO_PROXY": "*"}, {"no_proxy": "*", "NO_PROXY": "*"}),
        (
            {"no_grpc_proxy": "g"},
            {"no_proxy": "127.0.0.1,h", "NO_PROXY": "127.0.0.1,h", "no_grpc_proxy": "g,127.0.0.1,h"},
        ),
    ],
)
def test_hosts_are_added_to_those_that_no_proxy_is_asked_for(given: dict[str, str], expected: dict[str, str]) -> None:
    environment = dict(given)
    bypass_proxies(("127.0.0.1", "h"), environment)
    assert environment == expected


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
def test_the_request_to_copy_works_where_the_environment_has_a_proxy(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    assert not needs_noproxy("127.0.0.1")
    monkeypatch.setenv(variable, "http://127.0.0.1:9")
    assert needs_noproxy("127.0.0.1")
    assert "--noproxy '*'" in example_command("http://127.0.0.1:8000", needs_key=False, has_proxy=True)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert not needs_noproxy("127.0.0.1")


def test_names_and_addresses_with_brackets_are_printed_as_they_are(capfd: pytest.CaptureFixture[str]) -> None:
    line = "Ready: gpt-j[fp16] or [/x] at http://[fd00:bee:1::2]:8000"
    open_console().print(line, soft_wrap=True)
    assert capfd.readouterr().out == f"{line}\n"


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("gptj_dist.errors.ConfigurationError: the stages need 12 GB", ConfigurationError),
        ("gptj_dist.errors.CheckpointError: the stages need 12 GB", CheckpointError),
        ("gptj_dist.errors.StageFailedError: the stages need 12 GB", StageFailedError),
    ],
)
def test_the_error_of_a_replica_comes_out_as_it_was_raised(line: str, kind: type[Exception]) -> None:
    messages = ["The deployment failed to start 1 times in a row.\nTraceback (most recent call last):\n  File x", line]
    failure = failure_in([*messages, "Deploying app 'gptj-dist' failed: see above."])
    assert type(failure) is kind
    assert str(failure) == "the stages need 12 GB"


def test_an_error_that_is_not_ours_is_told_by_its_last_line() -> None:
    failure = failure_in(["Traceback:\n  File x\nValueError: no\nReplica failed.\n"])
    assert str(failure) == "the pipelines cannot start: ValueError: no"
    assert str(failure_in([])) == "the pipelines cannot start: Serve gives no reason"


def test_what_ray_does_not_answer_is_given_up() -> None:
    assert within(LIMIT_S, lambda: 5) == 5
    with pytest.raises(RayGoneError, match="no answer for 0 s"):
        within(0.0, lambda: wait_until(lambda: None, "never", LIMIT_S))
    with pytest.raises(RayGoneError, match="broken"):
        within(LIMIT_S, lambda: int("broken"))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RayGoneError("Ray does not answer: no"), "Ray does not answer: no"),
        (AttributeError("no such part"), "it cannot be watched: AttributeError('no such part')"),
    ],
)
def test_a_server_that_can_no_longer_be_watched_has_ended(
    monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    monkeypatch.setattr(watch, "PERIOD_S", 0.0)

    def fail() -> str | None:
        raise error

    stop = threading.Event()
    watcher = Watcher(cast(Any, None), stop, fail, lambda _: None)
    watcher.start([])
    assert stop.wait(LIMIT_S)
    assert watcher.failure == reason


def test_one_failed_look_is_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "PERIOD_S", 0.0)
    errors = [RuntimeError("once")]

    def lost_process() -> str:
        if errors:
            raise errors.pop()
        return "raylet"

    stop = threading.Event()
    watcher = Watcher(cast(Any, None), stop, lost_process, lambda _: None)
    watcher.start([])
    assert stop.wait(LIMIT_S)
    assert watcher.failure == "Ray's process raylet has ended"


def status(name: str, num_restarts: int, is_up: bool, *losses: StageLoss) -> PipelineStatus:
    return cast(PipelineStatus, SimpleNamespace(name=name, num_restarts=num_restarts, is_up=is_up, losses=losses))


def test_the_cause_of_a_loss_is_said_once_with_process_node_and_last_log_line() -> None:
    said: list[str] = []
    reporter = LossReporter(said.append)
    old = StageLoss(0, "died long ago", "node", 1, None)
    new = StageLoss(1, "exited with code 3", "host-b", 4711, "ERROR out of memory")
    reporter.note([status("a", 1, True, old)])
    for is_up, num_restarts in ((False, 1), (False, 2), (True, 2), (True, 2)):
        reporter.note([status("a", num_restarts, is_up, old, new)])
    (cause,) = [line for line in said if "exited" in line]
    assert all(part in cause for part in ("stage 1", "4711", "host-b", "ERROR out of memory"))
    assert ["lost" in said[0], "exited" in said[1], "back" in said[2]] == [True, True, True]
    assert len(said) == 3


def test_a_loss_and_a_return_are_each_told_once() -> None:
    said: list[str] = []
    reporter = LossReporter(said.append)
    for is_up, num_restarts in ((True, 0), (True, 0), (False, 0), (False, 1), (True, 1), (True, 1)):
        reporter.note([status("a", num_restarts, is_up), status("b", 0, True)])
    assert [line.split()[1] for line in said] == ["a", "a"]
    assert "lost" in said[0]
    assert "back" in said[1]


def test_a_cause_that_becomes_known_after_the_return_is_said_and_is_no_second_loss() -> None:
    said: list[str] = []
    reporter = LossReporter(said.append)
    loss = StageLoss(1, "exited with code 3", "host-b", 4711, None)
    for num_restarts, losses in ((0, ()), (1, ()), (1, (loss,)), (1, (loss,))):
        reporter.note([status("a", num_restarts, True, *losses)])
    assert ["lost" in said[0], "back" in said[1], "exited" in said[2]] == [True, True, True]
    assert len(said) == 3


def test_a_loss_between_two_looks_is_told_too() -> None:
    said: list[str] = []
    reporter = LossReporter(said.append)
    reporter.note([status("a", 0, True)])
    reporter.note([status("a", 1, True)])
    assert ["lost" in said[0], "back" in said[1]] == [True, True]


@pytest.mark.parametrize(
    ("address", "place"),
    [
        ("127.0.0.1:6379", ("127.0.0.1", 6379)),
        ("[::1]:6379", ("::1", 6379)),
        ("ray://127.0.0.1:10001", None),
        ("head", None),
        (":6379", None),
        ("head:port", None),
    ],
)
def test_addresses_of_ray(address: str, place: tuple[str, int] | None) -> None:
    assert split_address(address) == place


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[Exception | None]:
    """What each attempt to start Ray ends with; None is success."""
    outcomes: list[Exception | None] = []
    monkeypatch.setattr(os, "environ", dict(os.environ))

    def attempt(directory: Path) -> Exception | None:
        (directory / f"session_2026-01-01_00-00-0{len(outcomes)}_{os.getpid()}" / "logs").mkdir(parents=True)
        return outcomes.pop(0)

    monkeypatch.setattr(local_ray, "_try_to_start", attempt)
    return outcomes


def start(directory: Path, timeout_s: float) -> list[str]:
    said: list[str] = []
    ray = LocalRay(SessionRoom(directory))
    ray.noise.write_text("printed by Ray")
    try:
        ray.start(timeout_s, said.append)
    finally:
        ray.discard_empty_logs()
    return said


def test_a_start_that_was_too_slow_is_tried_again(attempts: list[Any], tmp_path: Path) -> None:
    attempts += [TimeoutError("timed out"), Exception("The current node timed out during startup"), None]
    said = start(tmp_path, 120.0)
    assert len(said) == 2
    assert all("trying again" in line for line in said)
    [session] = tmp_path.glob("session_*")
    assert [path.name for path in (session / "logs").iterdir()] == ["launcher.err"]


def test_a_start_is_given_up_in_one_line_when_there_is_no_time_for_another(attempts: list[Any], tmp_path: Path) -> None:
    attempts += [Exception("The current node\ntimed out " + "x" * 1000)]
    with pytest.raises(
        ConfigurationError, match=r"did not start within 0 s .*--start-timeout-s.*logs are in"
    ) as raised:
        start(tmp_path, 20.0)
    logs = Path(str(raised.value).rpartition("logs are in ")[2])
    assert (logs / "launcher.err").read_text() == "printed by Ray"
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 700


def test_a_start_that_cannot_work_is_not_tried_again(attempts: list[Any], tmp_path: Path) -> None:
    attempts += [PermissionError(13, "Permission denied", "/root/.ray/auth_token"), None]
    with pytest.raises(ConfigurationError, match=r"/root/\.ray/auth_token cannot be written: Permission denied"):
        start(tmp_path, 120.0)
    assert attempts == [None]


def test_processes_are_found_by_descent_and_by_mark() -> None:
    script = "import subprocess; subprocess.Popen(['sleep', '60']); print(1, flush=True); input()"
    environment = {**os.environ, LAUNCHER_VARIABLE: "mark"}
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        found = [process.pid, *descendants(process.pid)]
        assert len(found) == 2
        assert set(found) <= set(descendants(os.getpid()))
        assert {pid for pid, value in environments(LAUNCHER_VARIABLE).items() if value == "mark"} == set(found)
        kill(found)
    wait_until(lambda: not any(map(is_running, found)), "both are gone", LIMIT_S)


def test_processes_that_start_others_until_they_die_leave_none() -> None:
    value = uuid.uuid4().hex
    script = "import subprocess\nwhile True: print(subprocess.Popen(['sleep', '60']).pid, flush=True)"
    for _ in range(5):
        with subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, env={**os.environ, LAUNCHER_VARIABLE: value}
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            end_all(lambda: marked(LAUNCHER_VARIABLE, value))
        assert marked(LAUNCHER_VARIABLE, value) == []


def test_a_launcher_that_starts_processes_when_it_is_stopped_leaves_none() -> None:
    value = uuid.uuid4().hex
    with subprocess.Popen(
        [sys.executable, "-c", BUSY_LAUNCHER], stdout=subprocess.PIPE, env={**os.environ, LAUNCHER_VARIABLE: value}
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.terminate()
        assert process.wait(LIMIT_S) == 128 + signal.SIGTERM
        assert marked(LAUNCHER_VARIABLE, value) == []
