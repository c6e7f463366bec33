"""Invariants of requests and of the blocks they hold. They are true between any two plans."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from gptj_dist.engine.block_pool import BlockPool
from gptj_dist.engine.request import Request, run_order
from gptj_dist.engine.waiting import WaitingQueue


def invariant(holds: bool, message: str) -> None:
    """Raises AssertionError with the message unless the invariant holds."""
    if not holds:
        raise AssertionError(message)


def check_blocks(running: Sequence[Request], pool: BlockPool, max_drafts: int) -> None:
    """Each block is free, or has as many holders as the pool says. Only requests with the same first tokens, adapters
    and salt share blocks."""
    held = Counter(block for request in running for block in request.blocks)
    invariant(pool.free_blocks.isdisjoint(held), "a held block is free")
    num_spare = pool.blocks_for(max_drafts)  # of drafts that were rejected
    invariant(len(pool.free_blocks) == pool.num_free, "a block is free twice")
    miscounted = [block for block, number in held.items() if number != pool.num_holders(block)]
    invariant(not miscounted, "the pool miscounts the holders of a block")
    invariant(len(held) + pool.num_free == pool.num_blocks, "a block is lost")
    contents: dict[int, object] = {}
    for request in running:
        num_needed = pool.blocks_for(request.num_computed)
        invariant(num_needed <= len(request.blocks) <= num_needed + num_spare, "blocks do not match computed tokens")
        for index, block in enumerate(request.blocks):
            if held[block] == 1:
                continue
            stop = (index + 1) * pool.block_size
            content = (request.token_ids[:stop], request.params.adapters, request.params.cache_salt)
            invariant(contents.setdefault(block, content) == content, "requests of different prompts share a block")
            invariant(stop <= request.num_computed, "a shared block is written to")


def check_requests(
    running: Sequence[Request], waiting: WaitingQueue, known_ids: Collection[int], sampled_ids: Sequence[int]
) -> None:
    """Requests are in order, and their state matches the queues and the plans in flight.

    Args:
        known_ids: those of all requests.
        sampled_ids: the request of each token that the plans in flight sample; it may have ended.
    """
    ids = [request.request_id for request in (*running, *waiting)]
    invariant(set(ids) == set(known_ids) and len(ids) == len(known_ids), "a request is lost")
    awaited_ids = [id_ for id_ in sampled_ids if id_ in known_ids]
    invariant(list(running) == sorted(running, key=run_order), "running requests are out of order")
    invariant(list(waiting) == sorted(waiting, key=run_order), "waiting requests are out of order")
    invariant(len(awaited_ids) == len(set(awaited_ids)), "two plans in flight sample for one request")
    for request in (*running, *waiting):
        is_awaited = request.request_id in awaited_ids
        invariant(
            request.is_awaiting_token == is_awaited,
            "a request awaits a token that no plan samples, or does not await its token",
        )
        invariant(request.num_uncomputed >= 0, "more tokens computed than there are")
        is_holder = request.is_running and request.prompt.num_shareable > 0
        invariant(request.prompt.holders.count(request) == is_holder, "a prompt's holders are wrong")
        invariant(
            all(holder in running for holder in request.prompt.holders), "a prompt has a holder that does not run"
        )
    idle = [request for request in waiting if request.num_computed or request.blocks]
    invariant(not idle, "a waiting request holds blocks or computed tokens")
    invariant(all(request.is_running for request in running), "a running request is not marked as running")
    invariant(not any(request.is_running for request in waiting), "a waiting request is marked as running")
    num_tokens = sum(request.num_expected for request in waiting)
    invariant(num_tokens == waiting.num_tokens, "waiting tokens are miscounted")
    num_of_keys = Counter(request.key for request in waiting if not request.has_run)
    invariant(num_of_keys == waiting.num_of_keys, "waiting requests of a key are miscounted")
    num_new_tokens = sum(request.num_expected for request in waiting if not request.has_run)
    invariant(num_new_tokens == sum(waiting.num_tokens_of_keys.values()), "waiting tokens of keys are miscounted")
