"""The bodies of OpenAI's `POST /v1/completions` and `GET /v1/models`: requests checked, responses built.

Knows no tokenizer, so ids are only checked to be whole and not negative: the ingress checks the vocabulary, the context
window and the model's name. Knows no HTTP: `serving.errors` turns what is raised here into a status.
"""

from __future__ import annotations

import difflib
import json
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, TypeAlias

import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gptj_dist.errors import InvalidRequestError
from gptj_dist.params import SamplingParams

# `fail_fast`: a list of a million wrong elements is one problem, not a million.
_NonEmpty = Field(min_length=1, fail_fast=True)
TokenIds: TypeAlias = Annotated[list[Annotated[int, Field(ge=0)]], _NonEmpty]
Prompt: TypeAlias = str | Annotated[list[str], _NonEmpty] | TokenIds | Annotated[list[TokenIds], _NonEmpty]
Strings: TypeAlias = Annotated[list[str], Field(fail_fast=True)]
Stop: TypeAlias = str | Strings
Ids: TypeAlias = Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)]

# What a field of several types takes, in words; pydantic would report each type's complaint.
_UNION_FIELDS: Mapping[str, str] = {
    "prompt": "a string, a list of strings, a list of token ids (whole numbers from 0) or a list of such lists; "
    "no list may be empty",
    "stop": "a string or a list of strings",
}

# Fields of OpenAI's and vLLM's schemas without an effect here, and the values at which they ask for none, to which null
# always belongs. Any other value is refused rather than ignored.
NEUTRAL_VALUES: Mapping[str, tuple[object, ...]] = {
    # GPT-J's tokenizer has no tokens to add, so both values ask for the same.
    "add_special_tokens": (True, False),
    "cache_salt": (),
    "ec_transfer_params": (),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_whitespace_pattern": (),
    "kv_transfer_params": (),
    "length_penalty": (1,),
    "logits_processors": (),
    "logprob_token_ids": (),
    "priority": (0,),
    "prompt_embeds": (),
    "repetition_detection": (),
    "request_id": (),
    "response_format": ({"type": "text"},),
    "return_token_offsets": (False,),
    "return_tokens_as_token_ids": (False,),
    "session_id": (),
    "spaces_between_special_tokens": (True,),
    "stream_interval": (),
    "structured_outputs": (),
    "suffix": ("",),
    "thinking_token_budget": (),
    "truncation_side": (),
    "use_beam_search": (False,),
    "vllm_xargs": (),
    "watermarking": (False,),
}
NEUTRAL_STREAM_OPTIONS: Mapping[str, tuple[object, ...]] = {
    "continuous_usage_stats": (False,),
    "include_obfuscation": (False,),
}


MAX_BEST_OF = 128


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    """Options of a streamed response."""

    include_usage: bool = False


class CompletionRequest(_Strict):
    """Body of `POST /v1/completions`; `parse_completion` makes one from bytes.

    The sampling fields are those of `SamplingParams`. `user` goes to the log and changes nothing, as at OpenAI.
    A prompt may be an empty string here. `bad_words` are texts here, and `logit_bias` has token ids as strings.

    Args:
        best_of: completions to sample, of which the `n` with the highest mean log probability are returned.
        echo: begin the text with the prompt, and its log probabilities with the prompt's.
        return_token_ids: give the ids of prompt and output with each choice.
        truncate_prompt_tokens: keep so many of the prompt's last tokens; -1 as many as fit beside the output.
    """

    model: str | None = None
    prompt: Prompt
    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: Stop = []
    n: int = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    ignore_eos: bool = False
    min_tokens: int = 0
    best_of: int | None = None
    echo: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[str, float] = {}
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop_token_ids: Ids = []
    include_stop_str_in_output: bool = False
    bad_words: Strings = []
    allowed_token_ids: Ids | None = None
    skip_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    return_token_ids: bool = False

    @property
    def num_sampled(self) -> int:
        """Completions of each prompt that are computed."""
        return self.n if self.best_of is None else self.best_of

    @property
    def is_usage_streamed(self) -> bool:
        """Whether chunks carry a `usage` field and a last chunk its numbers."""
        return self.stream_options is not None and self.stream_options.include_usage

    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one, each text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)

    def sampling_params(self, bad_token_ids: tuple[tuple[int, ...], ...] = ()) -> SamplingParams:
        """How each prompt is to be sampled.

        Args:
            bad_token_ids: what `bad_words` are.

        Raises:
            InvalidRequestError: a value is out of its range.
        """
        asked = [
            number for number in (self.prompt_logprobs, self.logprobs if self.echo else None) if number is not None
        ]
        picks = self.num_sampled > self.n and self.logprobs is None
        return SamplingParams(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            seed=self.seed,
            n=self.n,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            stop_token_ids=tuple(self.stop_token_ids),
            include_stop_str_in_output=self.include_stop_str_in_output,
            skip_special_tokens=self.skip_special_tokens,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=tuple((_token_id(text), bias) for text, bias in self.logit_bias.items()),
            allowed_token_ids=None if self.allowed_token_ids is None else tuple(self.allowed_token_ids),
            bad_token_ids=bad_token_ids,
            logprobs=0 if picks else self.logprobs,
            prompt_logprobs=max(asked, default=None),
        )

    def check(self) -> None:
        """Raises InvalidRequestError if fields contradict each other or a value is out of its range."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options may be given only when stream is true", "stream_options")
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise InvalidRequestError(
                "max_tokens must be at least 1, unless echo or prompt_logprobs ask for the prompt", "max_tokens"
            )
        self.sampling_params()
        if not self.n <= self.num_sampled <= MAX_BEST_OF:
            raise InvalidRequestError(f"best_of must be from n ({self.n}) to {MAX_BEST_OF}", "best_of")
        if self.num_sampled > self.n and self.stream:
            raise InvalidRequestError("best_of cannot be more than n in a stream: the best is known last", "best_of")
        if self.truncate_prompt_tokens is not None and (
            self.truncate_prompt_tokens < -1 or self.truncate_prompt_tokens == 0
        ):
            raise InvalidRequestError("truncate_prompt_tokens must be at least 1, or -1", "truncate_prompt_tokens")
        if not all(word.strip() for word in self.bad_words):
            raise InvalidRequestError("bad_words must not hold an empty word", "bad_words")


def _token_id(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise InvalidRequestError(
            f"logit_bias must map token ids to numbers; {text!r:.80} is no token id", "logit_bias"
        )
    return int(text)


def parse_completion(body: bytes) -> CompletionRequest:
    """Reads and checks the body of a completion request, its sampling values' ranges included.

    Raises:
        InvalidRequestError: of all that is wrong, what was found first; `param` names the field, with a dot before an
            option's name, and is None when the body is not a JSON object.
    """
    given = _json_object(body)
    fields = _supported_fields(given, CompletionRequest, NEUTRAL_VALUES)
    if "stream_options" in fields:
        if not isinstance(fields["stream_options"], dict):
            raise InvalidRequestError("stream_options must be an object", "stream_options")
        fields["stream_options"] = _supported_fields(
            fields["stream_options"], StreamOptions, NEUTRAL_STREAM_OPTIONS, "stream_options."
        )
    try:
        request = CompletionRequest.model_validate(fields)
    except ValidationError as error:
        raise _first_problem(error) from None
    request.check()
    return request


def _json_object(body: bytes) -> dict[str, Any]:
    try:
        value = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidRequestError("the body must be a JSON object")
    return value


def _supported_fields(
    given: Mapping[str, Any], model: type[BaseModel], neutral: Mapping[str, Sequence[object]], prefix: str = ""
) -> dict[str, Any]:
    """The fields of `given` that `model` has, less nulls, which mean the default.

    Raises:
        InvalidRequestError: a field is in neither `model` nor `neutral`, or has none of its neutral values.
    """
    fields = {}
    for name, value in given.items():
        if name not in model.model_fields and name not in neutral:
            raise _unknown_field(prefix, name, [*model.model_fields, *neutral])
        if value is None:
            continue
        if name in model.model_fields:
            fields[name] = value
        elif not any(_is_same_json(value, allowed) for allowed in neutral[name]):
            allowed = json.dumps(next(iter(neutral[name]), None))
            raise InvalidRequestError(f"{prefix}{name} is not supported yet: it can only be {allowed}", prefix + name)
    return fields


def _is_same_json(left: object, right: object) -> bool:
    """Equality that tells false from 0, which Python does not."""
    return left == right and isinstance(left, bool) == isinstance(right, bool)


def _unknown_field(prefix: str, name: str, known: Iterable[str]) -> InvalidRequestError:
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {prefix + nearest[0]!r}?" if nearest else ""
    return InvalidRequestError(f"unknown field {prefix + name!r:.80}{hint}", prefix + name)


def _first_problem(error: ValidationError) -> InvalidRequestError:
    problem = error.errors(include_url=False, include_context=False)[0]
    param = ".".join(map(str, problem["loc"]))
    if problem["type"] == "missing":
        return InvalidRequestError(f"{param} is required", param)
    rule = problem["msg"].removeprefix("Input should be ")
    if problem["loc"][0] in _UNION_FIELDS:
        param = str(problem["loc"][0])
        rule = _UNION_FIELDS[param]
    return InvalidRequestError(f"{param} must be {rule}; got {reprlib.repr(problem['input'])}", param)


JsonObject: TypeAlias = dict[str, Any]


def completion_head(request_id: str, created: int, model: str) -> JsonObject:
    """What every response body and chunk of one HTTP request begins with; `created` is in seconds since 1970."""
    return {"id": f"cmpl-{request_id}", "object": "text_completion", "created": created, "model": model}


def usage(prompt_tokens: int, completion_tokens: int) -> JsonObject:
    """Token counts of a whole HTTP request: each prompt counts once, whatever n is."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def completion_response(head: JsonObject, choices: Sequence[JsonObject], totals: JsonObject) -> JsonObject:
    """The body of a response that is not streamed; `totals` is what `usage` made."""
    return {**head, "choices": choices, "usage": totals}


def completion_chunk(head: JsonObject, choice: JsonObject, *, is_usage_streamed: bool) -> JsonObject:
    """One event of a stream: the next part of a choice, whose last chunk has a `finish_reason`."""
    chunk = {**head, "choices": [choice]}
    if is_usage_streamed:
        chunk["usage"] = None
    return chunk


def usage_chunk(head: JsonObject, totals: JsonObject) -> JsonObject:
    """The last event before `[DONE]` when the client asked for usage."""
    return {**head, "choices": [], "usage": totals}


def model_list(names: Iterable[str], created: int) -> JsonObject:
    """The body of `GET /v1/models`."""
    data = [{"id": name, "object": "model", "created": created, "owned_by": "gptj-dist"} for name in names]
    return {"object": "list", "data": data}
