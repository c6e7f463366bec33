"""Compares two contenders. They take turns (A B B A), so that a machine whose speed drifts slows both alike.

Our engine against vLLM's, which runs in an environment of its own:

    python -m benchmarks.compare deep --a ours --b vllm --peer-python vllm/bin/python
    python -m benchmarks.compare wide --a ours --b vllm --peer-python vllm/bin/python --cases {1,8,32}x128/64
    python -m benchmarks.compare 6b --a "ours kv_cache_gb=2" --b "vllm kv_cache_gb=2" --cases {1,8}x128/16 --apart ...
    python -m benchmarks.compare deep --a "ours stages=2" --b "vllm stages=2" --peer-python vllm/bin/python

Weights of few bits against other engines' (see `benchmarks.contenders`):

    python -m benchmarks.compare deep --a "ours quantize=int8" \\
        --b "ct2 python=ct2/bin/python model=deep-ct2 compute_type=int8"
    python -m benchmarks.compare deep --a "ours quantize=int4" --b "openvino python=ov/bin/python model=deep-ov-int4"

Two stages against one, and two checkouts of ours:

    python -m benchmarks.compare deep --a "ours stages=2" --b ours --cases {1,8,32}x128/64 1x1024/1
    python -m benchmarks.compare deep --a ours --b "ours package=/path/to/another/checkout"

Our server against vLLM's server, and against our own engine in one process:

    python -m benchmarks.compare deep --a "serve stages=1" --b vllm-serve --peer-python vllm/bin/python
    python -m benchmarks.compare deep --a "serve stages=2" --b vllm-serve --peer-python vllm/bin/python
    python -m benchmarks.compare deep --a "serve stages=1" --b ours

`deep`, `wide` and `6b` are directories that `gptj-dist synth deep deep` makes. A case is BATCHxINPUT/OUTPUT: BATCH
requests at once, each with INPUT random tokens in and OUTPUT tokens out, greedy, without an early stop. Prefill is the
same case with one token out; decode is the rest. Neither engine converts tokens to text. The contender that waits is
stopped (SIGSTOP), because idle servers use some CPU: ours a seventh of a core, for Ray; vLLM's pipeline spins.
`idle_cores` is the CPU that a contender still used during the other's turns. If memory does not hold both,
`--apart` loads each contender anew for its turn, in which it runs all cases.

A ratio is A's rate over B's, or B's time over A's: above 1, A is better. It is the median of the ratios of the rounds.
The contender that is loaded first can be some percent slower, even of equal code: for small differences run both
orders. The last line on standard output is one JSON document.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from benchmarks.cases import Case, parse_case
from benchmarks.contenders import Contender, Shared, Spec, opened, parse_spec
from benchmarks.figures import Figures, machine, medians, print_document, print_row, times_as_good

DEFAULT_CASES = ("1x128/64", "8x128/64", "32x128/64", "1x1024/1")
Rounds = Sequence[tuple[Figures, Figures]]
"""Figures of A and of B in each round."""

CaseRounds = dict[Case, list[tuple[Figures, Figures]]]
Sides = dict[str, dict[str, Any]]
"""What the document says of contender `a` and of `b`."""


def main() -> None:
    args = _parser().parse_args()
    specs = {"a": args.a, "b": args.b}
    shared = Shared(args.model, args.dtype, args.peer_python, max(case.batch for case in args.cases))
    document: dict[str, Any] = {"machine": machine(), "model": args.model, "dtype": args.dtype, "rounds": args.rounds}
    measure = _measure_apart if args.apart else _measure_together
    rounds, sides = measure(specs, shared, args)
    print("medians")
    for case in args.cases:
        _print_case(case, rounds[case])
    print_document("compare", document | sides | {"cases": [_case_figures(case, rounds[case]) for case in args.cases]})


def _measure_together(specs: Mapping[str, Spec], shared: Shared, args: argparse.Namespace) -> tuple[CaseRounds, Sides]:
    """Loads both contenders; they take turns case by case."""
    with ExitStack() as stack:
        contenders = {side: stack.enter_context(_opened(side, spec, shared)) for side, spec in specs.items()}
        turns = Turns(contenders["a"], contenders["b"], args.turn_s)
        rounds = turns.measure(args.cases, args.rounds)
        about = {side: {**contenders[side].about, "idle_cores": turns.idle_cores[side]} for side in specs}
    return rounds, {side: {"contender": spec.text, **about[side]} for side, spec in specs.items()}


def _measure_apart(specs: Mapping[str, Spec], shared: Shared, args: argparse.Namespace) -> tuple[CaseRounds, Sides]:
    """Loads one contender at a time; it runs all cases in its turn."""
    rounds: CaseRounds = {case: [] for case in args.cases}
    sides: Sides = {}
    for seed in range(0, 1000 * args.rounds, 1000):
        figures: dict[str, dict[Case, Figures]] = {}
        for side, spec in specs.items():
            with _opened(side, spec, shared) as contender:
                sides[side] = {"contender": spec.text, **contender.about}
                for case in args.cases:
                    _warm_up(contender, case)
                # Other seeds for other cases, as servers keep the KV of prompts.
                figures[side] = {
                    case: contender.measure(case, seed + 2 * number) for number, case in enumerate(args.cases, 1)
                }
        for case in args.cases:
            rounds[case].append((figures["a"][case], figures["b"][case]))
            _print_case(case, rounds[case][-1:])
    return rounds, sides


@contextmanager
def _opened(side: str, spec: Spec, shared: Shared) -> Iterator[Contender]:
    """Starts a contender and prints its description."""
    with opened(spec, shared) as contender:
        print(f"{side}: {spec.text}: {contender.about}", flush=True)
        yield contender


def _warm_up(contender: Contender, case: Case) -> None:
    """Runs a case with at most two tokens out; the figures are dropped."""
    contender.measure(Case(case.batch, case.input_len, min(case.output_len, 2)), seed=0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory")
    parser.add_argument("--a", required=True, type=parse_spec, help="a contender, such as 'ours stages=2'")
    parser.add_argument("--b", required=True, type=parse_spec, help="the contender to compare with, such as vllm")
    parser.add_argument("--cases", nargs="+", type=parse_case, default=list(map(parse_case, DEFAULT_CASES)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turn-s", type=float, default=1.0, help="a turn repeats its case for this many seconds")
    parser.add_argument("--apart", action="store_true", help="load one contender at a time, anew for each turn")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--peer-python", default=sys.executable, help="the interpreter that has vLLM")
    return parser


class Turns:
    """Measures two contenders in turn."""

    def __init__(self, a: Contender, b: Contender, turn_s: float) -> None:
        self._contenders = {"a": a, "b": b}
        self._turn_s = turn_s
        self._seed = 0
        self._idle_cpu_s = {"a": 0.0, "b": 0.0}
        self._idle_s = {"a": 0.0, "b": 0.0}

    @property
    def idle_cores(self) -> dict[str, float]:
        """CPU time per second that each contender used during the other's turns."""
        return {side: cpu_s / max(self._idle_s[side], 1e-9) for side, cpu_s in self._idle_cpu_s.items()}

    def measure(self, cases: Sequence[Case], num_rounds: int) -> CaseRounds:
        """Figures of each case, round by round, after a warm-up of each case and contender."""
        for case in cases:
            for contender in self._contenders.values():
                _warm_up(contender, case)
        rounds: CaseRounds = {case: [] for case in cases}
        print_row(["", "a", "b", "ratio"])
        for number in range(num_rounds):
            for case in cases:
                order = ("a", "b") if number % 2 == 0 else ("b", "a")
                figures = {side: self._turn(side, case) for side in order}
                rounds[case].append((figures["a"], figures["b"]))
                _print_case(case, rounds[case][-1:])
        return rounds

    def _turn(self, side: str, case: Case) -> Figures:
        """Medians of the repetitions in one side's turn. Prompts are new each time."""
        runs: list[Figures] = []
        with self._stopped("b" if side == "a" else "a"):
            begin = time.perf_counter()
            while not runs or time.perf_counter() - begin < self._turn_s:
                self._seed += 2
                runs.append(self._contenders[side].measure(case, self._seed))
        return medians(runs)

    @contextmanager
    def _stopped(self, side: str) -> Iterator[None]:
        """Stops the side that waits, and counts the CPU time that it still uses."""
        contender = self._contenders[side]
        cpu_before, begin = contender.family.cpu_s(), time.perf_counter()
        with contender.family.frozen():
            yield
        self._idle_s[side] += time.perf_counter() - begin
        self._idle_cpu_s[side] += contender.family.cpu_s() - cpu_before


def _print_case(case: Case, rounds: Rounds) -> None:
    for name, figure in compared(rounds).items():
        print_row([f"{case!s:<12}{name}", figure["a"], figure["b"], figure["ratio"]])


def compared(rounds: Rounds) -> dict[str, dict[str, float]]:
    """For each figure that both have: its medians, and the median, least and greatest ratio of the rounds."""
    sides = {"a": [a for a, _ in rounds], "b": [b for _, b in rounds]}
    both = {side: medians(runs) for side, runs in sides.items()}
    figures = {}
    for name in (name for name in both["a"] if name in both["b"] and not name.startswith("stage_")):
        ratios = [times_as_good(name, a[name], b[name]) for a, b in rounds]
        figures[name] = {
            "a": both["a"][name],
            "b": both["b"][name],
            "ratio": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
        }
    return figures


def _case_figures(case: Case, rounds: Rounds) -> Mapping[str, Any]:
    every_round = {"a": [a for a, _ in rounds], "b": [b for _, b in rounds]}
    return {**case.as_json(), "figures": compared(rounds), "rounds": every_round}


if __name__ == "__main__":
    main()
