"""Kills stages of a server under load, and compares every stream with the same stream of an undisturbed run.

    python -m benchmarks.faults                                             every stage, moment and kind of request
    python -m benchmarks.faults --stages 1 --moments middle --kinds mixed --dtype bfloat16
    gptj-dist synth 6b nine --num-layers 9
    python -m benchmarks.faults --model nine --layers 1,7,1 --dtype bfloat16 --streams 1 --stages 1 --moments middle

Starts `gptj-dist serve demo --stages 3`. A case sends some streams of a kind at once and kills a stage with SIGKILL,
once, at one moment: `idle` just before the streams are sent, `queued` when requests wait, `prefill` while prompts are
computed and no stream has a token, `first` when one stream has its first token, `middle` when one has 20 tokens, `last`
when one lacks only its last token. The kind `mixed` has streams of all kinds.

A stream differs if any byte of its texts, token ids, log probabilities, finish reasons or numbers of tokens does. In
float32 none may; in bfloat16 texts may go on differently. A stream's pause is its longest time without a frame, from
its request on; `recovery_s` is the part of it in which the pipeline did not compute.
After four kills another server is started, because a pipeline with more in a short time gives up on its requests. The
last line on standard output is one JSON document. Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count, cycle, pairwise, product
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from benchmarks.figures import machine, percentile, print_document, print_row
from benchmarks.processes import Family
from benchmarks.servers import free_port, is_ready, running, serve_command
from benchmarks.sse_client import COMPLETIONS, StreamRecord, stream_completion
from gptj_dist.serving.debug import DebugDocument, PipelineDocument

NUM_STAGES = 3
NUM_STREAMS = 8
MAX_BATCH_SIZE = 6
"""Less than the number of streams, so that some wait."""

MAX_TOKENS = 64
MIDDLE_TOKENS = 20
POLL_S = 0.001
RETURN_POLL_S = 0.1
RETURN_TIMEOUT_S = 300.0
MAX_KILLS = 4
"""Of a server."""

TEXT = "The state of the Union is as strong as it was, and the people of this country are at work in the fields. "
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "ignore_eos": True}
PENALTIES = {"repetition_penalty": 1.2, "presence_penalty": 0.4, "frequency_penalty": 0.2, "logit_bias": {"262": -2}}
KINDS: Mapping[str, Mapping[str, Any]] = {
    "greedy": {"temperature": 0, "ignore_eos": True},
    "seeded": SAMPLED,
    "choices": {**SAMPLED, "n": 3},
    "logprobs": {**SAMPLED, "logprobs": 3, "prompt_logprobs": 1, "echo": True},
    "penalties": {**SAMPLED, **PENALTIES, "min_tokens": 9},
    "stop": {"temperature": 0.9, "stop": [" the", "\n"], "min_tokens": MIDDLE_TOKENS + 2},
    "grammar": {**SAMPLED, "structured_outputs": {"json": {"type": "array", "items": {}, "minItems": 99}}},
    "chat": {**SAMPLED, "logprobs": True, "top_logprobs": 2},
}
"""The fields of a request of each kind, besides its prompt and its seed."""

RUNS = count()
"""Numbers of the runs of streams, for their salts."""

MIXED = "mixed"
MOMENTS = ("idle", "queued", "prefill", "first", "middle", "last")

T = TypeVar("T")

Content = dict[str, Any]
"""All that an answer says: its choices by index, its usage and its error."""


class Fault(NamedTuple):
    """The kill of a stage at one of `MOMENTS`."""

    stage: int
    moment: str


@dataclass(slots=True)
class Stream:
    """A request, and its answer so far.

    Args:
        salt: a stream finds no drafts in the texts of streams with other salts, and takes its time.

    Attributes:
        content: joined from the frames: what comes twice is in it twice.
        record: arrival times; None until the stream ends.
    """

    kind: str
    number: int
    max_tokens: int = MAX_TOKENS
    salt: str = "usual"
    content: Content = field(default_factory=dict)
    record: StreamRecord | None = None

    async def run(self, base: str) -> None:
        body = json.dumps(self._body()).encode()
        path = "/v1/chat/completions" if self.kind == "chat" else COMPLETIONS
        self.record = await stream_completion(base, body, 0, path, self._take)

    def _body(self) -> dict[str, Any]:
        text = f"Speech {self.number}. {TEXT * (12 + self.number)}"
        prompt = {"messages": [{"role": "user", "content": text}]} if self.kind == "chat" else {"prompt": text}
        form = {"stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True}
        return {
            "model": "demo",
            **prompt,
            **form,
            "max_tokens": self.max_tokens,
            "seed": self.number,
            "cache_salt": self.salt,
            **KINDS[self.kind],
        }

    def _take(self, frame: bytes) -> None:
        told = json.loads(frame)
        parts = {str(choice["index"]): choice for choice in told.get("choices", ())}
        parts |= {name: told[name] for name in ("usage", "error") if told.get(name)}
        if "usage" in parts:
            parts["usage"] = {name: told["usage"][name] for name in ("prompt_tokens", "completion_tokens")}
        self.content = joined(self.content, parts)


def joined(one: Any, other: Any) -> Any:
    """Two parts of an answer as one: texts and lists are concatenated; of other values the later one is taken."""
    if one is None or other is None:
        return one if other is None else other
    if isinstance(one, dict):
        return {name: joined(one.get(name), other.get(name)) for name in (one | other)}
    return one + other if isinstance(one, str | list) else other


def num_tokens(content: Content) -> int:
    """Output tokens of the choice that has the most."""
    return max((len(part.get("token_ids") or ()) for part in content.values()), default=0)


def differences(content: Content, expected: Content) -> list[str]:
    """The names of the parts that differ, such as `0.text`."""
    names = [(part, name) for part in content | expected for name in content.get(part, {}) | expected.get(part, {})]
    pairs = [[json.dumps(of.get(part, {}).get(name)) for of in (content, expected)] for part, name in names]
    return [f"{part}.{name}" for (part, name), (one, other) in zip(names, pairs, strict=True) if one != other]


class Server(NamedTuple):
    """A running server."""

    base: str
    family: Family

    def pipeline(self) -> PipelineDocument:
        with urllib.request.urlopen(f"{self.base}/debug/pipeline", timeout=60) as response:
            return DebugDocument.from_json(response.read()).pipelines[0]

    def kill(self, pid: int) -> None:
        if str(pid) not in {process.name for process in self.family.members()}:
            sys.exit(f"process {pid} does not belong to this benchmark's server")
        os.kill(pid, signal.SIGKILL)

    def wait_for_return(self, num_restarts: int) -> None:
        """Waits until the pipeline has restarted more often than that, and is ready."""
        deadline_s = time.monotonic() + RETURN_TIMEOUT_S
        while self.pipeline().num_restarts <= num_restarts or not is_ready(self.base):
            if time.monotonic() > deadline_s:
                sys.exit(f"the pipeline is not back after {RETURN_TIMEOUT_S:g} s")
            time.sleep(RETURN_POLL_S)


def main() -> None:
    args = _parser().parse_args()
    faults = [Fault(stage, moment) for stage, moment in product(args.stages, args.moments)]
    options = {"dtype": args.dtype, "spares": args.spares, **({"layers": args.layers} if args.layers else {})}
    print_document("faults", {"machine": machine(), **measured(faults, args.kinds, options, args.model, args.streams)})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = list(range(NUM_STAGES))
    parser.add_argument("--stages", nargs="+", type=int, choices=stages, default=stages)
    parser.add_argument("--moments", nargs="+", choices=MOMENTS, default=list(MOMENTS))
    parser.add_argument("--kinds", nargs="+", choices=[*KINDS, MIXED], default=list(KINDS))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--spares", type=int, default=0, help="as for gptj-dist serve")
    parser.add_argument("--model", default="demo", help="as for gptj-dist serve")
    parser.add_argument("--streams", type=int, default=NUM_STREAMS, help="of a case (default %(default)s)")
    parser.add_argument("--layers", help="of each of the three stages, such as 1,7,1; as for gptj-dist serve")
    return parser


def measured(
    faults: Sequence[Fault],
    kinds: Iterable[str],
    options: Mapping[str, Any],
    model: str = "demo",
    num_streams: int = NUM_STREAMS,
) -> dict[str, Any]:
    """Has every fault disturb the streams of every kind.

    Args:
        options: of gptj-dist serve.
    """
    cases: list[dict[str, Any]] = []
    usual: dict[str, list[Stream]] = {}
    print_row(["", "pause p50 ms", "max ms", "differ", "failed"])
    for batch in _batched([(kind, fault) for kind in kinds for fault in faults], MAX_KILLS):
        with serving(options, model) as server:
            for kind, fault in batch:
                if kind not in usual:
                    usual[kind] = asyncio.run(_undisturbed(server, _streams(kind, num_streams)))
                    _print_case(f"undisturbed, {kind}", [pause_ms(stream) for stream in usual[kind]])
                cases.append(_case(server, kind, fault, [stream.content for stream in usual[kind]]))
    undisturbed_ms = [pause_ms(stream) for streams in usual.values() for stream in streams]
    return {
        "model": model,
        "options": options,
        "num_kills": len(cases),
        "num_streams": len(cases) * num_streams,
        "num_failed": sum(len(case["errors"]) for case in cases),
        "num_different": sum(len(case["different"]) for case in cases),
        "num_missed": sum(case["is_missed"] for case in cases),
        "undisturbed_pause_ms": _summary(undisturbed_ms),
        "pause_ms": {
            moment: {
                str(stage): _summary(
                    [ms for case in cases if case["fault"] == (stage, moment) for ms in case["pauses_ms"]]
                )
                for stage in dict.fromkeys(fault.stage for fault in faults)
            }
            for moment in dict.fromkeys(fault.moment for fault in faults)
        },
        "cases": cases,
    }


def _case(server: Server, kind: str, fault: Fault, expected: Sequence[Content]) -> dict[str, Any]:
    before = server.pipeline()
    case = asyncio.run(_disturbed(server, kind, fault, before.stages[fault.stage].pid, expected))
    server.wait_for_return(before.num_restarts)
    case["recovery_s"] = server.pipeline().losses[-1].back_after_s
    _print_case(
        f"stage {fault.stage}, {fault.moment}, {kind}", case["pauses_ms"], len(case["different"]), *case["errors"]
    )
    return case


def _batched(items: Sequence[T], size: int) -> list[Sequence[T]]:
    return [items[begin : begin + size] for begin in range(0, len(items), size)]


@contextmanager
def serving(options: Mapping[str, Any], model: str = "demo") -> Iterator[Server]:
    """Runs a server until the context ends."""
    family, port = Family(), free_port()
    with tempfile.TemporaryDirectory() as directory:
        template = Path(directory) / "template.jinja"
        template.write_text(TEMPLATE)
        settings = {
            **({} if "layers" in options else {"stages": NUM_STAGES}),
            **{"served_model_name": "demo", "max_batch_size": MAX_BATCH_SIZE, "chat_template": template},
            **options,
        }
        command = serve_command(model, settings, port)
        try:
            with running(command, family.environment, port, "/ready") as (base, _):
                yield Server(base, family)
        finally:
            family.kill()


def _streams(kind: str, num_streams: int) -> list[Stream]:
    kinds, salt = cycle(KINDS if kind == MIXED else [kind]), f"run {next(RUNS)}"
    return [Stream(next(kinds), number, salt=salt) for number in range(num_streams)]


async def _undisturbed(server: Server, streams: list[Stream]) -> list[Stream]:
    await asyncio.gather(*(stream.run(server.base) for stream in streams))
    if errors := _errors(streams):
        sys.exit(f"a stream failed although no stage was killed: {errors[0]}")
    return streams


async def _disturbed(server: Server, kind: str, fault: Fault, pid: int, expected: Sequence[Content]) -> dict[str, Any]:
    streams = _streams(kind, len(expected))
    ended = asyncio.gather(*(stream.run(server.base) for stream in streams))
    is_reached = await _wait_for(fault.moment, server, streams, expected, ended)
    server.kill(pid)
    await ended
    found = {stream.number: differences(stream.content, expected[stream.number]) for stream in streams}
    return {
        "kind": kind,
        "fault": fault,
        "is_missed": not is_reached,
        "pauses_ms": [pause_ms(stream) for stream in streams],
        "errors": _errors(streams),
        "different": {f"{number}, {streams[number].kind}": names for number, names in found.items() if names},
    }


async def _wait_for(
    moment: str, server: Server, streams: Sequence[Stream], expected: Sequence[Content], ended: asyncio.Future[Any]
) -> bool:
    """Waits for the moment. Returns False if the streams ended before it was seen."""
    needs_pipeline = moment in ("queued", "prefill")
    while not ended.done():
        pipeline = await asyncio.to_thread(server.pipeline) if needs_pipeline else None
        told = [num_tokens(stream.content) for stream in streams]
        if _is_now(moment, pipeline, told, [num_tokens(content) for content in expected]):
            return True
        await asyncio.sleep(POLL_S)
    return False


def _is_now(moment: str, pipeline: PipelineDocument | None, told: Sequence[int], all_: Sequence[int]) -> bool:
    match moment:
        case "queued":
            return pipeline is not None and pipeline.num_waiting > 0
        case "prefill":
            return pipeline is not None and pipeline.num_used_blocks > 0 and not any(told)
        case "first":
            return any(told)
        case "middle":
            return max(told) >= MIDDLE_TOKENS
        case "last":
            return any(number >= most - 1 for number, most in zip(told, all_, strict=True))
        case _:
            return True


def pause_ms(stream: Stream) -> float:
    assert stream.record is not None, "the stream has ended"
    times_s = [stream.record.begin_s, *stream.record.frame_s]
    return 1000 * max((later - earlier for earlier, later in pairwise(times_s)), default=0.0)


def _errors(streams: Sequence[Stream]) -> list[str]:
    """The failures of streams: the error of the answer, or of the connection."""
    return [
        f"{stream.kind}: {stream.content.get('error') or stream.record.error}"
        for stream in streams
        if stream.record is not None and stream.record.error
    ]


def _summary(pauses_ms: Sequence[float]) -> dict[str, float]:
    return {"p50": percentile(pauses_ms, 50), "max": max(pauses_ms)} if pauses_ms else {}


def _print_case(name: str, pauses_ms: Sequence[float], num_different: int = 0, *errors: str) -> None:
    print_row([name, *_summary(pauses_ms).values(), num_different, len(errors), *errors[:1]])


if __name__ == "__main__":
    main()
