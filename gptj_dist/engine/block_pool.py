"""Counts out KV blocks. Knows neither who holds a block nor where it lies."""

from __future__ import annotations

from collections.abc import Iterable


class BlockPool:
    """A fixed number of blocks of `block_size` tokens; each is free or handed out.

    Args:
        num_blocks: blocks 0 .. num_blocks - 1.
        block_size: tokens a block holds.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def free_blocks(self) -> frozenset[int]:
        return frozenset(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold `num_tokens`."""
        return -(-num_tokens // self.block_size)

    def take(self, num_blocks: int) -> list[int]:
        """Hands out blocks, the most recently returned first: their memory is warm.

        Raises:
            ValueError: fewer are free.
        """
        if num_blocks > len(self._free):
            raise ValueError(f"{num_blocks} blocks wanted, {len(self._free)} free")
        return [self._free.pop() for _ in range(num_blocks)]

    def give_back(self, blocks: Iterable[int]) -> None:
        self._free.extend(blocks)
