"""From a valid request to the tokens of its prompts. All of it may take long, so `Work` runs it.

Errors name `prompt` and the fields of `SamplingParams`; `schema.base.naming` gives them the request's own names.

Sizes are checked before anything is tokenised. No token stands for more bytes than the longest of the vocabulary, so a
prompt of more bytes than the context window has room for is refused by its length alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from gptj_dist.answers.request_limits import (
    MAX_BAD_WORD_CHARS,
    MAX_BAD_WORDS,
    MAX_CHOICES,
    MAX_LOGPROBS_OF_REQUEST,
    MAX_MESSAGES,
    MAX_STOP_CHARS,
    MAX_TEXT_BYTES,
)
from gptj_dist.answers.schema.chat import ChatRequest, Message, check_shown
from gptj_dist.answers.schema.completions import CompletionRequest
from gptj_dist.answers.schema.content import Prediction, text_of
from gptj_dist.answers.schema.embeddings import EmbeddingRequest
from gptj_dist.answers.schema.responses import ResponsesRequest
from gptj_dist.answers.schema.sampling import ChoiceFields, Defaults, SamplingFields
from gptj_dist.answers.schema.tokens import DetokenizeRequest, TokenizeRequest
from gptj_dist.answers.schema.tool_use import NO_TOOLS, ToolUse
from gptj_dist.answers.served_model import ServedModel
from gptj_dist.engine.limits import EngineLimits
from gptj_dist.errors import InvalidRequestError, RequestTooLongError
from gptj_dist.json_types import JsonObject
from gptj_dist.params import SamplingParams
from gptj_dist.text.stop_strings import StopPattern, prepare_stops

EncodedPrompt: TypeAlias = tuple[str, list[int]]
"""Its text, and its tokens."""

NO_TEMPLATE = (
    "the model has no chat template, as GPT-J has none: start the server with --chat-template FILE, "
    "or use /v1/completions"
)

GRAMMAR_COST = 100_000
"""Of a grammar, at most: it is compiled."""

PART_COST = 30
"""Of a text or a list of ids, beside one for each character or id."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that can be served.

    Args:
        stops: the stop strings of `params`.
        prediction_ids: tokens that the client expects to follow.
    """

    prompts: Sequence[EncodedPrompt]
    params: SamplingParams
    stops: tuple[StopPattern, ...]
    prediction_ids: tuple[int, ...] = ()

    @property
    def num_prompt_tokens(self) -> int:
        """Of all prompts; each counts once, whatever n is."""
        return sum(len(prompt_ids) for _, prompt_ids in self.prompts)


class PromptReader:
    """Renders, tokenises and checks prompts."""

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        template, chat = model.chat_template, model.chat
        stop = () if template is None else chat.stop_strings(template)
        self._chat_defaults = {**model.defaults, "stop": stop}

    def complete(self, request: CompletionRequest, limits: EngineLimits) -> Prepared:
        """The prompts of a request for completions. Raises InvalidRequestError."""
        _check_sizes(request)
        given = request.prompts()
        _check_choices(len(given), request)
        adds = request.add_special_tokens
        prompts = self._encoded(given, limits, adds, request.truncate_prompt_tokens, request.max_tokens)
        max_tokens = request.most_tokens
        if max_tokens is None and (default := self._model.defaults.get("max_tokens")) is not None:
            max_tokens = min(int(default), _room(prompts, limits))
        return self._prepared(request, prompts, max_tokens, self._model.defaults, limits)

    def chat(self, request: ChatRequest, limits: EngineLimits) -> Prepared:
        """The prompt of a conversation. Raises InvalidRequestError."""
        _check_sizes(request)
        text = self._render(
            request.messages,
            self._with_tools(request.chat_template_kwargs, request.tool_use),
            begins_answer=not request.continue_final_message and request.add_generation_prompt is not False,
            continues_last=request.continue_final_message,
        )
        room = request.most_tokens or min(self._model.max_answer_tokens, limits.max_model_len // 2)
        prompts = self._encoded([text], limits, request.add_special_tokens, request.truncate_prompt_tokens, room)
        max_tokens = request.most_tokens or self._answer_tokens(request.min_tokens, prompts, limits)
        return self._prepared(request, prompts, max_tokens, self._chat_defaults, limits, request.tool_use)

    def respond(self, request: ResponsesRequest, limits: EngineLimits) -> Prepared:
        """The prompt of a request for a response. Raises InvalidRequestError."""
        _check_sizes(request)
        is_plain = isinstance(request.input, str) and request.instructions is None and not request.tool_use.shown
        if isinstance(request.input, str) and is_plain and self._model.chat_template is None:
            text, is_template = request.input, False
        else:
            variables = self._with_tools({}, request.tool_use)
            text, is_template = self._render(request.messages(), variables, begins_answer=True), True
        prompts = self._encoded([text], limits, add_special_tokens=not is_template)
        max_tokens = request.max_output_tokens or self._answer_tokens(request.min_tokens, prompts, limits)
        return self._prepared(request, prompts, max_tokens, self._chat_defaults, limits, request.tool_use)

    def embed(self, request: EmbeddingRequest, limits: EngineLimits) -> Prepared:
        """The inputs of a request for embeddings. Raises InvalidRequestError."""
        given = request.prompts()
        _check_number("prompt", "texts", len(given), MAX_CHOICES)
        prompts = self._encoded(given, limits, request.add_special_tokens)
        return _checked(prompts, request.sampling_params(), limits)

    def tokenize(self, request: TokenizeRequest, limits: EngineLimits) -> JsonObject:
        """The tokens of a text or a conversation. Raises InvalidRequestError."""
        if request.messages is None:
            field, text = "prompt", request.prompt or ""
        else:
            begins_answer = request.add_generation_prompt
            tools = ToolUse([tool.function for tool in request.tools], "auto")
            variables = self._with_tools(request.chat_template_kwargs, tools)
            text = self._render(request.messages, variables, begins_answer=begins_answer)
            field = "messages"
        _check_number(field, "bytes", _num_bytes(text), MAX_TEXT_BYTES)
        adds = field == "prompt" if request.add_special_tokens is None else request.add_special_tokens
        token_ids = self._model.tokenizer.encode(text, adds)
        body: JsonObject = {"count": len(token_ids), "max_model_len": limits.max_model_len, "tokens": token_ids}
        if request.return_token_strs:
            body["token_strs"] = [self._model.tokenizer.token_text(token_id) for token_id in token_ids]
        return body

    def detokenize(self, request: DetokenizeRequest, limits: EngineLimits) -> JsonObject:
        """The text of tokens. Raises InvalidRequestError."""
        limits.check_vocabulary("tokens", request.tokens)
        return {"prompt": self._text_of(request.tokens)}

    def _prepared(
        self,
        request: SamplingFields,
        prompts: list[EncodedPrompt],
        max_tokens: int | None,
        defaults: Defaults,
        limits: EngineLimits,
        tools: ToolUse = NO_TOOLS,
    ) -> Prepared:
        if tools.must_call:
            defaults = {**defaults, "stop": ()}  # calls end themselves
        params = request.sampling_params(max_tokens, self._bad_words(request.bad_words), defaults)
        if tools.shown and (form := self._model.form_of_calls) is not None:
            params = replace(params, structured_outputs=tools.grammar(form))
        if params.structured_outputs is not None:
            self._model.tokenizer.grammars.check(params.structured_outputs)
        prepared = _checked(prompts, params, limits)
        _check_logprobs(prepared, request.num_sampled)
        if not isinstance(request, ChoiceFields) or request.prediction is None:
            return prepared
        return replace(prepared, prediction_ids=self._predicted(request.prediction, limits))

    def _predicted(self, prediction: Prediction, limits: EngineLimits) -> tuple[int, ...]:
        text = text_of(prediction.content)
        self._check_length(text, limits, is_cut=False, field="prediction")
        token_ids = tuple(self._model.tokenizer.encode(text))
        limits.check_vocabulary("prediction", token_ids)
        return token_ids

    def _with_tools(self, variables: Mapping[str, Any], tools: ToolUse) -> Mapping[str, Any]:
        """The variables of a template that shows tools to the model."""
        template = self._model.chat_template
        return variables if template is None else {**variables, **tools.variables(template)}

    def _render(
        self,
        messages: Sequence[Message],
        variables: Mapping[str, Any],
        *,
        begins_answer: bool,
        continues_last: bool = False,
    ) -> str:
        """A conversation as the text that the model continues."""
        if self._model.chat_template is None:
            raise InvalidRequestError(NO_TEMPLATE)
        _check_number("prompt", "messages", len(messages), MAX_MESSAGES)
        check_shown(messages, self._model.chat_template)
        return self._model.chat_template.render(
            [message.for_template() for message in messages],
            variables,
            begins_answer=begins_answer,
            continues_last=continues_last,
        )

    def _encoded(
        self,
        prompts: Sequence[str | list[int]],
        limits: EngineLimits,
        add_special_tokens: bool,
        most: int | None = None,
        max_tokens: int = 0,
    ) -> list[EncodedPrompt]:
        """The tokens of prompts, cut to the last `most`; -1 leaves room for `max_tokens`."""
        for prompt in prompts:
            if isinstance(prompt, str):
                self._check_length(prompt, limits, is_cut=most is not None)
        if most == -1:
            most = max(1, limits.max_model_len - max_tokens)
        return [self._encode(prompt, add_special_tokens, most) for prompt in prompts]

    def _encode(self, prompt: str | list[int], add_special_tokens: bool, most: int | None) -> EncodedPrompt:
        empty_prompt_ids = self._model.empty_prompt_ids
        token_ids = self._model.tokenizer.encode_prompt(prompt, empty_prompt_ids, add_special_tokens)
        if most is not None and len(token_ids) > most:
            token_ids = token_ids[-most:]
            return self._text_of(token_ids), token_ids
        return prompt if isinstance(prompt, str) else self._text_of(token_ids), token_ids

    def _check_length(self, text: str, limits: EngineLimits, *, is_cut: bool, field: str = "prompt") -> None:
        bytes_per_token = self._model.tokenizer.max_token_bytes
        if is_cut or bytes_per_token is None:
            _check_number(field, "bytes", _num_bytes(text), MAX_TEXT_BYTES)
        elif (num_bytes := _num_bytes(text)) > (most := bytes_per_token * limits.max_model_len):
            raise RequestTooLongError(
                f"{field} has {num_bytes} bytes, and the context window of {limits.max_model_len} tokens holds {most} "
                "at most",
                field,
            )

    def _answer_tokens(self, min_tokens: int, prompts: Sequence[EncodedPrompt], limits: EngineLimits) -> int:
        """The most tokens of an answer whose request does not say."""
        return min(_room(prompts, limits), max(self._model.max_answer_tokens, min_tokens))

    def _text_of(self, token_ids: Sequence[int]) -> str:
        """The text of tokens; a special one is its name, which is that token when the text is encoded again."""
        return b"".join(map(self._model.tokenizer.token_or_special_bytes, token_ids)).decode("utf-8", "replace")

    def _bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """The tokens of words, at the beginning of a text and within it."""
        texts = [text for word in words for text in (word.strip(), f" {word.strip()}")]
        return tuple(tuple(self._model.tokenizer.encode(text)) for text in texts)


def _checked(prompts: list[EncodedPrompt], params: SamplingParams, limits: EngineLimits) -> Prepared:
    for _, prompt_ids in prompts:
        limits.check(prompt_ids, params)
    return Prepared(prompts, params, prepare_stops(params.stop))


def reading_cost(request: SamplingFields | EmbeddingRequest | TokenizeRequest | DetokenizeRequest) -> int:
    """An estimate of the microseconds that reading the request takes, for `Work`."""
    has_grammar = isinstance(request, SamplingFields) and request.grammar is not None
    has_grammar |= isinstance(request, ChatRequest | ResponsesRequest) and bool(request.tool_use.shown)
    return GRAMMAR_COST * has_grammar + sum(len(part) + PART_COST for part in _parts(request))


def _parts(request: SamplingFields | EmbeddingRequest | TokenizeRequest | DetokenizeRequest) -> Iterable[Any]:
    if isinstance(request, SamplingFields):
        yield from request.bad_words * 2
        yield from [request.stop] if isinstance(request.stop, str) else request.stop
    if isinstance(request, ChoiceFields) and request.prediction is not None:
        yield text_of(request.prediction.content)
    match request:
        case CompletionRequest() | EmbeddingRequest():
            yield from request.prompts()
        case ResponsesRequest():
            yield from _parts_of(request.messages())
        case ChatRequest() | TokenizeRequest():
            yield from _parts_of(request.messages or ())
    if isinstance(request, TokenizeRequest):
        yield request.prompt or ""
    if isinstance(request, DetokenizeRequest):
        yield request.tokens


def _parts_of(messages: Iterable[Message]) -> Iterable[str]:
    for message in messages:
        yield text_of(message.content)
        yield from (call.function.arguments for call in message.tool_calls)


def _room(prompts: Sequence[EncodedPrompt], limits: EngineLimits) -> int:
    """The most tokens that fit beside the longest prompt, or 1: if there is no room, the limits say so."""
    longest = max(len(prompt_ids) for _, prompt_ids in prompts)
    return max(1, min(limits.max_model_len, limits.kv_tokens) - longest)


def _check_sizes(request: SamplingFields) -> None:
    """Checks the lengths of lists and texts that are looked at one by one."""
    _check_number("bad_words", "words", len(request.bad_words), MAX_BAD_WORDS)
    for field, texts, most in (
        ("bad_words", request.bad_words, MAX_BAD_WORD_CHARS),
        ("stop", [request.stop] if isinstance(request.stop, str) else request.stop, MAX_STOP_CHARS),
    ):
        _check_number(field, "characters in one string", max(map(len, texts), default=0), most)


def _check_choices(num_prompts: int, request: CompletionRequest) -> None:
    _check_number("prompt", "prompts", num_prompts, MAX_CHOICES)
    if (number := num_prompts * request.num_sampled) > MAX_CHOICES:
        raise InvalidRequestError(f"{number} completions in one request, at most {MAX_CHOICES} are made", "n")


def _check_logprobs(prepared: Prepared, num_sampled: int) -> None:
    params = prepared.params
    of_prompt = 0 if params.prompt_logprobs is None else prepared.num_prompt_tokens * (params.prompt_logprobs + 1)
    of_output = 0 if params.logprobs is None else len(prepared.prompts) * params.max_tokens * (params.logprobs + 1)
    if (number := num_sampled * (of_prompt + of_output)) > MAX_LOGPROBS_OF_REQUEST:
        field = "logprobs" if params.prompt_logprobs is None else "prompt_logprobs"
        message = f"{field} may ask for {MAX_LOGPROBS_OF_REQUEST} log probabilities in one answer, got {number}"
        raise InvalidRequestError(message, field)


def _check_number(field: str, what: str, number: int, most: int) -> None:
    if number > most:
        raise InvalidRequestError(f"{field} has {number} {what}, at most {most} are taken", field)


def _num_bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))
