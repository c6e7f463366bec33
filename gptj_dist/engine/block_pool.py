"""Allocates KV blocks and counts the holders of each. Knows no requests and no memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from gptj_dist.sizes import ceil_div


class BlockPool:
    """A fixed number of blocks of `block_size` tokens. Each block is free or has one or more holders.

    Args:
        num_blocks: blocks 0 .. num_blocks - 1.
        block_size: tokens a block holds.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._num_holders = [0] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def free_blocks(self) -> frozenset[int]:
        return frozenset(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold `num_tokens`."""
        return ceil_div(num_tokens, self.block_size)

    def take(self, num_blocks: int) -> list[int]:
        """Takes free blocks; each gets one holder. The last to be given back come first, because their memory is warm.

        Raises:
            ValueError: fewer than `num_blocks` are free.
        """
        if num_blocks > len(self._free):
            raise ValueError(f"{num_blocks} blocks wanted, {len(self._free)} free")
        taken = [self._free.pop() for _ in range(num_blocks)]
        for block in taken:
            self._num_holders[block] = 1
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """Adds a holder to each of the blocks, which have one already."""
        for block in blocks:
            self._num_holders[block] += 1

    def give_back(self, blocks: Iterable[int]) -> None:
        """Removes a holder from each of the blocks. A block without holders is free."""
        for block in blocks:
            self._num_holders[block] -= 1
            if not self._num_holders[block]:
                self._free.append(block)

    def num_holders(self, block: int) -> int:
        return self._num_holders[block]

    def num_freed(self, num_given_back: Mapping[int, int]) -> int:
        """How many blocks would become free.

        Args:
            num_given_back: by block, the number of holders that would give it back.
        """
        return sum(self._num_holders[block] == number for block, number in num_given_back.items())
