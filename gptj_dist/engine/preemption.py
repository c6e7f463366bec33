"""Chooses which requests give up their blocks for another one. Changes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from gptj_dist.engine.block_pool import BlockPool
from gptj_dist.engine.request import Request


def choose_victims(
    num_blocks: int, request: Request, running: Sequence[Request], planned: Collection[Request], pool: BlockPool
) -> list[Request] | None:
    """Requests that come after this one, the last first, without which the blocks are free. None if they never are.

    A beam search stops as a whole, and not while its beams are computed: it would have to take their tokens while it
    waits.

    Args:
        running: in their order.
        planned: requests in the plan that is being made.
    """
    num_free = pool.num_free
    victims: list[Request] = []
    num_given_back: Counter[int] = Counter()
    for victim in reversed(running):
        if num_free >= num_blocks or victim.leader is request.leader:
            break
        is_busy = victim in planned or (victim.group is not None and victim.is_awaiting_token)
        if victim.blocks and not is_busy:
            victims.append(victim)
            num_given_back.update(victim.blocks)
            num_free = pool.num_free + pool.num_freed(num_given_back)
    return victims if num_free >= num_blocks else None
