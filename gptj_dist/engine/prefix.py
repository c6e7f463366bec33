"""Keys for what KV blocks hold, so that a request finds what earlier ones have computed of its first tokens."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, islice, takewhile

from gptj_dist.engine.block_pool import BlockPool
from gptj_dist.engine.plan import KVPrefix
from gptj_dist.engine.request import Request
from gptj_dist.params import SamplingParams

KEY_BYTES = 16
"""Of a hash: too many to meet the same one by chance, or by intent."""


def keep_blocks(pool: BlockPool, request: Request, start: int) -> None:
    """Gives the request's whole blocks their keys.

    Args:
        start: tokens from here on were computed since the last call.
    """
    first, stop = start // pool.block_size, request.num_computed // pool.block_size
    for block, key in zip(request.blocks[first:stop], block_keys(pool, request, stop)[first:], strict=True):
        pool.keep(block, key)


def find_prefix(pool: BlockPool, request: Request) -> KVPrefix | None:
    """The KV of the request's first tokens that the pool's blocks hold. At least one token is left to be computed."""
    if not can_begin_with_prefix(request.params):
        return None
    blocks = pool.find(block_keys(pool, request, (request.num_tokens - 1) // pool.block_size))
    num_tokens = len(blocks) * pool.block_size
    return KVPrefix(None, num_tokens, tuple(blocks), tuple(request.token_ids[:num_tokens])) if blocks else None


def find_source(request: Request, starts: Mapping[Request, int]) -> Request | None:
    """A request whose KV of the same prompt earlier plans have computed, so that it can be taken over.

    Args:
        starts: see `NextPlan`.
    """
    num_needed = request.prompt.num_shareable
    holders = request.prompt.holders
    return next((holder for holder in holders if starts.get(holder, holder.num_computed) >= num_needed), None)


def prefix_of(source: Request, block_size: int | None) -> KVPrefix:
    """The KV that other requests of the source's prompt begin with.

    Args:
        block_size: None if blocks cannot be shared.
    """
    num_tokens = source.prompt.num_shareable
    num_blocks = 0 if block_size is None else num_tokens // block_size
    return KVPrefix(source.request_id, num_tokens, tuple(source.blocks[:num_blocks]))


def known_keys(pool: BlockPool, requests: Iterable[Request], max_keys: int) -> list[bytes]:
    """Keys of the blocks that later requests begin with: those that the requests compute, then the free ones.

    Args:
        max_keys: the most that are returned. The least recently used blocks are left out first.
    """
    computed = (key for request in requests for key in block_keys(pool, request, request.num_tokens // pool.block_size))
    return list(islice(dict.fromkeys(chain(computed, pool.kept_keys())), max_keys))


class ComingBlocks:
    """Blocks that the next plan, or later ones, compute for running requests: others can begin with them afterwards."""

    def __init__(self, pool: BlockPool, requests: Iterable[Request] = ()) -> None:
        self._pool = pool
        self._coming: set[bytes] = set()
        for request in requests:
            self.add(request)

    def add(self, request: Request) -> None:
        """Adds those of a request, before the plan computes more of it."""
        size = self._pool.block_size
        self._coming.update(block_keys(self._pool, request, request.num_tokens // size)[request.num_computed // size :])

    def num_tokens(self, request: Request, begins_with: KVPrefix | None) -> int:
        """How many more tokens the request finds if it waits for them."""
        if not self._coming or not can_begin_with_prefix(request.params):
            return 0
        size = self._pool.block_size
        num_found = 0 if begins_with is None else len(begins_with.blocks)
        missing = block_keys(self._pool, request, (request.num_tokens - 1) // size)[num_found:]
        return size * sum(1 for _ in takewhile(self._coming.__contains__, missing))


def can_begin_with_prefix(params: SamplingParams) -> bool:
    """Whether nothing is wanted of a request's first tokens but their KV."""
    return params.prompt_logprobs is None and params.pooling is None


def extend_keys(
    keys: list[bytes], params: SamplingParams, token_ids: Sequence[int], block_size: int, num_blocks: int
) -> None:
    """Adds the keys of the first blocks of a text, as far as they are missing.

    Each covers its tokens, all before them, the adapters, and the client's salt.
    """
    num_known = len(keys)
    if num_known >= num_blocks:
        return
    key = keys[-1] if keys else _hash(repr((params.cache_salt, params.adapters)).encode())
    tokens = array("i", token_ids[num_known * block_size : num_blocks * block_size])
    data, size = tokens.tobytes(), block_size * tokens.itemsize
    for start in range(0, len(data), size):
        key = _hash(key + data[start : start + size])
        keys.append(key)


def block_keys(pool: BlockPool, request: Request, num_blocks: int) -> Sequence[bytes]:
    """The keys of the first blocks."""
    extend_keys(request.block_keys, request.params, request.token_ids, pool.block_size, num_blocks)
    return request.block_keys[:num_blocks]


def key_after(key: bytes, token_ids: Sequence[int]) -> bytes:
    """The key of a block of these tokens after the block with this key."""
    return _hash(key + array("i", token_ids).tobytes())


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=KEY_BYTES).digest()
