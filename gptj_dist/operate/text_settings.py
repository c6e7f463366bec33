"""How a checkpoint wants texts to be read, ended and sampled, and what is odd about that. For `inspect` and `doctor`.

Reads tokenizer, chat template, end tokens and generation config; no weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gptj_dist.checkpoint.files import TOKENIZER_FILES
from gptj_dist.checkpoint.inspection import odd_generation
from gptj_dist.config import ModelConfig
from gptj_dist.errors import CheckpointError
from gptj_dist.text.chat import load_chat_template
from gptj_dist.text.tokenizer import Tokenizer


def text_rows(directory: Path, config: ModelConfig) -> Iterator[tuple[str, str]]:
    """How texts are read, how they end and how they are sampled: a name and a description each.

    A tokenizer or a template that cannot be loaded is a row and no error: its checkpoint can be converted.
    """
    tokenizer, text = _load_tokenizer(directory, config)
    yield "tokenizer", text
    yield "template", _template_text(directory)
    ends = [_token_text(tokenizer, token_id) for token_id in config.eos_token_ids]
    yield "end", ", ".join(ends) or "no token ends a text"
    if generation := list(_generation_texts(config)):
        yield "generation", "; ".join(generation)


def odd_text_settings(directory: Path, config: ModelConfig) -> Iterator[str]:
    """What is unusual about them, a line each."""
    yield from odd_generation(directory, config)
    tokenizer, _ = _load_tokenizer(directory, config)
    if tokenizer is None:  # a row says so
        return
    for token_id in config.eos_token_ids:
        if not tokenizer.token_text(token_id):
            yield f"token {token_id} ends texts, but the tokenizer has no entry for it"
    yield from _odd_answer_end(directory, config, tokenizer)


def _odd_answer_end(directory: Path, config: ModelConfig, tokenizer: Tokenizer) -> Iterator[str]:
    """The token by which the chat template ends an answer, if no text ends with it."""
    try:
        template = load_chat_template(directory)
    except CheckpointError:  # a row says so
        return
    ids = [] if template is None else tokenizer.encode(template.answer_end().lstrip())
    if ids and tokenizer.is_added(ids[0]) and ids[0] not in config.eos_token_ids:
        yield (
            f"the chat template ends an answer with token {ids[0]} {tokenizer.token_text(ids[0])!r:.40}, which is not "
            "an eos_token_id: answers go on to a stop string or to max_tokens"
        )


def _load_tokenizer(directory: Path, config: ModelConfig) -> tuple[Tokenizer | None, str]:
    """The tokenizer, if it can be loaded, and its description."""
    if not any((directory / name).exists() for name in TOKENIZER_FILES):
        return None, "none"
    try:
        tokenizer = Tokenizer.load(directory)
    except CheckpointError as error:
        return None, f"cannot be loaded, {error}"
    text = f"{tokenizer.num_entries} entries for {config.vocab_size} rows"
    if num_spare := len(tokenizer.spare_ids(config.vocab_size)):
        text += f"; {num_spare} rows stand for no text and are generated only where they are named"
    if tokenizer.num_entries > config.vocab_size:
        text += f"; {tokenizer.num_entries - config.vocab_size} entries have no row: text with them cannot be served"
    return tokenizer, text


def _token_text(tokenizer: Tokenizer | None, token_id: int) -> str:
    """The id and, where the tokenizer has one, its name."""
    name = "" if tokenizer is None else tokenizer.token_text(token_id)
    return f"{token_id} {name!r:.40}" if name else str(token_id)


def _template_text(directory: Path) -> str:
    try:
        return "none: chat needs --chat-template" if load_chat_template(directory) is None else "for chat"
    except CheckpointError as error:
        return f"cannot be loaded, {error}"


def _generation_texts(config: ModelConfig) -> Iterator[str]:
    generation = config.generation
    if generation.defaults:
        yield "defaults " + ", ".join(f"{name} {value:g}" for name, value in generation.defaults)
    num_banned = len(generation.suppressed_ids) + len(generation.bad_words) + len(generation.first_suppressed_ids)
    if num_banned:
        yield f"{num_banned} tokens or runs of tokens are ruled out"
