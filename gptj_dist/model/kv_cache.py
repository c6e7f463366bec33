"""Keys and values of the tokens computed so far, as a CPU keeps them.

On a CPU memory that was never touched costs nothing, so each request has a contiguous region as long as the context and
attention reads it in place. A GPU has a `block_cache`. Neither decides who gets what: accounting is the scheduler's.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from gptj_dist.model.inputs import MicroBatch

MAP_NORESERVE = 0x4000
"""Linux's flag for "do not count this memory as used until it is touched"; Python's mmap does not name it."""


Places = tuple[Tensor, Tensor]
"""Where the keys and values of a micro-batch's rows go: regions and positions, int64 [rows] each."""


class KVCache(Protocol):
    """Where a stage keeps keys and values. How attention gets at them is between the two."""

    def add(self, request_id: int) -> None:
        """Meets a request that has no tokens yet."""

    def extend(self, request_id: int, blocks: Iterable[int]) -> None:
        """Gives the request more blocks, behind those it has."""

    def release(self, request_id: int) -> None:
        """Forgets the request; its memory may be given to the next one at once."""


class RegionCache:
    """A contiguous region for each request, in float32, touched only as far as tokens are written. For CPUs.

    float32 whatever the model's type: this CPU multiplies float32 straight out of the cache, and bfloat16 only after a
    copy (one query row, 512 tokens of 16 heads x 256: 0.39 ms against 3.9 ms).

    Args:
        num_regions: the most requests at once.
        max_tokens: the most tokens of a request; `read` may ask for as many, even unwritten ones, which are zeros.
    """

    def __init__(self, num_layers: int, num_regions: int, max_tokens: int, num_heads: int, head_dim: int) -> None:
        shape = (num_regions, num_layers, 2, num_heads, max_tokens, head_dim)
        self._memory = _lazy_memory(4 * math.prod(shape))
        self._regions = torch.frombuffer(self._memory, dtype=torch.float32).view(shape)
        self._region_bytes = self._regions[0].nbytes
        self._layers = [(layer[:, 0], layer[:, 1]) for layer in self._regions.unbind(1)]
        self._free = list(range(num_regions - 1, -1, -1))
        self._region_of: dict[int, int] = {}
        self._views_of: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def add(self, request_id: int) -> None:
        region = self._region_of[request_id] = self._free.pop()
        self._views_of[request_id] = [(kv[0].transpose(1, 2), kv[1]) for kv in self._regions[region].unbind()]

    def extend(self, request_id: int, blocks: Iterable[int]) -> None:
        """Nothing to do: a region is as long as it can get."""

    def release(self, request_id: int) -> None:
        del self._views_of[request_id]
        region = self._region_of.pop(request_id)
        self._free.append(region)
        self._give_back(region)

    def locate(self, batch: MicroBatch) -> Places:
        """Where the rows' keys and values go, the same in every layer."""
        regions = [self._region_of[span.request_id] for span in batch.spans for _ in range(span.num_tokens)]
        return torch.tensor(regions), batch.positions

    def write(self, layer: int, places: Places, keys: Tensor, values: Tensor) -> None:
        """Stores what the rows have, [rows, num_heads, head_dim] each."""
        regions, positions = places
        layer_keys, layer_values = self._layers[layer]
        layer_keys[regions, :, positions] = keys
        layer_values[regions, :, positions] = values.to(layer_values.dtype)

    def read(self, layer: int, request_id: int, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Keys [num_heads, head_dim, tokens] and values [num_heads, tokens, head_dim] of the first tokens, in place."""
        keys, values = self._views_of[request_id][layer]
        return keys.narrow(2, 0, num_tokens), values.narrow(1, 0, num_tokens)

    def _give_back(self, region: int) -> None:
        """Returns the region's pages to the machine; they read as zeros from now on.

        Zeros also keep one request's infinities from ever reaching another through the masked columns of a tile.
        """
        start, stop = region * self._region_bytes, (region + 1) * self._region_bytes
        first_page, last_page = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
        flat = self._regions[region].view(-1)
        if first_page >= last_page:
            flat.zero_()
            return
        self._memory.madvise(mmap.MADV_DONTNEED, first_page, last_page - first_page)
        flat[: (first_page - start) // 4].zero_()
        flat[(last_page - start) // 4 :].zero_()


def _lazy_memory(num_bytes: int) -> mmap.mmap:
    """Zeros that take no memory until they are written, even if there are more of them than the machine has memory."""
    return mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
