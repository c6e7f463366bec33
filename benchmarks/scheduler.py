"""Measures the scheduler alone: plans per second, without a model, a transport or an event loop.

    python -m benchmarks.scheduler                                              20,000 requests, 64 of them running
    python -m benchmarks.scheduler --requests 20000 --running 64 --stages 4     plans of a pipeline of four stages
    python -m benchmarks.scheduler --drafts 16                                  it looks for drafts, and finds none

All requests are added at the start. `plans_per_s` counts the time in `Scheduler.schedule` and `Scheduler.update` only;
adding the requests is a separate figure. Results return at once, first in, first out. Prompts and outputs have random
lengths, so that requests end one by one. All tokens are the same, or with `--drafts` random. The last line on standard
output is one JSON document.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.figures import machine, percentile, print_document
from gptj_dist.config import BLOCK_SIZE_TOKENS
from gptj_dist.engine.plan import Plan, Result
from gptj_dist.engine.request import Prompt, Request
from gptj_dist.engine.scheduler import Scheduler
from gptj_dist.engine.scheduling import SchedulerConfig
from gptj_dist.params import SamplingParams

TOKEN_ID = 1
VOCAB_SIZE = 50_000
PROMPT_TOKENS = (8, 24)
OUTPUT_TOKENS = (16, 48)
SEED = 0


@dataclass(slots=True)
class Timings:
    """Measurements of a run.

    Args:
        add_s: time to add all requests.
        seconds: of each step: one plan made and one result taken.
        requests_per_plan: number of requests of each plan.
    """

    add_s: float = 0.0
    seconds: list[float] = field(default_factory=list)
    requests_per_plan: list[int] = field(default_factory=list)


def main() -> None:
    args = _parser().parse_args()
    requests = make_requests(args.requests, has_random_tokens=args.drafts > 0)
    blocks_per_request = -(-(PROMPT_TOKENS[1] + OUTPUT_TOKENS[1]) // BLOCK_SIZE_TOKENS)
    config = SchedulerConfig(
        num_stages=args.stages,
        num_blocks=args.running * blocks_per_request,
        block_size=BLOCK_SIZE_TOKENS,
        max_batch_size=args.running,
        eos_token_ids=(0,),
        max_drafts=args.drafts,
    )
    settings = {"requests": args.requests, "running": args.running, "stages": args.stages, "drafts": args.drafts}
    timings = run(Scheduler(config), requests, args.drafts > 0)
    print_document("scheduler", {"machine": machine(), **settings, **figures(timings)})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--running", type=int, default=64, help="the most that run at once")
    parser.add_argument("--stages", type=int, default=1)
    parser.add_argument("--drafts", type=int, default=0, help="the most of a request in a plan")
    return parser


def make_requests(num_requests: int, has_random_tokens: bool = False) -> list[Request]:
    """Requests of random lengths, the same in each run."""
    rng = random.Random(SEED)
    tokens = random.Random(SEED)

    def prompt(length: int) -> Prompt:
        return Prompt(tuple(tokens.randrange(VOCAB_SIZE) if has_random_tokens else TOKEN_ID for _ in range(length)))

    return [
        Request(
            request_id,
            prompt(rng.randint(*PROMPT_TOKENS)),
            SamplingParams(max_tokens=rng.randint(*OUTPUT_TOKENS), temperature=0, ignore_eos=True),
            noise_key=request_id,
        )
        for request_id in range(num_requests)
    ]


def run(scheduler: Scheduler, requests: Sequence[Request], has_random_tokens: bool = False) -> Timings:
    """Schedules until all requests have ended."""
    timings = Timings()
    rng = random.Random(SEED) if has_random_tokens else None
    begin = time.perf_counter()
    for request in requests:
        scheduler.add(request)
    timings.add_s = time.perf_counter() - begin
    in_flight: deque[Plan] = deque()
    while scheduler.has_requests:
        begin = time.perf_counter()
        plan = scheduler.schedule()
        seconds = time.perf_counter() - begin
        if plan is not None:
            in_flight.append(plan)
            timings.requests_per_plan.append(len(plan.chunks))
            timings.seconds.append(seconds)
            continue
        result = _compute(in_flight.popleft(), rng)
        begin = time.perf_counter()
        scheduler.update(result)
        timings.seconds[-1] += time.perf_counter() - begin + seconds
    return timings


def figures(timings: Timings) -> dict[str, Any]:
    """Rates, and percentiles of the steps' times."""
    num_plans = len(timings.requests_per_plan)
    return {
        "num_plans": num_plans,
        "requests_per_plan": sum(timings.requests_per_plan) / num_plans,
        "plans_per_s": num_plans / sum(timings.seconds),
        "median_step_us": 1e6 * percentile(timings.seconds, 50),
        "p99_step_us": 1e6 * percentile(timings.seconds, 99),
        "add_s": timings.add_s,
    }


def _compute(plan: Plan, rng: random.Random | None) -> Result:
    sampled = [chunk for chunk in plan.chunks if chunk.samples]
    token_ids = tuple(TOKEN_ID if rng is None else rng.randrange(1, VOCAB_SIZE) for _ in sampled)
    return Result(plan.plan_id, token_ids, num_accepted=(0,) * sum(bool(chunk.num_drafts) for chunk in sampled))


if __name__ == "__main__":
    main()
