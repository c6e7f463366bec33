"""Simulates the autoscaling of pipelines: our policy against Ray Serve's default one, at the same cost.

    python -m benchmarks.scaling                             half an hour of each kind of arrivals
    python -m benchmarks.scaling --hours 3 --seeds 1 2 3     longer, and others
    python -m benchmarks.scaling --start-s 2 8 30            pipelines that start sooner and later

Both policies are the real ones, with Serve's own code around them (bounds, factors, delays), and are asked ten times a
second. Pipelines are simulated: a step takes 20 ms and 1 ms for each row, has 64 rows at most, and 32 requests compute
at once. A pipeline computes 8 s (`--start-s`) after it was asked for. A request goes to the pipeline with the fewest.
Nothing is known beforehand: requests allow 512 tokens and end earlier.

`steady`: arrivals at random, at one rate. `burst`: in every five minutes one at eight times the rate. `daily`: a rate
that goes up and down by a factor of ten in 20 minutes. `good` is the share of requests that have their first token
within 2 s and the others within 100 ms each on average, `hours` the pipelines' hours, `p99` seconds until the first
token, for all requests but one in a hundred. Serve's policy is taken twice, with its own delays (30 s up, 600 s down),
and with 1 s for both. Each time the number of requests for each pipeline is the largest at which it is at least as dear
as ours. Of several seeds the medians are shown, with the least and largest `good`. The last line on standard output is
one JSON document.
"""

from __future__ import annotations

import argparse
import bisect
import math
import random
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from statistics import median_low
from typing import Any
from unittest import mock

from ray.serve import autoscaling_policy
from ray.serve._private.common import TimeStampedValue
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from benchmarks.figures import machine, print_document
from gptj_dist.chunking import StepCost
from gptj_dist.engine.load import Arrivals, Load, RequestCost
from gptj_dist.serving.scaling import NEEDED, SETTINGS, Scale

OVERHEAD_S, ROW_S, MAX_ROWS, MAX_BATCH = 0.020, 0.001, 64, 32
MAX_TOKENS = 512
START_S = 8.0
MOST_PIPELINES = 16
MOST_REQUESTS = 512
TICK_S, PUSH_S, LOOK_BACK_S = 0.1, 1.0, 30.0
FIRST_TOKEN_GOAL_S, TOKEN_GOAL_S = 2.0, 0.1

OURS = {name: SETTINGS[name] for name in ("upscale_delay_s", "downscale_delay_s")}
QUICK = {"upscale_delay_s": 1.0, "downscale_delay_s": 1.0}
DEFAULT = autoscaling_policy.replica_queue_length_autoscaling_policy

Policy = Callable[[AutoscalingContext], tuple[int, dict[str, Any]]]


@dataclass(slots=True)
class Work:
    """A request: what is left of it, and when it came and had its first token."""

    came_s: float
    prompt_left: int
    tokens_left: int
    num_tokens: int
    first_s: float = 0.0
    is_good: bool = False


@dataclass(slots=True)
class Pipeline:
    """Computes in steps. `now_s` is the end of its last one."""

    ready_s: float
    now_s: float
    running: list[Work] = field(default_factory=list)
    waiting: deque[Work] = field(default_factory=deque)
    is_going: bool = False
    arrivals: Arrivals = field(init=False)
    num_ended: int = 0
    num_tokens: int = 0

    def __post_init__(self) -> None:
        self.arrivals = Arrivals(self.ready_s)

    @property
    def num_requests(self) -> int:
        return len(self.running) + len(self.waiting)

    def take(self, work: Work) -> None:
        """A request comes."""
        self.waiting.append(work)
        self.arrivals.note(work.came_s, work.prompt_left, MAX_TOKENS)

    def load(self, now_s: float) -> Load:
        """As a real pipeline estimates it."""
        early_share = self.num_ended / self.num_tokens if self.num_tokens else 0.0
        cost = RequestCost.of(StepCost(OVERHEAD_S, ROW_S), 1, MAX_BATCH, early_share)
        return Load(
            running=len(self.running) / MAX_BATCH,
            wanted=self.num_requests / MAX_BATCH,
            arriving=self.arrivals.share(cost, now_s),
            backlog_s=sum(cost.seconds(work.prompt_left, MAX_TOKENS) for work in self.waiting),
            is_in_use=self.num_requests > 0 or self.arrivals.has_any(now_s),
        )

    def run_until(self, until_s: float) -> None:
        """Computes steps up to a time."""
        while self.now_s < until_s:
            while self.waiting and len(self.running) < MAX_BATCH:
                self.running.append(self.waiting.popleft())
            if not self.running:
                self.now_s = until_s
                return
            self._step()

    def _step(self) -> None:
        rows = sum(1 for work in self.running if not work.prompt_left)
        decoding = [work for work in self.running if not work.prompt_left]
        for work in self.running:
            chunk = min(work.prompt_left, MAX_ROWS - rows)
            work.prompt_left -= chunk
            rows += chunk
            if chunk and not work.prompt_left:
                decoding.append(work)
        self.now_s += OVERHEAD_S + ROW_S * rows
        for work in decoding:
            work.first_s = work.first_s or self.now_s
            work.tokens_left -= 1
            self.num_tokens += 1
            self.num_ended += not work.tokens_left
            if not work.tokens_left:
                token_s = (self.now_s - work.first_s) / max(1, work.num_tokens - 1)
                work.is_good = work.first_s - work.came_s <= FIRST_TOKEN_GOAL_S and token_s <= TOKEN_GOAL_S
        self.running = [work for work in self.running if work.tokens_left]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of a simulation. `most` pipelines ran at once; `target` is the number of requests for each in Serve's policy."""

    good: float
    hours: float
    most: int
    p99_s: float
    target: int | None = None


@dataclass(slots=True)
class Serve:
    """The part of Serve's controller that scales, on a simulated clock."""

    policy: Policy
    config: AutoscalingConfig
    target: int = 1
    state: dict[str, Any] = field(default_factory=dict)
    counts: deque[int] = field(default_factory=lambda: deque(maxlen=round(LOOK_BACK_S / TICK_S)))
    published: list[float] = field(default_factory=list)
    published_s: float = -math.inf
    wrapped: Policy = field(init=False)

    def __post_init__(self) -> None:
        self.wrapped = autoscaling_policy._apply_autoscaling_config(self.policy)

    def decide(self, pipelines: list[Pipeline], now_s: float) -> int:
        """The number of pipelines that there should be."""
        staying = [pipeline for pipeline in pipelines if not pipeline.is_going]
        self.counts.append(sum(pipeline.num_requests for pipeline in pipelines))
        if now_s - self.published_s >= PUSH_S:
            started = [pipeline for pipeline in staying if pipeline.ready_s <= now_s]
            self.published, self.published_s = [pipeline.load(now_s).pipelines for pipeline in started], now_s
        context = AutoscalingContext(
            deployment_id=None,
            deployment_name="Pipeline",
            app_name="gptj",
            current_num_replicas=len(staying),
            target_num_replicas=self.target,
            running_replicas=[],
            total_num_requests=sum(self.counts) / len(self.counts),
            total_queued_requests=None,
            aggregated_metrics=None,
            raw_metrics={NEEDED: {i: [TimeStampedValue(now_s, number)] for i, number in enumerate(self.published)}},
            capacity_adjusted_min_replicas=1,
            capacity_adjusted_max_replicas=MOST_PIPELINES,
            policy_state=self.state,
            last_scale_up_time=None,
            last_scale_down_time=None,
            current_time=now_s,
            config=self.config,
        )

        def clock() -> float:  # a mock that returned it would take most of a simulation's time to make
            return now_s

        with mock.patch.object(autoscaling_policy.time, "time", clock):
            number, self.state = self.wrapped(context)
        self.target = max(1, min(MOST_PIPELINES, number))
        return self.target


def simulate(serve: Serve, requests: list[Work], until_s: float, start_s: float = START_S) -> Outcome:
    """Runs the requests, which are ordered by the time at which they come."""
    pipelines = [Pipeline(0.0, 0.0)]
    arrivals = deque(requests)
    seconds, most = 0.0, 1
    now_s = 0.0
    while now_s < until_s or any(pipeline.num_requests for pipeline in pipelines):
        now_s += TICK_S
        ready = [pipeline for pipeline in pipelines if not pipeline.is_going and pipeline.ready_s <= now_s]
        while arrivals and arrivals[0].came_s <= now_s:
            min(ready, key=lambda pipeline: pipeline.num_requests).take(arrivals.popleft())
        for pipeline in pipelines:
            pipeline.run_until(now_s)
        pipelines = [pipeline for pipeline in pipelines if pipeline.num_requests or not pipeline.is_going]
        staying = [pipeline for pipeline in pipelines if not pipeline.is_going]
        difference = serve.decide(pipelines, now_s) - len(staying)
        pipelines += [Pipeline(now_s + start_s, now_s + start_s) for _ in range(difference)]
        for pipeline in sorted(staying, key=lambda pipeline: pipeline.ready_s <= now_s)[: max(0, -difference)]:
            pipeline.is_going = True
        seconds, most = seconds + len(pipelines) * TICK_S, max(most, len(pipelines))
    waits_s = sorted(work.first_s - work.came_s for work in requests)
    good = sum(work.is_good for work in requests) / len(requests)
    return Outcome(good, seconds / 3600, most, waits_s[int(0.99 * len(waits_s))])


def arrivals(rate_at: Callable[[float], float], highest: float, until_s: float, seed: int) -> list[Work]:
    """Requests that come at random, by thinning a Poisson process of the highest rate.

    Args:
        rate_at: requests per second at a time, in seconds since the start. At most `highest`.
    """
    rng = random.Random(seed)
    requests, now_s = [], 0.0
    while (now_s := now_s + rng.expovariate(highest)) < until_s:
        if rng.random() * highest < rate_at(now_s):
            prompt, tokens = (max(1, round(rng.lognormvariate(mean, 0.8))) for mean in (4.6, 4.2))
            requests.append(Work(now_s, min(prompt, 1024), min(tokens, MAX_TOKENS), min(tokens, MAX_TOKENS)))
    return requests


KINDS: dict[str, tuple[Callable[[float], float], float]] = {
    "steady": (lambda _: 8.0, 8.0),
    "burst": (lambda now_s: 16.0 if now_s % 300 >= 240 else 2.0, 16.0),
    "daily": (lambda now_s: 10 ** (0.5 - 0.5 * math.cos(2 * math.pi * now_s / 1200)), 10.0),
}
"""Rates at a time, and the highest one, in requests a second."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=0.5, help="simulated time for each kind")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--start-s", type=float, nargs="+", default=[START_S], help="from a decision to a token")
    options = parser.parse_args()
    document: list[dict[str, Any]] = []
    for kind, start_s in product(options.kinds, options.start_s):
        runs = [compare(kind, start_s, 3600 * options.hours, seed) for seed in options.seeds]
        for name in runs[0]:
            row = _median([run[name] for run in runs])
            goods = sorted(run[name].good for run in runs)
            target = "" if row.target is None else f"  {row.target} requests each"
            print(
                f"{kind:8}start {start_s:4g} s  {name:20}good {row.good:6.1%} ({goods[0]:.1%} to {goods[-1]:.1%})  "
                f"hours {row.hours:5.2f}  p99 {row.p99_s:5.1f} s  most {row.most}{target}",
                flush=True,
            )
            document.append({"kind": kind, "start_s": start_s, "policy": name, "range": [goods[0], goods[-1]]})
            document[-1] |= asdict(row)
    print_document("scaling", {"machine": machine(), "hours": options.hours, "seeds": options.seeds, "rows": document})


def compare(kind: str, start_s: float, until_s: float, seed: int) -> dict[str, Outcome]:
    """Our policy, Serve's, and Serve's with short delays, each with the same requests."""
    rate_at, highest = KINDS[kind]
    requests = partial(arrivals, rate_at, highest, until_s, seed)

    def run(policy: Policy, delays: Mapping[str, float], target: int = 1) -> Outcome:
        return simulate(Serve(policy, _config(delays, target)), requests(), until_s, start_s)

    ours = run(Scale(), OURS)
    return {
        "ours": ours,
        "serve": _as_dear(ours, partial(run, DEFAULT, {})),
        "serve, short delays": _as_dear(ours, partial(run, DEFAULT, QUICK)),
    }


def _median(outcomes: list[Outcome]) -> Outcome:
    """Of each figure."""
    columns: dict[str, list[Any]] = {name: [asdict(one)[name] for one in outcomes] for name in asdict(outcomes[0])}
    medians: dict[str, Any] = {name: None if None in of else median_low(of) for name, of in columns.items()}
    return Outcome(**medians)


def _config(delays: Mapping[str, float], target: int = 1) -> AutoscalingConfig:
    return AutoscalingConfig(
        min_replicas=1, max_replicas=MOST_PIPELINES, target_ongoing_requests=target, **dict(delays)
    )


def _as_dear(ours: Outcome, run: Callable[[int], Outcome]) -> Outcome:
    """Of Serve's policy with the most requests for each pipeline with which it costs at least as much as ours."""
    outcomes: dict[int, Outcome] = {}

    def is_cheaper(target: int) -> bool:
        outcomes[target] = replace(run(target), target=target)
        return outcomes[target].hours < ours.hours

    bisect.bisect_left(range(1, MOST_REQUESTS), True, key=is_cheaper)
    dear = [target for target, outcome in outcomes.items() if outcome.hours >= ours.hours]
    return outcomes[max(dear, default=1)]


if __name__ == "__main__":
    main()
