"""`gptj-dist serve` from start to end: what it prints, what it leaves, how it refuses."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.servers import free_port
from gptj_dist.checkpoint.hub import resolve_model
from gptj_dist.operate.launch.processes import command_lines
from gptj_dist.operate.launch.tokens import why_refused
from tests.http.command import STOP_LIMIT_S, Command, running, wait_until_gone
from tests.http.test_stop import NUM_STREAMS, Streams
from tests.unit.test_trace import check
from tests.verbs import run_verb
from tests.waiting import wait_until
from tests.wheel import build_wheel, install_wheel

pytestmark = pytest.mark.ray

SERVE = [sys.executable, "-m", "gptj_dist", "serve"]


HOSTILE_ENVIRONMENT = {
    "http_proxy": "http://127.0.0.1:9",
    "HTTPS_PROXY": "http://127.0.0.1:9",
    "ALL_PROXY": "socks5://127.0.0.1:9",
    "TMPDIR": "/dev/shm/" + "d" * 100,
}
"""Proxies that answer nothing, and a directory whose path is too long for Ray's sockets."""


def test_it_serves_says_where_and_leaves_nothing_but_the_trace_even_in_mid_stream_and_from_a_wheel(
    tmp_path: Path,
) -> None:
    install_wheel(build_wheel(tmp_path), tmp_path / "installed")
    environment = {**os.environ, **HOSTILE_ENVIRONMENT, "PYTHONPATH": str(tmp_path / "installed")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    port, trace = free_port(), tmp_path / "trace.json"
    options = ["--stages", "2", "--port", str(port), "--served-model-name", "tiny", "--trace", str(trace)]
    options += ["--log-prompts", "--drain-s", "1"]
    with running([*SERVE, "demo", *options], environment, tmp_path) as command:
        base = command.wait_for(r"Ready after [\d.]+ s: tiny at (http://127\.0\.0\.1:\d+)")
        command.wait_for(r"(Ctrl-C stops)")
        output = command.output()
        assert base.endswith(str(port))
        assert "embed + 0-13 (14)" in output
        assert "14-27 (14) + head" in output
        logs = Path(command.wait_for(r"Logs: (\S+)"))
        assert logs.parents[3].stat().st_mode & 0o077 == 0  # Ray opens all that lies below
        (gcs_port,) = (path.read_text() for path in logs.parents[1].glob("gcs_server_port_*"))
        assert "asks for a token" in why_refused(f"127.0.0.1:{gcs_port}", token=None)
        mapped = [line for pid in command.family() for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
        assert {"(deleted)"} == {line.split()[-1] for line in mapped if "/plasma" in line}  # the object store
        curl = next(line.strip() for line in output.splitlines() if "curl" in line)
        answer = subprocess.run(curl, shell=True, env=environment, capture_output=True, text=True, check=True).stdout
        assert answer.rstrip().endswith("data: [DONE]")
        for verb in (["status"], ["complete", "Call me", "--max-tokens", "2"]):
            asked = [sys.executable, "-m", "gptj_dist", *verb, "--url", base]
            done = subprocess.run(asked, env=environment, capture_output=True, text=True, check=False)
            assert (done.returncode, done.stderr) == (0, "")
        compiled = {path.name.partition(".")[0] for path in tmp_path.glob("installed/gptj_dist/*/__pycache__/*")}
        assert {"ingress", "pipeline", "runner"} <= compiled  # by processes of Ray's
        found = {path.name.rpartition("-")[0]: path.read_text() for path in logs.iterdir()}
        assert found.keys() == {"ingress", "coordinator", "stage-0", "stage-1"}
        assert "INFO ingress request accepted model=tiny" in found["ingress"]
        assert "The state of the Union is" in found["ingress"]
        wait_until(lambda: len(_stages_of(trace)) == 2, "the trace has both stages")
        _is_planned_for(command, base)
        streams = Streams(base, num_tokens=1000)
        assert len(_stages_of(trace)) == 2
        command.interrupt()
        wait_until_gone(command)
        assert command.process.returncode == 0
        assert f"{NUM_STREAMS} requests took longer than 1 s and were cut" in command.output()
        assert all("the server stopped before this answer was complete" in end for end in streams.ends())
        assert "Traceback" not in command.output()
        assert all(len(slices) >= 40 for slices in _stages_of(trace).values())


def _stages_of(trace: Path) -> dict[str, list[dict[str, Any]]]:
    """The stages' slices; the trace must be whole, even while it grows."""
    lanes = check(json.loads(trace.read_text()))
    return {name: slices for (_, name), slices in lanes.items() if name.startswith("stage")}


def _is_planned_for(command: Command, base: str) -> None:
    """`gptj-dist plan --devices cluster` plans for the server's Ray while it serves."""
    lines = command_lines()
    (address,) = {
        argument.removeprefix("--gcs-address=")
        for pid in command.family()
        for argument in lines.get(pid, ())
        if argument.startswith("--gcs-address=")
    }
    done = run_verb("plan", "demo", "--devices", "cluster", "--address", address, COLUMNS="100")
    assert done.returncode == 0, done.stderr
    assert "gptj-dist serve demo --layers 28" in done.stdout
    assert httpx.get(f"{base}/ready").status_code == 200


@pytest.mark.parametrize(
    ("signal_number", "moment"),
    [
        (signal.SIGINT, lambda _: True),
        (signal.SIGINT, lambda command: "Starting Ray" in command.output()),
        (signal.SIGTERM, lambda command: len(command.family()) > 3),
        (signal.SIGHUP, lambda command: "Placing" in command.output()),
        (signal.SIGINT, lambda command: "Loading" in command.output()),
    ],
    ids=["first", "before Ray", "while Ray starts", "before the stages", "while they load"],
)
def test_interrupted_at_any_moment_of_its_start_it_leaves_nothing_behind(
    signal_number: int, moment: Callable[[Command], bool]
) -> None:
    # pytest's own directories are too long for Ray's sockets
    with (
        tempfile.TemporaryDirectory(dir="/tmp") as room,
        running([*SERVE, "demo", "--port", str(free_port())], {**os.environ, "RAY_TMPDIR": room}) as command,
    ):
        wait_until(lambda: moment(command), "the moment has come")
        os.killpg(command.process.pid, signal_number)
        wait_until_gone(command)
        assert "Traceback" not in command.output()
        assert command.process.returncode != 0
        assert [path.name for path in Path(room, "ray").glob("session_2*")] == []


@pytest.mark.parametrize(
    ("directory", "message"), [("/proc/none", "cannot be written"), ("/tmp/" + "d" * 100, "is too long by")]
)
def test_a_directory_that_ray_cannot_use_is_one_line_and_exit_code_2(directory: str, message: str) -> None:
    with running([*SERVE, "demo", "--port", str(free_port())], {**os.environ, "RAY_TMPDIR": directory}) as command:
        assert command.process.wait(timeout=30) == 2
        (line,) = command.output().splitlines()
        assert line.startswith("gptj-dist: Ray cannot start: ")
        assert message in line


def test_a_model_that_does_not_fit_is_loaded_once_and_refused_in_one_line_with_exit_code_2() -> None:
    options = ["--port", str(free_port()), "--kv-cache-gb", "5000"]
    with (
        tempfile.TemporaryDirectory(dir="/tmp") as room,
        running([*SERVE, "demo", *options], {**os.environ, "RAY_TMPDIR": room}) as command,
    ):
        assert command.process.wait(timeout=120) == 2
        wait_until_gone(command)
        assert len(list(Path(room).glob("ray/session_2*/logs/serve/replica_*_Pipeline_*.log"))) == 1
        assert Path(room).stat().st_mode & 0o077 == 0  # Ray opens its own directories to all users, not this one
        (line,) = [line for line in command.output().splitlines() if line.startswith("gptj-dist: ")]
        assert line.startswith("gptj-dist: kv_cache_gb 5000.0 is room for")
        assert command.output().splitlines()[-1] == line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/no/such/model"], "there is no directory /no/such/model"),
        (["demo", "--layers", "20,20"], "add up to 40"),
        (["demo", "--stages", "29"], "cannot cut 28 layers into 29 stages"),
        (["demo", "--max-model-len", "5000"], "exceeds the model's context of 1024"),
        (["demo", "--kv-cache-gb", "much"], "--kv-cache-gb takes a number or 'auto'"),
        (["demo", "--trace", "/no/such/directory/trace.json"], "cannot write the trace"),
        (["demo", "--min-replicas", "3", "--max-replicas", "2"], "contradict"),
    ],
)
def test_what_cannot_work_is_one_line_and_exit_code_2_before_anything_starts(
    arguments: list[str], message: str
) -> None:
    with running([*SERVE, *arguments]) as command:
        assert command.process.wait(timeout=30) == 2
        lines = command.output().strip().splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("gptj-dist: ")
        assert message in lines[0]
        assert command.family() == []


def test_a_broken_checkpoint_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    for file in resolve_model("demo").iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes()[: 5_000_000 if "safetensors" in file.name else None])
    with running([*SERVE, str(tmp_path)]) as command:
        assert command.process.wait(timeout=30) == 2
        assert "model.safetensors" in command.output()
        assert len(command.output().strip().splitlines()) == 1


def test_a_port_in_use_is_said_before_ray_starts() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as other,
        running([*SERVE, "demo", "--port", str(other.getsockname()[1])]) as command,
    ):
        assert command.process.wait(timeout=30) == 2
        assert "choose another --port" in command.output()
        assert command.family() == []


def test_more_than_the_machine_has_is_refused_with_a_hint_and_ray_is_ended() -> None:
    with running([*SERVE, "demo", "--port", str(free_port()), "--cpus-per-stage", "500"]) as command:
        assert command.process.wait(timeout=60) == 2
        assert "try --cpus-per-stage" in command.output()
        wait_until(lambda: command.family() == [], "no process is left", STOP_LIMIT_S)
