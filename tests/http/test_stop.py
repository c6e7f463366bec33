"""How `gptj-dist serve` ends, with streams under way, and what it says of a stage that dies before."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from benchmarks.servers import free_port
from gptj_dist.serving.debug import DebugDocument
from tests.http.command import Command, running, wait_until_gone
from tests.waiting import wait_until

pytestmark = pytest.mark.ray

SERVE = [sys.executable, "-m", "gptj_dist", "serve", "demo"]
NUM_STREAMS, NUM_TOKENS = 8, 300
DRAIN_LIMIT_S = 60.0


class Streams:
    """Streams of a number of tokens each, read by a thread each."""

    def __init__(self, base: str, num_tokens: int = NUM_TOKENS) -> None:
        self._num_tokens = num_tokens
        self.lines: list[list[str]] = [[] for _ in range(NUM_STREAMS)]
        self._threads = [threading.Thread(target=self._read, args=(base, lines)) for lines in self.lines]
        for thread in self._threads:
            thread.start()
        wait_until(lambda: all(len(lines) > 3 for lines in self.lines), "all streams flow")

    def _read(self, base: str, lines: list[str]) -> None:
        body = {"prompt": "Call me", "max_tokens": self._num_tokens, "ignore_eos": True, "stream": True}
        body |= {"stream_options": {"include_usage": True}}
        try:
            with httpx.stream("POST", f"{base}/v1/completions", json=body, timeout=DRAIN_LIMIT_S) as response:
                lines.extend(line for line in response.iter_lines() if line)
        except httpx.TransportError as error:
            lines.append(repr(error))

    def ends(self) -> set[str]:
        """The last line of each stream, when all have ended."""
        for thread in self._threads:
            thread.join(DRAIN_LIMIT_S)
        return {lines[-1] for lines in self.lines}

    def num_tokens(self) -> list[int]:
        """Of each stream, as its last chunk counts them."""
        return [json.loads(lines[-2].removeprefix("data: "))["usage"]["completion_tokens"] for lines in self.lines]


@contextmanager
def served(*options: str) -> Iterator[tuple[Command, str]]:
    """A server that is ready, and its URL."""
    with running([*SERVE, *options, "--port", str(free_port())]) as command:
        base = command.wait_for(r"Ready after [\d.]+ s: demo at (http://127\.0\.0\.1:\d+)")
        command.wait_for(r"(Ctrl-C stops)")
        yield command, base


def test_running_streams_finish_while_new_requests_are_refused_even_if_all_processes_get_the_signal() -> None:
    """Also after the loss of a stage, which is all that is said in between."""
    with served("--stages", "2", "--log-format", "json") as (command, base):
        before = command.output()
        _lose_a_stage(command, base)
        streams = Streams(base)
        for pid in command.family():  # as systemd does with KillMode=control-group
            os.kill(pid, signal.SIGTERM)
        command.wait_for(r"(Draining)")
        body = {"prompt": "Call me", "max_tokens": 1}
        refused = wait_until(lambda: _refusal(base, body), "new requests are refused")
        assert int(refused.headers["retry-after"]) > 0
        assert httpx.get(f"{base}/ready").status_code == 503
        assert httpx.get(f"{base}/health").status_code == 200
        command.process.wait(DRAIN_LIMIT_S)
        wait_until_gone(command)
        assert streams.ends() == {"data: [DONE]"}
        assert streams.num_tokens() == [NUM_TOKENS] * NUM_STREAMS
        assert command.process.returncode == 0
        *said, draining, stopped = command.output().removeprefix(before).splitlines()
        assert all(line.startswith("Pipeline ") for line in said)
        assert sum("has lost a stage" in line for line in said) == 1
        assert sum("is back" in line for line in said) == 1
        assert draining.startswith("Draining")
        assert stopped == "Stopped."


def _lose_a_stage(command: Command, base: str) -> None:
    """Kills a stage, and waits until the log and the terminal say that it is lost, and the pipeline back."""
    logs = Path(command.wait_for(r"Logs: (\S+)"))
    document = DebugDocument.from_json(httpx.get(f"{base}/debug/pipeline").content)
    pid = document.pipelines[0].stages[1].pid
    os.kill(pid, signal.SIGKILL)
    (log,) = logs.glob("coordinator-*")
    wait_until(lambda: _events_of(log).count("pipeline back") == 1, "the pipeline is back")
    assert "stage lost, pipeline replaces it" in _events_of(log)
    command.wait_for(r"(is back)")
    command.wait_for(rf"stage 1 \(pid {pid} on (\S+)\)")


def _events_of(log: Path) -> list[str]:
    return [json.loads(line)["event"] for line in log.read_text().splitlines()]


def _refusal(base: str, body: dict[str, object]) -> httpx.Response | None:
    response = httpx.post(f"{base}/v1/completions", json=body, timeout=DRAIN_LIMIT_S)
    return response if response.status_code == 503 else None


def test_a_second_signal_stops_at_once() -> None:
    with served() as (command, base):
        streams = Streams(base)
        command.interrupt()
        command.wait_for(r"(Draining)")

        def ends() -> bool:
            if command.process.poll() is None:
                command.interrupt()
            return command.process.poll() is not None

        wait_until(ends, "the second signal counts")
        wait_until_gone(command)
        assert command.process.returncode == 128 + signal.SIGINT
        assert "data: [DONE]" not in streams.ends()
        assert command.output().rstrip().endswith("Stopped.")
        assert "Traceback" not in command.output()


def test_when_ray_dies_the_launcher_says_so_in_one_line_and_ends() -> None:
    with served() as (command, _):
        before = command.output()
        (pid,) = [pid for pid in command.family() if _program(pid) == "gcs_server"]
        os.kill(pid, signal.SIGKILL)
        command.process.wait(DRAIN_LIMIT_S)
        wait_until_gone(command)
        assert command.process.returncode == 1
        (line,) = command.output().removeprefix(before).splitlines()
        said, _, logs = line.partition("; logs: ")
        assert said == "gptj-dist: the server has ended: Ray's process gcs_server has ended"
        assert "StageFailedError" in Path(logs, "launcher.err").read_text()


@pytest.mark.parametrize("victim", ["gcs_server", "raylet"])
def test_when_ray_dies_while_stages_load_the_launcher_ends_with_one_line(victim: str) -> None:
    with running([*SERVE, "--port", str(free_port())]) as command:
        command.wait_for(r"(Placing the stages)")
        (pid,) = [pid for pid in command.family() if _program(pid) == victim]
        os.kill(pid, signal.SIGKILL)
        command.process.wait(DRAIN_LIMIT_S)
        wait_until_gone(command)
        assert command.process.returncode == 1
        assert command.output().splitlines()[-1].startswith(f"gptj-dist: Ray's process {victim} has ended; logs: /")
        assert "Traceback" not in command.output()


def _program(pid: int) -> str:
    try:
        return Path(os.fsdecode((Path("/proc") / str(pid) / "cmdline").read_bytes().split(b"\0")[0])).name
    except OSError:
        return ""


IN_A_TERMINAL = "import pty, sys; pty.spawn(sys.argv[1:])"


def test_when_its_terminal_is_closed_running_streams_still_finish_also_without_a_home() -> None:
    port = free_port()
    command_line = [sys.executable, "-c", IN_A_TERMINAL, *SERVE, "--port", str(port)]
    with running(command_line, {**os.environ, "HOME": "/dev/null"}) as command:
        command.wait_for(r"(Ctrl-C stops)")
        streams = Streams(f"http://127.0.0.1:{port}")
        command.process.kill()  # it holds the terminal's other end
        assert streams.ends() == {"data: [DONE]"}
        wait_until_gone(command)
