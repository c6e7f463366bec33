"""Moves a layer between two stages of a running ring: the coordinator's part. Does not import torch.

`docs/decisions/0044-moving-layers.md` says why each cut that a failure can leave behind is a whole one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray

from gptj_dist.errors import StageFailedError
from gptj_dist.logs import values
from gptj_dist.planning.moves import LayerMove
from gptj_dist.stages.ray_errors import own_error, summary
from gptj_dist.stages.ring import CUT_OFF, Ring
from gptj_dist.stages.transport.frames import FrameFaultError
from gptj_dist.stages.transport.parcels import AbandonedError

if TYPE_CHECKING:
    from gptj_dist.stages.moving import MoveReport

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MovedLayer:
    """A layer that has moved.

    Args:
        pause_s: time in which neither of its stages could compute, because of the switch.
        took_s: from the start of its loading until the switch.
        num_bytes_ahead, num_bytes_rest: keys and values that were sent before the switch, and in it.
    """

    move: LayerMove
    pause_s: float
    took_s: float
    num_bytes_ahead: int
    num_bytes_rest: int


async def carry_out(move: LayerMove, giver: Any, receiver: Any, ring: Ring, commit: Callable[[], None]) -> MovedLayer:
    """Moves a layer between two stages, given by their actors, while the ring computes.

    Args:
        commit: called when both stages have switched. If it is not called, both can go back.

    Raises:
        GPTJDistError: the layer could not be loaded, or a stage was lost. It has not moved.
    """
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    has_switched = False
    try:
        address = await receiver.prepare_move.remote(move)
        await asyncio.gather(giver.send_ahead.remote(move, address), receiver.take_ahead.remote())
        has_switched = True
        await ring.switch(move)
        took_over: MoveReport = await receiver.end_move.remote()
        if ring.is_closed:
            raise StageFailedError(CUT_OFF)
        commit()
    except BaseException as error:
        if not has_switched:  # else the ring has ended, and the stages find their way back when they join the next one
            await _abandon(giver, receiver)
        if isinstance(error, ray.exceptions.RayError | AbandonedError | FrameFaultError):
            raise own_error(error) or StageFailedError(f"{move} did not move: a stage {summary(error)}") from error
        raise
    took_s = loop.time() - began_s
    try:
        gave: MoveReport = await giver.end_move.remote()
    except (ray.exceptions.RayError, AbandonedError):  # its ring has ended since; the layer has moved all the same
        gave = took_over
    begin_ns = max(took_over.span.begin_ns, gave.span.begin_ns)
    pause_s = max(0, took_over.span.end_ns - begin_ns) * 1e-9
    return MovedLayer(move, pause_s, took_s, gave.num_bytes_ahead, gave.num_bytes_rest)


async def _abandon(giver: Any, receiver: Any) -> None:
    calls = [actor.cancel_move.remote() for actor in (giver, receiver)]
    calls += [actor.forget_move.remote() for actor in (giver, receiver)]
    for answer in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(answer, BaseException):  # a stage that has died has nothing to forget
            logger.info("stage did not forget a move", extra=values(error=repr(answer)))
