"""Reads this machine's processes from /proc: descendants, environments and command lines."""

from __future__ import annotations

import os
import signal
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

_PROC = Path("/proc")


def descendants(root: int) -> list[int]:
    """Process ids of all children of `root` and of their children, parents first. Empty where there is no /proc."""
    children: defaultdict[int, list[int]] = defaultdict(list)
    for pid in _pids():
        with suppress(OSError, ValueError):
            children[_parent(pid)].append(pid)
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
    prefix = f"{variable}=".encode()
    found = {}
    for pid in _pids():
        with suppress(OSError):  # another user's, or one that has just ended
            for entry in (_PROC / str(pid) / "environ").read_bytes().split(b"\0"):
                if entry.startswith(prefix):
                    found[pid] = entry.removeprefix(prefix).decode(errors="replace")
    return found


def command_lines() -> Mapping[int, list[str]]:
    """The arguments of every process, by process id."""
    found = {}
    for pid in _pids():
        with suppress(OSError):
            found[pid] = (_PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")
    return found


def _pids() -> list[int]:
    return [int(path.name) for path in _PROC.glob("[0-9]*")]


def _parent(pid: int) -> int:
    return int(_stat(pid)[1])


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third on: the second, the name, may hold spaces and brackets."""
    return (_PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
