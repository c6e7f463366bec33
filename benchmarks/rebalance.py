"""Holds one of two stages to half of its speed, and moves layers while streams run.

    python -m benchmarks.rebalance
    gptj-dist synth deep deep
    python -m benchmarks.rebalance --model deep --dtype bfloat16 --share 0.5 --streams 32

Starts the stages as actors, with the engine in this process: what a server's coordinator does, without HTTP. One stage
gets a share of a core (`benchmarks/throttle.py`).

1. `rebalance`: the pipeline begins with the even cut, streams run, and `--rebalance`'s loop moves layers until it has
   been content for a while.
2. `rounds`: tokens a second of all streams with the even cut, the planner's cut for a device of that share of the
   speed, and the cut of step 1, in turn. Layers move from one to the next while streams run.
3. `moves`: pauses of all moved layers, by their stages' clocks, and the longest gap between two tokens of a stream with
   moves and without.
4. `streams_that_differ`: streams whose tokens are not those of a run without moves. In float32 there may be none.

The last line on standard output is one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count, pairwise
from statistics import median
from typing import Any

from benchmarks.figures import machine, percentile, print_document, print_row, rounded
from benchmarks.throttle import throttled
from benchmarks.workers.actors import start_actors
from gptj_dist.config import ModelConfig, PipelineConfig
from gptj_dist.engine.async_engine import AsyncEngine
from gptj_dist.params import SamplingParams
from gptj_dist.planning.partition import lm_head_cost_layers
from gptj_dist.planning.search import share_layers
from gptj_dist.serving.layer_moves import LayerMoves
from gptj_dist.stages.group import StageGroup
from gptj_dist.stages.relocation import MovedLayer

POLL_S = 0.1
CONTENT_S = 60.0
"""The balance is reached when no layer has moved for so long: more than the looks that its third cut takes."""

BALANCE_TIMEOUT_S = 240.0


@dataclass
class Streams:
    """Streams that run one after another on a number of lanes.

    Attributes:
        times_s: arrivals of each stream's tokens, by the stream's number.
    """

    engine: AsyncEngine
    num_lanes: int
    num_tokens: int
    vocab_size: int
    times_s: dict[int, list[float]] = field(default_factory=dict)

    async def one(self, number: int, num_tokens: int | None = None) -> tuple[int, ...]:
        """The tokens of the stream with that number, which are the same in every run.

        Args:
            num_tokens: fewer than the other streams have.
        """
        prompt = [(7 * number + 3 * position + 1) % self.vocab_size for position in range(64)]
        params = SamplingParams(num_tokens or self.num_tokens, seed=number, ignore_eos=True)
        times = self.times_s[number] = []
        tokens: list[int] = []
        async for delta in self.engine.generate(prompt, params):
            times.append(time.perf_counter())
            tokens += delta.token_ids
        return tuple(tokens)

    async def all_lanes(self) -> list[tuple[int, ...]]:
        """The tokens of one stream on each lane."""
        return list(await asyncio.gather(*map(self.one, range(self.num_lanes))))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Keeps all lanes busy until the context ends.

        The first streams end one after another, so that prompts come at all times, and each measurement has its share.
        """
        numbers = count(self.num_lanes)

        async def lane(number: int) -> None:
            await self.one(next(numbers), max(1, self.num_tokens * (number + 1) // self.num_lanes))
            while True:
                await self.one(next(numbers))

        lanes = [asyncio.create_task(lane(number)) for number in range(self.num_lanes)]
        try:
            yield
        finally:
            for task in lanes:
                task.cancel()

    async def rate(self, seconds: float) -> float:
        """Tokens a second, from now on."""
        begin_s = time.perf_counter()
        await asyncio.sleep(seconds)
        end_s = time.perf_counter()
        return sum(begin_s < at < end_s for times in self.times_s.values() for at in times) / (end_s - begin_s)

    def gaps_ms(self, begin_s: float, end_s: float) -> list[float]:
        """Times between two tokens of a stream, of which the second came in that time."""
        pairs = (pair for times in self.times_s.values() for pair in pairwise(times))
        return [1e3 * (after - before) for before, after in pairs if begin_s < after < end_s]


def planned_cut(model: ModelConfig, speeds: Sequence[float]) -> tuple[int, ...]:
    """The planner's cut for devices whose speeds have these ratios."""
    heads = [0.0] * (len(speeds) - 1) + [lm_head_cost_layers(model)]
    counts = range(1, model.num_layers + 1)
    return share_layers(
        model.num_layers,
        [[(layers + head) / speed for layers in counts] for head, speed in zip(heads, speeds, strict=True)],
    )


async def balanced(moves: LayerMoves, group: StageGroup, content_s: float) -> dict[str, Any]:
    """Lets the balance find a cut; says which, and when its last layer had moved."""
    task, began_s = asyncio.create_task(moves.keep_balance()), time.perf_counter()
    cut, changed_s = layers_of(group), began_s
    while time.perf_counter() < min(changed_s + content_s, began_s + BALANCE_TIMEOUT_S):
        await asyncio.sleep(POLL_S)
        if (now := layers_of(group)) != cut:
            cut, changed_s = now, time.perf_counter()
            print_row((f"{changed_s - began_s:.1f} s", "balance", ",".join(map(str, cut))))
    task.cancel()
    return {"cut": cut, "seconds": changed_s - began_s, "moved_layers": sum(moves.totals.num_moved.values())}


def layers_of(group: StageGroup) -> tuple[int, ...]:
    return tuple(each.num_layers for each in group.loaded.blueprint.layers)


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    config = PipelineConfig(
        args.model,
        layers=args.layers,
        stages=None if args.layers else 2,
        dtype=args.dtype,
        speculation=False,
        prefix_cache=False,
        threads_per_stage=1,
        max_batch_size=max(args.streams, 1),
        device="cpu",
    )
    async with start_actors(config) as (group, pipeline):
        engine = AsyncEngine(pipeline.make_scheduler(), group, pipeline.limits())
        driver = asyncio.create_task(engine.run())
        model = pipeline.blueprint.model
        half = model.num_layers // 2
        even = args.layers or (model.num_layers - half, half)
        moves = LayerMoves("benchmark", group, engine.stats)
        await moves.recut(even)
        streams = Streams(engine, args.streams, args.tokens, model.vocab_size)
        with throttled(pipeline.reports[0].pid, args.share) as means:
            expected = await streams.all_lanes()
            with streams.running():
                found = await balanced(moves, group, args.content)
                cuts = {"even": even, "planned": planned_cut(model, (args.share, 1.0)), "rebalance": found["cut"]}
                rates, moved, gaps = await rounds(args, streams, moves, cuts)
            differing = await differences(streams, moves, cuts, expected)
        driver.cancel()
    pauses_ms = [1e3 * each.pause_s for each in moved]
    medians = {name: median(of_cut) for name, of_cut in rates.items()}
    return {
        "throttled_by": means,
        "rebalance": found,
        "cuts": cuts,
        "tokens_per_s": medians,
        "rounds": rates,
        "planned_over_even": medians["planned"] / medians["even"],
        "rebalance_over_planned": medians["rebalance"] / medians["planned"],
        "moves": {
            "num_layers": len(moved),
            "median_pause_ms": median(pauses_ms),
            "longest_pause_ms": max(pauses_ms),
            "median_seconds_each": median(each.took_s for each in moved),
            "median_bytes_ahead": median(each.num_bytes_ahead for each in moved),
            "median_bytes_rest": median(each.num_bytes_rest for each in moved),
        },
        "token_gaps_ms": gaps,
        "streams_that_differ": differing,
    }


async def rounds(
    args: argparse.Namespace, streams: Streams, moves: LayerMoves, cuts: dict[str, tuple[int, ...]]
) -> tuple[dict[str, list[float]], list[MovedLayer], dict[str, float]]:
    """Tokens a second with each cut, in turn; what moved between; and gaps between tokens with moves and without."""
    rates: dict[str, list[float]] = {name: [] for name in cuts}
    moved: list[MovedLayer] = []
    calm: list[float] = []
    moving: list[float] = []
    for number in range(args.rounds):
        for name, layers in cuts.items():
            begin_s = time.perf_counter()
            moved += (await moves.recut(layers)).moved
            moved_s = time.perf_counter()
            await asyncio.sleep(args.settle)
            rates[name].append(await streams.rate(args.seconds))
            moving += streams.gaps_ms(begin_s, moved_s + args.settle)
            calm += streams.gaps_ms(moved_s + args.settle, time.perf_counter())
            print_row((number, name, ",".join(map(str, layers)), f"{rates[name][-1]:.1f} tokens/s"))
    gaps = {"median": median(calm), "p99": percentile(calm, 99), "longest": max(calm)}
    return rates, moved, {**gaps, "p99_with_moves": percentile(moving, 99), "longest_with_moves": max(moving)}


async def differences(
    streams: Streams, moves: LayerMoves, cuts: dict[str, tuple[int, ...]], expected: list[tuple[int, ...]]
) -> int:
    """How many streams have other tokens than expected if layers move to and fro while they run."""
    telling = asyncio.ensure_future(streams.all_lanes())
    while not telling.done():
        for layers in (cuts["even"], cuts["planned"]):
            await moves.recut(layers)
    return sum(one != other for one, other in zip(telling.result(), expected, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--layers", type=lambda text: tuple(map(int, text.split(","))), help="the first cut")
    parser.add_argument("--share", type=float, default=0.5, help="of a core, for stage 0")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=200, help="of each stream")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--settle", type=float, default=1.0, help="seconds between moves and measurement")
    parser.add_argument("--content", type=float, default=CONTENT_S, help="seconds without moves after which to go on")
    args = parser.parse_args()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    figures = rounded(asyncio.run(measure(args)))
    print_document("rebalance", {"arguments": vars(args), **machine(), **figures})


if __name__ == "__main__":
    main()
