"""The pipeline deployment, which autoscales. A replica is one pipeline: its coordinator and stages."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections import Counter, deque
from collections.abc import Awaitable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray import serve

import gptj_dist
from gptj_dist import garbage
from gptj_dist.config import PipelineConfig
from gptj_dist.engine.async_engine import AsyncEngine
from gptj_dist.engine.histogram import Histogram
from gptj_dist.engine.journal import RequestTotals
from gptj_dist.engine.limits import EngineLimits
from gptj_dist.engine.record import RequestRecord
from gptj_dist.engine.routing import Route
from gptj_dist.engine.stats import StageWork
from gptj_dist.errors import GPTJDistError, NotReadyError, PipelineLostError, StageFailedError
from gptj_dist.logs import LogFormat, LogLevel, LogSettings, open_log, values
from gptj_dist.params import AdapterSource, SamplingParams
from gptj_dist.placement import StageResources
from gptj_dist.quantization import weights_text
from gptj_dist.serving.adapters import AdapterChanges, AdapterList, GivenAdapters, Loaded
from gptj_dist.serving.debug import PipelineDocument, PipelineFacts, pipeline_document
from gptj_dist.serving.feed import ReplyTo
from gptj_dist.serving.layer_moves import LayerMoves, MoveTotals, Recut
from gptj_dist.serving.loop_watch import LoopWatch
from gptj_dist.serving.loopback import keep_replica_on_node_address
from gptj_dist.serving.outages import Outages
from gptj_dist.serving.queue_room import QueueRoom
from gptj_dist.serving.scaling import NEEDED
from gptj_dist.serving.sending import StreamSender
from gptj_dist.serving.weights import require_same
from gptj_dist.stages.actor import log_directory, stage_address
from gptj_dist.stages.background import run_in_background
from gptj_dist.stages.blueprint import LoadedPipeline, StageReport, draw_blueprint
from gptj_dist.stages.files import FileSource
from gptj_dist.stages.group import Placement, StageGroup
from gptj_dist.stages.loss import StageLoss, StageProcess
from gptj_dist.stages.peer_files import files_here
from gptj_dist.stages.trace import TracePart
from gptj_dist.stages.transport.frames import FrameFault

logger = logging.getLogger(__name__)

PROOF_LIFETIME_S = 10.0
"""How long a token that came through all stages proves that another can be made."""

MAX_LOSSES_IN_WINDOW, LOSS_WINDOW_S = 5, 120.0
"""Requests survive the loss of a stage, but not this number of losses within this time."""

MAX_RESTARTS_IN_A_ROW = 3
RESTART_DELAY_S = 1.0


@dataclass(frozen=True, kw_only=True)
class PipelineStatus(PipelineFacts):
    """A pipeline now, and its counters since its coordinator started.

    Args:
        actor, process, node_id: the coordinator's; the name of its actor is in Serve's namespace.
        work, coordinator_ns: see `PipelineStats`.
        edge_bytes: see `Ring`; since the stages were joined last.
        port_dropped: what the ports of the stages, the coordinator's port and the outbox have dropped, in this order.
        loop_lag: see `LoopWatch`.
        frame_faults: see `StageGroup.num_faults`.
        back_in_s, recovery_time: see `Outages`.
        start_s: seconds that it took to start.
        adapter_digest: see `AdapterList`.
        num_routed: calls that came here, by the reason, where there was a choice.
        moves: of layers between its stages.
    """

    actor: str
    process: StageProcess
    node_id: str
    limits: EngineLimits
    stages: tuple[StageReport, ...]
    requests: RequestTotals
    work: tuple[StageWork, ...]
    coordinator_ns: int
    edge_bytes: tuple[int, ...]
    port_dropped: tuple[int, ...]
    loop_lag: Histogram
    frame_faults: Mapping[tuple[int, FrameFault], int]
    back_in_s: float
    recovery_time: Histogram
    start_s: float
    adapter_digest: str
    num_routed: Mapping[Route, int]
    moves: MoveTotals


class Pipeline:
    """Coordinator of one pipeline: starts its stages, feeds them, replaces them when one dies.

    The constructor returns when a token can be made, because Serve sends requests from then on.

    Args:
        stages: how the replica's placement group was cut.
        model_name: what clients call the model.
        adapters: those that are there from the start.
        source: a node with the model's files, which others may lack; None if each has its own.
        weights: see `serving.weights`.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits the constructor
        self,
        config: PipelineConfig,
        stages: Sequence[StageResources],
        model_name: str,
        log_format: LogFormat,
        log_level: LogLevel,
        adapters: GivenAdapters,
        source: FileSource | None,
        weights: str,
    ) -> None:
        keep_replica_on_node_address()
        replica = serve.get_replica_context().replica_id
        self._name: str = replica.unique_id
        self._log = LogSettings(log_format, model_name, self._name, log_level)
        self._process = StageProcess.this(Path(open_log(log_directory(), self._log, "coordinator").baseFilename))
        logger.info("pipeline starts", extra=values(pid=self._process.pid))
        self._actor = replica.to_full_id_str()
        placement = Placement(
            group=ray.util.get_current_placement_group(),
            stages=tuple(stages),
            name=self._actor,
        )
        self._adapters = AdapterList(adapters)
        self._reading: set[asyncio.Task[None]] = set()
        self._epoch = 0
        self._end: Exception | None = None
        self._loss_times_s: deque[float] = deque(maxlen=MAX_LOSSES_IN_WINDOW)
        self._group: StageGroup
        began_s = time.monotonic()
        config, self._files = await asyncio.to_thread(files_here, config, source, stage_address(config.interface))
        blueprint = draw_blueprint(config, source)
        self._group, _ = await StageGroup.start(blueprint, placement, self._epoch, self._log)
        self._start_s = time.monotonic() - began_s
        self._outages = Outages(usual_s=self._start_s)
        self._engine = AsyncEngine(self._loaded.make_scheduler(), self._group, self._loaded.limits())
        self._room = QueueRoom(config.max_queued_requests, config.max_queued_tokens, self._engine, self._outages)
        self._moves = LayerMoves(self._name, self._group, self._engine.stats)
        self._weights = weights
        self._sender = StreamSender(self._actor, weights)
        self._num_routed: Counter[Route] = Counter()
        self._driver = run_in_background("driver of the pipeline", self._drive(), self._note_end)
        await self._read_adapters(list(self._adapters.sources.values()))
        await self.prove_ready()
        garbage.settle()
        garbage.collect_when_quiet(lambda: self._engine.scheduler.num_running + self._engine.scheduler.num_waiting)
        self._watch = LoopWatch()
        self._balancer = self._moves.keep_balance_in_background() if config.rebalance else None
        logger.info("pipeline up", extra=values(version=gptj_dist.__version__, pid=os.getpid(), **_shape(self._loaded)))

    async def generate(self, records: Sequence[RequestRecord], reply_to: ReplyTo, route: Route | None = None) -> None:
        """Runs `AsyncEngine.generate_all`, and sends the tokens to an ingress.

        Serve's cancellation closes all completions. A single one is closed when the ingress no longer reads it.

        Args:
            reply_to: stream of the first record; the following streams are those of the others.
            route: why it came to this pipeline; None if there is no other one.

        Raises:
            StageFailedError: a record has tokens of other weights.
            TooManyRequestsError: too many requests or tokens wait already; not for one that was accepted before.
        """
        require_same(records, self._weights)
        if not records[0].is_accepted:
            self._room.require(records[0].key)
        if route is not None:
            self._num_routed[route] += 1
        await self._sender.send(self._engine.generate_all(records), reply_to)

    async def prove_ready(self) -> None:
        """Returns when a token has recently been through every stage; generates one if needed.

        Raises:
            NotReadyError, StageFailedError: no token can be generated.
        """
        if not self._engine.is_up:
            raise NotReadyError(self._ended or self._outages.message)
        last = self._engine.last_token_s
        if last is not None and time.monotonic() - last < PROOF_LIFETIME_S:
            return
        params = SamplingParams(max_tokens=1, temperature=0)
        async with aclosing(self._engine.generate([0], params)) as deltas:
            async for _ in deltas:
                pass

    async def status(self) -> PipelineStatus:
        """The pipeline's status. Cheap, as `/metrics` and the launcher ask for it again and again."""
        return PipelineStatus(
            **vars(self._facts()),
            actor=self._actor,
            process=self._process,
            node_id=ray.get_runtime_context().get_node_id(),
            limits=self._loaded.limits(),
            stages=self._loaded.reports,
            requests=self._engine.journal.totals,
            work=self._engine.stats.stages,
            coordinator_ns=self._engine.stats.coordinator_ns,
            edge_bytes=tuple(self._group.edge_bytes),
            port_dropped=self._port_dropped(),
            loop_lag=self._watch.lag,
            frame_faults=self._group.num_faults,
            back_in_s=self._outages.back_in_s,
            recovery_time=self._outages.recovery_time,
            start_s=self._start_s,
            adapter_digest=self._adapters.digest,
            num_routed=dict(self._num_routed),
            moves=self._moves.totals,
        )

    async def record_routing_stats(self) -> dict[str, Any]:
        """Called by Serve, which passes it to all handles. See `RoutingFacts`."""
        down_s = math.inf if self._end is not None else self._outages.back_in_s
        received, computing = dict(self._sender.received), self._sender.computing()
        return asdict(replace(self._engine.routing_facts(), received=received, computing=computing, down_s=down_s))

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve, which passes it to `scaling.Scale`."""
        return {NEEDED: self._engine.load().pipelines}

    async def load_adapter(self, source: AdapterSource) -> Loaded:
        """Has all stages read an adapter."""
        try:
            await self._group.load_adapter(source)
        except GPTJDistError as error:
            return Loaded("".join(map(str, error.args[:1])))
        return Loaded()

    async def take_adapters(self, changes: AdapterChanges) -> AdapterChanges:
        """Takes over what an ingress knows, and has new adapters read. Returns all that is known here."""
        if new := self._adapters.merge(changes):
            reading = asyncio.create_task(self._read_adapters(new))
            self._reading.add(reading)
            reading.add_done_callback(self._reading.discard)
        return self._adapters.changes

    async def _read_adapters(self, sources: Sequence[AdapterSource]) -> None:
        """Has adapters read before requests need them. Those that cannot be read end such requests."""
        for source in sources:
            if (problem := (await self.load_adapter(source)).problem) is not None:
                logger.error("adapter cannot be read", extra=values(path=source.path, error=problem))

    async def repartition(self, layers: Sequence[int]) -> Recut:
        """Moves layers between the stages until each has as many as asked for, while requests run."""
        return await self._moves.recut(layers)

    async def document(self) -> PipelineDocument:
        """The pipeline's part of the response of `GET /debug/pipeline`."""
        return pipeline_document(self._facts(), self._engine.stats.snapshot(), self._loaded.reports)

    def _facts(self) -> PipelineFacts:
        scheduler = self._engine.scheduler
        return PipelineFacts(
            name=self._name,
            state="lost" if self._end is not None else "up" if self._engine.is_up else "restarting",
            pid=os.getpid(),
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_in_flight=scheduler.num_in_flight,
            num_used_blocks=scheduler.num_used_blocks,
            num_blocks=self._loaded.num_blocks,
            num_preemptions=scheduler.num_preemptions,
            num_restarts=self._epoch,
            losses=tuple(self._outages.losses),
            num_dropped=sum(self._port_dropped()),
            num_frame_faults=sum(self._group.num_faults.values()),
            problem=self._ended or self._outages.problem,
            down_s=self._outages.down_s,
            num_recomputed_tokens=self._engine.journal.totals.num_recomputed_tokens,
            num_adapters=len(self._adapters.sources),
            adapter_requests=scheduler.num_of_adapters(),
            num_cached_blocks=scheduler.pool.num_kept,
            num_evicted_blocks=scheduler.pool.num_evicted,
            num_drafts=self._engine.stats.num_drafts,
            num_accepted=self._engine.stats.num_accepted,
        )

    @property
    def _loaded(self) -> LoadedPipeline:
        return self._group.loaded

    @property
    def _ended(self) -> str | None:
        return None if self._end is None else f"the pipeline has ended: {self._end}"

    def _port_dropped(self) -> tuple[int, ...]:
        return *self._group.num_dropped, self._sender.num_malformed

    async def trace_part(self, since: Mapping[str, int]) -> TracePart:
        """The completed plans that are still kept.

        Args:
            since: pipeline name -> number of the first plan to return; a pipeline that is not named returns all.
        """
        records = self._engine.stats.records(since.get(self._name, 0))
        return TracePart(self._name, self._loaded.blueprint.layers, records)

    def check_health(self) -> None:
        """Called by Serve, which replaces the replica if this raises. It raises if new stages could not be started."""
        if self._ended is not None:
            raise StageFailedError(self._ended)

    async def __del__(self) -> None:
        """Called by Serve when the replica has drained."""
        self._watch.stop()
        self._driver.cancel()
        if self._balancer is not None:
            self._balancer.cancel()
        self._sender.stop()
        await self._group.stop()

    async def _drive(self) -> None:
        """Runs the engine, and replaces each stage that dies. Raises if that cannot be done."""
        while True:
            try:
                await self._engine.run()
            except GPTJDistError as error:
                self._outages.begin(error)
                self._give_up_on_requests(time.monotonic())
                await asyncio.gather(self._note_losses(self._group.losses()), self._restart())

    def _give_up_on_requests(self, now_s: float) -> None:
        """Fails all requests if stages have died again and again: one of the requests may be the cause."""
        self._loss_times_s.append(now_s)
        if len(self._loss_times_s) == MAX_LOSSES_IN_WINDOW and now_s - self._loss_times_s[0] < LOSS_WINDOW_S:
            self._loss_times_s.clear()
            times = f"{MAX_LOSSES_IN_WINDOW} times within {LOSS_WINDOW_S:g} s"
            self._engine.fail(StageFailedError(f"stages of the pipeline died {times}; try again shortly"))

    async def _note_losses(self, reading: Awaitable[list[StageLoss]]) -> None:
        try:
            losses = await reading
        except Exception:  # the new stages do not depend on it
            logger.exception("cause of a loss is unknown")
            return
        for loss in losses:
            known = {"stage": loss.stage, "cause": loss.cause, "node": loss.node, "pid": loss.pid}
            logger.error("stage died", extra=values(**known, last_log_line=loss.last_log_line))
        self._outages.note_losses(losses)

    async def _restart(self) -> None:
        for attempt in range(1, MAX_RESTARTS_IN_A_ROW + 1):
            self._epoch += 1
            try:
                await self._group.join(self._epoch)
            except Exception:  # whatever it is, the next attempt or Serve's next replica may succeed
                logger.exception("restart failed", extra=values(attempt=attempt, most=MAX_RESTARTS_IN_A_ROW))
                await asyncio.sleep(RESTART_DELAY_S * 2 ** (attempt - 1))
            else:
                self._engine.resume(self._loaded.make_scheduler(), self._group, self._loaded.limits())
                back = {"num_restarts": self._epoch, "took_s": self._outages.end(), **_shape(self._loaded)}
                logger.info("pipeline back", extra=values(**back))
                return
        raise StageFailedError(f"the stages could not be restarted in {MAX_RESTARTS_IN_A_ROW} attempts")

    def _note_end(self, error: Exception) -> None:
        """Called when the driver ends. Requests go on elsewhere, and `check_health` has Serve replace the replica."""
        logger.error("pipeline lost", exc_info=error, extra=values(error=str(error)))
        self._end = error
        self._engine.fail(PipelineLostError(f"the pipeline has ended: {error}"))
        self._group.kill()


def _shape(loaded: LoadedPipeline) -> dict[str, object]:
    """For the log: how the model is cut and what it has room for."""
    return {
        "dtype": weights_text(loaded.reports[0].quantized, loaded.reports[0].dtype),
        "layers": "/".join(str(report.layers.num_layers) for report in loaded.reports),
        "kv_tokens": loaded.num_kv_tokens,
    }
