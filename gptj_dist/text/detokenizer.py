"""Tokens to text as they come, never half a character. Knows the bytes of tokens, not where tokens come from."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from gptj_dist.text.tokenizer import Tokenizer

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """The text of one output. All pushes and the finish together are what `Tokenizer.decode` gives for all ids.

    Args:
        skips_special: special tokens have no text; else they have their names.
    """

    def __init__(self, tokenizer: Tokenizer, skips_special: bool = True) -> None:
        self._token_bytes = tokenizer.token_bytes if skips_special else tokenizer.token_or_special_bytes
        self._decoder = _Utf8Decoder(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        """The characters that `ids` complete; the bytes of an unfinished one wait."""
        return self._decoder.decode(b"".join(map(self._token_bytes, ids)))

    def finish(self) -> str:
        """What still waits: U+FFFD where the output ends within a character."""
        return self._decoder.decode(b"", final=True)
