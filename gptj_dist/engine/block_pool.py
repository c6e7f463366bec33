"""Allocates KV blocks, counts the holders of each, and keeps what free ones hold. Knows no requests and no memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import takewhile

from gptj_dist.sizes import ceil_div


class BlockPool:
    """A fixed number of blocks of `block_size` tokens. Each block is free or has one or more holders.

    A block can have a key, which stands for all that decides its keys and values. It keeps the key, free or not, until
    it is taken for something else.

    Args:
        num_blocks: blocks 0 .. num_blocks - 1.
        block_size: tokens a block holds.

    Attributes:
        num_evicted: blocks that were taken for something else while they had a key.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_evicted = 0
        self._num_holders = [0] * num_blocks
        self._empty = list(range(num_blocks - 1, -1, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        return len(self._empty) + len(self._kept)

    @property
    def num_kept(self) -> int:
        """Free blocks with a key."""
        return len(self._kept)

    @property
    def free_blocks(self) -> frozenset[int]:
        return frozenset((*self._empty, *self._kept))

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold `num_tokens`."""
        return ceil_div(num_tokens, self.block_size)

    def take(self, num_blocks: int) -> list[int]:
        """Takes free blocks; each gets one holder, and loses its key.

        Those without a key come first, the last to be given back before the others, because their memory is warm. Of
        those with a key, the first to be given back go first.

        Raises:
            ValueError: fewer than `num_blocks` are free.
        """
        if num_blocks > self.num_free:
            raise ValueError(f"{num_blocks} blocks wanted, {self.num_free} free")
        taken = [self._empty.pop() if self._empty else self._evicted() for _ in range(num_blocks)]
        for block in taken:
            self._num_holders[block] = 1
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """Adds a holder to each of the blocks, which have holders or a key."""
        for block in blocks:
            if not self._num_holders[block]:
                del self._kept[block]
            self._num_holders[block] += 1

    def give_back(self, blocks: Sequence[int]) -> None:
        """Removes a holder from each of the blocks. A block without holders is free.

        Args:
            blocks: of a request, in the order of its tokens. The last ones will be evicted first.
        """
        for block in reversed(blocks):
            self._num_holders[block] -= 1
            if self._num_holders[block]:
                continue
            if block in self._key_of:
                self._kept[block] = None
            else:
                self._empty.append(block)

    def keep(self, block: int, key: bytes) -> None:
        """Gives a block that is held a key, unless another block has that key."""
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks of the first keys, up to the first key that no block has."""
        found = (self._block_of.get(key) for key in keys)
        return [block for block in takewhile(lambda block: block is not None, found) if block is not None]

    def kept_keys(self) -> Iterator[bytes]:
        """The keys of free blocks, those that will be evicted last first."""
        return (self._key_of[block] for block in reversed(self._kept))

    def forget(self, blocks: Iterable[int]) -> None:
        """Takes the keys of blocks away."""
        for block in blocks:
            if (key := self._key_of.pop(block, None)) is not None:
                del self._block_of[key]
                if block in self._kept:
                    del self._kept[block]
                    self._empty.append(block)

    def num_holders(self, block: int) -> int:
        return self._num_holders[block]

    def num_freed(self, num_given_back: Mapping[int, int]) -> int:
        """How many blocks would become free.

        Args:
            num_given_back: by block, the number of holders that would give it back.
        """
        return sum(self._num_holders[block] == number for block, number in num_given_back.items())

    def _evicted(self) -> int:
        block, _ = self._kept.popitem(last=False)
        del self._block_of[self._key_of.pop(block)]
        self.num_evicted += 1
        return block
