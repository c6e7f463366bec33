"""Ends the `join` of this machine, from another terminal."""

from __future__ import annotations

import math
import os
import signal
import time

from gptj_dist.errors import ConfigurationError, StageFailedError
from gptj_dist.operate.cluster.ray_node import NODE_VARIABLE
from gptj_dist.operate.launch.processes import command_lines, environments, is_running, start_tick

_LOOK_PERIOD_S = 0.1


def find_joined() -> dict[int, str]:
    """The `join` processes of this user on this machine, and the arguments with which they were called."""
    lines = command_lines()
    found: dict[int, str] = {}
    for mark in set(environments(NODE_VARIABLE).values()):
        pid, _, tick = mark.partition(":")
        if pid.isdigit() and is_running(int(pid)) and str(start_tick(int(pid))) == tick:
            words = lines.get(int(pid), [])
            if "join" in words:
                found[int(pid)] = " ".join(words[words.index("join") :]).strip()
    return found


def leave_cluster(pid: int | None, limit_s: float | None) -> int:
    """Tells a `join` to leave, and returns its process id when it has.

    Args:
        pid: of the `join`; None takes the only one.
        limit_s: None waits as long as the `join` does, whose node ends in its own time.

    Raises:
        ConfigurationError: there is none, or several and no pid.
        StageFailedError: it takes longer than `limit_s`.
    """
    joined = find_joined()
    if pid is None:
        if len(joined) > 1:
            raise ConfigurationError(f"several nodes run on this machine: choose one by --pid, of {sorted(joined)}")
        if not joined:
            raise ConfigurationError("no `gptj-dist join` of yours runs on this machine; Ctrl-C ends `gptj-dist up`")
        [pid] = joined
    elif pid not in joined:
        raise ConfigurationError(f"the process {pid} is no `gptj-dist join` of yours")
    os.kill(pid, signal.SIGTERM)
    deadline_s = math.inf if limit_s is None else time.monotonic() + limit_s
    while is_running(pid):
        if time.monotonic() > deadline_s:
            raise StageFailedError(f"the process {pid} has not left within {limit_s:g} s; it goes on leaving")
        time.sleep(_LOOK_PERIOD_S)
    return pid
