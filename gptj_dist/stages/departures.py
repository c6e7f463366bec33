"""Stages leave nodes that will end before they do: another node starts them while the old ones still compute.

A node will end if Ray drains it: `gptj-dist leave`, `ray drain-node`, an autoscaler, the notice of a spot machine.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Container, Mapping
from typing import Any

import ray

from gptj_dist.errors import GPTJDistError
from gptj_dist.logs import LogSettings, values
from gptj_dist.stages.actor import PlacedStage
from gptj_dist.stages.blueprint import LoadedPipeline, StageReport, StageSpec
from gptj_dist.stages.ray_errors import own_error, summary

logger = logging.getLogger(__name__)

PERIOD_S = 1.0
"""Time between two looks at which nodes will end."""

MOVE_TIMEOUT_S = 120.0
"""How long another node may take to find room for a stage, to start its process and to load it."""

RETRY_S = 10.0
ASK_TIMEOUT_S = 5.0


class DrainedNodes:
    """Asks the cluster which nodes will end."""

    def __init__(self) -> None:
        from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled, and without stubs

        self._gcs = GcsClient(address=ray.get_runtime_context().gcs_address)

    async def ask(self) -> Mapping[str, float]:
        """When each of these nodes ends, by its id, in seconds since 1970; infinity where nothing was said about it.

        Empty if the cluster does not answer.
        """
        try:
            found = await asyncio.to_thread(self._gcs.get_draining_nodes, timeout=ASK_TIMEOUT_S)
        except Exception:  # of any kind that Ray has for a GCS that restarts
            return {}
        return {node_id: deadline_ms / 1000 or math.inf for node_id, deadline_ms in found.items()}


async def end_nears(
    ask: Callable[[], Awaitable[Mapping[str, float]]],
    node_id: str,
    margin_s: float,
    clock: Callable[[], float] = time.time,
) -> None:
    """Returns when a node will end within `margin_s`.

    Args:
        ask: gives the times at which nodes will end, by their ids, on the clock.
    """
    while True:
        if (await ask()).get(node_id, math.inf) - clock() <= margin_s:
            return
        await asyncio.sleep(PERIOD_S)


async def watch_departures(
    ask: Callable[[], Awaitable[Container[str]]],
    nodes: Callable[[], Mapping[int, str]],
    move: Callable[[int], Awaitable[None]],
) -> None:
    """Has each stage move that is on a node which will end, one after the other. Runs until it is cancelled.

    Args:
        ask: gives the ids of the nodes that will end.
        nodes: gives the node of each stage.
        move: moves a stage; if it fails, it is called again later.
    """
    while True:
        await asyncio.sleep(PERIOD_S)
        ending = await ask()
        for index, node_id in sorted(nodes().items()):
            if node_id not in ending:
                continue
            logger.info("stage moves, as its node will end", extra=values(stage=index, node=node_id))
            try:
                await move(index)
            except (GPTJDistError, TimeoutError, ray.exceptions.RayError) as error:
                told = summary(error) if isinstance(error, ray.exceptions.RayError) else str(error) or "no room in time"
                logger.error("stage could not move", extra=values(stage=index, error=told))
                await asyncio.sleep(RETRY_S)


async def start_successor(
    actor: Any, spec: StageSpec, log: LogSettings | None, loaded: LoadedPipeline, num_threads: int | None
) -> tuple[PlacedStage, StageReport]:
    """Has a new actor become and load a stage that another one still computes. Kills it if that fails.

    Args:
        num_threads: None takes an even share of its machine's cores.

    Raises:
        TimeoutError: no node has room, or it takes too long.
        GPTJDistError: it cannot load.
    """
    before = loaded.reports[spec.layers.stage]
    try:
        async with asyncio.timeout(MOVE_TIMEOUT_S):
            placed: PlacedStage = await actor.become.remote(spec, 0, log)
            num_cores = placed.device.num_cores
            num_there = 1 + sum(report.device.host == placed.device.host for report in loaded.reports)
            share = num_threads or max(1, num_cores // num_there)
            report: StageReport = await actor.load.remote(before.dtype, share, num_threads or num_cores)
            await actor.allocate.remote(loaded.num_blocks)
    except BaseException as error:
        ray.kill(actor)
        if isinstance(error, ray.exceptions.RayTaskError) and (own := own_error(error)) is not None:
            raise own from error
        raise
    return placed, report
