"""One contender against another, in turn (A B A B), so that a machine whose speed drifts is as unkind to both.

Goals 1 and 2, against vLLM; its environment is made by its own instructions and belongs to no part of this project:

    python -m benchmarks.compare deep --a ours --b vllm --peer-python vllm/bin/python
    python -m benchmarks.compare wide --a ours --b vllm --peer-python vllm/bin/python --cases {1,8,32}x128/64
    python -m benchmarks.compare 6b --a "ours kv_cache_gb=2" --b "vllm kv_cache_gb=2" --cases {1,8}x128/16 --apart ...
    python -m benchmarks.compare deep --a "ours stages=2" --b "vllm stages=2" --peer-python vllm/bin/python

Goal 3, two stages against one; and two checkouts of ours:

    python -m benchmarks.compare deep --a "ours stages=2" --b ours --cases {1,8,32}x128/64 1x1024/1
    python -m benchmarks.compare deep --a ours --b "ours package=/path/to/another/checkout"

Goal 5, over HTTP against vLLM's server, and against our own engine in one process:

    python -m benchmarks.compare deep --a "serve stages=1" --b vllm-serve --peer-python vllm/bin/python
    python -m benchmarks.compare deep --a "serve stages=2" --b vllm-serve --peer-python vllm/bin/python
    python -m benchmarks.compare deep --a "serve stages=1" --b ours

`deep`, `wide` and `6b` are directories that `gptj-dist synth deep deep` makes. A case is BATCHxINPUT/OUTPUT: so many
requests at once of so many random tokens in and out, greedy, without an early stop. Prefill is the case with one token
out, and decode the rest. Engines leave text out on both sides. Whoever waits is frozen, because idle
servers use some CPU (ours a seventh of a core, for Ray; vLLM's pipeline spins): `idle_cores` says what got through.
Where the memory does not hold both, `--apart` loads each anew for its turn, which then has all cases.

A ratio is that of A to B, of times B to A: above 1, A is better; it is the median of the rounds' own ratios. The last
line on standard output is one JSON document.
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
Fought = dict[Case, list[tuple[Figures, Figures]]]
Sides = dict[str, dict[str, Any]]


def main() -> None:
    """Measures, prints a table for people and the JSON document."""
    args = _parser().parse_args()
    specs = {"a": args.a, "b": args.b}
    shared = Shared(args.model, args.dtype, args.peer_python, max(case.batch for case in args.cases))
    document: dict[str, Any] = {"machine": machine(), "model": args.model, "dtype": args.dtype, "rounds": args.rounds}
    fight = _fight_apart if args.apart else _fight_together
    rounds, sides = fight(specs, shared, args)
    print("medians")
    for case in args.cases:
        _tell(case, rounds[case])
    print_document("compare", document | sides | {"cases": [_case_figures(case, rounds[case]) for case in args.cases]})


def _fight_together(specs: Mapping[str, Spec], shared: Shared, args: argparse.Namespace) -> tuple[Fought, Sides]:
    """Both are loaded, and take turns case by case."""
    with ExitStack() as stack:
        contenders = {side: stack.enter_context(_introduced(side, spec, shared)) for side, spec in specs.items()}
        duel = Duel(contenders["a"], contenders["b"], args.turn_s)
        rounds = duel.fight(args.cases, args.rounds)
        about = {side: {**contenders[side].about, "idle_cores": duel.idle_cores[side]} for side in specs}
    return rounds, {side: {"contender": spec.text, **about[side]} for side, spec in specs.items()}


def _fight_apart(specs: Mapping[str, Spec], shared: Shared, args: argparse.Namespace) -> tuple[Fought, Sides]:
    """One is loaded at a time, and has all cases in its turn."""
    rounds: Fought = {case: [] for case in args.cases}
    sides: Sides = {}
    for seed in range(0, 1000 * args.rounds, 1000):
        figures: dict[str, dict[Case, Figures]] = {}
        for side, spec in specs.items():
            with _introduced(side, spec, shared) as contender:
                sides[side] = {"contender": spec.text, **contender.about}
                for case in args.cases:
                    _warm_up(contender, case)
                figures[side] = {case: contender.measure(case, seed + 2) for case in args.cases}
        for case in args.cases:
            rounds[case].append((figures["a"][case], figures["b"][case]))
            _tell(case, rounds[case][-1:])
    return rounds, sides


@contextmanager
def _introduced(side: str, spec: Spec, shared: Shared) -> Iterator[Contender]:
    with opened(spec, shared) as contender:
        print(f"{side}: {spec.text}: {contender.about}", flush=True)
        yield contender


def _warm_up(contender: Contender, case: Case) -> None:
    """A turn that does not count."""
    contender.measure(Case(case.batch, case.input_len, min(case.output_len, 2)), seed=0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory")
    parser.add_argument("--a", required=True, type=parse_spec, help="a contender, such as 'ours stages=2'")
    parser.add_argument("--b", required=True, type=parse_spec, help="what it is compared with, such as vllm")
    parser.add_argument("--cases", nargs="+", type=parse_case, default=list(map(parse_case, DEFAULT_CASES)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turn-s", type=float, default=1.0, help="a turn is repeated until it took so many seconds")
    parser.add_argument("--apart", action="store_true", help="one is in memory at a time, loaded anew for each turn")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--peer-python", default=sys.executable, help="the interpreter that has vLLM")
    return parser


class Duel:
    """Two contenders that take turns.

    Attributes:
        idle_cores: what each used of the CPU while it was the other's turn, in cores.
    """

    def __init__(self, a: Contender, b: Contender, turn_s: float) -> None:
        self._contenders = {"a": a, "b": b}
        self._turn_s = turn_s
        self._seed = 0
        self._idle_cpu_s = {"a": 0.0, "b": 0.0}
        self._idle_s = {"a": 0.0, "b": 0.0}

    @property
    def idle_cores(self) -> dict[str, float]:
        return {side: cpu_s / max(self._idle_s[side], 1e-9) for side, cpu_s in self._idle_cpu_s.items()}

    def fight(self, cases: Sequence[Case], num_rounds: int) -> Fought:
        """Each case's figures, round by round; a first turn of each case and contender does not count."""
        for case in cases:
            for contender in self._contenders.values():
                _warm_up(contender, case)
        rounds: Fought = {case: [] for case in cases}
        print_row(["", "a", "b", "ratio"])
        for number in range(num_rounds):
            for case in cases:
                order = ("a", "b") if number % 2 == 0 else ("b", "a")
                figures = {side: self._turn(side, case) for side in order}
                rounds[case].append((figures["a"], figures["b"]))
                _tell(case, rounds[case][-1:])
        return rounds

    def _turn(self, side: str, case: Case) -> Figures:
        """One side's turn; medians of its repetitions. Prompts are new each time."""
        runs: list[Figures] = []
        with self._watched("b" if side == "a" else "a"):
            begin = time.perf_counter()
            while not runs or time.perf_counter() - begin < self._turn_s:
                self._seed += 2
                runs.append(self._contenders[side].measure(case, self._seed))
        return medians(runs)

    @contextmanager
    def _watched(self, side: str) -> Iterator[None]:
        """It is not this side's turn: freezes it, and notes what it uses of the CPU nevertheless."""
        contender = self._contenders[side]
        cpu_before, begin = contender.family.cpu_s(), time.perf_counter()
        with contender.family.frozen():
            yield
        self._idle_s[side] += time.perf_counter() - begin
        self._idle_cpu_s[side] += contender.family.cpu_s() - cpu_before


def _tell(case: Case, rounds: Rounds) -> None:
    for name, figure in compared(rounds).items():
        print_row([f"{case!s:<12}{name}", figure["a"], figure["b"], figure["ratio"]])


def compared(rounds: Rounds) -> dict[str, dict[str, float]]:
    """Of each figure that both have: medians, and the median, least and greatest of the rounds' ratios."""
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
