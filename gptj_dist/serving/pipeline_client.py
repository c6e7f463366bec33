"""The ingress's client of the pipelines: one handle for all of them, and the feed that brings their tokens."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import ray
from ray import serve
from ray.exceptions import ActorDiedError, RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from gptj_dist.config import DEFAULT_WAKE_TIMEOUT_S
from gptj_dist.engine.limits import EngineLimits
from gptj_dist.engine.mailbox import Delta, Mailbox
from gptj_dist.engine.record import RequestRecord
from gptj_dist.errors import GPTJDistError, InvalidRequestError, NotReadyError, StageFailedError
from gptj_dist.logs import values
from gptj_dist.serving.broadcast import Replies, ask_all, ask_any
from gptj_dist.serving.debug import DownPipeline, PipelineDocument
from gptj_dist.serving.feed import BEAT_S, FeedInbox
from gptj_dist.serving.keys import CALLER, SESSION
from gptj_dist.serving.layer_moves import Recut
from gptj_dist.serving.moves import JointMoves, lasting
from gptj_dist.serving.outages import ServerOutage
from gptj_dist.serving.pipeline import PipelineStatus
from gptj_dist.serving.pipeline_call import PipelineCall
from gptj_dist.serving.pipeline_watch import PipelineWatch, ScalePlan
from gptj_dist.stages.background import run_in_background
from gptj_dist.stages.loss import LastWords, last_words
from gptj_dist.stages.on_node import on_node
from gptj_dist.stages.trace import TracePart
from gptj_dist.stages.transport.frames import FrameFault
from gptj_dist.stages.transport.guard import DropCount

logger = logging.getLogger(__name__)

READY_TIMEOUT_S, PROVE_AGAIN_S = 5.0, 0.1

REPARTITION_TIMEOUT_S = 1800.0
"""Layers of a large model may have to be downloaded first."""

ANSWER_S, PROBE_S = 2.0, 0.5
"""How long a pipeline may take to tell its state, and then to show that its coordinator lives."""


async def _no_wait() -> None:
    """Nothing to do."""


class PipelineClient:
    """A `TokenSource` whose tokens come from whichever pipeline Serve chooses. Made on a running event loop.

    Args:
        handle: to the deployment whose replicas are pipelines.
        on_move: called when a completion moves to another pipeline.
        on_first: awaited when the first pipeline is there, before requests are served.
        on_look: called every second with the status of each pipeline that answers.
        wake_timeout_s: how long a request waits while there is no pipeline.
    """

    def __init__(
        self,
        handle: DeploymentHandle,
        on_move: Callable[[], None] = lambda: None,
        on_first: Callable[[], Awaitable[None]] = _no_wait,
        on_look: Callable[[Sequence[PipelineStatus]], None] = lambda _: None,
        wake_timeout_s: float = DEFAULT_WAKE_TIMEOUT_S,
    ) -> None:
        self._handle = handle
        self._wake_timeout_s = wake_timeout_s
        self._on_move = on_move
        self._on_first = on_first
        self._problem: str | None = None
        self._pipelines = PipelineWatch(_Coordinators(handle, on_look))
        self._looking = run_in_background("look at pipelines", self._pipelines.run(), _note_no_look)
        self._feed = FeedInbox(ray.util.get_node_ip_address(), self._note_failure)
        self._watcher = run_in_background("watch of pipelines", self._watch(), self._note_failure)
        self._limits: EngineLimits | None = None
        self._limits_task = run_in_background("wait for the first pipeline", self._fetch_limits(), self._note_no_limits)

    @property
    def dropped(self) -> DropCount:
        """What arrived at the port for tokens and did not come from a pipeline."""
        return self._feed.dropped

    @property
    def feed_faults(self) -> Counter[FrameFault]:
        """Parts of streams that did not arrive in order."""
        return self._feed.faults

    @property
    def down(self) -> tuple[DownPipeline, ...]:
        """See `PipelineWatch`."""
        return self._pipelines.down

    @property
    def outage(self) -> ServerOutage | None:
        """See `PipelineWatch.server_outage`."""
        return self._pipelines.server_outage

    @property
    def is_deleted(self) -> asyncio.Event:
        """See `PipelineWatch`."""
        return self._pipelines.is_deleted

    def check_health(self) -> None:
        """Raises StageFailedError if no tokens can be received: no more, or none ever."""
        if self._problem is not None:
            raise StageFailedError(self._problem)

    def close(self) -> None:
        """Stops receiving tokens."""
        self._limits_task.cancel()
        self._looking.cancel()
        self._watcher.cancel()
        self._feed.stop()

    def fail_streams(self, error: Exception) -> None:
        """Ends all streams with the error, those that wait for another pipeline or have not begun, too."""
        self._feed.fail(error)

    def limits(self) -> EngineLimits:
        """Implements `TokenSource`. Raises NotReadyError while the model loads."""
        if self._limits is None:
            raise NotReadyError("the model is still loading; try again shortly")
        return self._limits

    def streams(self, records: Sequence[RequestRecord]) -> list[AsyncGenerator[Delta, None]]:
        """Implements `TokenSource`. The streams outlive pipelines, and take turns with those of other keys.

        Raises:
            StageFailedError: see `check_health`.
            Exception: that of `fail_streams`, after that.
        """
        self.check_health()
        self._feed.require_open()
        key, session = CALLER.get(), SESSION.get()
        if key is not None or session is not None:
            records = [replace(record, key=key, session=session) for record in records]
        make_call = partial(PipelineCall, self._handle, self._feed, self._first)
        call, reopen = make_call(records), partial(self._reopen, JointMoves(make_call))
        return [lasting(call.stream(choice), record, reopen, self._on_move) for choice, record in enumerate(records)]

    def _reopen(self, moves: JointMoves, record: RequestRecord) -> AsyncGenerator[Delta, None]:
        self._feed.require_open()  # what it raises ends the request; an error of the stream may have it wait
        return moves.reopen(record)

    async def _first(self, mailbox: Mailbox) -> Delta:
        return await self._pipelines.patiently(mailbox.take, self._wake_timeout_s)

    async def prove_ready(self) -> bool:
        """Returns when a pipeline has recently generated a token, or at once if there is none until one is needed.

        Returns:
            Whether there is a pipeline.

        Raises:
            NotReadyError, StageFailedError: no pipeline can generate one.
        """
        self.limits()
        if self._pipelines.none_is_up.is_set():
            return self._require_sleep()
        proving = asyncio.ensure_future(self._prove())
        failing = asyncio.ensure_future(self._pipelines.none_is_up.wait())
        try:
            await asyncio.wait((proving, failing), timeout=READY_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
            if failing.done():
                return self._require_sleep()
            if not proving.done():
                raise NotReadyError("no pipeline makes a token right now")
            proving.result()
            return True
        finally:
            proving.cancel()
            failing.cancel()
            await asyncio.gather(proving, failing, return_exceptions=True)

    def _require_sleep(self) -> bool:
        """False: there is no pipeline. Raises NotReadyError if one is needed."""
        if not self._pipelines.is_asleep:
            raise NotReadyError(self._pipelines.problem)
        return False

    async def _prove(self) -> None:
        """Tries again if a pipeline dies or there is none, until another one answers."""
        while True:
            try:
                if await ask_any(self._handle, "prove_ready"):
                    return
                await self._pipelines.look()
            except (RayError, RayServeException) as error:
                if isinstance(error, GPTJDistError):  # Ray raises an actor's error as a subclass of both
                    raise
            await asyncio.sleep(PROVE_AGAIN_S)

    async def statuses(self) -> Replies[PipelineStatus]:
        """The status of every pipeline. Raises NotReadyError."""
        self.limits()
        return await ask_all(self._handle, PipelineStatus, "status", timeout_s=ANSWER_S)

    async def documents(self) -> Replies[PipelineDocument]:
        """Every pipeline's part of the response of `GET /debug/pipeline`. Raises NotReadyError."""
        self.limits()
        return await ask_all(self._handle, PipelineDocument, "document", timeout_s=ANSWER_S)

    async def trace_parts(self) -> Replies[TracePart]:
        """The plans that every pipeline has kept. Raises NotReadyError."""
        self.limits()
        return await ask_all(self._handle, TracePart, "trace_part", {})

    async def repartition(self, layers: Sequence[int]) -> tuple[Recut, ...]:
        """Has every pipeline move layers until each stage has as many as asked for.

        Raises:
            InvalidRequestError: the cut does not suit them.
            NotReadyError: there is none yet.
        """
        self.limits()
        replies = await ask_all(self._handle, Recut, "repartition", layers, timeout_s=REPARTITION_TIMEOUT_S)
        if problem := next((recut.problem for recut in replies.given if recut.is_refused), None):
            raise InvalidRequestError(problem, "layers")
        return replies.given

    async def _watch(self) -> None:
        """Ends pipelines that hang. Serve would do so, too, but give them time to finish their requests."""
        while True:
            await asyncio.sleep(BEAT_S)
            for name in self._feed.beat():
                if await asyncio.to_thread(_end_replica, name):
                    logger.error("pipeline hangs and is ended", extra=values(name=name))

    def _note_failure(self, error: Exception) -> None:
        self._problem = f"the ingress can no longer receive tokens: {error}"
        self._feed.fail(StageFailedError(self._problem))

    def _note_no_limits(self, error: Exception) -> None:
        if self._limits is None:
            self._problem = f"the ingress does not find the pipelines: {error}"

    async def _fetch_limits(self) -> None:
        """Waits for the first pipeline. Before that Serve would hold calls back, but clients must get a 503."""
        while self._limits is None:
            try:
                limits = (await self._handle.status.remote()).limits
                await self._on_first()
                self._limits = limits
            except Exception:
                logger.exception("no pipeline yet")
                await asyncio.sleep(1)


def _note_no_look(error: Exception) -> None:
    logger.error("pipelines are no longer looked at", exc_info=error)


class _Coordinators:
    """Implements `Coordinators`: the replicas behind a handle."""

    def __init__(self, handle: DeploymentHandle, on_look: Callable[[Sequence[PipelineStatus]], None]) -> None:
        self._handle = handle
        self._on_look = on_look
        self._actors: dict[str, Any] = {}

    async def statuses(self) -> Sequence[PipelineStatus]:
        try:
            given = (await ask_all(self._handle, PipelineStatus, "status", timeout_s=ANSWER_S)).given
        except (NotReadyError, RayError, RayServeException):
            return ()
        self._on_look(given)
        for status in given:
            if status.name not in self._actors:
                with suppress(ValueError):  # it has just died
                    self._actors[status.name] = await asyncio.to_thread(ray.get_actor, status.actor, "serve")
        return given

    async def plan(self) -> ScalePlan:
        try:
            return await asyncio.to_thread(_plan_of, self._handle.app_name, self._handle.deployment_name)
        except (RayError, RayServeException) as error:
            logger.warning("Serve does not say how many pipelines there shall be", extra=values(error=repr(error)))
            return ScalePlan.UNKNOWN

    async def death_report(self, status: PipelineStatus) -> str | None:
        if (actor := self._actors.pop(status.name, None)) is None:
            return ""
        try:
            async with asyncio.timeout(PROBE_S):
                await actor.__ray_ready__.remote()
        except ActorDiedError as error:
            return str(error)
        except (TimeoutError, RayError):
            self._actors[status.name] = actor
            raise TimeoutError from None
        return None

    async def last_words(self, status: PipelineStatus) -> LastWords | None:
        return await on_node(status.node_id, last_words, status.process)


def _plan_of(app: str, deployment: str) -> ScalePlan:
    """What Serve does about the number of a deployment's replicas."""
    application = serve.status().applications.get(app)
    if application is None or application.status == "DELETING":
        return ScalePlan.DELETED
    if (overview := application.deployments.get(deployment)) is None:
        return ScalePlan.UNKNOWN
    states = set(overview.replica_states)
    if overview.status in ("HEALTHY", "DOWNSCALING") and states <= {"STOPPING"}:
        return ScalePlan.NONE
    is_started = overview.status == "HEALTHY" and "RUNNING" in states
    return ScalePlan.SOME if is_started or overview.status == "UPSCALING" else ScalePlan.UNKNOWN


def _end_replica(name: str) -> bool:
    """Ends a replica's process, even a stopped one. Returns False if that has happened already."""
    try:
        ray.kill(ray.get_actor(name, namespace="serve"))
    except ValueError:
        return False
    return True
