"""What a checkpoint says about generating text: its end tokens, its defaults, tokens that it rules out. Stdlib only.

Knows the fields of `generation_config.json` and of `config.json`, not where the files are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gptj_dist.errors import CheckpointError, InvalidRequestError, excerpt
from gptj_dist.params import SamplingParams

_DEFAULTS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
"""Fields that set defaults, and the parameters that they set; the same ones as in vLLM."""

_NEUTRAL: Mapping[str, object] = {
    "do_sample": True,
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "typical_p": 1.0,
    "length_penalty": 1.0,
    "diversity_penalty": 0.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    **dict.fromkeys(
        (
            "min_new_tokens", "max_length", "penalty_alpha", "forced_bos_token_id", "forced_eos_token_id",
            "sequence_bias", "exponential_decay_length_penalty", "guidance_scale", "stop_strings", "top_h",
        )
    ),
}  # fmt: skip
"""Fields of transformers that would change the text and are not applied, and the values that ask for nothing."""


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """A checkpoint's settings for generating text.

    Args:
        defaults: names and values of `SamplingParams` where a request gives none.
        suppressed_ids: tokens that are never sampled.
        first_suppressed_ids: tokens that no completion begins with.
        bad_words: runs of two or more tokens; the last of a run is never sampled right after the others.
    """

    defaults: tuple[tuple[str, float], ...] = ()
    suppressed_ids: tuple[int, ...] = ()
    first_suppressed_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def from_hf(
        cls, fields: Mapping[str, Any], file: str, vocab_size: int, eos_token_ids: Sequence[int]
    ) -> GenerationConfig:
        """Reads the fields of `generation_config.json`, or those that `config.json` has of it.

        Args:
            file: their file, for errors.

        Raises:
            CheckpointError: a value is invalid; the field is named.
        """
        words = fields.get("bad_words_ids")
        if not isinstance(words, list | None) or not all(isinstance(word, list) and word for word in words or ()):
            raise CheckpointError(f"{file}: bad_words_ids must be a list of lists of token ids, got {excerpt(words)}")
        runs = [_token_ids(word, "bad_words_ids", file, vocab_size) for word in words or ()]
        # As in transformers: a bad word does not keep a text from ending.
        single = [run[0] for run in runs if len(run) == 1 and run[0] not in eos_token_ids]
        return cls(
            _defaults(fields, file),
            tuple(sorted({*single, *_token_ids(fields.get("suppress_tokens"), "suppress_tokens", file, vocab_size)})),
            _token_ids(fields.get("begin_suppress_tokens"), "begin_suppress_tokens", file, vocab_size),
            tuple(run for run in runs if len(run) > 1),
        )


NO_GENERATION_CONFIG = GenerationConfig()
"""Of a checkpoint that says nothing."""


def eos_token_ids(value: object, file: str, vocab_size: int) -> tuple[int, ...]:
    """The tokens that end a text: `eos_token_id` is a number, a list of numbers or null.

    Raises:
        CheckpointError: it is something else, or a number is not in the vocabulary.
    """
    ids = _token_ids([value] if isinstance(value, int) else value, "eos_token_id", file, vocab_size)
    return tuple(dict.fromkeys(ids))


def unapplied_fields(fields: Mapping[str, Any]) -> list[str]:
    """Names and values of fields that ask for something that is not done."""
    asked = {name: value for name, value in fields.items() if name in _NEUTRAL and value is not None}
    return [f"{name} {excerpt(value)}" for name, value in asked.items() if value != _NEUTRAL[name]]


def _defaults(fields: Mapping[str, Any], file: str) -> tuple[tuple[str, float], ...]:
    defaults: dict[str, Any] = {}
    for name, parameter in _DEFAULTS.items():
        if (value := fields.get(name)) is None:
            continue
        if isinstance(value, float) and value.is_integer() and parameter in ("top_k", "max_tokens"):
            value = int(value)
        setting: dict[str, Any] = {parameter: value}
        try:
            SamplingParams(**setting)
        except InvalidRequestError as error:
            raise CheckpointError(f"{file}: {name} is invalid: {error}") from error
        if name == "max_new_tokens" and value < 1:
            raise CheckpointError(f"{file}: max_new_tokens must be at least 1, got {excerpt(value)}")
        defaults |= setting
    return tuple(defaults.items())


def _token_ids(value: object, name: str, file: str, vocab_size: int) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(type(id) is int for id in value):
        raise CheckpointError(f"{file}: {name} must hold token ids, which are whole numbers, got {excerpt(value)}")
    if wrong := [id for id in value if not 0 <= id < vocab_size]:
        raise CheckpointError(f"{file}: {name} {excerpt(wrong[0])} is not a number below vocab_size {vocab_size}")
    return tuple(value)
