"""Text to token ids and back, with GPT-J's byte-level BPE. Knows a checkpoint's tokenizer files, not its model.

Byte-level BPE (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.2) writes every
byte as one printable character, so that a token is a string of bytes, not always of whole UTF-8 characters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import tokenizers

from gptj_dist.text.grammar import Grammars
from gptj_dist.text.tokenizer_files import read_bpe
from gptj_dist.text.tool_calls import MARKS

# GPT-J's embedding has 143 rows more than its vocabulary: named like this, never trained.
PADDING_PREFIX = "<|extratoken_"


class Tokenizer:
    """A byte-level BPE vocabulary and its special tokens."""

    def __init__(self, bpe: tokenizers.Tokenizer) -> None:
        self._bpe = bpe
        self._names = {id: name for name, id in bpe.get_vocab(with_added_tokens=True).items()}
        added = bpe.get_added_tokens_decoder().items()
        special = {id for id, token in added if token.special and token.content not in MARKS}
        self._bytes = {id: _raw_bytes(name) for id, name in self._names.items() if id not in special}

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """Reads a checkpoint's tokenizer files, as `tokenizer_files` describes them.

        Raises:
            CheckpointError: files are missing or broken, or the tokenizer is not a byte-level BPE.
        """
        return cls(read_bpe(directory))

    @cached_property
    def max_token_bytes(self) -> int | None:
        """The most bytes of UTF-8 that one token stands for, special names included; None if there is no limit."""
        added = self._bpe.get_added_tokens_decoder().values()
        if self._bpe.normalizer is not None or any(token.lstrip or token.rstrip for token in added):
            return None  # characters may be dropped, or blanks belong to a token beside them
        return max(len(self.token_or_special_bytes(id)) for id in self._names)

    @cached_property
    def grammars(self) -> Grammars:
        """Compiles grammars for these tokens. The first use takes some 100 ms, in which no other thread runs."""
        ids = range(max(self._names) + 1)
        return Grammars([self.token_or_special_bytes(id) for id in ids], [id for id in ids if self.special_name(id)])

    @property
    def num_entries(self) -> int:
        """Tokens that have a name, special ones included."""
        return len(self._names)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of `text`; the name of a special token, where `text` holds it, is that token.

        Args:
            add_special_tokens: begin and end with the tokens that the checkpoint asks for; GPT-J's own asks for none.
        """
        # Other than `encode` this call lets other threads run, and it takes half the time.
        (encoding,) = self._bpe.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def encode_prompt(
        self, prompt: str | Sequence[int], empty_prompt_ids: Sequence[int], add_special_tokens: bool = True
    ) -> list[int]:
        """Token ids of a prompt, which may be ids already.

        Args:
            empty_prompt_ids: what an empty text stands for: end of text, as at OpenAI.
        """
        if not isinstance(prompt, str):
            return list(prompt)
        return self.encode(prompt, add_special_tokens) or list(empty_prompt_ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of whole output; special tokens have none, and bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, id: int) -> bytes:
        """What the token adds to the text; nothing for a special token and for an id without an entry."""
        return self._bytes.get(id, b"")

    def token_or_special_bytes(self, id: int) -> bytes:
        """As `token_bytes`, but a special token adds its name."""
        return self._bytes[id] if id in self._bytes else self._names.get(id, "").encode()

    def special_name(self, id: int) -> str:
        """The name of a special token; empty for any other."""
        return "" if id in self._bytes else self._names.get(id, "")

    def token_text(self, id: int) -> str:
        """A token on its own, for people: a special one by its name, bytes of no whole character as U+FFFD."""
        return self.token_or_special_bytes(id).decode("utf-8", "replace")

    def is_added(self, id: int) -> bool:
        """Whether the token was added to the vocabulary by its name, as special ones are."""
        return id in self._bpe.get_added_tokens_decoder()

    def spare_ids(self, vocab_size: int) -> list[int]:
        """Ids below `vocab_size` (rows of the embedding) that stand for no text: nameless, or named as padding."""
        return [id for id in range(vocab_size) if self._names.get(id, PADDING_PREFIX).startswith(PADDING_PREFIX)]


def _alphabet() -> Iterator[tuple[str, int]]:
    """The character that stands for each byte: itself where it is printable, else the next free one from U+0100."""
    num_moved = 0
    for byte in range(256):
        is_printable = 0x21 <= byte <= 0x7E or (byte >= 0xA1 and byte != 0xAD)
        yield chr(byte if is_printable else 0x100 + num_moved), byte
        num_moved += not is_printable


_BYTE_OF = dict(_alphabet())


def _raw_bytes(name: str) -> bytes:
    """The bytes that a token's name stands for; an added token may be plain text outside the alphabet."""
    try:
        return bytes([_BYTE_OF[char] for char in name])
    except KeyError:
        return name.encode()
