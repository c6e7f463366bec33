"""Writes a tokenizer for a model of any vocabulary, out of GPT-2's byte-level BPE, which is GPT-J's. Stdlib only.

Its first 256 ids are the bytes, and each merge adds the next one, so any beginning of it is a vocabulary, too.
"""

from __future__ import annotations

import json
from pathlib import Path

from gptj_dist.errors import ConfigurationError

_GPT2 = Path(__file__).parent / "gpt2_bpe"
_NUM_BYTES = 256
GPT2_VOCAB_SIZE = 50257
END_OF_TEXT = "<|endoftext|>"


def eos_token_id(vocab_size: int) -> int:
    """The id of `<|endoftext|>` in a vocabulary that `write_tokenizer` writes: its last, or GPT-2's."""
    return min(vocab_size, GPT2_VOCAB_SIZE) - 1


def write_tokenizer(directory: Path, vocab_size: int) -> None:
    """Writes `vocab.json`, `merges.txt` and what else transformers wants. Ids beyond GPT-2's are named as GPT-J's are.

    Raises:
        ConfigurationError: too few ids even for the bytes and the end of text.
    """
    num_merges = eos_token_id(vocab_size) - _NUM_BYTES
    if num_merges < 0:
        raise ConfigurationError(f"vocab_size must be at least {_NUM_BYTES + 1}, got {vocab_size}")
    ids: dict[str, int] = json.loads((_GPT2 / "vocab.json").read_bytes())
    vocab = {name: id for name, id in ids.items() if id < _NUM_BYTES + num_merges}
    vocab[END_OF_TEXT] = eos_token_id(vocab_size)
    version, *merges = (_GPT2 / "merges.txt").read_text("utf-8").splitlines()
    added = {f"<|extratoken_{id - GPT2_VOCAB_SIZE + 1}|>": id for id in range(GPT2_VOCAB_SIZE, vocab_size)}
    config = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}
    config |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    (directory / "merges.txt").write_text("\n".join([version, *merges[:num_merges]]) + "\n", "utf-8")
    for file, content in (("vocab.json", vocab), ("added_tokens.json", added), ("tokenizer_config.json", config)):
        (directory / file).write_text(json.dumps(content, ensure_ascii=False) + "\n", "utf-8")
