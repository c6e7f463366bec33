"""Remembers what earlier texts had after the same first tokens, block by block. Decides nothing."""

from __future__ import annotations

from collections.abc import Sequence

from gptj_dist.engine.prefix import key_after


class KnownTexts:
    """The blocks of texts by the key of the block before, which stands for all that is before (`engine/prefix.py`).

    Args:
        max_blocks: the most that are remembered. Those that were noted first are forgotten first.
    """

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        self._after: dict[bytes, tuple[int, ...]] = {}

    def note(self, key: bytes, token_ids: tuple[int, ...]) -> None:
        """A text has the block `token_ids` after the one with this key. The latest counts."""
        self._after.pop(key, None)
        self._after[key] = token_ids
        if len(self._after) > self._max_blocks:
            del self._after[next(iter(self._after))]

    def following(self, key: bytes, token_ids: Sequence[int], most: int) -> list[int]:
        """What a text had after the block with this key and `token_ids`; at most `most` tokens."""
        num_equal = len(token_ids)
        block = self._after.get(key)
        if block is None or block[:num_equal] != tuple(token_ids):
            return []
        found = list(block[num_equal:])
        while len(found) < most and (block := self._after.get(key := key_after(key, block))) is not None:
            found += block
        return found[:most]
