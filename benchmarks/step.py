"""Splits the time of one stage's step into packed products, attention, other operators and the stage's own overhead.

    python -m benchmarks.step deep --dtype bfloat16 --cases 1x160/1 8x160/1 32x160/1 1x512/512

    python -m benchmarks.step deep --quantize int8 int4 --rounds 7 --cases 1x160/1 8x160/1 32x160/1 1x512/512

A case is `REQUESTSxCONTEXT/ROWS`: REQUESTS requests with CONTEXT tokens each, of which the last ROWS are computed. All
layers are one stage, on all cores, without engine or transport. `overhead` is the share of the step's wall time outside
of operators. Torch's profiler times the operators and adds to the overhead. With `--quantize` each case is also timed
with weights of few bits, in turn; `speed` is the median ratio to the step with weights of `--dtype` in the same round,
and the other figures are of the fastest round. The last line on standard output is one JSON document.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, cast

from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.cases import Case, parse_case
from benchmarks.figures import machine, print_document, print_row
from gptj_dist.config import DTYPE_BYTES, DTypeName, PipelineConfig
from gptj_dist.model.native.attention import NativeAttention
from gptj_dist.model.native.product import NativeProduct
from gptj_dist.model.regions import TiledAttention
from gptj_dist.planning.cost import Chunks
from gptj_dist.stages.blueprint import draw_blueprint
from gptj_dist.stages.runner import StageRunner
from gptj_dist.stages.stopwatch import StageStopwatch

STEP, ATTENTION, PRODUCTS, OTHERS, OVERHEAD = "step", "attention", "products", "other operators", "overhead"
SPEED = "speed"
PRODUCT_PREFIXES = ("mkldnn::_linear", "aten::linear", "aten::addmm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dtype", choices=tuple(DTYPE_BYTES), default="bfloat16")
    parser.add_argument("--threads", type=int, default=0, help="0: one per core")
    parser.add_argument("--cases", nargs="+", type=parse_case, default=[Case(32, 160, 1)])
    parser.add_argument("--quantize", nargs="+", choices=("int8", "int4"), default=[], help="compared with --dtype")
    parser.add_argument("--rounds", type=int, default=1, help="how often each case is timed with each weights, in turn")
    args = parser.parse_args()
    _record(StageRunner, "step", STEP)
    for attention in (NativeAttention, TiledAttention):
        _record(attention, "__call__", ATTENTION)
    _record(NativeProduct, "_product", PRODUCTS)
    about = machine()
    stopwatches = {
        weights: StageStopwatch(
            draw_blueprint(PipelineConfig(args.model, stages=1, quantize=weights)).stage_specs(["cpu"])[0],
            cast(DTypeName, args.dtype),
            args.threads or about["num_cores"],
        )
        for weights in (None, *args.quantize)
    }
    print_row(["shares of a step", "step_ms", PRODUCTS, ATTENTION, OTHERS, OVERHEAD, SPEED])
    steps: dict[str | None, dict[str, Any]] = {weights: {} for weights in stopwatches}
    for case in args.cases:
        for weights, figures in in_turn(stopwatches, case, args.rounds).items():
            print_row([f"{case} {weights or args.dtype}", *figures.values()])
            steps[weights][str(case)] = figures
    document = {"machine": about, "model": args.model, "dtype": args.dtype, "steps": steps.pop(None)}
    print_document("step", document | {"quantized": steps})


def in_turn(
    stopwatches: Mapping[str | None, StageStopwatch], case: Case, num_rounds: int
) -> dict[str | None, dict[str, float]]:
    """The figures of the fastest round with each weights, and their speed against those that have no name."""
    rounds = [{weights: shares(watch, case) for weights, watch in stopwatches.items()} for _ in range(num_rounds)]
    return {
        weights: min((figures[weights] for figures in rounds), key=lambda figures: figures["step_ms"])
        | {SPEED: statistics.median(figures[None]["step_ms"] / figures[weights]["step_ms"] for figures in rounds)}
        for weights in stopwatches
    }


def shares(stopwatch: StageStopwatch, case: Case) -> dict[str, float]:
    """Milliseconds of one case's step, and each kind of work's share of them."""
    chunks = Chunks(case.batch, case.output_len, case.input_len)
    stopwatch.prepare(chunks)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        stopwatch.time(chunks)
    events: Any = profiler.events()
    steps = [event for event in events if event.name == STEP]
    us: dict[str, float] = defaultdict(float)
    for step in steps:
        for operator in step.cpu_children:
            us[_kind(operator.name)] += operator.time_range.elapsed_us()
    total_us = sum(step.time_range.elapsed_us() for step in steps)
    figures = {kind: us[kind] / total_us for kind in (PRODUCTS, ATTENTION, OTHERS)}
    return {"step_ms": total_us / len(steps) / 1000, **figures, OVERHEAD: 1 - sum(us.values()) / total_us}


def _kind(name: str) -> str:
    if name in (ATTENTION, PRODUCTS):
        return name
    return PRODUCTS if name.startswith(PRODUCT_PREFIXES) else OTHERS


def _record(owner: type, method: str, label: str) -> None:
    """Makes the profiler record a method that is not an operator of torch."""
    inner: Callable[..., object] = getattr(owner, method)

    def recorded(*arguments: object, **options: object) -> object:
        with record_function(label):
            return inner(*arguments, **options)

    setattr(owner, method, recorded)


if __name__ == "__main__":
    main()
