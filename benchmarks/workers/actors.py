"""Starts the stages of a pipeline as actors on a local Ray, without Serve; Ray stops with them."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import ray
from ray.util.placement_group import placement_group

from gptj_dist.config import PipelineConfig
from gptj_dist.operate.launch.environment import LOCAL_RAY_ENVIRONMENT
from gptj_dist.serving.sizing import size_stages
from gptj_dist.stages.blueprint import LoadedPipeline, draw_blueprint
from gptj_dist.stages.group import Placement, StageGroup

NICENESS = "RAY_worker_niceness"


@asynccontextmanager
async def start_actors(config: PipelineConfig) -> AsyncIterator[tuple[StageGroup, LoadedPipeline]]:
    """Starts the stages on this machine with a server's priority, and stops them when the context ends."""
    os.environ[NICENESS] = LOCAL_RAY_ENVIRONMENT[NICENESS]
    ray.init(
        address="local",
        _node_ip_address="127.0.0.1",
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    try:
        group, pipeline = await StageGroup.start(draw_blueprint(config), _place(config), epoch=0)
        try:
            yield group, pipeline
        finally:
            await group.stop()
    finally:
        ray.shutdown()


def _place(config: PipelineConfig) -> Placement:
    size = size_stages(config, config.num_stages, lambda resource: float(ray.cluster_resources().get(resource, 0.0)))
    bundles = placement_group(size.bundles)
    ray.get(bundles.ready())
    return Placement(bundles, size.stages, name="benchmark")
