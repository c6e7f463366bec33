"""Kills or stops one process of a server, and says what goes on, what comes back and what does not.

    python -m benchmarks.parts                                  every process, each of a server of its own
    python -m benchmarks.parts coordinator ingress

Starts `gptj-dist serve demo --stages 2 --dtype float32` for each part, sends one stream, kills the process with SIGKILL
(a hung coordinator is stopped with SIGSTOP) when the stream has 20 tokens, and compares the stream with that of an
undisturbed run. Then it sends short requests until one is served. The last line on standard output is one JSON
document. Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.faults import MAX_TOKENS, MIDDLE_TOKENS, Stream, differences, num_tokens, pause_ms
from benchmarks.figures import machine, print_document, print_row
from benchmarks.processes import Family, content
from benchmarks.servers import free_port, is_ready, serve_command, stop

PARTS = {
    "stage": ":stage-1",
    "coordinator": "ServeReplica:gptj-dist:Pipeline",
    "hung coordinator": "ServeReplica:gptj-dist:Pipeline",
    "ingress": "ServeReplica:gptj-dist:Ingress",
    "controller": "ServeController",
    "gcs": "/gcs/gcs_server",
    "raylet": "/raylet/raylet",
    "agent": "ray::DashboardAgent",
}
"""Part of the first word of each process's command line."""

SIGNALS = {"hung coordinator": signal.SIGSTOP}
"""Those that are sent other signals than SIGKILL."""

START_TIMEOUT_S = 300.0
RETURN_TIMEOUT_S = 60.0
AFTERMATH_S = 20.0
"""Time in which a server that will end after the loss does."""

POLL_S = 0.1
KIND = "seeded"


def main() -> None:
    assert __doc__ is not None
    report("parts", __doc__, {part: partial(loss_of, part) for part in PARTS})


def report(benchmark: str, description: str, losses: Mapping[str, Callable[[], dict[str, Any]]]) -> None:
    """Has the losses happen that the command line names, all by default, and prints what `tried` returns of each."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(losses)}; default: all")
    parts = parser.parse_args().parts or list(losses)
    if unknown := set(parts) - set(losses):
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}")
    print_row(["killed", "stream", "pause ms", "served after s", "server"])
    documents = []
    for part in parts:
        documents.append(losses[part]())
        print_row(documents[-1].values())
    print_document(benchmark, {"machine": machine(), "parts": documents})


def loss_of(part: str) -> dict[str, Any]:
    """Starts a server, kills the part and reports as `tried` does."""
    family = Family()
    return tried(part, family, {"stages": 2, "dtype": "float32"}, family.environment, partial(_kill, part, family))


def tried(
    part: str,
    family: Family,
    settings: Mapping[str, Any],
    environment: Mapping[str, str],
    harm: Callable[[], None],
    max_tokens: int = MAX_TOKENS,
    aftermath_s: float = AFTERMATH_S,
) -> dict[str, Any]:
    """Starts a server of the demo, sends a stream, does the harm in its middle, and kills the family in the end.

    Returns:
        What became of the stream, its longest pause, the seconds until a new request was served (None: never), and
        the exit status of the server (None: it went on).
    """
    port = free_port()
    base, command = f"http://127.0.0.1:{port}", serve_command("demo", settings, port)
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_until_served(base, server, START_TIMEOUT_S)
        usual, stream = Stream(KIND, 0, max_tokens), Stream(KIND, 0, max_tokens, salt="disturbed")
        asyncio.run(usual.run(base))
        harmed_s = asyncio.run(_disturbed(base, stream, harm))
        served_s = _wait_until_served(base, server, RETURN_TIMEOUT_S)
        with suppress(subprocess.TimeoutExpired):
            server.wait(aftermath_s)
        return {
            "part": part,
            "stream": _outcome(stream, usual),
            "pause_ms": pause_ms(stream),
            "served_after_s": None if served_s is None else served_s - harmed_s,
            "exit_status": server.poll(),
        }
    finally:
        stop(server)
        family.kill()


async def _disturbed(base: str, stream: Stream, harm: Callable[[], None]) -> float:
    """Runs the stream, and does the harm in its middle; returns when it began to."""
    ended = asyncio.ensure_future(stream.run(base))
    while num_tokens(stream.content) < MIDDLE_TOKENS and not ended.done():  # noqa: ASYNC110  # frames set no event
        await asyncio.sleep(POLL_S / 10)
    harmed_s = time.monotonic()
    await asyncio.to_thread(harm)
    await ended
    return harmed_s


def _kill(part: str, family: Family) -> None:
    [victim, *_] = [int(process.name) for process in family.members() if PARTS[part] in title(process)]
    os.kill(victim, SIGNALS.get(part, signal.SIGKILL))


def _outcome(stream: Stream, usual: Stream) -> str:
    assert stream.record is not None
    if stream.record.error is not None:
        return f"ended: {stream.record.error}"
    return "differs" if differences(stream.content, usual.content) else "identical"


def _wait_until_served(base: str, server: subprocess.Popen[bytes], timeout_s: float) -> float | None:
    """Waits until a request is served; returns the time, or None if that takes too long or the server has ended."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s and server.poll() is None:
        if is_ready(base):
            short = Stream(KIND, 1)
            with suppress(TimeoutError):
                asyncio.run(asyncio.wait_for(short.run(base), timeout_s))
            if short.record is not None and short.record.error is None:
                return time.monotonic()
        time.sleep(POLL_S)
    return None


def title(process: Path) -> str:
    """The first word of a process's command line; empty if it has ended."""
    return content(process / "cmdline").partition(b"\0")[0].decode(errors="replace")


if __name__ == "__main__":
    main()
