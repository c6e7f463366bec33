"""Closed and open loads on a server, and their figures, named as vLLM's serving benchmark names them."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from benchmarks.cases import Case
from benchmarks.figures import summarise
from benchmarks.sse_client import StreamRecord, completion_body, stream_completion


@dataclass(frozen=True, slots=True)
class Target:
    """A server's URL, and the name of its model."""

    base: str
    model: str


@dataclass(frozen=True, slots=True)
class Measured:
    """The requests of a load.

    Args:
        seconds: from the first request to the last token.
    """

    records: Sequence[StreamRecord]
    seconds: float


async def closed_loop(target: Target, case: Case, num_requests: int, seed: int) -> Measured:
    """Runs `case.batch` clients. Each sends its next request when its last one has ended."""
    bodies = _bodies(target, case, num_requests, seed)
    records: list[StreamRecord] = []

    async def client() -> None:
        for body in bodies:
            records.append(await stream_completion(target.base, body, case.input_len))

    begin = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(case.batch)))
    return Measured(records, time.perf_counter() - begin)


async def open_loop(target: Target, case: Case, num_requests: int, rate: float, seed: int) -> Measured:
    """Sends requests at random times, `rate` per second on average, whether or not others have ended.

    Ignores the batch of the case.
    """
    begin = time.perf_counter()

    async def request(body: bytes, after_s: float) -> StreamRecord:
        await asyncio.sleep(begin + after_s - time.perf_counter())
        return await stream_completion(target.base, body, case.input_len)

    bodies = _bodies(target, case, num_requests, seed)
    arrivals = poisson_arrivals(rate, num_requests, seed)
    records = await asyncio.gather(*(request(body, after_s) for body, after_s in zip(bodies, arrivals, strict=True)))
    return Measured(records, time.perf_counter() - begin)


def poisson_arrivals(rate: float, num_requests: int, seed: int) -> list[float]:
    """The time of each arrival in seconds, beginning with 0."""
    rng = random.Random(seed)
    arrivals, now_s = [], 0.0
    for _ in range(num_requests):
        arrivals.append(now_s)
        now_s += rng.expovariate(rate)
    return arrivals


def serving_figures(measured: Measured, goodput_ms: Mapping[str, float]) -> dict[str, float]:
    """Figures of the completed requests.

    Args:
        goodput_ms: limits of `ttft`, `tpot` or `e2el` in ms; goodput counts requests within all of them.
    """
    done = [record for record in measured.records if record.error is None]
    times = [request_times(record) for record in done]
    num_input = sum(record.num_input_tokens for record in done)
    num_output = sum(record.num_tokens for record in done)
    figures: dict[str, float] = {
        "completed": len(done),
        "failed": len(measured.records) - len(done),
        "duration": measured.seconds,
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(done) / measured.seconds,
        "output_throughput": num_output / measured.seconds,
        "total_token_throughput": (num_input + num_output) / measured.seconds,
    }
    if goodput_ms:
        num_good = sum(all(1000 * time_s[name] <= most for name, most in goodput_ms.items()) for time_s in times)
        figures["request_goodput"] = num_good / measured.seconds
    gaps = [later - earlier for record in done for earlier, later in pairwise(record.frame_s)]
    for name in ("ttft", "tpot", "e2el"):
        figures |= summarise(name, [time_s[name] for time_s in times if name in time_s])
    return figures | summarise("itl", gaps)


def request_times(record: StreamRecord) -> dict[str, float]:
    """Seconds to the first token, per later token, and of the whole request."""
    first_s, last_s = record.frame_s[0], record.frame_s[-1]
    tpot_s = (last_s - first_s) / max(1, record.num_tokens - 1)
    return {"ttft": first_s - record.begin_s, "tpot": tpot_s, "e2el": last_s - record.begin_s}


def failures(measured: Measured) -> dict[str, int]:
    """The number of failed requests by error."""
    return dict(Counter(record.error for record in measured.records if record.error is not None))


def _bodies(target: Target, case: Case, num_requests: int, seed: int) -> Iterator[bytes]:
    """The bodies of all requests, made before the measurement."""
    prompts = Case(num_requests, case.input_len, case.output_len).prompts(seed)
    return iter([completion_body(target.model, prompt, case.output_len) for prompt in prompts])
