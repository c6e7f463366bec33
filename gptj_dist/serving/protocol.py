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

from gptj_dist.engine.request import FinishReason
from gptj_dist.errors import InvalidRequestError
from gptj_dist.params import SamplingParams

# `fail_fast`: a list of a million wrong elements is one problem, not a million.
_NonEmpty = Field(min_length=1, fail_fast=True)
TokenIds: TypeAlias = Annotated[list[Annotated[int, Field(ge=0)]], _NonEmpty]
Prompt: TypeAlias = str | Annotated[list[str], _NonEmpty] | TokenIds | Annotated[list[TokenIds], _NonEmpty]
Stop: TypeAlias = str | Annotated[list[str], Field(fail_fast=True)]

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
    "allowed_token_ids": (),
    "bad_words": ([],),
    "best_of": (1,),  # and the request's n
    "cache_salt": (),
    "echo": (False,),
    "ec_transfer_params": (),
    "frequency_penalty": (0,),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_whitespace_pattern": (),
    "include_stop_str_in_output": (False,),
    "kv_transfer_params": (),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "logits_processors": (),
    "logprob_token_ids": (),
    "logprobs": (),
    "presence_penalty": (0,),
    "priority": (0,),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "repetition_detection": (),
    "repetition_penalty": (1,),
    "request_id": (),
    "response_format": ({"type": "text"},),
    "return_token_ids": (False,),
    "return_token_offsets": (False,),
    "return_tokens_as_token_ids": (False,),
    "session_id": (),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stop_token_ids": ([],),
    "stream_interval": (),
    "structured_outputs": (),
    "suffix": ("",),
    "thinking_token_budget": (),
    "truncate_prompt_tokens": (),
    "truncation_side": (),
    "use_beam_search": (False,),
    "vllm_xargs": (),
    "watermarking": (False,),
}
NEUTRAL_STREAM_OPTIONS: Mapping[str, tuple[object, ...]] = {
    "continuous_usage_stats": (False,),
    "include_obfuscation": (False,),
}


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    """Options of a streamed response."""

    include_usage: bool = False


class CompletionRequest(_Strict):
    """Body of `POST /v1/completions`; `parse_completion` makes one from bytes.

    The sampling fields are those of `SamplingParams`. `user` goes to the log and changes nothing, as at OpenAI.
    A prompt may be an empty string here.
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

    def sampling_params(self) -> SamplingParams:
        """How each prompt is to be sampled.

        Raises:
            InvalidRequestError: a value is out of its range.
        """
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
        )


def parse_completion(body: bytes) -> CompletionRequest:
    """Reads and checks the body of a completion request, its sampling values' ranges included.

    Raises:
        InvalidRequestError: of all that is wrong, what was found first; `param` names the field, with a dot before an
            option's name, and is None when the body is not a JSON object.
    """
    given = _json_object(body)
    # best_of samples that many and returns n of them: no choice to make where they are equal.
    neutral = {**NEUTRAL_VALUES, "best_of": (1, given.get("n"))}
    fields = _supported_fields(given, CompletionRequest, neutral)
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
    if request.stream_options is not None and not request.stream:
        raise InvalidRequestError("stream_options may be given only when stream is true", "stream_options")
    request.sampling_params()
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


def completion_choice(index: int, text: str, finish_reason: FinishReason | None) -> JsonObject:
    """One of the n completions of one of the prompts: the k-th of prompt i has index i * n + k."""
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}


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


def completion_chunk(
    head: JsonObject, index: int, text: str, finish_reason: FinishReason | None, *, is_usage_streamed: bool
) -> JsonObject:
    """One event of a stream: the next text of choice `index`, whose last chunk has a `finish_reason`."""
    chunk = {**head, "choices": [completion_choice(index, text, finish_reason)]}
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
