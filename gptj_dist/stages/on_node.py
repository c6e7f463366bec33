"""Calls a function about a process on the process's machine, and finds out whether a machine can be reached."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gptj_dist.stages.loss import StageProcess

TIMEOUT_S = 10.0
DIAL_TIMEOUT_S = 1.0

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


def node_doors() -> Mapping[str, tuple[str, int]]:
    """Host and port of Ray's raylet on each living node, by the node's id."""
    return {
        node["NodeID"]: (node["NodeManagerAddress"], node["NodeManagerPort"]) for node in ray.nodes() if node["Alive"]
    }


async def cannot_be_reached(door: tuple[str, int] | None) -> bool:
    """Whether packets do not come through to the machine. One that refuses the connection can be reached.

    Args:
        door: where a process listens there; None counts as reachable.
    """
    if door is None:
        return False
    try:
        async with asyncio.timeout(DIAL_TIMEOUT_S):
            _, writer = await asyncio.open_connection(*door)
    except ConnectionRefusedError:
        return False
    except (TimeoutError, OSError):
        return True
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()
    return False
