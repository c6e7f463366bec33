"""Splits the time of one stage's step into packed products, attention, other operators and the stage's own overhead.

    python -m benchmarks.step deep --dtype bfloat16 --cases 1x160/1 8x160/1 32x160/1 1x512/512

A case is `REQUESTSxCONTEXT/ROWS`: REQUESTS requests with CONTEXT tokens each, of which the last ROWS are computed. All
layers are one stage, on all cores, without engine or transport. `overhead` is the share of the step's wall time outside
of operators. Torch's profiler times the operators and adds to the overhead. The last line on standard output is one
JSON document.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable
from typing import Any, cast

from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.cases import Case, parse_case
from benchmarks.figures import machine, print_document, print_row
from gptj_dist.config import DTYPE_BYTES, DTypeName, PipelineConfig
from gptj_dist.model.native.attention import NativeAttention
from gptj_dist.model.native.product import NativeLinear
from gptj_dist.model.regions import TiledAttention
from gptj_dist.planning.cost import Chunks
from gptj_dist.stages.blueprint import draw_blueprint
from gptj_dist.stages.runner import StageRunner
from gptj_dist.stages.stopwatch import StageStopwatch

STEP, ATTENTION, PRODUCTS, OTHERS, OVERHEAD = "step", "attention", "products", "other operators", "overhead"
PRODUCT_PREFIXES = ("mkldnn::_linear", "aten::linear", "aten::addmm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dtype", choices=tuple(DTYPE_BYTES), default="bfloat16")
    parser.add_argument("--threads", type=int, default=0, help="0: one per core")
    parser.add_argument("--cases", nargs="+", type=parse_case, default=[Case(32, 160, 1)])
    args = parser.parse_args()
    _record(StageRunner, "step", STEP)
    for attention in (NativeAttention, TiledAttention):
        _record(attention, "__call__", ATTENTION)
    _record(NativeLinear, "_product", PRODUCTS)
    blueprint = draw_blueprint(PipelineConfig(args.model, stages=1))
    about = machine()
    stopwatch = StageStopwatch(
        blueprint.stage_specs("cpu")[0], cast(DTypeName, args.dtype), args.threads or about["num_cores"]
    )
    print_row(["shares of a step", "step_ms", PRODUCTS, ATTENTION, OTHERS, OVERHEAD])
    figures = {str(case): shares(stopwatch, case) for case in args.cases}
    print_document("step", {"machine": about, "model": args.model, "dtype": args.dtype, "steps": figures})


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
    figures = {"step_ms": total_us / len(steps) / 1000, **figures, OVERHEAD: 1 - sum(us.values()) / total_us}
    print_row([case, *figures.values()])
    return figures


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
