"""Keys for what KV blocks hold, so that a request finds what earlier ones have computed of its first tokens."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

from gptj_dist.engine.block_pool import BlockPool
from gptj_dist.engine.plan import KVPrefix
from gptj_dist.engine.request import Request

KEY_BYTES = 16
"""Of a hash: too many to meet the same one by chance, or by intent."""


def keep_blocks(pool: BlockPool, request: Request, start: int) -> None:
    """Gives the request's whole blocks their keys.

    Args:
        start: tokens from here on were computed since the last call.
    """
    first, stop = start // pool.block_size, request.num_computed // pool.block_size
    for block, key in zip(request.blocks[first:stop], _keys(pool, request, stop)[first:], strict=True):
        pool.keep(block, key)


def find_prefix(pool: BlockPool, request: Request) -> KVPrefix | None:
    """The KV of the request's first tokens that the pool's blocks hold. At least one token is left to be computed."""
    blocks = pool.find(_keys(pool, request, (request.num_tokens - 1) // pool.block_size))
    num_tokens = len(blocks) * pool.block_size
    return KVPrefix(None, num_tokens, tuple(blocks), tuple(request.token_ids[:num_tokens])) if blocks else None


def can_begin_with_prefix(request: Request) -> bool:
    """Whether nothing is wanted of the first tokens but their KV."""
    return request.params.prompt_logprobs is None and request.params.pooling is None


def _keys(pool: BlockPool, request: Request, num_blocks: int) -> Sequence[bytes]:
    """The keys of the first blocks. Each covers its tokens, all before them, the adapters, and the client's salt."""
    keys, size = request.block_keys, pool.block_size
    while len(keys) < num_blocks:
        before = keys[-1] if keys else _root(request)
        tokens = array("i", request.token_ids[len(keys) * size : (len(keys) + 1) * size])
        keys.append(_hash(before + tokens.tobytes()))
    return keys[:num_blocks]


def _root(request: Request) -> bytes:
    """What comes before the first block's key."""
    return _hash(repr((request.params.cache_salt, request.params.adapters)).encode())


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=KEY_BYTES).digest()
