"""Requests that begin and stop to run, and their blocks. Decides nothing.

Args of all functions:
    running: the running requests, in their order.
    pool: of the KV blocks.
"""

from __future__ import annotations

from bisect import insort

from gptj_dist.engine.block_pool import BlockPool
from gptj_dist.engine.plan import KVPrefix
from gptj_dist.engine.request import Request, run_order


def start(running: list[Request], pool: BlockPool, request: Request, prefix: KVPrefix | None) -> None:
    """Adds a request. It begins with the KV that is there."""
    insort(running, request, key=run_order)
    if prefix is not None:
        request.blocks = list(prefix.blocks)
        pool.share(request.blocks)
        request.num_computed = prefix.num_tokens
        if prefix.source_id is None and not request.has_run:
            request.num_cached_tokens = min(prefix.num_tokens, len(request.prompt_ids))
    request.is_running = request.has_run = True
    if request.prompt.num_shareable:
        request.prompt.holders.append(request)


def stop(running: list[Request], pool: BlockPool, request: Request) -> list[int]:
    """Frees the blocks of a request, of a beam search those of all beams. Returns the ids that the stages must drop."""
    released: list[int] = []
    for one in request.beams:
        running.remove(one)
        one.is_running = False
        if one.prompt.num_shareable:
            one.prompt.holders.remove(one)
        if one.source is None:
            released.append(one.request_id)
        _empty(pool, one)
        one.source = None
    return released


def begin_anew(pool: BlockPool, beam: Request, shares_blocks: bool) -> None:
    """Lets a beam begin with the whole blocks of its source. The stages copy the rest, or all."""
    assert beam.source is not None, "another beam's KV is taken over"
    _empty(pool, beam)
    if shares_blocks:
        num_blocks = beam.source.num_computed // pool.block_size
        beam.blocks, beam.block_keys = beam.source.blocks[:num_blocks], beam.source.block_keys[:num_blocks]
        pool.share(beam.blocks)
        beam.num_computed = num_blocks * pool.block_size


def _empty(pool: BlockPool, request: Request) -> None:
    pool.give_back(request.blocks)
    request.blocks, request.num_computed = [], 0
