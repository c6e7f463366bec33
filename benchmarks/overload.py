"""Measures what a server still does when more is asked of it than it can do.

    python -m benchmarks.overload                       `gptj-dist serve demo --stages 1`: its capacity; then 1, 2, 5 x
    python -m benchmarks.overload --model deep --seconds 120 --target-s 60 --serve-args "--stages 2"

Capacity is what `--clients` clients get, each of which sends its next request when its last one has ended. Then
requests come at random times (a Poisson process), at `--factors` times the rate at which those ended, whether or not
others have ended. Prompts and outputs have several lengths. Goodput is the output tokens per second of requests that
were answered in full within `--target-s` seconds of being sent. A request counts when it ends, but not in the first
`--ramp-s` seconds of a load, nor after the last one was sent. Refused requests (429) and failed ones are counted apart;
`refusal_s` is the 99th percentile of the time to a refusal. How long requests wait, and so which target can be met,
follows from `--max-queued-requests`. The client runs on the same machine. The last line on standard output is one JSON
document.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, TypeAlias

from benchmarks.cases import Case
from benchmarks.figures import machine, percentile, print_document, print_row
from benchmarks.load import Target
from benchmarks.servers import started
from benchmarks.sse_client import StreamRecord, completion_body, stream_completion

LENGTHS = ((16, 32), (64, 64), (192, 32), (32, 128))
"""Tokens of prompt and output; each as often as the others."""

COLUMNS = ("goodput", "of_peak", "throughput", "whole", "late", "refused", "failed", "median_s", "p99_s", "refusal_s")
REFUSED = "429"
NUM_WARM_UP = 8

Request: TypeAlias = tuple[bytes, int, int]
"""The body of a request, and its tokens in and out."""


@dataclass(frozen=True, slots=True)
class Sent:
    """A request, and the time at which it ended.

    Args:
        num_wanted: output tokens that it asked for.
    """

    record: StreamRecord
    num_wanted: int
    end_s: float

    @property
    def is_whole(self) -> bool:
        return self.record.error is None and self.record.num_tokens == self.num_wanted

    @property
    def is_refused(self) -> bool:
        return self.record.error is not None and REFUSED in self.record.error.partition(":")[2].split()

    @property
    def took_s(self) -> float:
        return self.end_s - self.record.begin_s


def main() -> None:
    args = _parser().parse_args()
    document: dict[str, Any] = {"machine": machine(), "model": args.model, "serve_args": args.serve_args}
    document |= {"seconds": args.seconds, "target_s": args.target_s, "lengths": LENGTHS}
    with started(args.model, args.serve_args.split()) as (base, _):
        target = Target(base, args.model)
        asyncio.run(_closed(target, NUM_WARM_UP, 0.0, seed=0))
        print_row(["", *COLUMNS])
        begin_s = time.perf_counter()
        sent = asyncio.run(_closed(target, args.clients, args.seconds, args.seed))
        capacity = load_figures(sent, begin_s + args.ramp_s, begin_s + args.seconds, args.target_s)
        loads = [_report("capacity", capacity, capacity["goodput"])]
        rate = capacity["whole"] / (args.seconds - args.ramp_s)
        for factor in args.factors:
            requests = made_before(target, factor * rate, args.seconds, args.seed + 1)
            begin_s = time.perf_counter()
            sent = asyncio.run(offered(target, factor * rate, args.seconds, args.seed, requests))
            figures = load_figures(sent, begin_s + args.ramp_s, begin_s + args.seconds, args.target_s)
            loads.append(_report(f"{factor:g} x {rate:.3g} requests/s", figures, capacity["goodput"]))
    print_document("overload", document | {"requests_per_s": rate, "loads": loads})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--serve-args", default="--stages 1 --max-queued-requests 64", help="of gptj-dist serve")
    parser.add_argument("--clients", type=int, default=96, help="that measure the capacity")
    parser.add_argument("--factors", type=float, nargs="+", default=[1, 2, 5])
    parser.add_argument("--seconds", type=float, default=40, help="of each load")
    parser.add_argument("--ramp-s", type=float, default=10, help="first seconds of each load, which do not count")
    parser.add_argument("--target-s", type=float, default=15, help="in which a request is to be answered")
    parser.add_argument("--seed", type=int, default=1, help="of prompts, lengths and arrivals")
    return parser


def load_figures(sent: Sequence[Sent], begin_s: float, end_s: float, target_s: float) -> dict[str, Any]:
    """Figures of the requests that ended between two times."""
    ended = [one for one in sent if begin_s <= one.end_s < end_s]
    whole = [one for one in ended if one.is_whole]
    good = [one for one in whole if one.took_s <= target_s]
    refused = [one for one in ended if one.is_refused]
    failed = [one for one in ended if not one.is_whole and not one.is_refused]
    took_s = [one.took_s for one in whole]
    return {
        "goodput": sum(one.num_wanted for one in good) / (end_s - begin_s),
        "throughput": sum(one.num_wanted for one in whole) / (end_s - begin_s),
        "whole": len(whole),
        "late": len(whole) - len(good),
        "refused": len(refused),
        "failed": len(failed),
        "errors": dict(Counter(one.record.error or "too few tokens" for one in failed)),
        "median_s": statistics.median(took_s) if took_s else 0.0,
        "p99_s": percentile(took_s, 99) if took_s else 0.0,
        "refusal_s": percentile([one.took_s for one in refused], 99) if refused else 0.0,
    }


def _report(name: str, figures: dict[str, Any], peak: float) -> dict[str, Any]:
    figures = {"load": name, **figures, "of_peak": figures["goodput"] / peak if peak else 0.0}
    print_row([name, *(figures[column] for column in COLUMNS)])
    return figures


async def _closed(target: Target, num_clients: int, seconds: float, seed: int) -> list[Sent]:
    """Each client sends requests, one after the other, until the time is over: at least one."""
    bodies, sent = _bodies(target.model, seed), []
    stop_s = time.perf_counter() + seconds

    async def client() -> None:
        while True:
            sent.append(await _send(target, *next(bodies)))
            if time.perf_counter() >= stop_s:
                return

    await asyncio.gather(*(client() for _ in range(num_clients)))
    return sent


def made_before(target: Target, rate: float, seconds: float, seed: int) -> Iterator[Request]:
    """The requests of a load. They are made before it begins, as making them costs CPU time."""
    bodies = _bodies(target.model, seed)
    return chain(list(islice(bodies, math.ceil(1.2 * rate * seconds))), bodies)


async def offered(target: Target, rate: float, seconds: float, seed: int, requests: Iterator[Request]) -> list[Sent]:
    """Requests at random times, and then until all have ended."""
    rng = random.Random(seed)
    sending: list[asyncio.Task[Sent]] = []
    at_s, stop_s = time.perf_counter(), time.perf_counter() + seconds
    while at_s < stop_s:
        await asyncio.sleep(at_s - time.perf_counter())
        sending.append(asyncio.create_task(_send(target, *next(requests))))
        at_s += rng.expovariate(rate)
    return await asyncio.gather(*sending)


async def _send(target: Target, body: bytes, num_input: int, num_wanted: int) -> Sent:
    record = await stream_completion(target.base, body, num_input)
    return Sent(record, num_wanted, time.perf_counter())


def _bodies(model: str, seed: int) -> Iterator[Request]:
    """Without end."""
    rng = random.Random(seed)
    while True:
        num_input, num_output = rng.choice(LENGTHS)
        [prompt] = Case(1, num_input, num_output).prompts(rng.getrandbits(32))
        yield completion_body(model, prompt, num_output), num_input, num_output


if __name__ == "__main__":
    main()
