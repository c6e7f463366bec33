"""The parameters of one completion: how it is sampled, where it ends, what is returned. Stdlib only.

One `SamplingParams` goes unchanged from the request to the sampler. It is checked here, once, except for what depends
on the model, which `engine/limits.py` checks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

from gptj_dist.errors import InvalidRequestError, excerpt
from gptj_dist.field_types import type_problems

MAX_STOP_STRINGS = 16
MAX_ADAPTERS = 8
MAX_STRENGTH = 100.0
MAX_LOGPROBS = 20
MAX_SALT_CHARACTERS = 256
MAX_GRAMMAR_CHARACTERS = 1 << 17

RANGES: Mapping[str, tuple[float, float]] = {
    "max_tokens": (0, 2**31),
    "temperature": (0, 100),
    "top_p": (0, 1),
    "top_k": (-1, 2**31),
    "min_p": (0, 1),
    "seed": (-(2**63), 2**64 - 1),
    "n": (1, 128),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "repetition_penalty": (0, 10),
    "repetition_penalty_range": (-1, 2**31),
    "logprobs": (0, MAX_LOGPROBS),
    "prompt_logprobs": (0, MAX_LOGPROBS),
    "best_of": (1, 128),
    "length_penalty": (-5, 5),
    "priority": (-(2**31), 2**31 - 1),
}
"""Smallest and largest value of each number."""

BEAM_DEFAULTS: Mapping[str, object] = {"best_of": None, "length_penalty": 1.0, "early_stopping": False}
"""Settings that only a beam search has."""

NOT_SAMPLED: Mapping[str, tuple[float, ...]] = {"temperature": (1, 0), "top_p": (1,), "top_k": (0, -1), "min_p": (0,)}
"""What settings of sampling may be in a beam search."""

NO_TOKEN = -1
"""The sampler's answer where every token is ruled out."""

BROKEN_TOKEN = -2
"""The sampler's answer where the model computed no numbers, but NaN."""

COMPLETE_TOKEN = -3
"""The sampler's answer where the text matches the request's grammar, and no token may follow."""

BLANKS = r"\n?[ \t]{0,16}"
"""Blanks between the tokens of JSON, as a regular expression. Without a limit, some models write blanks for ever."""

PoolingKind = Literal["mean", "last"]
GrammarKind = Literal["json", "regex", "choice", "grammar", "calls"]


@dataclass(frozen=True)
class Pooling:
    """How an embedding is made of the prompt's hidden states.

    Args:
        kind: their mean over the prompt's tokens, or those of the last token.
        layer: 0 for those that go into the first layer, k for those that come out of the k-th; None, or the number of
            layers, for those after the final LayerNorm. transformers' `hidden_states` are counted the same.
    """

    kind: PoolingKind = "mean"
    layer: int | None = None

    def __post_init__(self) -> None:
        _check_types(self)


@dataclass(frozen=True)
class AdapterSource:
    """Files of an adapter.

    Args:
        path: a directory or file, the same on every node.
        version: hash of what is in it; other files at the same path are another adapter.
    """

    path: str
    version: str


@dataclass(frozen=True)
class AdapterChoice:
    """An adapter that changes the model for a request.

    Args:
        name: what it was loaded as.
        strength: multiplies its changes, from -100 to 100; 0 changes nothing.
        source: filled in by the LLM or the server, which know the names.
    """

    name: str
    strength: float = 1.0
    source: AdapterSource | None = None

    def __post_init__(self) -> None:
        _check_types(self)
        in_range = -MAX_STRENGTH <= self.strength <= MAX_STRENGTH
        _check(in_range, "strength", f"must be from {-MAX_STRENGTH:g} to {MAX_STRENGTH:g}", self.strength)


@dataclass(frozen=True)
class Grammar:
    """What a generated text matches, from its first character to its last.

    `Grammar("regex", r"[0-9]{4}")` and `Grammar("grammar", 'start: "yes" | "no"')` are written directly; for the other
    kinds there are `json` and `choice`.

    Args:
        kind: of `text`: a JSON schema, a regular expression in Rust's syntax, a JSON list of strings, a context-free
            grammar in Lark's or GBNF's notation, or one in Lark's for calls of tools.
        text: at most 131,072 characters.

    Raises:
        InvalidRequestError: the text is too long. Whether it is valid is checked where it is compiled.
    """

    kind: GrammarKind
    text: str

    def __post_init__(self) -> None:
        _check_types(self)
        rule = f"takes at most {MAX_GRAMMAR_CHARACTERS} characters"
        _check(len(self.text) <= MAX_GRAMMAR_CHARACTERS, "structured_outputs", rule, len(self.text))

    @classmethod
    def json(cls, schema: Mapping[str, object] | str, blanks: str = BLANKS) -> Self:
        """JSON that is valid by a schema.

        Args:
            schema: an object, or its JSON. `{"type": "object"}` allows every object.
            blanks: what may stand between tokens, as a regular expression; "" for nothing.

        Raises:
            InvalidRequestError: it is not an object.
        """
        try:
            parsed = json.loads(schema) if isinstance(schema, str) else dict(schema)
            is_object = isinstance(parsed, dict)
            options = {"whitespace_pattern": blanks} if blanks else {"whitespace_flexible": False}
            text = json.dumps({**parsed, "x-guidance": options}) if is_object else ""
        except (TypeError, ValueError, RecursionError):
            is_object = False
        if not is_object:
            raise InvalidRequestError(
                "structured_outputs must have a JSON schema that is an object", "structured_outputs"
            )
        return cls("json", text)

    @classmethod
    def choice(cls, choices: Sequence[str]) -> Self:
        """One of some texts. Raises InvalidRequestError if there is none."""
        _check(len(choices) > 0, "structured_outputs", "must have a choice", choices)
        return cls("choice", json.dumps(list(choices)))


@dataclass(frozen=True)
class SamplingParams:
    """Sampling settings of a request; the names and meanings are those of OpenAI's and vLLM's APIs.

    Lists are taken for tuples, a dict for the pairs of `logit_bias`, and a string for a `stop` of one string.

    Args:
        max_tokens: the most tokens to generate; 0 generates none, for a prompt whose log probabilities are wanted.
        temperature: 0 is greedy; larger is more random.
        top_p: keep the smallest set of tokens whose probability reaches this, in [0, 1]; 0 is greedy.
        top_k: keep the k likeliest tokens; 0 or -1 keeps all.
        min_p: drop tokens less likely than this fraction of the likeliest one, in [0, 1].
        seed: makes sampling repeatable, from -2^63 to 2^64 - 1; None draws a fresh one for each request.
        n: completions of the prompt, 1 or more.
        stop: strings that end the text; they are not part of it.
        min_tokens: tokens before which neither end of text nor a stop string can end the request.
        ignore_eos: go on past the tokens that end a text by the checkpoint's configuration.
        stop_token_ids: tokens that end the request, whether or not end of text does.
        include_stop_str_in_output: keep the stop string, or the text of the stop token, that ended the text.
        skip_special_tokens: leave special tokens such as end of text out of the text.
        presence_penalty: taken from the logit of every token that was generated before, in [-2, 2].
        frequency_penalty: taken from it for each time that it was, in [-2, 2].
        repetition_penalty: divides positive logits, and multiplies negative ones, of every token of prompt and output,
            in (0, 10] (Keskar et al. 2019, section 4.1).
        repetition_penalty_range: only this number of last tokens is penalised; 0 or -1 for all.
        logit_bias: (token id, number from -100 to 100 that is added to its logit).
        allowed_token_ids: no other token is sampled; None allows all.
        bad_words: runs of token ids; the last token of a run is never sampled right after the others.
        logprobs: return each token's log probability, and those of this many likeliest, 0 to 20; None returns none.
        prompt_logprobs: the same of the prompt's tokens but the first.
        pooling: asks for an embedding of the prompt, instead of any tokens.
        priority: requests with a lower one are served first, and preempted last; among equals the earlier ones. Others
            may wait for ever.
        adapters: change the model for this request; their changes are added.
        cache_salt: only requests with the same one share cached prompt tokens. The time to the first token then tells a
            client nothing of what others have asked.
        use_beam_search: search for the likeliest texts, the best first, instead of sampling; a stop string cuts them
            afterwards.
        best_of: number of beams, `n` or more; None takes `n`.
        length_penalty: a text's log probability is divided by its number of tokens to this power, in [-5, 5]; more than
            0 favours long texts.
        early_stopping: when a beam search ends: true as soon as there are as many texts as beams, false when none of
            the beams is better at its present length, "never" when none can become better.
        structured_outputs: what the text matches when it ends by itself; None for any text.

    Raises:
        InvalidRequestError: a value has another type or is out of its range; `param` names it.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    repetition_penalty_range: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    priority: int = 0
    pooling: Pooling | None = None
    adapters: tuple[AdapterChoice, ...] = ()
    cache_salt: str | None = None
    use_beam_search: bool = False
    best_of: int | None = None
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    structured_outputs: Grammar | None = None

    def __post_init__(self) -> None:
        for name, value in tuple(vars(self).items()):
            if name == "stop" and isinstance(value, str):
                object.__setattr__(self, "stop", (value,))
            elif isinstance(value, list | tuple | dict):
                object.__setattr__(self, name, _as_tuples(value))
        _check_types(self)
        for name, (least, most) in RANGES.items():
            value = vars(self)[name]
            if value is not None and not least <= value <= most:
                raise InvalidRequestError(f"{name} must be from {least} to {most}, got {excerpt(value)}", name)
        _check(self.repetition_penalty > 0, "repetition_penalty", "must be above 0", self.repetition_penalty)
        self._check_lists()
        self._check_beams()
        rule = f"must have from 1 to {MAX_SALT_CHARACTERS} characters"
        if self.cache_salt is not None:
            _check(1 <= len(self.cache_salt) <= MAX_SALT_CHARACTERS, "cache_salt", rule, self.cache_salt)
        rule = f"must be from 0 to the {self.max_tokens} tokens to generate"
        _check(0 <= self.min_tokens <= self.max_tokens, "min_tokens", rule, self.min_tokens)
        if self.pooling is not None:
            _check(self.max_tokens == 0, "max_tokens", "must be 0 with pooling", self.max_tokens)
            _check(self.prompt_logprobs is None, "prompt_logprobs", "must be None with pooling", self.prompt_logprobs)

    def _check_lists(self) -> None:
        _check(len(self.stop) <= MAX_STOP_STRINGS, "stop", f"takes at most {MAX_STOP_STRINGS} strings", len(self.stop))
        _check(all(self.stop), "stop", "must not hold an empty string", self.stop)
        biases = [bias for _, bias in self.logit_bias]
        _check(all(-100 <= bias <= 100 for bias in biases), "logit_bias", "takes numbers from -100 to 100", biases)
        _check(self.allowed_token_ids != (), "allowed_token_ids", "must allow a token", self.allowed_token_ids)
        _check(all(self.bad_words), "bad_words", "must not hold an empty word", self.bad_words)
        names = [choice.name for choice in self.adapters]
        _check(len(names) <= MAX_ADAPTERS, "adapters", f"takes at most {MAX_ADAPTERS}", len(names))
        _check(len(set(names)) == len(names), "adapters", "must name each adapter once", names)

    def _check_beams(self) -> None:
        _check(self.best_of is None or self.best_of >= self.n, "best_of", f"must be n ({self.n}) or more", self.best_of)
        if not self.use_beam_search:
            return
        _check(self.max_tokens > 0, "max_tokens", "must be at least 1 with use_beam_search", self.max_tokens)
        has_end = self.structured_outputs is None or not self.ignore_eos
        _check(has_end, "ignore_eos", "must be false with use_beam_search and structured_outputs", self.ignore_eos)
        for name, plain in NOT_SAMPLED.items():
            rule = f"must be {plain[0]}: use_beam_search does not sample"
            _check(vars(self)[name] in plain, name, rule, vars(self)[name])

    @property
    def listed_token_ids(self) -> dict[str, tuple[int, ...]]:
        """All token ids that the settings name, by the name of the setting."""
        return {
            "stop_token_ids": self.stop_token_ids,
            "logit_bias": tuple(token_id for token_id, _ in self.logit_bias),
            "allowed_token_ids": self.allowed_token_ids or (),
            "bad_words": tuple(token_id for run in self.bad_words for token_id in run),
        }

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature == 0 or self.top_p == 0 or self.use_beam_search

    @property
    def num_beams(self) -> int:
        """Texts that a search continues at once; 1 without a search."""
        return (self.best_of or self.n) if self.use_beam_search else 1


class TokenLogprobs(NamedTuple):
    """A token's natural log probability by the model alone, before temperature, penalties and bans.

    Args:
        rank: 1 if it is the likeliest.
        top: the requested number of likeliest tokens with their log probabilities, the likeliest first.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


class Continuation(NamedTuple):
    """A token that may come next in a beam.

    Args:
        logprob: after penalties and biases.
        shown: the token's log probabilities, if they are requested.
    """

    token_id: int
    logprob: float
    shown: TokenLogprobs | None = None


def _check(is_valid: bool, param: str, rule: str, value: object) -> None:
    if not is_valid:
        raise InvalidRequestError(f"{param} {rule}, got {excerpt(value)}", param)


def _check_types(settings: object) -> None:
    for param, problem in type_problems(settings):
        raise InvalidRequestError(f"{param} {problem}", param)


def _as_tuples(value: object) -> object:
    if isinstance(value, dict):
        return tuple(value.items())
    return tuple(map(_as_tuples, value)) if isinstance(value, list | tuple) else value
