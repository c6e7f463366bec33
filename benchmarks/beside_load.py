"""Measures how much of their speed engines keep while other programs compute on the same cores.

    python -m benchmarks.beside_load demo
    python -m benchmarks.beside_load deep --dtype bfloat16 --loads 1 2 4 twin
    python -m benchmarks.beside_load deep --contenders ours "vllm python=vllm/bin/python kv_cache_gb=2" \\
        "ct2 python=ct2/bin/python model=/path/to/deep-ct2"

A load is a number of processes that compute all the time, or `twin`: a second process of the contender that generates
without a pause. Contenders, written as for `benchmarks.compare`, take turns under each load; the others are stopped
(SIGSTOP) meanwhile. They start before the load, so the figures include how they adapt to it.

`share_of_quiet` is the decode rate beside a load divided by the contender's own quiet rate. `fair_share` is the share
of the cores that is left to an engine with one thread a core if the scheduler gives every thread and every process of
the load the same time. The last line on standard output is one JSON document. Linux only.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from benchmarks.cases import Case, parse_case
from benchmarks.contenders import Contender, Shared, Spec, opened, parse_spec
from benchmarks.figures import Figures, machine, medians, print_document, print_row

QUIET, TWIN = "quiet", "twin"
DEFAULT_LOADS = (QUIET, "1", "2", TWIN)
BUSY = "print(flush=True)\nwhile True: pass"
RATE = "decode_tokens_per_s"

Rounds = Mapping[tuple[str, str], Sequence[Figures]]
"""Figures of each round, by contender and load."""


def main() -> None:
    args = _parser().parse_args()
    loads = [QUIET, *(load for load in args.loads if load != QUIET)]
    about = machine()
    shared = Shared(args.model, args.dtype, args.peer_python, args.case.batch)
    with ExitStack() as stack:
        contenders = {spec.text: stack.enter_context(opened(spec, shared)) for spec in args.contenders}
        specs = {spec.text: spec for spec in args.contenders}
        for contender in contenders.values():
            contender.measure(args.case, seed=0)
        print_row(["", *loads])
        rounds: dict[tuple[str, str], list[Figures]] = defaultdict(list)
        for number in range(args.rounds):
            for load in loads:
                for name in contenders:
                    with _alone(contenders, name), _load(load, specs[name], shared, args.case):
                        rounds[name, load].append(_turn(contenders[name], args.case, args.turn_s, 1000 * number))
    results = {name: _compared(rounds, name, loads, about["num_cores"]) for name in contenders}
    for name, by_load in results.items():
        print_row([name, *(figures[RATE] for figures in by_load.values())])
        print_row(["  share of quiet", *(figures["share_of_quiet"] for figures in by_load.values())])
    fields = {"machine": about, "model": args.model, "dtype": args.dtype, **args.case.as_json(), "rounds": args.rounds}
    print_document("beside_load", {**fields, "contenders": results})


def fair_share(load: str, num_cores: int) -> float:
    """Share of the cores that a load leaves to an engine with one thread a core."""
    if load == QUIET:
        return 1.0
    num_others = num_cores if load == TWIN else int(load)
    return num_cores / (num_cores + num_others)


def _compared(rounds: Rounds, name: str, loads: Sequence[str], num_cores: int) -> dict[str, dict[str, float]]:
    """One contender's medians by load, with their share of its quiet rate."""
    by_load = {load: medians(rounds[name, load]) for load in loads}
    return {
        load: {
            **figures,
            "share_of_quiet": figures[RATE] / by_load[QUIET][RATE],
            "fair_share": fair_share(load, num_cores),
        }
        for load, figures in by_load.items()
    }


def _turn(contender: Contender, case: Case, turn_s: float, seed: int) -> Figures:
    """Medians of the measurements of one turn."""
    runs: list[Figures] = []
    begin = time.perf_counter()
    while not runs or time.perf_counter() - begin < turn_s:
        seed += 2
        runs.append(contender.measure(case, seed))
    return medians(runs)


@contextmanager
def _alone(contenders: Mapping[str, Contender], name: str) -> Iterator[None]:
    """Stops all contenders but one until the context ends."""
    with ExitStack() as stack:
        for other, contender in contenders.items():
            if other != name:
                stack.enter_context(contender.family.frozen())
        yield


@contextmanager
def _load(load: str, spec: Spec, shared: Shared, case: Case) -> Iterator[None]:
    """Runs a load until the context ends."""
    if load == TWIN:
        with opened(spec, shared) as twin, _generating(twin, case):
            yield
        return
    with ExitStack() as stack:
        for _ in range(0 if load == QUIET else int(load)):
            stack.enter_context(_busy_process())
        yield


@contextmanager
def _busy_process() -> Iterator[None]:
    """Runs a process that computes until the context ends."""
    with subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield
        finally:
            process.kill()


@contextmanager
def _generating(twin: Contender, case: Case) -> Iterator[None]:
    """Lets a contender generate until the context ends."""
    has_begun, shall_end = threading.Event(), threading.Event()

    def generate() -> None:
        seed = 1_000_000
        while not shall_end.is_set():
            twin.measure(case, seed)
            seed += 2
            has_begun.set()

    thread = threading.Thread(target=generate)
    thread.start()
    has_begun.wait()
    try:
        yield
    finally:
        shall_end.set()
        thread.join()


def _load_name(text: str) -> str:
    if text not in (QUIET, TWIN) and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"a load is {QUIET}, {TWIN} or a number of processes, not {text!r}")
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory, or demo")
    parser.add_argument("--contenders", nargs="+", type=parse_spec, default=[parse_spec("ours")], help="engines")
    parser.add_argument("--loads", nargs="+", type=_load_name, default=list(DEFAULT_LOADS))
    parser.add_argument("--case", type=parse_case, default=Case(1, 16, 33))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turn-s", type=float, default=3.0, help="a turn repeats its case for this many seconds")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--peer-python", default=sys.executable, help="the interpreter of peers that have no python=")
    return parser


if __name__ == "__main__":
    main()
