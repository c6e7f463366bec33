"""Chooses the cache of keys and values, and with it the attention, for a device."""

from __future__ import annotations

import torch

from gptj_dist.config import BLOCK_SIZE_TOKENS, ModelConfig
from gptj_dist.model.attention import KVCache
from gptj_dist.model.block_cache import BlockCache
from gptj_dist.model.native.attention import NativeCache
from gptj_dist.model.native.library import load_library
from gptj_dist.model.regions import RegionCache


def cache_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The type of keys and values in the cache of a model that is computed in `dtype`."""
    if device.type != "cpu":
        return dtype
    return torch.bfloat16 if dtype == torch.bfloat16 and load_library() is not None else torch.float32


def has_blocks(device: torch.device) -> bool:
    """Whether the device's cache has blocks, which requests can share; otherwise it has a region for each request."""
    return device.type != "cpu" or load_library() is not None


def make_cache(
    config: ModelConfig,
    num_layers: int,
    num_blocks: int,
    max_requests: int,
    max_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
) -> KVCache:
    """Makes the cache of a stage, in `cache_dtype`.

    Args:
        num_blocks: blocks in all, of `BLOCK_SIZE_TOKENS` each.
        max_requests: the most requests at once.
        max_tokens: the most tokens of one request.
    """
    heads, head_dim = config.num_heads, config.head_dim
    kept = cache_dtype(dtype, device)
    if device.type != "cpu":
        return BlockCache(num_layers, num_blocks, BLOCK_SIZE_TOKENS, max_tokens, heads, head_dim, kept, device)
    library = load_library()
    if library is None:
        return RegionCache(num_layers, max_requests, max_tokens, heads, head_dim)
    return NativeCache(library, num_layers, num_blocks, max_tokens, heads, head_dim, kept)
