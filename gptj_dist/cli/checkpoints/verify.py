"""`gptj-dist verify`: are the numbers those of transformers? If not, from which layer on?"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gptj_dist.cli.options import Model, Revision, finite
from gptj_dist.cli.streams import as_text
from gptj_dist.config import LayerRange, ModelConfig
from gptj_dist.errors import ConfigurationError, InvalidRequestError

if TYPE_CHECKING:
    from gptj_dist.operate.verification import Comparison
    from gptj_dist.text.tokenizer import Tokenizer

_LONG_PROMPT = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, it "
    "was the epoch of belief, it was the epoch of incredulity, it was the season of Light, it was the season of "
    "Darkness, it was the spring of hope, it was the winter of despair, we had everything before us, we had nothing "
    "before us, we were all going direct to Heaven, we were all going direct the other way - in short, the period was "
    "so far like the present period, that some of its noisiest authorities insisted on its being received, for good "
    "or for evil, in the superlative degree of comparison only. There were a king with a large jaw and a queen with a "
    "plain face, on the throne of England; there were a king with a large jaw and a queen with a fair face, on the "
    "throne of France. In both countries it was clearer than crystal to the lords of the State preserves of loaves "
    "and fishes, that things in general were settled for ever."
)
PROMPTS = ("The", "The state of the Union is", "Größe, naïveté, 東京, Привет 🙂", _LONG_PROMPT)
"""One token, a few, those of bytes that are no ASCII, and about two hundred."""

_MAX_SHOWN = 30
_DIFFERS = 1


def verify(
    model: Model,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="A text to read; may be given several times.", metavar="TEXT", parser=as_text),
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file of texts to read, one a line.")] = None,
    tolerance: Annotated[
        float, typer.Option(help="Largest difference of a logit.", metavar="NUMBER", parser=finite)
    ] = 1e-4,
    revision: Revision = None,
) -> None:
    """Compare the float32 logits of a model with transformers'; where they differ, name the first layer that does."""
    if not tolerance > 0:
        raise ConfigurationError(f"--tolerance must be positive, got {tolerance}")
    texts = _texts(prompt, prompts)
    # Only the oracle's module imports torch: what is wrong with the options is said at once.
    from gptj_dist.checkpoint.hub import fetch_weights, resolve_model
    from gptj_dist.checkpoint.index import read_model_config
    from gptj_dist.operate.verification import compare, oracle_version, require_memory, trace_ours, trace_theirs
    from gptj_dist.text.tokenizer import Tokenizer

    version = oracle_version()
    directory = resolve_model(model, revision)
    config = read_model_config(directory)
    token_ids = _encode(texts or PROMPTS, Tokenizer.load(directory), config, is_cut=not texts)
    require_memory(config, sum(map(len, token_ids)))
    fetch_weights(model, directory, LayerRange.whole(config.num_layers), config)
    _note(f"transformers {version} reads {len(token_ids)} prompts in float32")
    theirs = trace_theirs(directory, token_ids)
    _note(f"gptj-dist reads them, in {config.num_layers} stages of a layer")
    ours = trace_ours(str(directory), config, token_ids)
    comparisons = [compare(*pair, tolerance) for pair in zip(theirs, ours, strict=True)]
    for text, comparison in zip(texts or PROMPTS, comparisons, strict=True):
        _print_prompt(text, comparison, directory, config)
    _sum_up(comparisons, tolerance, version)


def _texts(prompt: Sequence[str] | None, path: Path | None) -> list[str]:
    """The prompts that were given, if any were.

    Raises:
        ConfigurationError: the file cannot be read, or there is nothing in it.
    """
    if path is None:
        return list(prompt or ())
    try:
        lines = [line for line in path.read_text("utf-8").splitlines() if line]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"--prompts {path} cannot be read: {error}") from error
    if not lines:
        raise ConfigurationError(f"--prompts {path} holds no prompts: it needs one a line")
    return [*(prompt or ()), *lines]


def _encode(texts: Sequence[str], tokenizer: Tokenizer, config: ModelConfig, is_cut: bool) -> list[list[int]]:
    """Token ids of each text.

    Args:
        is_cut: what exceeds the context is cut off, not refused.

    Raises:
        InvalidRequestError: a text has more tokens than the context, or one that the model has no row for.
    """
    prompts = [tokenizer.encode_prompt(text, config.empty_prompt_ids) for text in texts]
    if is_cut:
        prompts = [prompt[: config.context_length] for prompt in prompts]
    for text, prompt in zip(texts, prompts, strict=True):
        if len(prompt) > config.context_length:
            raise InvalidRequestError(
                f"the prompt {_shown(text)} has {len(prompt)} tokens, more than the model's context of "
                f"{config.context_length}"
            )
        if max(prompt) >= config.vocab_size:
            raise InvalidRequestError(
                f"the prompt {_shown(text)} has token {max(prompt)}, but the model's vocabulary ends at "
                f"{config.vocab_size - 1}: its tokenizer is another model's"
            )
    return prompts


def _print_prompt(text: str, comparison: Comparison, directory: Path, config: ModelConfig) -> None:
    verdict = "ok" if comparison.first is None else "differs"
    tokens = "1 token" if comparison.num_tokens == 1 else f"{comparison.num_tokens} tokens"
    print(
        f"{_shown(text)}: {tokens}, logits differ by {comparison.largest:.2g} at most, "
        f"greedy next token alike at {comparison.num_alike} of {comparison.num_tokens}: {verdict}"
    )
    if comparison.first is not None:
        first = comparison.first
        print(
            f"  the first to differ is the {first.part}: by {first.largest:.2g} where the largest number is "
            f"{first.magnitude:.2g}; look at {_weights_of(first.part, directory, config)}"
        )


def _weights_of(part: str, directory: Path, config: ModelConfig) -> str:
    """The tensors of a part, and their files."""
    from gptj_dist.checkpoint.index import WTE, CheckpointIndex, expected_tensors
    from gptj_dist.operate.verification import EMBEDDING, HEAD

    patterns = {EMBEDDING: [WTE], HEAD: ["transformer.ln_f.*", WTE if config.has_tied_embeddings else "lm_head.*"]}
    chosen = patterns.get(part, [f"transformer.h.{part.removeprefix('layer ')}.*"])
    names = expected_tensors(config, LayerRange.whole(config.num_layers))
    files = CheckpointIndex(directory).files(n for n in names if any(fnmatchcase(n, pattern) for pattern in chosen))
    return f"{', '.join(chosen)} in {', '.join(files)}"


def _sum_up(comparisons: Sequence[Comparison], tolerance: float, version: str) -> None:
    """The last line, and the exit code."""
    num_different, num_all = sum(comparison.first is not None for comparison in comparisons), len(comparisons)
    if num_different:
        print(f"{num_different} of {num_all} prompts differ from transformers {version} by more than {tolerance:g}")
        raise typer.Exit(_DIFFERS)
    print(f"{num_all} of {num_all} prompts agree with transformers {version} to {tolerance:g}, in float32")


def _shown(text: str) -> str:
    """The beginning of a prompt, in one line."""
    return repr(text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 3]}...")


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
