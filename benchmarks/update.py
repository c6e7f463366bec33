"""Updates an application again and again while clients stream from it, and compares every stream with a quiet one.

    python -m benchmarks.update                            three updates of two pipelines, eight clients
    python -m benchmarks.update --surge 100                the next pipelines load before the others stop
    python -m benchmarks.update --updates 1 --clients 4 --calm-s 5

Starts a Ray node (`cluster/local_nodes.py`), deploys the demo with `serve deploy` behind Serve's proxy, and takes what
some streams of each kind of `benchmarks.faults` say while there is no other load. Then clients send such streams, one
after the other. After `--calm-s` a changed config is deployed, which replaces every process; when the last process of
the version before has ended and all pipelines of the new one run, the server is left alone for `--calm-s` again, and so
on. A stream that ends between two updates and began there is a calm one; the others have `during` figures.

`differ` counts streams of which any byte differs: texts, token ids, log probabilities, finish reasons, numbers of
tokens. A pause is the longest time without a frame, from the request on. `tokens_per_s` counts the tokens that came
during the updates, and between them. The last line on standard output is one JSON document. Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPException
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from benchmarks.faults import KINDS, TEMPLATE, Content, Stream, differences, pause_ms
from benchmarks.figures import machine, percentile, print_document, print_row
from benchmarks.nodes import read_until_up
from benchmarks.parts import title
from benchmarks.processes import Family
from benchmarks.servers import ROOT, STOP_TIMEOUT_S, free_port
from gptj_dist.serving.debug import DebugDocument

APP = "update"
NUM_CPUS = 8
"""Of Ray's node, so that two versions fit. They share the machine's cores."""

NUM_TEXTS = 3
"""Streams of each kind that differ."""

START_TIMEOUT_S, UPDATE_TIMEOUT_S = 300.0, 300.0
POLL_S = 0.2
SERVE = str(Path(sys.executable).with_name("serve"))
PROCESSES = (":Pipeline", ":Ingress", ":stage-")
"""Parts of the titles of the processes that an update replaces."""

Span = tuple[float, float]
"""Begin and end, on the clock of `time.perf_counter`."""


@dataclass(slots=True)
class Findings:
    """What clients have seen.

    Attributes:
        streams: those that have ended.
        problems: a line for each stream that failed or differs.
        updates: when each update was, from the command on.
    """

    streams: list[Stream] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    num_failed: int = 0
    num_different: int = 0
    updates: list[Span] = field(default_factory=list)

    def judge(self, stream: Stream, expected: Content) -> None:
        """Notes a stream that has ended."""
        assert stream.record is not None, "the stream has ended"
        self.streams.append(stream)
        if stream.record.error is not None:
            self.num_failed += 1
            self.problems.append(f"{stream.kind}: {stream.content.get('error') or stream.record.error}")
        elif parts := differences(stream.content, expected):
            self.num_different += 1
            self.problems.append(f"{stream.kind} {stream.number}: {', '.join(parts)} differ")


@dataclass(frozen=True, slots=True)
class Application:
    """The application on its Ray node."""

    base: str
    family: Family
    environment: Mapping[str, str]
    num_pipelines: int
    surge: int

    def deploy(self, version: int, directory: Path) -> None:
        """Runs `serve deploy` with a config that differs from that of other versions. Does not wait for the update."""
        path = directory / f"version-{version}.yaml"
        template = directory / "template.jinja"
        template.write_text(TEMPLATE)
        path.write_text(yaml.safe_dump(self._config(version, template)))
        command = [SERVE, "deploy", str(path)]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"serve deploy failed: {done.stderr}")

    def _config(self, version: int, template: Path) -> dict[str, Any]:
        args: dict[str, Any] = {
            "model": "demo",
            "stages": 2,
            "device": "cpu",
            "cpus_per_stage": 0.5,
            "dtype": "float32",
        }
        pipelines: dict[str, Any] = {
            "name": "Pipeline",
            "num_replicas": self.num_pipelines,
            "max_surge_percent": self.surge,
        }
        application = {
            "name": APP,
            "route_prefix": "/",
            "import_path": "gptj_dist.serving.app:build",
            "args": {**args, "chat_template": str(template), "max_queued_requests": 1000 + version},
            "deployments": [pipelines],
        }
        port = int(self.base.rpartition(":")[2])
        return {"http_options": {"host": "127.0.0.1", "port": port}, "applications": [application]}

    def processes(self) -> frozenset[str]:
        """The ids of the ingress's, coordinators' and stages' processes."""
        return frozenset(
            process.name
            for process in self.family.members()
            if (name := title(process)).startswith("ray::") and any(part in name for part in PROCESSES)
        )

    def is_complete(self) -> bool:
        """Whether all pipelines answer."""
        try:
            with urllib.request.urlopen(f"{self.base}/debug/pipeline", timeout=60) as response:
                return len(DebugDocument.from_json(response.read()).pipelines) == self.num_pipelines
        except (OSError, HTTPException):
            return False


def main() -> None:
    args = _parser().parse_args()
    with application(args.pipelines, args.surge) as app, tempfile.TemporaryDirectory() as directory:
        app.deploy(0, Path(directory))
        asyncio.run(_until(app.is_complete, START_TIMEOUT_S, "the first version runs"))
        expected = asyncio.run(_undisturbed(app))
        findings = asyncio.run(_load(app, expected, args, Path(directory)))
    print_document("update", {"machine": machine(), **vars(args), **figures(findings)})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--pipelines", type=int, default=2)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--calm-s", type=float, default=20.0, help="seconds before, between and after updates")
    parser.add_argument("--surge", type=int, default=0, help="max_surge_percent of the pipelines")
    return parser


@contextmanager
def application(num_pipelines: int, surge: int) -> Iterator[Application]:
    """Runs a Ray node until the context ends. Nothing is deployed on it yet."""
    family = Family()
    command = [sys.executable, str(ROOT / "cluster" / "local_nodes.py"), "1", "--cpus-per-node", str(NUM_CPUS)]
    with subprocess.Popen(command, env=family.environment, stdout=subprocess.PIPE, text=True) as nodes:
        try:
            variables = dict(re.findall(r"export (\w+)=(\S+)", read_until_up(nodes)))
            base = f"http://127.0.0.1:{free_port()}"
            yield Application(base, family, {**family.environment, **variables}, num_pipelines, surge)
        finally:
            nodes.send_signal(signal.SIGINT)
            try:
                nodes.communicate(timeout=STOP_TIMEOUT_S)
            finally:
                family.kill()


async def _undisturbed(app: Application) -> dict[tuple[str, int], Content]:
    """What each stream says while nothing is updated."""
    streams = [Stream(kind, number) for kind in KINDS for number in range(NUM_TEXTS)]
    for stream in streams:
        await stream.run(app.base)
        assert stream.record is not None, "the stream has ended"
        if stream.record.error is not None:
            sys.exit(f"a stream failed although nothing was updated: {stream.record.error}")
    return {(stream.kind, stream.number): stream.content for stream in streams}


async def _load(
    app: Application, expected: Mapping[tuple[str, int], Content], args: argparse.Namespace, directory: Path
) -> Findings:
    findings, is_over, numbers = Findings(), asyncio.Event(), count()

    async def client() -> None:
        while not is_over.is_set():
            number = next(numbers)
            kind, text = list(expected)[number % len(expected)]
            stream = Stream(kind, text, salt=f"stream {number}")  # no draft from the texts of others
            await stream.run(app.base)
            findings.judge(stream, expected[kind, text])

    async with asyncio.TaskGroup() as group:
        for _ in range(args.clients):
            group.create_task(client())
        try:
            for version in range(1, args.updates + 1):
                await asyncio.sleep(args.calm_s)
                await _update(app, version, directory, findings)
            await asyncio.sleep(args.calm_s)
        finally:
            is_over.set()
    return findings


async def _update(app: Application, version: int, directory: Path, findings: Findings) -> None:
    before = await asyncio.to_thread(app.processes)
    begin_s, num_before = time.perf_counter(), len(findings.streams)
    await asyncio.to_thread(app.deploy, version, directory)
    await _until(lambda: not before & app.processes() and app.is_complete(), UPDATE_TIMEOUT_S, "the update is over")
    findings.updates.append((begin_s, time.perf_counter()))
    took_s = time.perf_counter() - begin_s
    print_row([f"update {version}", f"{took_s:.0f} s", len(findings.streams) - num_before, len(findings.problems)])


async def _until(condition: Any, timeout_s: float, what: str) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not await asyncio.to_thread(condition):
        if time.monotonic() > deadline_s:
            sys.exit(f"gave up after {timeout_s:.0f} s waiting until {what}")
        await asyncio.sleep(POLL_S)


def figures(findings: Findings) -> dict[str, Any]:
    """Sums up; for streams and tokens `during` updates and in `calm` times apart."""
    done = [stream for stream in findings.streams if stream.record is not None and stream.record.error is None]
    spans = [_span(stream) for stream in done]
    during = [any(begin < end_s and end > begin_s for begin_s, end_s in findings.updates) for begin, end in spans]
    whole_s = max(end for _, end in spans) - min(begin for begin, _ in spans)
    updates_s = sum(end - begin for begin, end in findings.updates)
    tokens = sum(_tokens_within(stream, findings.updates) for stream in done)
    all_tokens = sum(stream.record.num_tokens for stream in done if stream.record is not None)
    pauses_ms = {
        name: [pause_ms(stream) for stream, is_during in zip(done, during, strict=True) if is_during == wanted]
        for name, wanted in (("during", True), ("calm", False))
    }
    return {
        "num_requests": len(findings.streams),
        "num_failed": findings.num_failed,
        "num_different": findings.num_different,
        "problems": findings.problems,
        "update_s": [end - begin for begin, end in findings.updates],
        "num_streams": {name: len(some) for name, some in pauses_ms.items()},
        "pause_ms": {name: _summary(some) for name, some in pauses_ms.items() if some},
        "tokens_per_s": {"during": tokens / updates_s, "calm": (all_tokens - tokens) / (whole_s - updates_s)},
    }


def _span(stream: Stream) -> Span:
    assert stream.record is not None, "the stream has ended"
    return stream.record.begin_s, stream.record.frame_s[-1]


def _tokens_within(stream: Stream, spans: Sequence[Span]) -> float:
    """The stream's tokens that came within the spans, as if each of its frames had the same number."""
    assert stream.record is not None, "the stream has ended"
    times_s = stream.record.frame_s
    num_within = sum(any(begin <= at_s <= end for begin, end in spans) for at_s in times_s)
    return stream.record.num_tokens * num_within / len(times_s)


def _summary(pauses_ms: Sequence[float]) -> dict[str, float]:
    return {"p50": percentile(pauses_ms, 50), "p99": percentile(pauses_ms, 99), "max": max(pauses_ms)}


if __name__ == "__main__":
    main()
