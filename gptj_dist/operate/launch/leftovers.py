"""Finds and removes what dead launchers have left: processes on this machine, an application on a cluster."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from gptj_dist.errors import ConfigurationError
from gptj_dist.operate.launch.application import Served, remove
from gptj_dist.operate.launch.cluster import applications_served
from gptj_dist.operate.launch.environment import LAUNCHER_VARIABLE
from gptj_dist.operate.launch.processes import end_all, environments, is_running, marked, start_tick


@dataclass(frozen=True, slots=True)
class LocalServer:
    """The processes of one `gptj-dist serve` on this machine.

    Args:
        launcher: process id of the launcher.
        is_orphaned: the launcher has ended.
        pids: the processes of its Ray.
        mark: what `LAUNCHER_VARIABLE` is in each of them.
    """

    launcher: int
    is_orphaned: bool
    pids: tuple[int, ...]
    mark: str


def find_servers() -> list[LocalServer]:
    """All servers of this user on this machine that have a Ray of their own."""
    pids: defaultdict[str, list[int]] = defaultdict(list)
    for pid, mark in environments(LAUNCHER_VARIABLE).items():
        pids[mark].append(pid)
    return [_server(mark, of_mark) for mark, of_mark in sorted(pids.items())]


def end(server: LocalServer) -> None:
    """Kills the processes of a server whose launcher has ended, and those that they start meanwhile."""
    end_all(lambda: marked(LAUNCHER_VARIABLE, server.mark))


def remove_application(name: str, drain_s: float) -> int:
    """Lets an application of the connected cluster finish its requests, and removes it.

    Args:
        drain_s: requests that take longer are cut.

    Returns:
        The number of requests that were cut.

    Raises:
        ConfigurationError: the cluster does not serve it.
        RayGoneError: Ray does not answer.
    """
    names = applications_served() or ()
    if name not in names:
        others = f"; it serves {', '.join(names)}" if names else ""
        raise ConfigurationError(f"the cluster serves no application {name!r}{others}")
    try:
        return Served(name).finish_requests(drain_s)
    finally:
        remove(name)


def _server(mark: str, pids: list[int]) -> LocalServer:
    pid, _, tick = mark.partition(":")
    launcher = int(pid) if pid.isdigit() else 0
    is_orphaned = not (is_running(launcher) and str(start_tick(launcher)) == tick)
    return LocalServer(launcher, is_orphaned, tuple(pids), mark)
