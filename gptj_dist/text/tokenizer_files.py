"""Reads a checkpoint's tokenizer files into what transformers' GPT2Tokenizer makes of them.

`tokenizer.json` is a whole tokenizer. Without it, `vocab.json` and `merges.txt` make one. To either,
`tokenizer_config.json` adds its tokens and settings; where it lists no added tokens, `special_tokens_map.json` and
`added_tokens.json` do, which older versions wrote.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from gptj_dist.errors import CheckpointError, one_line
from gptj_dist.file_kinds import kind_of_file

END_OF_TEXT = "<|endoftext|>"
CONFIG_FILE = "tokenizer_config.json"
ADDED_FIELD = "added_tokens_decoder"

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Fields that name a special token, in the order in which new ones get their ids."""

_MAX_FILE_BYTES = 8 << 20
"""GPT-J's largest has 2 MB; the library takes many times as much memory."""

_MAX_ID = 1 << 31


class TokenizerSettings(NamedTuple):
    """What is said about a tokenizer beside its vocabulary.

    Args:
        config: the fields of `tokenizer_config.json`.
        named: special tokens by their fields, such as `eos_token`.
        extra: more special tokens.
        added: tokens beside those that merges make, by their ids.
    """

    config: Mapping[str, Any]
    named: Mapping[str, AddedToken]
    extra: tuple[AddedToken, ...]
    added: Mapping[int, AddedToken]


def read_settings(directory: Path) -> TokenizerSettings:
    """Reads the files beside the vocabulary; none of them has to be there.

    Raises:
        CheckpointError: one of them is broken.
    """
    config = _read_json(directory / CONFIG_FILE)
    fields = config if ADDED_FIELD in config else config | _read_json(directory / "special_tokens_map.json")
    if str(config.get("tokenizer_class", "GPT2")).startswith("GPT2"):
        fields = dict.fromkeys(_SPECIAL_NAMES[:3], END_OF_TEXT) | fields
    others = sorted(name for name in fields if name.endswith("_token") and name not in _SPECIAL_NAMES)
    named = {name: _as_token(fields.get(name), is_special=True) for name in (*_SPECIAL_NAMES, *others)}
    extra = fields.get("extra_special_tokens") or fields.get("additional_special_tokens")
    if isinstance(extra, dict):
        named |= {name: _as_token(value, is_special=True) for name, value in extra.items()}
    if not isinstance(extra, list):
        extra = []
    special = {name: token for name, token in named.items() if token is not None}
    extra = tuple(token for value in extra if (token := _as_token(value, is_special=True)) is not None)
    special_texts = {token.content for token in (*special.values(), *extra)}
    return TokenizerSettings(config, special, extra, _added_tokens(directory, config, special_texts))


def read_bpe(directory: Path) -> tokenizers.Tokenizer:
    """The byte-level BPE of a directory, with its added tokens and settings.

    Raises:
        CheckpointError: files are missing or broken, or the tokenizer is not a byte-level BPE.
    """
    settings = read_settings(directory)
    whole = directory / "tokenizer.json"
    if whole.exists():
        bpe = _from_tokenizer_json(whole)
        is_byte_level = isinstance(bpe.pre_tokenizer, pre_tokenizers.ByteLevel)
        if is_byte_level and isinstance(settings.config.get("add_prefix_space"), bool):
            bpe.pre_tokenizer = _pre_tokenizer(settings)
        added = settings.added if ADDED_FIELD in settings.config else {}
    else:
        bpe = _from_vocab(directory, settings)
        added = settings.added
    bpe.add_tokens(list(added.values()))
    bpe.add_tokens(list(_special_tokens(settings, bpe)))
    bpe.encode_special_tokens = settings.config.get("split_special_tokens") is True
    for id, token in added.items():
        if (found := bpe.token_to_id(token.content)) != id:
            raise CheckpointError(
                f"{directory}: {token.content!r:.50} has id {id} in {CONFIG_FILE}, {found} in {whole}"
            )
    return bpe


def _added_tokens(directory: Path, config: Mapping[str, Any], special: set[str]) -> dict[int, AddedToken]:
    """Tokens with ids: of the configuration, or else of `added_tokens.json`, which does not say which are special."""
    tokens: dict[int, AddedToken] = {}
    if ADDED_FIELD in config:
        path, pairs = directory / CONFIG_FILE, list(_pairs(config[ADDED_FIELD]))
    else:
        path = directory / "added_tokens.json"
        pairs = [(id, name) for name, id in _read_json(path).items()]
    for id, value in pairs:
        token = _as_token(value, is_special=isinstance(value, str) and value in special)
        if token is None or type(id) is not int or not 0 <= id < _MAX_ID or id in tokens:
            raise CheckpointError(f"{path}: {value!r:.80} has id {id!r:.20}, which is no free id of a token")
        tokens[id] = token
    return dict(sorted(tokens.items()))


def _pairs(added: object) -> Iterator[tuple[object, object]]:
    """Ids, which JSON can only have as texts, and tokens."""
    for id, token in added.items() if isinstance(added, dict) else [(None, added)]:
        yield int(id) if isinstance(id, str) and id.isascii() and id.isdigit() and len(id) < 11 else id, token


def _special_tokens(settings: TokenizerSettings, bpe: tokenizers.Tokenizer) -> Iterator[AddedToken]:
    """Those that are to be added, or marked as special; a token keeps the other flags that it was added with."""
    added = {token.content: token for token in bpe.get_added_tokens_decoder().values()}
    for token in settings.named.values():
        if token.content == END_OF_TEXT and bpe.token_to_id(END_OF_TEXT) is None:
            continue  # a default of GPT-2's that another vocabulary lacks
        token = added.get(token.content, token)
        token.special = True
        yield token
    yield from (token for token in settings.extra if token.content not in added)


def _from_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    text = _read_text(path)
    try:
        bpe = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the Rust library raises nothing more exact
        raise _broken(path, error) from error
    if not isinstance(bpe.decoder, decoders.ByteLevel):
        raise CheckpointError(f"{path}: is not a byte-level BPE tokenizer, as GPT-J's is")
    # A file may carry its trainer's settings, which would cut or pad prompts.
    bpe.no_truncation()
    bpe.no_padding()
    return bpe


def _from_vocab(directory: Path, settings: TokenizerSettings) -> tokenizers.Tokenizer:
    vocab, merges = directory / "vocab.json", directory / "merges.txt"
    for path in (vocab, merges):
        if not path.exists():
            raise CheckpointError(f"{directory}: has no tokenizer.json, and no {path.name} either")
        _read_text(path)
    try:
        ids, pairs = models.BPE.read_file(str(vocab), str(merges))
        # The library numbers added tokens itself; those that the vocabulary holds keep their ids. No merge makes them.
        bpe = tokenizers.Tokenizer(models.BPE(_with_added(ids, settings.added, directory), pairs))
    except CheckpointError:
        raise
    except Exception as error:  # the Rust library raises nothing more exact
        raise _broken(f"{vocab} or {merges.name}", error) from error
    bpe.pre_tokenizer = _pre_tokenizer(settings)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = _post_processor(settings, bpe)
    return bpe


def _with_added(ids: dict[str, int], added: Mapping[int, AddedToken], directory: Path) -> dict[str, int]:
    names = {id: name for name, id in ids.items()}
    for id, token in added.items():
        if names.get(id, token.content) != token.content or ids.get(token.content, id) != id:
            raise CheckpointError(f"{directory}: {token.content!r:.50} cannot have id {id} beside vocab.json's")
    return ids | {token.content: id for id, token in added.items()}


def _pre_tokenizer(settings: TokenizerSettings) -> pre_tokenizers.ByteLevel:
    return pre_tokenizers.ByteLevel(add_prefix_space=settings.config.get("add_prefix_space") is True)


def _post_processor(settings: TokenizerSettings, bpe: tokenizers.Tokenizer) -> processors.TemplateProcessing:
    """Lets texts begin and end with the tokens that the configuration asks for."""

    def wanted(setting: str, name: str) -> list[str]:
        return [settings.named[name].content] if settings.config.get(setting) is True and name in settings.named else []

    begin, end = wanted("add_bos_token", "bos_token"), wanted("add_eos_token", "eos_token")
    ids = {token: bpe.token_to_id(token) for token in (*begin, *end)}
    if None in ids.values():
        raise CheckpointError(f"the tokenizer adds {(*begin, *end)!r:.80} to texts, but has no such token")
    return processors.TemplateProcessing(single=[*begin, "$A", *end], special_tokens=list(ids.items()))


def _as_token(value: object, is_special: bool) -> AddedToken | None:
    """A token that is written as its text, or as an object with flags; None for anything else."""
    if isinstance(value, str) and value:
        return AddedToken(value, special=is_special, normalized=not is_special)
    if not isinstance(value, dict) or not isinstance(content := value.get("content"), str) or not content:
        return None
    flags = {name: value.get(name) is True for name in ("lstrip", "rstrip", "single_word", "special")}
    flags["special"] |= is_special
    return AddedToken(content, normalized=value.get("normalized", not flags["special"]) is True, **flags)


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty if there is no such file."""
    if not path.exists():
        return {}
    try:
        content = json.loads(_read_text(path))
        json.dumps(content, ensure_ascii=False).encode()  # no half of a surrogate pair, which the library cannot take
    except (ValueError, RecursionError) as error:
        raise _broken(path, error) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return content


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise CheckpointError(f"{path} has more than {_MAX_FILE_BYTES} bytes, far more than any GPT-J needs")
        if kind := kind_of_file(path):
            raise CheckpointError(f"{path} is {kind}")
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _broken(path, error) from error


def _broken(files: Path | str, error: Exception) -> CheckpointError:
    return CheckpointError(f"{files}: cannot be read as a tokenizer: {one_line(error)[:200]}")
