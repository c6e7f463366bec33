"""What calls to stages' actors return, and why those failed whose stage has died."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import ray

from gptj_dist.errors import StageFailedError
from gptj_dist.stages.actor import PlacedStage
from gptj_dist.stages.loss import StageLoss, death_cause, last_words
from gptj_dist.stages.on_node import on_node
from gptj_dist.stages.pulse import StageHungError
from gptj_dist.stages.ray_errors import own_error, summary

PLACEMENT_TIMEOUT_S = 600.0
"""How long the cluster may take to find room for all stages and to start their processes."""


async def when_placed(becoming: Mapping[int, Any]) -> dict[int, PlacedStage]:
    """Waits until new actors have a process and have become their stages.

    Args:
        becoming: the call of `Stage.become`, by stage.

    Raises:
        GPTJDistError: the stage's own error.
        StageFailedError: there is no room in time, or a stage died.
    """
    try:
        async with asyncio.timeout(PLACEMENT_TIMEOUT_S):
            return dict(zip(becoming, await asyncio.gather(*becoming.values()), strict=True))
    except TimeoutError:
        raise StageFailedError(f"the stages were not placed within {PLACEMENT_TIMEOUT_S:.0f} s") from None
    except ray.exceptions.RayError as error:
        raise own_error(error) or StageFailedError(f"a stage {summary(error)}") from error


async def answers_of(placed: Mapping[int, PlacedStage], calls: Mapping[int, Any]) -> dict[int, Any]:
    """What calls to stages return, by stage.

    Raises:
        GPTJDistError: the stage's own error.
        StageFailedError: a stage died.
    """
    answers = await asyncio.gather(*(_answer(index, placed[index], call) for index, call in calls.items()))
    return dict(zip(calls, answers, strict=True))


async def _answer(index: int, placed: PlacedStage, call: Any) -> Any:
    try:
        return await call
    except ray.exceptions.RayError as error:
        raise own_error(error) or StageFailedError(str(await find_loss(index, placed, error))) from error


async def find_loss(index: int, placed: PlacedStage, error: Exception) -> StageLoss:
    """The cause of a stage's death, as far as its machine still knows it."""
    words = await on_node(placed.node_id, last_words, placed.process)
    is_known = isinstance(error, ray.exceptions.RayTaskError) or (
        words is not None and isinstance(error, StageHungError)
    )
    cause = summary(error) if is_known else death_cause(words, str(error))
    return StageLoss(index, cause, placed.process.host, placed.process.pid, None if words is None else words.log_line)
