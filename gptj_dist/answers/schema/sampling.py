"""The fields that all requests for text share: how it is sampled, where it ends, how it is sent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import Field

from gptj_dist.answers.schema.base import Body, Ids, Integer, Strings, Unserved, one_of
from gptj_dist.answers.schema.content import Prediction
from gptj_dist.answers.schema.grammars import ResponseFormat, StructuredOutputs
from gptj_dist.errors import InvalidRequestError
from gptj_dist.params import NOT_SAMPLED, AdapterChoice, Grammar, SamplingParams

BadWords: TypeAlias = tuple[tuple[int, ...], ...]
Defaults: TypeAlias = Mapping[str, Any]
"""Parameters by their names."""

NO_DEFAULTS: Defaults = {}

Stop: TypeAlias = Annotated[str | Strings, one_of("a string or a list of strings")]
EarlyStopping: TypeAlias = Annotated[bool | Literal["never"], one_of('true, false or "never"')]
MAX_TIMEOUT_S = 86_400.0

HINTS = frozenset((
    # GPT-J's tokenizer puts no spaces between tokens.
    "spaces_between_special_tokens",
    "cache_control", "include_reasoning", "metadata", "parallel_tool_calls", "prompt_cache_key",
    "prompt_cache_options", "prompt_cache_retention", "safety_identifier", "service_tier", "store",
    # They shape samplers of other servers that are off: see `UNSERVED`.
    "dry_allowed_length", "dry_base", "dry_penalty_last_n", "dry_sequence_breakers", "dynatemp_exponent",
    "mirostat_eta", "mirostat_tau", "xtc_threshold",
))  # fmt: skip
UNSERVED: Unserved = {
    **dict.fromkeys((
        "audio", "ban_eos_token", "banned_tokens", "cache_salt", "chat_template", "do_sample", "documents",
        "dry_multiplier", "dynamic_temperature", "dynatemp_range", "ec_transfer_params", "echo", "functions",
        "grammar_string", "guided_choice", "guided_decoding_backend", "guided_grammar", "guided_json",
        "guided_regex", "guided_whitespace_pattern", "kv_transfer_params", "logits_processors",
        "logprob_token_ids", "media_io_kwargs", "mirostat_mode", "mm_processor_kwargs", "moderation",
        "penalize_nl", "prompt_embeds", "reasoning_effort", "repetition_detection", "request_id",
        "return_token_offsets", "session_id", "stream_interval", "suffix", "thinking_token_budget", "tools",
        "top_logprobs", "use_beam_search", "verbosity", "vllm_xargs", "watermarking", "web_search_options",
        "xtc_probability",
    )),
    "best_of": 1,
    "function_call": "none",
    "length_penalty": 1,
    "modalities": ["text"],
    "tfs": 1,
    "tool_choice": "none",
    "truncation_side": "left",
    "typical_p": 1,
}  # fmt: skip
"""Of completions and of chat; a body that has such a field itself serves it."""


class StreamOptions(Body):
    """Options of a streamed response.

    Args:
        include_usage: send the numbers of tokens in a separate last event.
        continuous_usage_stats: send the numbers of tokens so far with every event.
    """

    hints: ClassVar = frozenset(("include_obfuscation",))

    include_usage: bool = False
    continuous_usage_stats: bool = False


class AdapterField(Body):
    """An adapter that changes the model for this request.

    Args:
        name: one of the adapters in `GET /v1/models`.
        strength: multiplies its changes, from -100 to 100.
    """

    name: str
    strength: float = 1.0


class SamplingFields(Body):
    """The fields of all bodies that ask for text; names and meanings are those of `SamplingParams` where it has them.

    Args:
        model: one of the names in `GET /v1/models`, of the model or of an adapter; null takes the model that there is.
        adapters: adapters that change the model, beside the one that `model` may name; at most 8.
        stream: send the text as it is made, as server-sent events.
        user: goes to the log and changes nothing, as at OpenAI.
        bad_words: texts that are not generated, at the beginning of a text and within it.
        logit_bias: token ids, as strings, and numbers from -100 to 100 that are added to their logits.
        timeout_s: seconds, more than 0, after which the request is given up and answered with an error.
        cache_salt: only requests with the same one share cached prompt tokens; for clients that must not learn from the
            time to the first token what others have asked.
        structured_outputs: what the text matches when it ends by itself.
    """

    hints: ClassVar = HINTS
    unserved: ClassVar = UNSERVED

    model: str | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: Integer = 0
    min_p: float = 0.0
    seed: Integer | None = None
    stop: Stop = []
    stream: bool = False
    user: str | None = None
    ignore_eos: bool = False
    min_tokens: Integer = 0
    logit_bias: dict[str, float] = {}
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    repetition_penalty_range: Integer = 0
    stop_token_ids: Ids = []
    include_stop_str_in_output: bool = False
    bad_words: Strings = []
    allowed_token_ids: Ids | None = None
    skip_special_tokens: bool = True
    timeout_s: float | None = None
    priority: Integer = 0
    adapters: Annotated[list[AdapterField], Field(fail_fast=True)] = []
    cache_salt: str | None = None
    structured_outputs: StructuredOutputs | None = None

    @property
    def num_choices(self) -> int:
        """Completions of each prompt that are returned."""
        return 1

    @property
    def num_sampled(self) -> int:
        """Completions of each prompt that are computed."""
        return self.num_choices

    @property
    def num_streams(self) -> int:
        """Streams of each prompt, of which the best are returned."""
        return self.num_sampled

    @property
    def num_completions(self) -> int:
        """Completions of all prompts that are computed."""
        return self.num_sampled

    def check(self) -> None:
        if not all(word.strip() for word in self.bad_words):
            raise InvalidRequestError("bad_words must not hold an empty word", "bad_words")
        if self.timeout_s is not None and not 0 < self.timeout_s <= MAX_TIMEOUT_S:
            raise InvalidRequestError(f"timeout_s must be above 0 and at most {MAX_TIMEOUT_S:.0f}", "timeout_s")
        if self.structured_outputs is not None:
            self.structured_outputs.check()

    @cached_property
    def grammar(self) -> Grammar | None:
        """What the text must match; None for any text."""
        return None if self.structured_outputs is None else self.structured_outputs.as_grammar()

    def own_params(self) -> dict[str, Any]:
        """Parameters that the body calls by another name, or makes of several fields."""
        return {}

    def sampling_params(
        self, max_tokens: int | None = None, bad_words: BadWords = (), defaults: Defaults = NO_DEFAULTS
    ) -> SamplingParams:
        """How each prompt is to be sampled.

        Args:
            max_tokens: in place of the request's.
            bad_words: their tokens.
            defaults: of fields that the request leaves out; others have the default of `SamplingParams`.

        Raises:
            InvalidRequestError: a value is out of its range.
        """
        params = {**defaults, **self.model_dump(include=SAME_IN_PARAMS, exclude_unset=True), **self.own_params()}
        params["logit_bias"] = tuple((_token_id(text), bias) for text, bias in self.logit_bias.items())
        params["bad_words"] = bad_words
        params["structured_outputs"] = self.grammar
        params["adapters"] = tuple(AdapterChoice(each.name, each.strength) for each in self.adapters)
        if max_tokens is not None:
            params["max_tokens"] = max_tokens
        return SamplingParams(**params)


class ChoiceFields(SamplingFields):
    """The fields of completions and of chat, which answer with choices.

    Args:
        stream_options: only with `stream`.
        truncate_prompt_tokens: keep this number of the prompt's last tokens; -1 keeps all that fit beside the output.
        return_token_ids: return the ids of prompt and output with each choice.
        prediction: text that is expected: where it is what is sampled, its tokens take no steps of their own.
        return_tokens_as_token_ids: name tokens in log probabilities by their ids, such as `token_id:198`.
        use_beam_search: search for the `n` likeliest texts, and return the best first; not with `stream`. A stop string
            cuts them afterwards.
        response_format: OpenAI's name for the JSON forms of `structured_outputs`.
    """

    n: Integer = 1
    stream_options: StreamOptions | None = None
    truncate_prompt_tokens: Integer | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    prediction: Prediction | None = None
    use_beam_search: bool = False
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False
    response_format: ResponseFormat | None = None

    @property
    def num_choices(self) -> int:
        return self.n

    @property
    def num_streams(self) -> int:
        return self.n if self.use_beam_search else self.num_sampled

    def sampling_params(
        self, max_tokens: int | None = None, bad_words: BadWords = (), defaults: Defaults = NO_DEFAULTS
    ) -> SamplingParams:
        if self.use_beam_search:
            defaults = {name: value for name, value in defaults.items() if name not in NOT_SAMPLED}
        return super().sampling_params(max_tokens, bad_words, defaults)

    @cached_property
    def grammar(self) -> Grammar | None:
        of_format = None if self.response_format is None else self.response_format.grammar()
        return super().grammar if of_format is None else of_format

    def own_names(self) -> Mapping[str, str]:
        return {} if self.structured_outputs is not None else {"structured_outputs": "response_format"}

    def check(self) -> None:
        super().check()
        if self.use_beam_search and self.stream:
            raise InvalidRequestError("use_beam_search has no stream: the texts are known last", "stream")
        if self.response_format is not None:
            self.response_format.check()
            if self.structured_outputs is not None and self.response_format.type != "text":
                raise InvalidRequestError(
                    "response_format and structured_outputs contradict each other", "response_format"
                )
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options may be given only when stream is true", "stream_options")
        if self.truncate_prompt_tokens is not None and (
            self.truncate_prompt_tokens < -1 or self.truncate_prompt_tokens == 0
        ):
            raise InvalidRequestError("truncate_prompt_tokens must be at least 1, or -1", "truncate_prompt_tokens")


SAME_IN_PARAMS = {field.name for field in fields(SamplingParams)} & ChoiceFields.model_fields.keys() - {
    "bad_words",
    "logit_bias",
    "adapters",
    "structured_outputs",
}
"""Fields that mean in `SamplingParams` what they mean here."""


def _token_id(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise InvalidRequestError(
            f"logit_bias must map token ids to numbers; {text!r:.80} is no token id", "logit_bias"
        )
    return int(text)
