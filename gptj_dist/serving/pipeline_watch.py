"""What an ingress knows of its pipelines: which of them are down, why and since when.

A pipeline's coordinator reports lost stages, but not that it has died itself, or hangs. So each ingress asks all of
them again and again. Knows Ray only by `Coordinators`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Protocol, TypeVar

from gptj_dist.errors import NotReadyError
from gptj_dist.logs import time_text, values
from gptj_dist.serving.debug import DownPipeline
from gptj_dist.serving.outages import MIN_BACK_IN_S, ServerOutage
from gptj_dist.serving.pipeline import PipelineStatus
from gptj_dist.stages.loss import LastWords, death_cause

logger = logging.getLogger(__name__)

T = TypeVar("T")

LOOK_S = 1.0
MAX_DOWN = 16
SILENT = "does not answer"
NO_PIPELINE = "no pipeline is up: Ray Serve has to start one"


class ScalePlan(Enum):
    """What Serve does about the number of pipelines, as far as it matters when none answers."""

    NONE = "none"
    """There shall be none until a request comes."""
    SOME = "some"
    """It starts some because they are needed, or has done so."""
    DELETED = "deleted"
    """It deletes the application."""
    UNKNOWN = "unknown"
    """It replaces or repairs them, or does not say."""


class Coordinators(Protocol):
    """The coordinators' processes."""

    async def statuses(self) -> Sequence[PipelineStatus]:
        """Of the pipelines that take requests, as far as they answer."""

    async def death_report(self, status: PipelineStatus) -> str | None:
        """What Ray says of the death of a coordinator; None if it lives. Raises TimeoutError if it does not answer."""

    async def last_words(self, status: PipelineStatus) -> LastWords | None:
        """What a dead coordinator has written; None if its node does not answer."""

    async def plan(self) -> ScalePlan:
        """What Serve does about the number of pipelines."""


@dataclass(frozen=True, slots=True)
class _Outage:
    """The outage of a pipeline; `cause` continues "its coordinator"."""

    status: PipelineStatus
    cause: str
    began_s: float
    began_at: str
    is_dead: bool = False
    last_log_line: str | None = None

    @property
    def problem(self) -> str:
        process = self.status.process
        last = "" if self.last_log_line is None else f"; its last log line: {self.last_log_line}"
        return f"its coordinator (pid {process.pid} on {process.host}) {self.cause}{last}"


class PipelineWatch:
    """Made on a running event loop.

    Args:
        clock: seconds, monotonic.

    Attributes:
        none_is_up: set while no pipeline takes requests and answers; not before the first one has.
        is_deleted: set when Serve deletes the application.
        is_asleep: whether there is none because none was needed: a request makes Serve start one, or has done so.
        start_s: how long the last pipeline took to start.
    """

    def __init__(self, coordinators: Coordinators, clock: Callable[[], float] = time.monotonic) -> None:
        self._coordinators = coordinators
        self._clock = clock
        self._known: dict[str, PipelineStatus] = {}
        self._seen_s: dict[str, float] = {}
        self._outages: dict[str, _Outage] = {}
        self._readers: set[asyncio.Task[None]] = set()
        self._last_up_s: float | None = None
        self._looking = asyncio.Lock()
        self.none_is_up = asyncio.Event()
        self.is_deleted = asyncio.Event()
        self.is_asleep = False
        self.start_s = 0.0

    @property
    def down(self) -> tuple[DownPipeline, ...]:
        """The pipelines whose coordinators have died or do not answer, until others take their place."""
        now_s = self._clock()
        return tuple(
            DownPipeline(name, outage.problem, round(now_s - outage.began_s, 3), outage.began_at)
            for name, outage in self._outages.items()
        )

    @property
    def server_outage(self) -> ServerOutage | None:
        """None if a pipeline computes."""
        now_s = self._clock()
        dead = [
            ServerOutage(now_s - outage.began_s, max(outage.status.start_s - (now_s - outage.began_s), MIN_BACK_IN_S))
            for outage in self._outages.values()
        ]
        up = [status for name, status in self._known.items() if name not in self._outages]
        if any(status.is_up for status in up):
            return None
        ages_s = [now_s - self._seen_s[status.name] for status in up]
        restarting = [
            ServerOutage((status.down_s or 0.0) + age_s, max(status.back_in_s - age_s, MIN_BACK_IN_S))
            for status, age_s in zip(up, ages_s, strict=True)
        ]
        return min((*dead, *restarting), key=lambda outage: outage.back_in_s, default=None)

    @property
    def none_up_for_s(self) -> float:
        """For how long no pipeline has taken requests and answered; 0 before the first one has."""
        return 0.0 if self._last_up_s is None else self._clock() - self._last_up_s

    @property
    def problem(self) -> str:
        """Why no pipeline is up, as far as it is known."""
        return "; ".join(map(str, self.down)) or NO_PIPELINE

    async def patiently(self, take: Callable[[], Awaitable[T]], timeout_s: float) -> T:
        """Awaits what pipelines give. While one is up, that may take as long as it likes.

        Args:
            timeout_s: how long to wait while there is none.

        Raises:
            NotReadyError: none has been up for that time.
        """
        while True:
            try:
                async with asyncio.timeout(timeout_s):
                    return await take()
            except TimeoutError:
                if (none_up_for_s := self.none_up_for_s) >= timeout_s:
                    retry_after_s = math.ceil(max(self.start_s - none_up_for_s, MIN_BACK_IN_S))
                    message = f"no pipeline has started within {timeout_s:g} s; try again later"
                    raise NotReadyError(message, retry_after_s) from None

    async def run(self) -> None:
        """Looks again and again."""
        while True:
            await asyncio.sleep(LOOK_S)
            await self.look()

    async def look(self) -> None:
        """Asks all pipelines, and finds out what has become of those that do not answer any more."""
        async with self._looking:
            await self._look()

    async def _look(self) -> None:
        statuses = {status.name: status for status in await self._coordinators.statuses()}
        for name, status in statuses.items():
            if name not in self._known:
                self._forget_one()
            self._known[name] = status
            self._seen_s[name] = self._clock()
            self.start_s = status.start_s
            self._outages.pop(name, None)
        silent = [status for name, status in self._known.items() if name not in statuses]
        await asyncio.gather(*map(self._examine, silent))
        if self._known.keys() - self._outages.keys():
            self.none_is_up.clear()
            self.is_asleep, self._last_up_s = False, self._clock()
        elif self._last_up_s is not None:
            plan = await self._coordinators.plan()
            self.is_asleep = plan is ScalePlan.NONE or (self.is_asleep and plan is ScalePlan.SOME)
            if self.is_asleep:
                self._outages.clear()
            if plan is ScalePlan.DELETED:
                self.is_deleted.set()
            self.none_is_up.set()

    async def _examine(self, status: PipelineStatus) -> None:
        try:
            report = await self._coordinators.death_report(status)
        except TimeoutError:
            if status.name not in self._outages:
                self._note(_Outage(status, SILENT, self._clock(), time_text(time.time())))
            return
        del self._known[status.name], self._seen_s[status.name]
        began = self._outages.pop(status.name, _Outage(status, SILENT, self._clock(), time_text(time.time())))
        if report is not None:  # else Serve stops it
            self._note(replace(began, cause=death_cause(LastWords(), report), is_dead=True))
            reader = asyncio.create_task(self._read_words(status, report))
            self._readers.add(reader)
            reader.add_done_callback(self._readers.discard)

    async def _read_words(self, status: PipelineStatus, report: str) -> None:
        """Adds what the process has written, for which another node may need a while."""
        words = await self._coordinators.last_words(status)
        outage = self._outages.get(status.name)
        if outage is not None:
            line = None if words is None else words.log_line
            self._note(replace(outage, cause=death_cause(words, report), last_log_line=line))

    def _note(self, outage: _Outage) -> None:
        self._outages[outage.status.name] = outage
        if len(self._outages) > MAX_DOWN:
            self._forget_one()
        logger.error("pipeline down", extra=values(pipeline=outage.status.name, problem=outage.problem))

    def _forget_one(self) -> None:
        """Forgets the pipeline that died first: another one has taken its place."""
        if (name := next((name for name, outage in self._outages.items() if outage.is_dead), None)) is not None:
            del self._outages[name]
