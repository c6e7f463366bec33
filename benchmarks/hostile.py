"""Sends hostile requests to a server and measures for how long they silence a well-behaved stream.

    python -m benchmarks.hostile                                    every case against `gptj-dist serve demo`
    python -m benchmarks.hostile --cases "2,000 streams" --package /path/to/another/checkout

Reports for each case: the largest gap between two frames of the stream, the slowest response of `/health`, the statuses
of the hostile requests and when the first and the last of them were answered, the largest response, and the CPU time of
the server's processes. The case `nothing` is the control: on a busy machine the stream has gaps without an attack, too,
and a case causes only what exceeds them. One server takes all cases, one after the other. The last line on standard
output is one JSON document. Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.figures import machine, print_document, print_row
from benchmarks.processes import Family
from benchmarks.servers import ROOT, free_port, running, serve_command
from benchmarks.sse_client import StreamRecord, completion_body, stream_completion
from benchmarks.workers.hostile_cases import CASES, MODERATED, TIMEOUT_S

REST_S = 1.0
"""Seconds of the stream before and after a case."""

COLUMNS = ("gap_ms", "ttft_ms", "health_ms", "first_s", "last_s", "answer_bytes", "cpu_s")

STREAM_TOKENS = 400
HEALTH_PERIOD_S = 0.2
START_S = 60.0
"""Most seconds that an attacker may take to build its bytes."""

MODERATOR = "benchmarks.hostile_moderator:moderate"


@dataclass(slots=True)
class Beside:
    """Measurements of well-behaved clients during a case.

    Attributes:
        streams: completions, one after the other.
        health_s: seconds of each response of `/health`.
        is_over: the clients begin no more requests.
    """

    streams: list[StreamRecord] = field(default_factory=list)
    health_s: list[float] = field(default_factory=list)
    is_over: bool = False

    def figures(self) -> dict[str, Any]:
        gaps_s = [later - earlier for stream in self.streams for earlier, later in pairwise(stream.frame_s)]
        first_s = [stream.frame_s[0] - stream.begin_s for stream in self.streams if stream.frame_s]
        return {
            "gap_ms": 1000 * max(gaps_s, default=math.inf),
            "ttft_ms": 1000 * max(first_s, default=math.inf),
            "health_ms": 1000 * max(self.health_s, default=math.inf),
            "errors": [stream.error for stream in self.streams if stream.error],
        }


def main() -> None:
    args = _parser().parse_args()
    print_row(["", *COLUMNS])
    cases: dict[str, Any] = {}
    for names, options in (
        ([name for name in args.cases if name not in MODERATED], {}),
        ([name for name in args.cases if name in MODERATED], {"moderation": MODERATOR}),
    ):
        if names:
            with _server(options, Path(args.package)) as (base, family):
                for name in names:
                    cases[name] = _measured(name, base, family)
    print_document("hostile", {"machine": machine(), "package": args.package, "cases": cases})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE")
    parser.add_argument("--package", default=str(ROOT), help="directory of the gptj_dist to measure")
    return parser


def _measured(name: str, base: str, family: Family) -> dict[str, Any]:
    figures = asyncio.run(_case(name, base, family))
    print_row([name, *(figures[column] for column in COLUMNS), figures["statuses"], *figures["errors"][:1]])
    return figures


@contextmanager
def _server(options: dict[str, Any], package: Path) -> Iterator[tuple[str, Family]]:
    family, port = Family(), free_port()
    command = serve_command("demo", {"stages": 1, "dtype": "float32", **options}, port)
    environment = {**family.environment, "PYTHONPATH": f"{package}:{ROOT}"}
    try:
        with running(command, environment, port, "/ready", package) as (base, _):
            yield base, family
    finally:
        family.kill()


async def _case(name: str, base: str, family: Family) -> dict[str, Any]:
    beside = Beside()
    clients = [asyncio.create_task(_stream(base, beside)), asyncio.create_task(_probe(base, beside))]
    try:
        await asyncio.sleep(REST_S)
        async with _attacker(name, base) as process:
            begin_cpu_s = family.cpu_s()
            seen = await _attack(process)
        await asyncio.sleep(REST_S)
        cpu_s = family.cpu_s() - begin_cpu_s
    finally:
        beside.is_over = True
        await asyncio.gather(*clients)
    return {"cpu_s": cpu_s, **beside.figures(), **seen}


async def _stream(base: str, beside: Beside) -> None:
    while not beside.is_over:
        beside.streams.append(await stream_completion(base, completion_body("demo", [464], STREAM_TOKENS), 1))


async def _probe(base: str, beside: Beside) -> None:
    url = urlsplit(base)
    while not beside.is_over:
        begin_s = time.perf_counter()
        reader, writer = await asyncio.open_connection(url.hostname, url.port)
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        await reader.read()
        writer.close()
        beside.health_s.append(time.perf_counter() - begin_s)
        await asyncio.sleep(HEALTH_PERIOD_S)


@asynccontextmanager
async def _attacker(name: str, base: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """Runs an attacking process until the context ends; it has built its bytes and waits for a line."""
    url = urlsplit(base)
    command = [sys.executable, "-m", "benchmarks.workers.hostile_cases", name, str(url.hostname), str(url.port)]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, cwd=ROOT)
    try:
        async with asyncio.timeout(START_S):
            await _line(process)
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _attack(process: asyncio.subprocess.Process) -> dict[str, Any]:
    assert process.stdin is not None
    process.stdin.write(b"\n")
    async with asyncio.timeout(3 * TIMEOUT_S):
        seen: dict[str, Any] = json.loads(await _line(process))
    return seen


async def _line(process: asyncio.subprocess.Process) -> bytes:
    assert process.stdout is not None
    return await process.stdout.readline()


if __name__ == "__main__":
    main()
