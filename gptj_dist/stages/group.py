"""A pipeline's stages as Ray actors: places and loads them, joins them to a ring, and replaces those that have died.

Ray does placement, lifecycle and liveness. Plans and results travel over ZeroMQ edges, in a ring through the
coordinator. Does not import torch.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, defaultdict
from collections.abc import Awaitable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from gptj_dist.engine.plan import Plan, Result
from gptj_dist.errors import StageFailedError
from gptj_dist.logs import LogSettings, values
from gptj_dist.params import AdapterSource
from gptj_dist.placement import StageResources
from gptj_dist.planning.moves import LayerMove
from gptj_dist.stages.actor import PlacedStage, stage_address
from gptj_dist.stages.actor_classes import spare_actor, stage_actor
from gptj_dist.stages.background import run_in_background
from gptj_dist.stages.blueprint import (
    Blueprint,
    DeviceReport,
    LoadedPipeline,
    StageReport,
    choose_dtype,
    require_equal_bits,
)
from gptj_dist.stages.calls import answers_of, find_loss, when_placed
from gptj_dist.stages.departures import DrainedNodes, start_successor, watch_departures
from gptj_dist.stages.loss import StageLoss, end_process
from gptj_dist.stages.on_node import cannot_be_reached, node_doors, on_node
from gptj_dist.stages.ray_errors import own_error, summary
from gptj_dist.stages.relocation import MovedLayer, carry_out
from gptj_dist.stages.ring import Ring
from gptj_dist.stages.room import count_kv_blocks, recut_reports, require_memory, require_room
from gptj_dist.stages.transport import open_transport
from gptj_dist.stages.transport.frames import FrameFault
from gptj_dist.stages.transport.leash import LeashPost

logger = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 5.0
LEAVE_TIMEOUT_S = 30.0
"""How long a stage may take to answer, and to end its step and leave its ring. One that takes longer is replaced."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where stages go.

    Args:
        group: a placement group. Bundle 0 is the coordinator's; the next ones are those of the stages without a node
            of their own, in their order.
        stages: what each stage asks of Ray.
        name: the pipeline's unique name; the names of its actors begin with it.
    """

    group: PlacementGroup
    stages: tuple[StageResources, ...]
    name: str

    def strategy(self, index: int) -> PlacementGroupSchedulingStrategy | NodeAffinitySchedulingStrategy:
        """How Ray places a stage: in its bundle, or on the node of its own; if that one is gone, on any other."""
        node_id = self.stages[index].node_id
        if node_id is not None:
            return NodeAffinitySchedulingStrategy(node_id, soft=True)
        bundle = 1 + sum(stage.node_id is None for stage in self.stages[:index])
        return PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=bundle)


@dataclass(frozen=True, slots=True)
class _Member:
    """A loaded stage."""

    actor: Any
    placed: PlacedStage
    report: StageReport


@dataclass(frozen=True, slots=True)
class _Newcomer:
    """An actor that becomes a stage; `becoming` resolves to its `PlacedStage`."""

    actor: Any
    becoming: Any


class StageGroup:
    """The stages of a pipeline, an `engine.Executor`. Made by `start`. After an error of `receive`, call `join`.

    Args:
        log: log settings of the stages; None logs nothing.
    """

    def __init__(self, blueprint: Blueprint, placement: Placement, log: LogSettings | None) -> None:
        self._blueprint = blueprint
        self._placement = placement
        self._log = log
        self._specs = blueprint.stage_specs([stage.device for stage in placement.stages])
        self._members: dict[int, _Member] = {}
        self._dropped: dict[int, PlacedStage] = {}
        self._spares: dict[str, list[Any]] = defaultdict(list)
        self._loaded: LoadedPipeline | None = None
        self._endings: set[asyncio.Task[None]] = set()
        self._faults: Counter[tuple[int, FrameFault]] = Counter()
        self._ring: Ring | None = None
        self._successors: dict[int, _Member] = {}
        self._departures: asyncio.Task[None] | None = None
        self._leash = LeashPost(stage_address(blueprint.config.interface))

    @classmethod
    async def start(
        cls, blueprint: Blueprint, placement: Placement, epoch: int, log: LogSettings | None = None
    ) -> tuple[StageGroup, LoadedPipeline]:
        """Creates a group and calls `join` for the first time.

        Raises:
            ConfigurationError, StageFailedError: see `join`.
        """
        group = cls(blueprint, placement, log)
        loaded = await group.join(epoch)
        group._departures = run_in_background(
            "watch of departures", watch_departures(DrainedNodes().ask, group._nodes, group._move), _note_no_watch
        )
        return group, loaded

    async def join(self, epoch: int) -> LoadedPipeline:
        """Joins all stages to a new ring, without any requests.

        Stages that live keep their processes and weights. The others are started, and load their weights.

        Args:
            epoch: number of the ring; larger than that of the ring before.

        Raises:
            ConfigurationError: the devices or the checkpoint are not suitable.
            StageFailedError: a stage died, or was not placed in time. Another call tries again.
        """
        if self._ring is not None and not self._ring.is_closed:
            self._ring.close()
            for index in self._ring.deaths:
                self._drop(index)
        for index, successor in self._successors.items():
            if index in self._members:
                self._drop(index)
            self._members[index] = successor
        self._successors.clear()
        newcomers = self._create(epoch)
        try:
            await self._renew(epoch)
            newcomers |= self._create(epoch, besides=newcomers)
            loaded = await self._load(newcomers)
        except BaseException:
            for index, newcomer in newcomers.items():
                self._members.pop(index, None)
                ray.kill(newcomer.actor)
            raise
        transport = open_transport(epoch)
        inbound = transport.async_inbound(stage_address(self._blueprint.config.interface))
        members = [self._members[index] for index in range(len(self._specs))]
        outbound = transport.outbound(members[0].placed.address)
        next_addresses = [*(member.placed.address for member in members[1:]), inbound.address]
        runs = [member.actor.run.remote(address) for member, address in zip(members, next_addresses, strict=True)]
        doors = node_doors()

        async def is_cut_off(index: int) -> bool:
            return await cannot_be_reached(doors.get(members[index].placed.node_id))

        self._ring = Ring(
            inbound, outbound, runs, lambda index: members[index].actor.pulse.remote(), is_cut_off, self._faults
        )
        self._create_spares()
        return loaded

    @property
    def edge_bytes(self) -> Sequence[int]:
        """See `Ring`; those of the present ring."""
        return self._present_ring.edge_bytes

    @property
    def num_faults(self) -> Mapping[tuple[int, FrameFault], int]:
        """Faults of frames in all rings, by edge: those that did not arrive as they were sent."""
        return self._faults

    @property
    def num_dropped(self) -> Sequence[int]:
        """See `Ring`; those of the present ring."""
        *of_stages, of_ring = self._present_ring.num_dropped
        return [*of_stages, of_ring + self._leash.dropped.total]

    def submit(self, plan: Plan) -> None:
        self._present_ring.submit(plan)

    async def receive(self) -> Result:
        return await self._present_ring.receive()

    async def load_adapter(self, source: AdapterSource) -> None:
        """Has the stages that live read an adapter. One that is replaced reads it when a request needs it.

        Raises:
            CheckpointError: a stage cannot read it.
        """
        calls = [member.actor.load_adapter.remote(source) for member in self._members.values()]
        for answer in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(answer, ray.exceptions.RayTaskError) and (error := own_error(answer)) is not None:
                raise error

    async def move_layer(self, move: LayerMove) -> MovedLayer:
        """Moves a layer between two stages, between two steps, while requests run.

        Raises: ConfigurationError, StageFailedError: it cannot move, or a stage was lost; it has not moved.
        """
        loaded = self.loaded
        if move.before != loaded.blueprint.layers or self._present_ring.is_closed:
            raise StageFailedError("a stage is being replaced; try again when the pipeline is back")
        require_room(loaded, move.after)

        def commit() -> None:
            self._blueprint = replace(self._blueprint, layers=move.after)
            self._specs = self._blueprint.stage_specs([spec.device for spec in self._specs])
            reports = recut_reports(self._blueprint.model, loaded.reports, move.after)
            self._loaded = replace(loaded, blueprint=self._blueprint, reports=reports)
            for index, report in enumerate(reports):
                self._members[index] = replace(self._members[index], report=report)

        giver, receiver = (self._members[index].actor for index in (move.giver, move.receiver))
        return await carry_out(move, giver, receiver, self._present_ring, commit)

    @property
    def loaded(self) -> LoadedPipeline:
        """The stages as they are cut now."""
        assert self._loaded is not None, "join() comes first"
        return self._loaded

    async def stop(self) -> None:
        """Ends the stages: after the frames that are under way if all still receive frames, otherwise at once."""
        if self._ring is not None:
            await self._ring.end()
        self.kill()

    def kill(self) -> None:
        """Kills all stages at once. A second call does nothing."""
        if self._departures is not None:
            self._departures.cancel()
        if self._ring is not None:
            self._ring.close()
        for member in [*self._members.values(), *self._successors.values()]:
            ray.kill(member.actor)
        for spares in self._spares.values():
            for spare in spares:
                ray.kill(spare)
        self._members.clear()
        self._spares.clear()
        self._leash.close()

    def losses(self) -> Awaitable[list[StageLoss]]:
        """The causes of death of the stages that have died in the present ring. Call it before `join`."""
        deaths = self._present_ring.deaths
        return asyncio.gather(
            *(find_loss(index, self._members[index].placed, error) for index, error in deaths.items())
        )

    @property
    def _present_ring(self) -> Ring:
        assert self._ring is not None, "join() comes first"
        return self._ring

    def _create(self, epoch: int, besides: Collection[int] = ()) -> dict[int, _Newcomer]:
        """Takes a spare, or creates an actor, for each stage that has none."""
        missing = set(range(len(self._specs))).difference(self._members, besides)
        return {index: self._spare(index, epoch) or self._new(index, epoch) for index in sorted(missing)}

    def _nodes(self) -> dict[int, str]:
        """The nodes of the stages that have no successor."""
        return {i: member.placed.node_id for i, member in self._members.items() if i not in self._successors}

    async def _move(self, index: int) -> None:
        """Starts a stage on any other node while the old one computes; the next `join` puts it in its place."""
        member = self._members[index]
        assert self._loaded is not None
        actor = self._stage_actor(index, None).remote(self._leash.address)
        threads = self._blueprint.config.threads_per_stage
        spec = self._specs[index]
        placed, report = await start_successor(actor, spec, self._log, self._loaded, threads)
        if self._members.get(index) is not member or self._specs[index] != spec:  # it was replaced, or layers moved
            ray.kill(actor)
            return
        self._successors[index] = _Member(actor, placed, report)
        self._present_ring.interrupt(f"stage {index} moves to another node")

    def _stage_actor(self, index: int, epoch: int | None) -> Any:
        """The actor class of a stage; for no epoch, of its successor anywhere else."""
        placement = self._placement
        strategy = None if epoch is None else placement.strategy(index)
        return stage_actor(placement.name, index, placement.stages[index], epoch, strategy)

    def _new(self, index: int, epoch: int) -> _Newcomer:
        actor = self._stage_actor(index, epoch).remote(self._leash.address)
        return _Newcomer(actor, actor.become.remote(self._specs[index], epoch, self._log))

    def _spare(self, index: int, epoch: int) -> _Newcomer | None:
        """A spare on the node of the stage that was dropped, which takes over its GPUs; None for none."""
        before = self._dropped.get(index)
        if before is None or not self._spares[before.node_id]:
            return None
        actor = self._spares[before.node_id].pop()
        return _Newcomer(actor, actor.become.remote(self._specs[index], epoch, self._log, before.visible_devices))

    def _create_spares(self) -> None:
        """Creates spares on all nodes that have fewer than they should. Does not wait for them."""
        for node_id in {member.placed.node_id for member in self._members.values()}:
            for _ in range(self._blueprint.config.spares - len(self._spares[node_id])):
                self._spares[node_id].append(spare_actor(self._placement.name, node_id).remote(self._leash.address))

    async def _renew(self, epoch: int) -> None:
        """Has the living stages leave their ring. Drops those that cannot."""

        async def renew(index: int, member: _Member) -> None:
            try:
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    await member.actor.leave.remote()
                async with asyncio.timeout(LEAVE_TIMEOUT_S):
                    address = await member.actor.renew.remote(epoch, self._specs[index].layers)
            except (TimeoutError, ray.exceptions.RayError) as error:
                logger.error("stage could not leave its ring", extra=values(stage=index, error=summary(error)))
                self._drop(index)
            else:
                self._members[index] = replace(member, placed=replace(member.placed, address=address))

        await asyncio.gather(*(renew(index, member) for index, member in list(self._members.items())))

    def _drop(self, index: int) -> None:
        """Makes sure that a stage is dead, which frees its memory and its place."""
        member = self._members.pop(index)
        self._dropped[index] = member.placed
        ray.kill(member.actor)
        # A process that hangs does not read Ray's message.
        ending = asyncio.create_task(on_node(member.placed.node_id, end_process, member.placed.process))
        self._endings.add(ending)
        ending.add_done_callback(self._endings.discard)

    async def _load(self, newcomers: Mapping[int, _Newcomer]) -> LoadedPipeline:
        """Has newcomers load their weights, makes them members, and sizes the caches."""
        blueprint, config = self._blueprint, self._blueprint.config
        placed = {index: member.placed for index, member in self._members.items()} | await when_placed(
            {index: newcomer.becoming for index, newcomer in newcomers.items()}
        )
        devices = [placed[index].device for index in range(len(self._specs))]
        kept = next(iter(self._members.values()), None)
        dtype = choose_dtype(config, blueprint.model, devices) if kept is None else kept.report.dtype
        require_memory(blueprint, dtype, devices)
        require_equal_bits(config, dtype, devices)
        shares = _share_cores(devices)
        loading = {
            index: newcomer.actor.load.remote(
                dtype,
                config.threads_per_stage or shares[index],
                config.threads_per_stage or devices[index].num_cores,
            )
            for index, newcomer in newcomers.items()
        }
        for index, report in (await answers_of(placed, loading)).items():
            self._members[index] = _Member(newcomers[index].actor, placed[index], self._as_before(index, report))
        reports = tuple(self._members[index].report for index in range(len(self._specs)))
        loaded = LoadedPipeline(blueprint, reports, count_kv_blocks(blueprint, reports))
        is_resized = self._loaded is None or loaded.num_blocks != self._loaded.num_blocks
        resized = {index: self._members[index].actor for index in (self._members if is_resized else newcomers)}
        await answers_of(placed, {i: actor.allocate.remote(loaded.num_blocks) for i, actor in resized.items()})
        self._loaded = loaded
        return loaded

    def _as_before(self, index: int, report: StageReport) -> StageReport:
        """The report of a stage that replaces another one in the same memory, in which caches have their room."""
        before = None if self._loaded is None else self._loaded.reports[index]
        if before is None or before.device.memory_pool != report.device.memory_pool:
            return report
        return replace(report, free_bytes=before.free_bytes)


def _note_no_watch(error: Exception) -> None:
    logger.error("stages do not move from nodes that will end", extra=values(error=str(error)))


def _share_cores(devices: Sequence[DeviceReport]) -> list[int]:
    """Threads for each stage: its machine's cores, shared evenly by the stages on that machine."""
    stages_on = Counter(device.host for device in devices)
    return [max(1, device.num_cores // stages_on[device.host]) for device in devices]
