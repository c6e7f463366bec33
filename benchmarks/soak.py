"""Loads a server for a long time while its processes are killed, and looks for what is wrong, lost or grows.

    python -m benchmarks.soak --minutes 30
    python -m benchmarks.soak --minutes 4 --stage-every-s 40 --coordinator-every-s 90

Starts `gptj-dist serve demo --stages 3 --dtype float32`. Clients send streams of all kinds of `benchmarks.faults`, one
after another; some disconnect at a random moment, some send requests that are wrong. Meanwhile a random stage and the
pipeline's coordinator are killed again and again with SIGKILL, each once at least; the load lasts until then.

Every stream that is read to its end is compared with the same stream of the server's first, undisturbed minute. When
the load has ended, the pipeline must hold no block of the KV cache. The memory and the open files of each part are
sampled. The first third of the run is the warm-up; the median of the last third is compared with that of the second.
Memory is what no file backs, as files are shared by processes that come and go. The last line on standard output is
one JSON document. Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

from benchmarks.faults import KINDS, NUM_STAGES, Content, Server, Stream, differences, pause_ms, serving
from benchmarks.figures import machine, print_document, print_row
from benchmarks.parts import PARTS, title
from benchmarks.processes import num_files, own_bytes
from benchmarks.servers import is_ready
from benchmarks.sse_client import stream_completion

NUM_CLIENTS = 6
NUM_TEXTS = 3
"""Streams of each kind that differ."""

DISCONNECT_SHARE, WRONG_SHARE = 0.1, 0.1
MAX_PATIENCE_S = 3.0
"""After at most this time a client disconnects that does."""

SAMPLE_S = 2.0
POLL_S = 0.1
END_TIMEOUT_S = 120.0
SEED = 0

WRONG: Sequence[tuple[bytes, int]] = (
    (b'{"model": "demo", "prompt"', 400),
    (b'{"model": "demo", "prompt": "x", "max_tokens": -1}', 400),
    (b'{"model": "demo", "prompt": "x", "temperature": "hot"}', 400),
    (b'{"model": "other", "prompt": "x"}', 404),
    (json.dumps({"model": "demo", "prompt": "many words " * 20_000}).encode(), 400),
)
"""Bodies of wrong requests, and the status of the answer."""

COORDINATOR = "coordinator"
ROLES = {
    **{f"stage {index}": f":stage-{index}" for index in range(NUM_STAGES)},
    **{part: PARTS[part] for part in (COORDINATOR, "ingress", "controller", "gcs", "raylet")},
}
"""Part of the first word of each process's command line."""

Samples = dict[str, list[tuple[float, int]]]
"""Of each role: seconds since the load began, and a value."""

Expected = Mapping[tuple[str, int], Content]
"""What the stream of a kind and number says."""


class Growth(NamedTuple):
    """The median of a third of the run, and its ratio to the third before."""

    value: float
    ratio: float


@dataclass(slots=True)
class Findings:
    """What has happened so far.

    Attributes:
        ends: how many streams were `completed`, `disconnected`, `refused` for a wrong request, `failed` or `different`.
        problems: one line for each of the failed and different ones.
        pauses_ms: the longest time without a frame of each completed stream.
        kills: of each role.
        memory_bytes, num_files: samples of each role.
    """

    ends: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    pauses_ms: list[float] = field(default_factory=list)
    kills: Counter[str] = field(default_factory=Counter)
    memory_bytes: Samples = field(default_factory=lambda: defaultdict(list))
    num_files: Samples = field(default_factory=lambda: defaultdict(list))

    def note_problem(self, end: str, problem: str) -> None:
        self.ends[end] += 1
        self.problems.append(problem)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--stage-every-s", type=float, default=120.0, help="seconds between kills of stages")
    parser.add_argument("--coordinator-every-s", type=float, default=300.0, help="seconds between its kills")
    args = parser.parse_args()
    print_document(
        "soak", {"machine": machine(), **soaked(60 * args.minutes, args.stage_every_s, args.coordinator_every_s)}
    )


def soaked(load_s: float, stage_every_s: float, coordinator_every_s: float) -> dict[str, Any]:
    """Starts a server, loads it for this time, and reports."""
    findings = Findings()
    with serving({"dtype": "float32"}) as server:
        expected = asyncio.run(_undisturbed(server))
        asyncio.run(_load(server, expected, findings, load_s, stage_every_s, coordinator_every_s))
        num_blocks = _blocks_when_quiet(server)
    memory, files = _growth(findings.memory_bytes, load_s), _growth(findings.num_files, load_s)
    print_row(["", "MiB", "last / second third", "open files", "last / second third"])
    for role in memory:
        print_row([role, memory[role].value / 2**20, memory[role].ratio, *files[role]])
    return {
        "load_s": load_s,
        "ends": dict(findings.ends),
        "kills": dict(findings.kills),
        "problems": findings.problems,
        "max_pause_ms": max(findings.pauses_ms, default=0.0),
        "num_used_blocks": num_blocks,
        "memory_bytes": {role: growth._asdict() for role, growth in memory.items()},
        "num_files": {role: growth._asdict() for role, growth in files.items()},
    }


async def _undisturbed(server: Server) -> Expected:
    """What each stream says while nothing is killed."""
    streams = [Stream(kind, number) for kind in KINDS for number in range(NUM_TEXTS)]
    await asyncio.gather(*(stream.run(server.base) for stream in streams))
    for stream in streams:
        assert stream.record is not None, "the stream has ended"
        if stream.record.error is not None:
            sys.exit(f"a stream failed although nothing was killed: {stream.record.error}")
    return {(stream.kind, stream.number): stream.content for stream in streams}


async def _load(
    server: Server,
    expected: Expected,
    findings: Findings,
    load_s: float,
    stage_every_s: float,
    coordinator_every_s: float,
) -> None:
    chance = random.Random(SEED)
    begin_s = time.monotonic()
    end_s = begin_s + load_s
    stages = [role for role in ROLES if role.startswith("stage")]

    def is_over() -> bool:
        return time.monotonic() >= end_s and COORDINATOR in findings.kills and len(findings.kills) > 1

    others = [
        asyncio.create_task(_kill(server, findings, stage_every_s, end_s, lambda: chance.choice(stages))),
        asyncio.create_task(_kill(server, findings, coordinator_every_s, end_s, lambda: COORDINATOR)),
        asyncio.create_task(_sample(server, findings, begin_s)),
    ]
    await asyncio.gather(*(_client(server, expected, findings, is_over, chance) for _ in range(NUM_CLIENTS)))
    for task in others:
        task.cancel()
    for end in await asyncio.gather(*others, return_exceptions=True):
        if isinstance(end, Exception):  # and not the cancellation
            raise end


async def _client(
    server: Server, expected: Expected, findings: Findings, is_over: Callable[[], bool], chance: random.Random
) -> None:
    while not is_over():
        share = chance.random()
        if share < WRONG_SHARE:
            await _send_wrong(server, findings, *chance.choice(WRONG))
            continue
        stream = Stream(*chance.choice(list(expected)))
        if share < WRONG_SHARE + DISCONNECT_SHARE:
            with suppress(TimeoutError):
                await asyncio.wait_for(stream.run(server.base), chance.uniform(0, MAX_PATIENCE_S))
            findings.ends["disconnected"] += 1
            continue
        await stream.run(server.base)
        _judge(stream, expected[stream.kind, stream.number], findings)


async def _send_wrong(server: Server, findings: Findings, body: bytes, status: int) -> None:
    answer = await stream_completion(server.base, body, 0)
    if f" {status} " in (answer.error or "accepted"):
        findings.ends["refused"] += 1
    else:
        findings.note_problem("failed", f"not refused with {status}: {answer.error}")


def _judge(stream: Stream, expected: Content, findings: Findings) -> None:
    assert stream.record is not None, "the stream has ended"
    name = f"{stream.kind} {stream.number}"
    if stream.record.error is not None:
        findings.note_problem("failed", f"{name}: {stream.content.get('error') or stream.record.error}")
    elif parts := differences(stream.content, expected):
        findings.note_problem("different", f"{name}: {', '.join(parts)}")
    else:
        findings.ends["completed"] += 1
        findings.pauses_ms.append(pause_ms(stream))


async def _kill(server: Server, findings: Findings, every_s: float, end_s: float, choose: Callable[[], str]) -> None:
    """Kills a process of the chosen role again and again, and once at least; none while another one is replaced."""
    is_first = True
    while is_first or time.monotonic() < end_s:
        await asyncio.sleep(every_s)
        while not await asyncio.to_thread(is_ready, server.base):  # noqa: ASYNC110  # the server sets no event
            await asyncio.sleep(POLL_S)
        role = choose()
        if pids := [int(process.name) for process in server.family.members() if ROLES[role] in title(process)]:
            server.kill(pids[0])
            is_first = False
            findings.kills[role] += 1
            print_row([f"{role} killed", *(f"{number} {end}" for end, number in findings.ends.items())])


async def _sample(server: Server, findings: Findings, begin_s: float) -> None:
    while True:
        for process in await asyncio.to_thread(server.family.members):
            for role in (role for role, part in ROLES.items() if part in title(process)):
                now_s = time.monotonic() - begin_s
                findings.memory_bytes[role].append((now_s, own_bytes(process)))
                findings.num_files[role].append((now_s, num_files(process)))
        await asyncio.sleep(SAMPLE_S)


def _blocks_when_quiet(server: Server) -> int:
    """Blocks in use when all requests have ended; waits for the pipeline's return, and for the last ones to leave."""
    deadline_s = time.monotonic() + END_TIMEOUT_S
    while not is_ready(server.base) and time.monotonic() < deadline_s:
        time.sleep(POLL_S)
    while (number := server.pipeline().num_used_blocks) > 0 and time.monotonic() < deadline_s:
        time.sleep(POLL_S)
    return number


def _growth(samples: Samples, load_s: float) -> dict[str, Growth]:
    """For each role that was sampled throughout."""
    thirds = {
        role: [[value for now_s, value in values if third <= 3 * now_s / load_s < third + 1] for third in range(3)]
        for role, values in samples.items()
    }
    return {
        role: Growth(median(last), median(last) / median(second))
        for role, (_, second, last) in thirds.items()
        if second and last
    }


if __name__ == "__main__":
    main()
