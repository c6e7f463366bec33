"""The classes of stages' actors, with what they ask of Ray. `ps` shows the name of a class."""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from gptj_dist.placement import StageResources
from gptj_dist.stages.actor import CONCURRENCY_GROUPS, Stage

ACTOR_NAME_PREFIX = "gptj-dist"


def stage_actor(
    pipeline: str,
    index: int,
    resources: StageResources,
    epoch: int | None,
    strategy: PlacementGroupSchedulingStrategy | NodeAffinitySchedulingStrategy | None,
) -> Any:
    """The actor class of a stage.

    Args:
        epoch: of the ring for which it is made; None for the successor of a stage that moves.
        strategy: None places it where there is room.
    """
    title = f"{ACTOR_NAME_PREFIX}:{pipeline.rpartition('::')[2]}:stage-{index}"
    made_for = f"moved-{time.time_ns()}" if epoch is None else epoch
    return ray.remote(concurrency_groups=CONCURRENCY_GROUPS)(type(title, (Stage,), {})).options(
        name=f"{ACTOR_NAME_PREFIX}/{pipeline}/{made_for}/stage-{index}",
        num_cpus=resources.cpus,
        num_gpus=resources.gpus,
        max_restarts=0,
        scheduling_strategy="DEFAULT" if strategy is None else strategy,
    )


def spare_actor(pipeline: str, node_id: str) -> Any:
    """The actor class of a spare. It asks for no resources: those of the stage whose place it takes stay reserved."""
    title = f"{ACTOR_NAME_PREFIX}:{pipeline.rpartition('::')[2]}:spare"
    return ray.remote(concurrency_groups=CONCURRENCY_GROUPS)(type(title, (Stage,), {})).options(
        num_cpus=0, max_restarts=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)
    )
