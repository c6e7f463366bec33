"""Text to token ids and back, with GPT-J's byte-level BPE. Knows a checkpoint's tokenizer files, not its model.

Byte-level BPE (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.2) writes every
byte as one printable character, so that a token is a string of bytes, not always of whole UTF-8 characters.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from gptj_dist.errors import CheckpointError

END_OF_TEXT = "<|endoftext|>"
# GPT-J's embedding has 143 rows more than its vocabulary: named like this, never trained.
PADDING_PREFIX = "<|extratoken_"

_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json")
_MAX_FILE_BYTES = 8 << 20
"""GPT-J's largest has 2 MB; the library takes many times as much memory."""


class Tokenizer:
    """A byte-level BPE vocabulary and its special tokens."""

    def __init__(self, bpe: tokenizers.Tokenizer) -> None:
        self._bpe = bpe
        self._names = {id: name for name, id in bpe.get_vocab(with_added_tokens=True).items()}
        special = {id for id, token in bpe.get_added_tokens_decoder().items() if token.special}
        self._bytes = {id: _raw_bytes(name) for id, name in self._names.items() if id not in special}

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """Reads `tokenizer.json`, or else `vocab.json`, `merges.txt` and, where there is one, `added_tokens.json`.

        Raises:
            CheckpointError: files are missing or broken, or the tokenizer is not a byte-level BPE.
        """
        whole, vocab, merges, added = (directory / name for name in _FILES)
        for path in (whole, vocab, merges, added):
            if path.exists() and path.stat().st_size > _MAX_FILE_BYTES:
                raise CheckpointError(f"{path} has more than {_MAX_FILE_BYTES} bytes, far more than any GPT-J needs")
        if whole.exists():
            return cls(_from_tokenizer_json(whole))
        for path in (vocab, merges):
            if not path.exists():
                raise CheckpointError(f"{directory}: has no tokenizer.json, and no {path.name} either")
        return cls(_from_vocab(vocab, merges, added))

    @property
    def num_entries(self) -> int:
        """Tokens that have a name, special ones included."""
        return len(self._names)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. Adds no special token; the name of one, where `text` holds it, is that token."""
        ids: list[int] = self._bpe.encode(text, add_special_tokens=False).ids
        return ids

    def encode_prompt(self, prompt: str | Sequence[int], eos_token_id: int) -> list[int]:
        """Token ids of a prompt, which may be ids already. An empty text stands for end of text, as at OpenAI."""
        return (self.encode(prompt) or [eos_token_id]) if isinstance(prompt, str) else list(prompt)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of whole output; special tokens have none, and bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, id: int) -> bytes:
        """What the token adds to the text; nothing for a special token and for an id without an entry."""
        return self._bytes.get(id, b"")

    def token_or_special_bytes(self, id: int) -> bytes:
        """As `token_bytes`, but a special token adds its name."""
        return self._bytes[id] if id in self._bytes else self._names.get(id, "").encode()

    def token_text(self, id: int) -> str:
        """A token on its own, for people: a special one by its name, bytes of no whole character as U+FFFD."""
        return self.token_or_special_bytes(id).decode("utf-8", "replace")

    def unsampled_ids(self, vocab_size: int) -> list[int]:
        """Ids below `vocab_size` (rows of the embedding) that stand for no text and must not be generated."""
        return [id for id in range(vocab_size) if self._names.get(id, PADDING_PREFIX).startswith(PADDING_PREFIX)]


def _from_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    try:
        bpe = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust library raises nothing more exact
        raise _broken(path, error) from error
    if not isinstance(bpe.decoder, decoders.ByteLevel):
        raise CheckpointError(f"{path}: is not a byte-level BPE tokenizer, as GPT-J's is")
    # A file may carry its trainer's settings, which would cut or pad prompts.
    bpe.no_truncation()
    bpe.no_padding()
    return bpe


def _from_vocab(vocab: Path, merges: Path, added: Path) -> tokenizers.Tokenizer:
    try:
        model = models.BPE.from_file(str(vocab), str(merges))
    except Exception as error:  # the Rust library raises nothing more exact
        raise _broken(f"{vocab} or {merges.name}", error) from error
    bpe = tokenizers.Tokenizer(model)
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    if bpe.token_to_id(END_OF_TEXT) is not None:
        bpe.add_special_tokens([END_OF_TEXT])
    if added.exists():
        _add_tokens(bpe, added)
    return bpe


def _add_tokens(bpe: tokenizers.Tokenizer, path: Path) -> None:
    try:
        ids: dict[str, int] = dict(json.loads(path.read_bytes()))
        names = sorted(ids, key=ids.__getitem__)
        # The library numbers added tokens itself, on from the vocabulary's last.
        bpe.add_tokens([AddedToken(name, normalized=False) for name in names if name != END_OF_TEXT])
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise _broken(path, error) from error
    for name in names:
        if bpe.token_to_id(name) != ids[name]:
            shown = reprlib.repr(ids[name])[:50]
            raise CheckpointError(f"{path}: {name!r:.50} has id {shown}, but the next free id is not that")


def _broken(files: Path | str, error: Exception) -> CheckpointError:
    reason = " ".join(str(error).split())[:200]
    return CheckpointError(f"{files}: cannot be read as a tokenizer: {''.join(filter(str.isprintable, reason))}")


def _alphabet() -> Iterator[tuple[str, int]]:
    """The character that stands for each byte: itself where it is printable, else the next free one from U+0100."""
    num_moved = 0
    for byte in range(256):
        is_printable = 0x21 <= byte <= 0x7E or (byte >= 0xA1 and byte != 0xAD)
        yield chr(byte if is_printable else 0x100 + num_moved), byte
        num_moved += not is_printable


_BYTE_OF = dict(_alphabet())


def _raw_bytes(name: str) -> bytes:
    """Bytes behind a token's name; an added token may be plain text outside the alphabet."""
    try:
        return bytes([_BYTE_OF[char] for char in name])
    except KeyError:
        return name.encode()
