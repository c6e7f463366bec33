"""Reads this machine's processes from /proc: descendants, environments and command lines."""

from __future__ import annotations

import os
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

END_LIMIT_S = 5.0

LOOK_PERIOD_S = 0.02

QUIET_LOOKS = 2
"""A process that is being started has no environment for a moment, and is then not found by it."""

_PROC = Path("/proc")


def descendants(root: int) -> list[int]:
    """Process ids of all children of `root` and of their children, parents first. Empty where there is no /proc."""
    children: defaultdict[int, list[int]] = defaultdict(list)
    for pid in _pids():
        with suppress(OSError, ValueError):
            children[int(_stat(pid)[1])].append(pid)
    found, waiting = list[int](), [root]
    while waiting:
        below = children[waiting.pop()]
        found += below
        waiting += below
    return found


def kill(pids: Iterable[int]) -> None:
    """Sends SIGKILL to each; one that has ended already is skipped."""
    for pid in pids:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def end_all(find: Callable[[], Iterable[int]]) -> None:
    """Kills the processes that `find` gives, and looks again: one that dies may have started another meanwhile.

    It ends when nothing runs any more, or after `END_LIMIT_S`.
    """
    deadline = time.monotonic() + END_LIMIT_S
    num_quiet_looks = 0
    while num_quiet_looks < QUIET_LOOKS and time.monotonic() < deadline:
        pids = [pid for pid in find() if is_running(pid)]
        num_quiet_looks = 0 if pids else num_quiet_looks + 1
        kill(pids)
        time.sleep(LOOK_PERIOD_S)


def is_running(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return _stat(pid)[0] not in "ZX"
    except OSError:
        return False


def start_tick(pid: int) -> int:
    """When the process started, in clock ticks since boot; 0 if that is unknown. With its id it names a process."""
    try:
        return int(_stat(pid)[19])
    except OSError:
        return 0


def environments(variable: str) -> Mapping[int, str]:
    """The value of an environment variable in each of this user's processes that sets it, by process id."""
    prefix = f"{variable}="
    return {
        pid: entry.removeprefix(prefix)
        for pid, entries in _strings("environ")
        for entry in entries
        if entry.startswith(prefix)
    }


def marked(variable: str, value: str) -> list[int]:
    """Process ids of this user's processes in whose environment the variable has this value."""
    return [pid for pid, found in environments(variable).items() if found == value]


def command_lines() -> Mapping[int, list[str]]:
    """The arguments of every process, by process id."""
    return dict(_strings("cmdline"))


def _strings(file: str) -> Iterator[tuple[int, list[str]]]:
    """A file of strings from /proc/PID, of each process that lets this user read it."""
    for pid in _pids():
        with suppress(OSError):  # another user's, or one that has just ended
            yield pid, (_PROC / str(pid) / file).read_bytes().decode(errors="replace").split("\0")


def _pids() -> list[int]:
    return [int(path.name) for path in _PROC.glob("[0-9]*")]


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third on: the second, the name, may hold spaces and brackets."""
    return (_PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
