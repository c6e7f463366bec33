"""Sends hostile input to every part that reads what others wrote, and stops at the first that is not dealt with.

`python -m tests.fuzzing.run --cases 100000` shares the cases among all targets; `--only NAME` takes one. Each case has
a time limit, and may only end as the part's description says. No case may start a program or open a connection, and the
memory of the process stays under a limit. A case depends only on the seed and its number, and a failure is reduced to a
small one, which is printed.
"""

from __future__ import annotations

import argparse
import faulthandler
import sys
import time
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzzing import api_cases, client_cases, file_cases, grammar_cases, wire_cases
from tests.fuzzing.strategies import Target
from tests.memory import peak_bytes

CASE_LIMIT_S = 30
MAX_MEMORY_BYTES = 1 << 30
"""Of the whole process, of which Python and its libraries take a quarter."""

PART_CASES = 2000
"""Cases after which the next part of a target begins, as hypothesis remembers all cases of a part."""

FORBIDDEN_EVENTS = frozenset(
    ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "ctypes.dlopen")
)
CASES = (api_cases, wire_cases, file_cases, client_cases, grammar_cases)
TARGETS = tuple(target for cases in CASES for target in cases.TARGETS)


class Guard:
    """Records that a case starts a program or opens a connection."""

    def __init__(self) -> None:
        self._is_on = False
        self._events: list[str] = []
        sys.addaudithook(self._note)

    def check(self, target: Target, case: Any) -> None:
        """Runs a case. Raises AssertionError if it does what none may, and ends the process if it takes too long."""
        faulthandler.dump_traceback_later(CASE_LIMIT_S, exit=True)
        self._is_on = True
        try:
            target.check(case)
        finally:
            self._is_on = False
            faulthandler.cancel_dump_traceback_later()
        assert not self._events, f"the case did {self._events}"

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._is_on and event in FORBIDDEN_EVENTS:
            self._events.append(f"{event} {arguments!r:.200}")


def fuzz(target: Target, num_cases: int, first_seed: int, guard: Guard) -> None:
    """Checks cases of a target. Raises what a case raises that is not allowed, with the smallest such case."""
    for number, begin in enumerate(range(0, num_cases, PART_CASES)):

        @seed(f"{first_seed}/{target.name}/{number}")
        @settings(
            max_examples=min(PART_CASES, num_cases - begin),
            database=None,
            deadline=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given(target.cases)
        def check(case: Any) -> None:
            guard.check(target, case)

        check()


def main() -> None:
    names = [target.name for target in TARGETS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=names, help="one target, which gets all cases")
    args = parser.parse_args()
    targets = [target for target in TARGETS if args.only in (None, target.name)]
    total = sum(target.share for target in targets)
    guard = Guard()
    for target in targets:
        num_cases = max(1, args.cases * target.share // total)
        begin_s = time.monotonic()
        fuzz(target, num_cases, args.seed, guard)
        took_s = time.monotonic() - begin_s
        print(f"{target.name}: {num_cases} cases in {took_s:.1f} s, {peak_bytes() >> 20} MiB at most", flush=True)
        assert peak_bytes() < MAX_MEMORY_BYTES


if __name__ == "__main__":
    main()
