"""The coordinator's side of a pipeline's stages: places them as Ray actors, loads, feeds and watches them.

Ray does placement, lifecycle and liveness. Plans and results travel over ZeroMQ edges, in a ring through the
coordinator. Does not import torch.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from gptj_dist.config import DeviceKind
from gptj_dist.engine.plan import Plan, Result
from gptj_dist.errors import GPTJDistError, StageFailedError
from gptj_dist.logs import LogSettings
from gptj_dist.stages.actor import CONCURRENCY_GROUPS, PlacedStage, Stage
from gptj_dist.stages.background import run_in_background
from gptj_dist.stages.blueprint import (
    Blueprint,
    DeviceReport,
    LoadedPipeline,
    choose_dtype,
    count_kv_blocks,
    require_equal_bits,
    require_memory,
)
from gptj_dist.stages.loss import LastWords, StageLoss, death_cause, last_words
from gptj_dist.stages.transport import open_transport
from gptj_dist.stages.transport.edge import AsyncInbound, Outbound
from gptj_dist.stages.transport.frames import EndFrame, PlanFrame, ResultFrame

ACTOR_NAME_PREFIX = "gptj-dist"
END_TIMEOUT_S = 2.0
LAST_WORDS_TIMEOUT_S = 10.0

PLACEMENT_TIMEOUT_S = 600.0
"""How long the cluster may take to find room for all stages and to start their processes."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where stages go.

    Args:
        group: a placement group whose bundle 0 is the coordinator's and bundle i + 1 is stage i's.
        cpus, gpus: resources that each stage takes from its bundle.
        name: the pipeline's unique name; the names of its actors begin with it.
    """

    group: PlacementGroup
    device: DeviceKind
    cpus: float
    gpus: float
    name: str


class StageGroup:
    """Running stages: an `engine.Executor` over actors. Made by `start`.

    Attributes:
        edge_bytes: bytes received over the ring's edges: from the coordinator to stage 0, from stage 0 to stage 1, and
            so on, and from the last stage to the coordinator.
        num_dropped: connections and messages that the receiving ends had dropped when their last frame arrived.
    """

    def __init__(
        self,
        stages: Sequence[Any],
        placed: Sequence[PlacedStage],
        inbound: AsyncInbound,
        outbound: Outbound,
        sentinels: Sequence[Any],
    ) -> None:
        self._stages = stages
        self._placed = placed
        self._inbound = inbound
        self._outbound = outbound
        self._deaths: dict[int, Exception] = {}
        self._is_killed = False
        self.edge_bytes = [0] * (len(stages) + 1)
        self.num_dropped = [0] * (len(stages) + 1)
        self._results: asyncio.Queue[Result | GPTJDistError] = asyncio.Queue()
        self._collector = run_in_background("collector of results", self._collect(), self._note_receive_error)
        self._watchers = [
            run_in_background(f"run() of stage {index}", _finished(sentinel), partial(self._note_death, index))
            for index, sentinel in enumerate(sentinels)
        ]

    @classmethod
    async def start(
        cls, blueprint: Blueprint, placement: Placement, epoch: int, log: LogSettings | None = None
    ) -> tuple[StageGroup, LoadedPipeline]:
        """Creates the actors, loads their weights, sizes their caches and joins them to a ring.

        Args:
            log: log settings of the stages; None logs nothing.

        Raises:
            ConfigurationError: the devices or the checkpoint are not suitable.
            StageFailedError: a stage died while starting, or was not placed in time.
        """
        stages = [
            _stage_actor(placement, index, epoch).remote(spec, epoch, log)
            for index, spec in enumerate(blueprint.stage_specs(placement.device))
        ]
        try:
            return await cls._join(blueprint, stages, epoch)
        except BaseException:
            for stage in stages:
                ray.kill(stage)
            raise

    @classmethod
    async def _join(cls, blueprint: Blueprint, stages: Sequence[Any], epoch: int) -> tuple[StageGroup, LoadedPipeline]:
        placed = await _place(stages)
        devices = [stage.device for stage in placed]
        dtype = choose_dtype(blueprint.config, blueprint.model, devices)
        require_memory(blueprint, dtype, devices)
        require_equal_bits(blueprint.config, dtype, devices)
        num_threads = [blueprint.config.threads_per_stage or n for n in _share_cores(devices)]
        loading = [stage.load.remote(dtype, n) for stage, n in zip(stages, num_threads, strict=True)]
        reports = await _answers(placed, loading)
        pipeline = LoadedPipeline(blueprint, tuple(reports), count_kv_blocks(blueprint, reports))
        await _answers(placed, [stage.allocate.remote(pipeline.num_blocks) for stage in stages])
        transport = open_transport(epoch)
        inbound = transport.async_inbound(ray.util.get_node_ip_address())
        outbound = transport.outbound(placed[0].address)
        next_addresses = [*(stage.address for stage in placed[1:]), inbound.address]
        sentinels = [stage.run.remote(address) for stage, address in zip(stages, next_addresses, strict=True)]
        return cls(stages, placed, inbound, outbound, sentinels), pipeline

    def submit(self, plan: Plan) -> None:
        self._outbound.send(PlanFrame(plan, None))

    async def receive(self) -> Result:
        result = await self._results.get()
        if isinstance(result, GPTJDistError):
            raise result
        return result

    async def stop(self) -> None:
        """Ends the stages: with an end frame if they still receive frames, otherwise by killing them.

        Does nothing after `kill`.
        """
        if self._is_killed:
            return
        self._outbound.send(EndFrame())
        with suppress(TimeoutError):
            async with asyncio.timeout(END_TIMEOUT_S):
                await asyncio.gather(*self._watchers)
        self.kill()

    def kill(self) -> None:
        """Kills the stages at once. Stages that are already dead are ignored."""
        self._is_killed = True
        for task in (self._collector, *self._watchers):
            task.cancel()
        for stage in self._stages:
            ray.kill(stage)
        self._outbound.close()
        self._inbound.close()

    async def _collect(self) -> None:
        while isinstance(frame := await self._inbound.receive(), ResultFrame):
            for edge, traffic in enumerate((*frame.edges, self._inbound.traffic)):
                self.edge_bytes[edge] += traffic.frame_bytes
                self.num_dropped[edge] = traffic.num_dropped
            self._results.put_nowait(frame.result)

    def _note_receive_error(self, error: Exception) -> None:
        self._results.put_nowait(StageFailedError(f"the coordinator can no longer receive results: {error}"))

    def _note_death(self, index: int, error: Exception) -> None:
        """Called when a stage's `run` ends, which means that the stage died unless `stop` was called."""
        self._deaths[index] = error
        self._results.put_nowait(StageFailedError(f"stage {index} {_summary(error)}"))

    async def losses(self) -> list[StageLoss]:
        """The causes of death of the stages that have died."""
        return await asyncio.gather(
            *(_loss(index, self._placed[index], error) for index, error in self._deaths.items())
        )


async def _finished(sentinel: Any) -> None:
    await sentinel


async def _place(stages: Sequence[Any]) -> list[PlacedStage]:
    try:
        async with asyncio.timeout(PLACEMENT_TIMEOUT_S):
            placed: list[PlacedStage] = await asyncio.gather(*(stage.describe.remote() for stage in stages))
            return placed
    except TimeoutError:
        raise StageFailedError(f"the stages were not placed within {PLACEMENT_TIMEOUT_S:.0f} s") from None
    except ray.exceptions.RayError as error:
        raise _own_error(error) or StageFailedError(f"a stage {_summary(error)}") from error


async def _answers(placed: Sequence[PlacedStage], calls: Sequence[Any]) -> list[Any]:
    """What the calls to all stages return."""
    return await asyncio.gather(*(_answer(index, *pair) for index, pair in enumerate(zip(placed, calls, strict=True))))


async def _answer(index: int, placed: PlacedStage, call: Any) -> Any:
    try:
        return await call
    except ray.exceptions.RayError as error:
        raise _own_error(error) or StageFailedError(str(await _loss(index, placed, error))) from error


async def _loss(index: int, placed: PlacedStage, error: Exception) -> StageLoss:
    words = await _last_words(placed)
    has_raised = isinstance(error, ray.exceptions.RayTaskError)
    cause = _summary(error) if has_raised else death_cause(words, str(error))
    return StageLoss(index, cause, placed.process.host, placed.process.pid, words.log_line)


async def _last_words(placed: PlacedStage) -> LastWords:
    if placed.node_id == ray.get_runtime_context().get_node_id():
        return last_words(placed.process)
    there = NodeAffinitySchedulingStrategy(placed.node_id, soft=False)
    try:
        async with asyncio.timeout(LAST_WORDS_TIMEOUT_S):
            words: LastWords = (
                await ray.remote(last_words).options(num_cpus=0, scheduling_strategy=there).remote(placed.process)
            )
            return words
    except (TimeoutError, ray.exceptions.RayError):  # the node is gone, too
        return LastWords()


def _stage_actor(placement: Placement, index: int, epoch: int) -> Any:
    """The actor class of a stage. `ps` shows the name of the class."""
    title = f"{ACTOR_NAME_PREFIX}:{placement.name.rpartition('::')[2]}:stage-{index}"
    return ray.remote(concurrency_groups=CONCURRENCY_GROUPS)(type(title, (Stage,), {})).options(
        name=f"{ACTOR_NAME_PREFIX}/{placement.name}/{epoch}/stage-{index}",
        num_cpus=placement.cpus,
        num_gpus=placement.gpus,
        max_restarts=0,
        scheduling_strategy=PlacementGroupSchedulingStrategy(placement.group, placement_group_bundle_index=index + 1),
    )


def _share_cores(devices: Sequence[DeviceReport]) -> list[int]:
    """Threads for each stage: its machine's cores, shared evenly by the stages on that machine."""
    stages_on = Counter(device.host for device in devices)
    return [max(1, device.num_cores // stages_on[device.host]) for device in devices]


def _own_error(error: Exception) -> GPTJDistError | None:
    """The package's own error inside the error of an actor call; None if it is another kind of error."""
    cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else None
    return cause if isinstance(cause, GPTJDistError) else None


def _summary(error: Exception) -> str:
    """A short description of how a stage ended."""
    if isinstance(error, ray.exceptions.RayTaskError):
        return f"failed: {_first_line(error.cause)}"
    if isinstance(error, ray.exceptions.ActorDiedError):
        lines = str(error).strip().splitlines()
        has_not_started = "creation task" in lines[0]
        return f"failed: {lines[-1]}" if has_not_started else "died"  # the constructor's traceback ends with its error
    return f"failed: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
