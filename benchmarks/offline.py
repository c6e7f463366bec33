"""Measures prefill and decode of our engine without HTTP, by batch, stages and dtype, and against the products alone.

    python -m benchmarks.offline deep --stages 1 2 --cases {1,8,32}x128/64 1x1024/1
    python -m benchmarks.offline deep --cases 8x{128/128,512/128,1919/128,128/64}
    python -m benchmarks.offline wide --limits --cases 1x128/64 4x128/64
    python -m benchmarks.offline deep --growth
    python -m benchmarks.offline deep --growth --stages 2 --dtype bfloat16 float32

`deep` and `wide` are directories that `gptj-dist synth deep deep` makes. A case is BATCHxINPUT/OUTPUT: BATCH requests
at once, each with INPUT random tokens in and OUTPUT tokens out, greedy, without an early stop. Prefill is the same case
with one token out; decode is the rest. Variants take turns, case by case; figures are medians of the rounds. With more
than one stage each stage is a process; `stage_0_cores` is the number of cores that stage 0 used.

`--limits` also measures, in the same turns, the packed matrix products alone: with one row, which reads all weights
once, and with 512 rows. `decode_share_of_limit` compares with the first and `prefill_share_of_limit` with the second,
so they are meaningful at a batch of one and at 512 tokens or more. The last line on standard output is one JSON
document.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from typing import Any

from benchmarks.cases import Case, parse_case
from benchmarks.contenders import EngineContender
from benchmarks.figures import Figures, machine, medians, print_document, print_row
from benchmarks.worker_process import WorkerProcess

DEFAULT_CASES = ("1x128/64", "8x128/64", "32x128/64", "1x1024/1")
IN_FLIGHT = (1, 2, 4, 8, 16, 32, 64, 128)
CONTEXT_LENGTHS = (128, 512, 1024, 1919)
GROWTH_OUTPUT_LEN = 64
CONTEXT_BATCH = 8
LIMIT_ROWS = {"decode": 1, "prefill": 512}
LIMIT_TURN_S = 0.5
WARM_UP_TOKENS = 2


def main() -> None:
    args = _parser().parse_args()
    cases = growth_cases() if args.growth else args.cases
    document: dict[str, Any] = {"machine": machine(), "model": args.model, "rounds": args.rounds}
    with ExitStack() as stack:
        variants = [_open_variant(args, stages, dtype, cases, stack) for stages in args.stages for dtype in args.dtype]
        if args.limits:
            for variant in variants:
                variant.open_limits(stack)
        for round_ in range(args.rounds + 1):
            for case in cases:
                for variant in variants:
                    variant.measure(case, round_)
    document["variants"] = [variant.as_json() for variant in variants]
    print_document("growth" if args.growth else "offline", document)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory, or demo")
    parser.add_argument("--stages", nargs="+", type=int, default=[1])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"])
    parser.add_argument("--cases", nargs="+", type=parse_case, default=list(map(parse_case, DEFAULT_CASES)))
    parser.add_argument("--growth", action="store_true", help="cases of 1 to 128 requests and of 128 to 1,919 tokens")
    parser.add_argument("--limits", action="store_true", help="also measure the packed products alone")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kv-cache-gb", type=float, help="as for gptj-dist serve")
    return parser


def growth_cases() -> list[Case]:
    """Cases that grow in requests at once, and cases that grow in tokens of context."""
    by_requests = [Case(batch, CONTEXT_LENGTHS[0], GROWTH_OUTPUT_LEN) for batch in IN_FLIGHT]
    by_context = [Case(CONTEXT_BATCH, length, GROWTH_OUTPUT_LEN) for length in CONTEXT_LENGTHS]
    return list(dict.fromkeys([*by_requests, *by_context]))


class Variant:
    """One way to run the model, and its measurements."""

    def __init__(self, settings: Mapping[str, Any], engine: EngineContender) -> None:
        self._settings = settings
        self._engine = engine
        self._limits: WorkerProcess | None = None
        self._rounds: dict[Case, list[Figures]] = {}
        self._limit_rounds: dict[int, list[Figures]] = {rows: [] for rows in LIMIT_ROWS.values()}

    def open_limits(self, stack: ExitStack) -> None:
        """Starts the worker of the limits; each turn then measures the limits first."""
        settings = {key: self._settings[key] for key in ("model", "dtype")}
        self._limits = stack.enter_context(closing(WorkerProcess("limits", settings)))

    def measure(self, case: Case, round_: int) -> None:
        """Measures one turn. Round 0 is a warm-up; its figures are dropped."""
        if round_ == 0:
            self._engine.measure(Case(case.batch, case.input_len, min(case.output_len, WARM_UP_TOKENS)), seed=0)
            return
        limits = self._measure_limits()
        figures = dict(self._engine.measure(case, seed=2 * round_))
        for phase, limit in limits.items():
            if f"{phase}_tokens_per_s" in figures:
                figures[f"{phase}_share_of_limit"] = figures[f"{phase}_tokens_per_s"] / limit
        self._rounds.setdefault(case, []).append(figures)
        for name, figure in figures.items():
            print_row([f"{self._name:<20}{case!s:<14}", name, figure])

    def as_json(self) -> dict[str, Any]:
        """Settings and medians of each case."""
        limits = {str(rows): medians(rounds) for rows, rounds in self._limit_rounds.items() if rounds}
        cases = [{**case.as_json(), "figures": medians(rounds)} for case, rounds in self._rounds.items()]
        about = {"about": self._engine.about, "settings": self._settings}
        return {**about, "cases": cases} | ({"limits_by_rows": limits} if limits else {})

    @property
    def _name(self) -> str:
        return f"stages={self._settings['stages']} {self._settings['dtype']}"

    def _measure_limits(self) -> dict[str, float]:
        """Tokens per second of the products alone, for decode and for prefill; empty without `--limits`."""
        if self._limits is None:
            return {}
        limits = {phase: _limit(self._limits, rows) for phase, rows in LIMIT_ROWS.items()}
        for phase, rows in LIMIT_ROWS.items():
            self._limit_rounds[rows].append(limits[phase])
        return {phase: limit["tokens_per_s"] for phase, limit in limits.items()}


def _open_variant(
    args: argparse.Namespace, stages: int, dtype: str, cases: Sequence[Case], stack: ExitStack
) -> Variant:
    most_requests = max(case.batch for case in cases)
    settings = {"model": args.model, "stages": stages, "dtype": dtype, "max_batch_size": most_requests}
    if args.kv_cache_gb is not None:
        settings["kv_cache_gb"] = args.kv_cache_gb
    worker = stack.enter_context(closing(WorkerProcess("ours", settings)))
    return Variant(settings, EngineContender(worker))


def _limit(worker: WorkerProcess, rows: int) -> Figures:
    """Rates of the fastest of the passes that fit in `LIMIT_TURN_S`."""
    end_s = time.perf_counter() + LIMIT_TURN_S
    passes = [worker.ask({"rows": rows})]
    while time.perf_counter() < end_s:
        passes.append(worker.ask({"rows": rows}))
    return max(passes, key=lambda rates: rates["tokens_per_s"])


if __name__ == "__main__":
    main()
