"""Polls the pipelines every few seconds, and reports lost stages, their return, and the end of the server."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from gptj_dist.operate.launch.application import RayGoneError, Served, is_served

if TYPE_CHECKING:
    from gptj_dist.serving.pipeline import PipelineStatus

PERIOD_S = 2.0
MAX_SILENCES = 2
"""Failed looks in a row, after which the server counts as gone."""


class Watcher:
    """Polls until `stop` is set. If the server is gone before that, sets `stop`, and `failure` holds the reason.

    Args:
        served: the application.
        stop: ends the watch.
        lost_process: gives the name of a process of Ray's own that has ended.
        say: receives a line for the user.
    """

    def __init__(
        self, served: Served, stop: threading.Event, lost_process: Callable[[], str | None], say: Callable[[str], None]
    ) -> None:
        self.failure = ""
        self._served = served
        self._stop = stop
        self._lost_process = lost_process
        self._losses = LossReporter(say)

    def start(self, statuses: Sequence[PipelineStatus]) -> None:
        """Starts polling on a separate thread, because Ray may answer slowly.

        Args:
            statuses: of the pipelines when the server became ready.
        """
        self._losses.note(statuses)
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def _watch(self) -> None:
        num_silences = 0
        while not self._stop.wait(PERIOD_S):
            try:
                failure = self._look()
                num_silences = 0
            except Exception as error:  # of any kind: a server that cannot be watched must not look healthy
                num_silences += 1
                reason = str(error) if isinstance(error, RayGoneError) else f"it cannot be watched: {error!r}"
                failure = reason if num_silences == MAX_SILENCES else ""
            if failure and not self._stop.is_set():
                self.failure = failure
                self._stop.set()

    def _look(self) -> str:
        """Polls once. Returns why the server is gone, or an empty string."""
        if (process := self._lost_process()) is not None:
            return f"Ray's process {process} has ended"
        statuses = self._served.statuses()
        if not statuses and not is_served(self._served.name):
            return "the application has been removed from Ray"
        self._losses.note(statuses)
        return ""


class LossReporter:
    """Remembers the last status of each pipeline, and reports changes.

    Args:
        say: receives a line for the user.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._last: dict[str, PipelineStatus] = {}
        self._down: set[str] = set()

    def note(self, statuses: Sequence[PipelineStatus]) -> None:
        """Compares the pipelines' statuses with the last ones, and reports changes."""
        for status in statuses:
            last = self._last.get(status.name, status)  # losses before the first look are in the log
            self._last[status.name] = status
            if status.name not in self._down and (status.num_restarts > last.num_restarts or not status.is_up):
                self._say(f"Pipeline {status.name} has lost a stage or a frame, and recovers. Its streams wait.")
                self._down.add(status.name)
            known = {(loss.stage, loss.node, loss.pid) for loss in last.losses}
            for loss in status.losses:  # a cause may be known only after the stage has been replaced
                if (loss.stage, loss.node, loss.pid) not in known:
                    self._say(f"Pipeline {status.name}: {loss}")
            if status.is_up and status.name in self._down:
                self._say(f"Pipeline {status.name} is back.")
                self._down.remove(status.name)
