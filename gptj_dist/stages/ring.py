"""The coordinator's part of a ring: sends plans to stage 0, receives results from the last stage, watches all stages.

A ring lasts for one epoch. It ends with the first loss. Then `StageGroup` joins its stages to the next ring.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial

from gptj_dist.engine.plan import Plan, Result
from gptj_dist.errors import GPTJDistError, StageFailedError
from gptj_dist.logs import values
from gptj_dist.planning.moves import LayerMove
from gptj_dist.stages.background import run_in_background
from gptj_dist.stages.pulse import PERIOD_S, Pulse, Pulses
from gptj_dist.stages.ray_errors import frame_fault, summary
from gptj_dist.stages.transport.edge import AsyncInbound, Outbound, edge_names
from gptj_dist.stages.transport.frames import (
    EndFrame,
    FrameFault,
    FrameFaultError,
    PlanFrame,
    ResultFrame,
    SwitchFrame,
)

logger = logging.getLogger(__name__)

END_TIMEOUT_S = 2.0
CUT_OFF = "a stage was lost while a layer moved; the layers stay where they were"


class Ring:
    """An `engine.Executor` over running stages.

    Args:
        inbound, outbound: the coordinator's ends of the edges from the last stage and to stage 0.
        runs: for each stage, what resolves or fails when the stage no longer computes frames.
        feel: asks a stage, by its index, for its pulse.
        is_cut_off: finds out whether the node of a stage cannot be reached.
        faults: counts faults of frames, by edge.

    Attributes:
        is_closed: whether `close` was called.
        deaths: for each stage that has died, the error of its run.
        edge_bytes: bytes received over the ring's edges: from the coordinator to stage 0, from stage 0 to stage 1, and
            so on, and from the last stage to the coordinator.
        num_dropped: connections and messages that the receiving ends had dropped when their last frame arrived.
    """

    def __init__(
        self,
        inbound: AsyncInbound,
        outbound: Outbound,
        runs: Sequence[Awaitable[None]],
        feel: Callable[[int], Awaitable[Pulse]],
        is_cut_off: Callable[[int], Awaitable[bool]],
        faults: Counter[tuple[int, FrameFault]],
    ) -> None:
        self._inbound = inbound
        self._outbound = outbound
        self._feel = feel
        self._is_cut_off = is_cut_off
        self._faults = faults
        self._pulses = Pulses(len(runs))
        self._num_sent = self._num_landed = 0
        self._has_landed = False
        self.is_closed = False
        self.deaths: dict[int, Exception] = {}
        self.edge_bytes = [0] * (len(runs) + 1)
        self.num_dropped = [0] * (len(runs) + 1)
        self._results: asyncio.Queue[Result | GPTJDistError] = asyncio.Queue()
        self._switch: asyncio.Future[None] | None = None
        self._collector = run_in_background("collector of results", self._collect(), self._note_receive_error)
        self._watch = run_in_background("watch of pulses", self._watch_pulses(), self._note_watch_error)
        self._watchers = [
            run_in_background(f"run() of stage {index}", _finished(running), partial(self._note_death, index))
            for index, running in enumerate(runs)
        ]

    def submit(self, plan: Plan) -> None:
        self._num_sent += 1
        self._outbound.send(PlanFrame(plan, None))

    async def switch(self, move: LayerMove) -> None:
        """Has the stages of a prepared move switch, after the plans in flight; returns when the last one has.

        Raises:
            StageFailedError: the ring has ended.
        """
        if self.is_closed:
            raise StageFailedError(CUT_OFF)
        self._num_sent += 1
        self._outbound.send(SwitchFrame(move))
        self._switch = asyncio.get_running_loop().create_future()
        await self._switch

    async def receive(self) -> Result:
        result = await self._results.get()
        if isinstance(result, GPTJDistError):
            raise result
        return result

    def interrupt(self, reason: str) -> None:
        """Ends the ring although all stages live, so that `StageGroup` joins another one."""
        self._results.put_nowait(StageFailedError(reason))

    async def end(self) -> None:
        """Lets the stages end their runs, if frames still pass all of them; then closes the ring."""
        if self.is_closed:
            return
        self._outbound.send(EndFrame())
        with suppress(TimeoutError):
            async with asyncio.timeout(END_TIMEOUT_S):
                await asyncio.gather(*self._watchers)
        self.close()

    def close(self) -> None:
        """Sends, receives and watches no more. A second call does nothing."""
        self.is_closed = True
        if self._switch is not None and not self._switch.done():
            self._switch.set_exception(StageFailedError(CUT_OFF))
        for task in (self._collector, self._watch, *self._watchers):
            task.cancel()
        self._outbound.close()
        self._inbound.close()

    async def _collect(self) -> None:
        while isinstance(frame := await self._inbound.receive(), ResultFrame | SwitchFrame):
            if isinstance(frame, SwitchFrame):
                self._note_switched()
                continue
            for edge, traffic in enumerate((*frame.edges, self._inbound.traffic)):
                self.edge_bytes[edge] += traffic.frame_bytes
                self.num_dropped[edge] = traffic.num_dropped
            self._num_landed += 1
            self._has_landed = True
            self._pulses.note_result([(timing.end_ns - timing.begin_ns) * 1e-9 for timing in frame.result.timings])
            self._results.put_nowait(frame.result)

    def _note_switched(self) -> None:
        self._num_landed += 1
        self._has_landed = True
        self._pulses.restart()
        if self._switch is not None and not self._switch.done():
            self._switch.set_result(None)

    async def _watch_pulses(self) -> None:
        """Finds stages that hang, until a frame is lost. While results arrive, or none is due, it asks no stage."""
        asked: dict[int, asyncio.Future[Pulse]] = {}
        while (edge := self._pulses.silent_edge(self._num_sent, self._num_landed)) is None:
            self._has_landed = False
            await asyncio.sleep(PERIOD_S)
            if self._has_landed or self._num_sent == self._num_landed:
                self._pulses.restart()
                continue
            self._pulses.pass_time()
            for index in range(len(self._watchers)):
                if index in asked and asked[index].done() and asked[index].exception() is None:
                    self._pulses.note_answer(index, asked[index].result())
                if index not in asked or asked[index].done():
                    asked[index] = asyncio.ensure_future(self._feel(index))
            await self._look_for_cuts()
            for index, error in self._pulses.hung().items():
                self._note_death(index, error)
        self._note_fault(edge, FrameFaultError(FrameFault.MISSING, "all stages wait for one"))

    async def _look_for_cuts(self) -> None:
        """Finds out which of the silent stages are on nodes that cannot be reached."""
        suspects = self._pulses.suspects()
        for index, is_cut in zip(suspects, await asyncio.gather(*map(self._is_cut_off, suspects)), strict=True):
            if is_cut:
                self._pulses.note_cut_off(index)

    def _note_watch_error(self, error: Exception) -> None:
        self._results.put_nowait(StageFailedError(str(error)))

    def _note_receive_error(self, error: Exception) -> None:
        if isinstance(error, FrameFaultError):
            self._note_fault(len(self._watchers), error)
        else:
            self._results.put_nowait(StageFailedError(f"the coordinator can no longer receive results: {error}"))

    def _note_fault(self, edge: int, error: FrameFaultError) -> None:
        """Called when an edge did not bring the next frame. All stages live, and can join the next ring."""
        name = edge_names(len(self._watchers))[edge]
        self._faults[edge, error.fault] += 1
        logger.error("frame fault", extra=values(edge=name, fault=str(error.fault), detail=error.detail))
        failure = StageFailedError(f"on the edge {name} {error}")
        failure.__cause__ = error
        self._results.put_nowait(failure)

    def _note_death(self, index: int, error: Exception) -> None:
        """Called when a stage's run ends: the stage died, unless an edge failed or `end` was called."""
        if (fault := frame_fault(error)) is not None:
            self._note_fault(index, fault)
        elif index not in self.deaths:
            self.deaths[index] = error
            self._results.put_nowait(StageFailedError(f"stage {index} {summary(error)}"))


async def _finished(running: Awaitable[None]) -> None:
    await running
