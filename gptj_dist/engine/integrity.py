"""Invariants of requests and of the blocks they hold. They must hold after every call of the scheduler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from gptj_dist.engine.block_pool import BlockPool
from gptj_dist.engine.request import Prompt, Request, run_order
from gptj_dist.engine.waiting import WaitingQueue


def invariant(holds: bool, message: str) -> None:
    """Raises AssertionError if the condition is false."""
    if not holds:
        raise AssertionError(message)


def check_blocks(running: Sequence[Request], pool: BlockPool) -> None:
    """Each block is free, or held as often as the pool says; only requests of one prompt hold one in common."""
    held = Counter(block for request in running for block in request.blocks)
    invariant(pool.free_blocks.isdisjoint(held), "a held block is free")
    invariant(len(pool.free_blocks) == pool.num_free, "a block is free twice")
    miscounted = [block for block, number in held.items() if number != pool.num_holders(block)]
    invariant(not miscounted, "a block has two holders, or is believed to")
    invariant(len(held) + pool.num_free == pool.num_blocks, "a block is lost")
    places: dict[int, tuple[Prompt, int]] = {}
    for request in running:
        invariant(len(request.blocks) == pool.blocks_for(request.num_computed), "blocks do not match computed tokens")
        for index, block in enumerate(request.blocks):
            place = (request.prompt, index)
            invariant(places.setdefault(block, place) == place, "a block is shared by strangers")
            is_read_only = (index + 1) * pool.block_size <= request.prompt.num_shareable
            invariant(held[block] == 1 or is_read_only, "a shared block is written to")


def check_requests(running: Sequence[Request], waiting: WaitingQueue, awaited_ids: Sequence[int]) -> None:
    """Requests are in order and know what they do.

    Args:
        awaited_ids: whom the plans in flight sample for, once for each time that they do.
    """
    everyone = [*running, *waiting]
    invariant(list(running) == sorted(running, key=run_order), "running requests are out of order")
    invariant(list(waiting) == sorted(waiting, key=run_order), "waiting requests are out of order")
    invariant(len(awaited_ids) == len(set(awaited_ids)), "two plans in flight sample for one request")
    for request in everyone:
        is_awaited = request.request_id in awaited_ids
        invariant(request.is_awaiting_token == is_awaited, "a token is awaited in vain")
        invariant(request.num_uncomputed >= 0, "more tokens computed than there are")
        is_holder = request.is_running and request.prompt.num_shareable > 0
        invariant(request.prompt.holders.count(request) == is_holder, "a prompt's holders are wrong")
        invariant(all(holder in running for holder in request.prompt.holders), "a prompt has a holder that is gone")
    idle = [request for request in waiting if request.num_computed or request.blocks]
    invariant(not idle, "a waiting request holds something")
    invariant(all(request.is_running for request in running), "a running request does not know that it runs")
    invariant(not any(request.is_running for request in waiting), "a waiting request believes that it runs")
    num_tokens = sum(request.num_expected for request in waiting)
    invariant(num_tokens == waiting.num_tokens, "waiting tokens are miscounted")
