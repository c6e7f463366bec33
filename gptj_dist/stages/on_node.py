"""Calls a function about a process on the process's machine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gptj_dist.stages.loss import StageProcess

TIMEOUT_S = 10.0

T = TypeVar("T")


async def on_node(node_id: str, function: Callable[[StageProcess], T], process: StageProcess) -> T | None:
    """Calls a function of a process on the process's node; returns None if the node is gone.

    Args:
        node_id: Ray's name of the node.
    """
    if node_id == ray.get_runtime_context().get_node_id():
        return function(process)
    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    task = ray.remote(function).options(num_cpus=0, scheduling_strategy=there)
    try:
        async with asyncio.timeout(TIMEOUT_S):
            answer: T = await task.remote(process)
            return answer
    except (TimeoutError, ray.exceptions.RayError):
        return None
