"""Which blocks each request has, and the memory of each layer, for caches that keep keys and values in blocks."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gptj_dist.model.attention import Attention
from gptj_dist.model.inputs import MicroBatch, Span
from gptj_dist.model.rotary import RotaryTable
from gptj_dist.sizes import ceil_div


class LayerKV(NamedTuple):
    """The memory of one layer: keys and values, [blocks, ...] each. A block's part of each is contiguous."""

    keys: Tensor
    values: Tensor

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return self.keys[0].nbytes + self.values[0].nbytes


class ChangedBlocks:
    """Blocks that were written since they were last taken. Threads may note and take at the same time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks: set[int] = set()

    def note(self, blocks: Iterable[int]) -> None:
        """Adds blocks. Call it after they were written: who takes one reads it later, and so reads all of it."""
        with self._lock:
            self._blocks.update(blocks)

    def take(self) -> list[int]:
        """All blocks that were noted, ascending; forgets them."""
        with self._lock:
            taken, self._blocks = self._blocks, set()
        return sorted(taken)


class BlockTables(ABC):
    """Implements what caches in blocks share of `KVCache`: a table for each request, of its blocks in order.

    A request holds only the blocks that its tokens need. The scheduler decides which request gets which block.

    Args:
        num_layers: layers at first.
        num_blocks, block_size: blocks in all, and tokens in each.
        max_tokens: the most tokens of a request.
        new_layer: makes the memory of a layer.

    Attributes:
        new_layer: see above.
    """

    def __init__(
        self, num_layers: int, num_blocks: int, block_size: int, max_tokens: int, new_layer: Callable[[], LayerKV]
    ) -> None:
        self.block_size = block_size
        self.new_layer = new_layer
        self._num_blocks = num_blocks
        self._table_width = ceil_div(max_tokens, block_size)
        self._tables: dict[int, Tensor] = {}
        self._num_blocks_of: dict[int, int] = {}
        self._layers = [new_layer() for _ in range(num_layers)]
        self._given: set[int] = set()
        self._changed: ChangedBlocks | None = None

    @property
    def num_layers(self) -> int:
        """Layers now."""
        return len(self._layers)

    def add(self, request_id: int) -> None:
        self._tables[request_id] = torch.zeros(self._table_width, dtype=torch.int32)
        self._num_blocks_of[request_id] = 0

    def extend(self, request_id: int, blocks: Iterable[int]) -> None:
        """Raises IndexError if there is no such block."""
        numbers = tuple(blocks)
        if not all(0 <= number < self._num_blocks for number in numbers):
            raise IndexError(f"request {request_id} is given blocks {numbers} of a cache of {self._num_blocks}")
        first = self._num_blocks_of[request_id]
        stop = self._num_blocks_of[request_id] = first + len(numbers)
        self._tables[request_id][first:stop] = torch.tensor(numbers, dtype=torch.int32)
        self._given.update(numbers)

    def copy(self, source_id: int, request_id: int, num_tokens: int) -> None:
        num_blocks = ceil_div(num_tokens, self.block_size)
        sources, targets = (self._tables[id_][:num_blocks].tolist() for id_ in (source_id, request_id))
        for block_from, block_to in zip(sources, targets, strict=True):
            if block_from != block_to:
                for kv in self._layers:
                    kv.keys[block_to] = kv.keys[block_from]
                    kv.values[block_to] = kv.values[block_from]
        if self._changed is not None:
            self._changed.note(targets)

    def release(self, request_id: int) -> None:
        del self._tables[request_id], self._num_blocks_of[request_id]

    def tables(self, spans: Sequence[Span]) -> Tensor:
        """The block tables of the spans' requests, int32 [spans, most blocks of a request] on the host.

        Raises:
            IndexError: a request has no block for a token, which would be written to another request's block.
        """
        for span in spans:
            if span.stop > self.block_size * self._num_blocks_of[span.request_id]:
                raise IndexError(f"request {span.request_id} has no block for position {span.stop - 1}")
        return torch.stack([self._tables[span.request_id] for span in spans])

    def layer(self, index: int) -> LayerKV:
        """The memory of one layer; `index` counts from 0 within the stage."""
        return self._layers[index]

    def insert_layer(self, index: int, kv: LayerKV) -> None:
        """Adds a layer before the one with that index."""
        self._layers.insert(index, kv)

    def remove_layer(self, index: int) -> LayerKV:
        """Removes a layer; returns its memory, with what is in it."""
        return self._layers.pop(index)

    def watch(self) -> ChangedBlocks:
        """Notes what is written from now on, and all that may be there already. Any thread may call it."""
        self._changed = changed = ChangedBlocks()  # before `_given` is read: what is given later is noted when written
        changed.note(self._given.copy())
        return changed

    def unwatch(self) -> None:
        """Notes no more."""
        self._changed = None

    @property
    def is_watched(self) -> bool:
        """Whether `note_written` has a use."""
        return self._changed is not None

    def note_written(self, request_id: int, start: int, stop: int) -> None:
        """The request's tokens at these positions have been written, in every layer."""
        if self._changed is not None:
            blocks = slice(start // self.block_size, ceil_div(stop, self.block_size))
            self._changed.note(self._tables[request_id][blocks].tolist())

    @abstractmethod
    def attention(self, batch: MicroBatch, rotary: RotaryTable) -> Attention:
        """The attention of one micro-batch."""
