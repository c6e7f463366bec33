"""From requests to answers, and from texts to tokens. Knows neither Ray nor HTTP."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TypeVar

from gptj_dist.answers.adapters import listing, with_sources
from gptj_dist.answers.answer import Answer, Form
from gptj_dist.answers.beams import choices
from gptj_dist.answers.choices import ChoicesForm, Head
from gptj_dist.answers.completion import TextDelta, stream_text
from gptj_dist.answers.deadline import Deadline
from gptj_dist.answers.embedding import EmbeddingAnswer
from gptj_dist.answers.error_responses import UnknownModelError
from gptj_dist.answers.event_ids import ResumableForm
from gptj_dist.answers.json_writing import json_bytes, writing_cost
from gptj_dist.answers.moderation import Moderation
from gptj_dist.answers.prompts import Prepared, PromptReader, reading_cost
from gptj_dist.answers.responses import ResponseForm
from gptj_dist.answers.resumable import ResumableStream
from gptj_dist.answers.schema.base import Body, naming, parse_body
from gptj_dist.answers.schema.chat import ChatRequest
from gptj_dist.answers.schema.completions import CompletionRequest
from gptj_dist.answers.schema.embeddings import EmbeddingRequest
from gptj_dist.answers.schema.responses import ResponsesRequest
from gptj_dist.answers.schema.sampling import SamplingFields
from gptj_dist.answers.schema.tokens import DetokenizeRequest, TokenizeRequest
from gptj_dist.answers.served_model import ServedModel
from gptj_dist.answers.source import TokenSource
from gptj_dist.answers.work import Work
from gptj_dist.answers.writers import ChatWriter, CompletionWriter
from gptj_dist.engine.limits import EngineLimits
from gptj_dist.engine.mailbox import Delta
from gptj_dist.engine.record import new_records
from gptj_dist.json_types import JsonObject
from gptj_dist.logs import values
from gptj_dist.params import AdapterChoice, AdapterSource
from gptj_dist.text.tool_calls import CallReader

logger = logging.getLogger(__name__)

MAX_USER_CHARS = 200
"""Of the request's `user` in the log."""

BYTES_PER_US = 4
"""Bytes of JSON that are parsed and checked in a microsecond, at worst."""

NO_ADAPTERS: Mapping[str, AdapterSource] = {}

TextRequest = CompletionRequest | ChatRequest | ResponsesRequest
Request = SamplingFields | EmbeddingRequest | TokenizeRequest | DetokenizeRequest
B = TypeVar("B", bound=Body)
R = TypeVar("R", bound=Request)
P = TypeVar("P", bound=SamplingFields | EmbeddingRequest)
T = TypeVar("T")


class AnswerService:
    """Understands requests for text.

    Args:
        moderation: checks prompts and answers, if there is one.
        on_end: as of `Answer`.
        logs_prompts: whether the log shows prompts.
        adapters: by name; may change at any time.

    Attributes:
        work: runs what takes CPU time.
    """

    def __init__(
        self,
        model: ServedModel,
        source: TokenSource,
        moderation: Moderation | None = None,
        on_end: Callable[[str], None] = lambda _: None,
        logs_prompts: bool = False,
        adapters: Mapping[str, AdapterSource] = NO_ADAPTERS,
    ) -> None:
        self._model = model
        self._source = source
        self._moderation = moderation
        self._on_end = on_end
        self._logs_prompts = logs_prompts
        self._adapters = adapters
        self.work = Work()
        self._reader = PromptReader(model)
        self._created = int(time.time())

    async def parse(self, body: bytes, kind: type[B]) -> B:
        """Reads a body. Raises InvalidRequestError."""
        return await self.work.run(len(body) // BYTES_PER_US, partial(parse_body, body, kind))

    async def answer(self, request: TextRequest, request_id: str, resumable: ResumableStream | None = None) -> Answer:
        """The answer to a request for text.

        Args:
            resumable: takes the tokens of a streamed answer, which may have begun elsewhere.

        Raises:
            GPTJDistError: it cannot be served.
        """
        if isinstance(request, CompletionRequest):
            return await self.complete(request, request_id, resumable)
        if isinstance(request, ChatRequest):
            return await self.chat(request, request_id, resumable)
        return await self.respond(request, request_id, resumable)

    async def complete(
        self, request: CompletionRequest, request_id: str, resumable: ResumableStream | None = None
    ) -> Answer:
        """The answer to a request for completions.

        Raises:
            GPTJDistError: it cannot be served.
        """
        deadline = Deadline(request.timeout_s)
        prepared = await deadline.bound(self._prepare(request, self._reader.complete, resumable))
        writers = [
            CompletionWriter(i * request.n + choice, request, prompt, prompt_ids, self._model.tokenizer)
            for i, (prompt, prompt_ids) in enumerate(prepared.prompts)
            for choice in range(request.n)
        ]
        kinds = ("text_completion", "text_completion")
        head = Head(f"cmpl-{request_id}", _created(resumable), self._name(request.model, resumable), *kinds)
        form = ChoicesForm(request, head, writers, prepared.num_prompt_tokens, len(prepared.prediction_ids))
        return await self._answer(request, request_id, form, prepared, deadline, resumable)

    async def chat(self, request: ChatRequest, request_id: str, resumable: ResumableStream | None = None) -> Answer:
        """The answer to a conversation.

        Raises:
            GPTJDistError: it cannot be served.
        """
        deadline = Deadline(request.timeout_s)
        prepared = await deadline.bound(self._prepare(request, self._reader.chat, resumable))
        ((_, prompt_ids),) = prepared.prompts
        tokenizer = self._model.tokenizer
        writers = [
            ChatWriter(choice, request, prompt_ids, tokenizer, self._call_reader(request), request_id)
            for choice in range(request.n)
        ]
        kinds = ("chat.completion", "chat.completion.chunk")
        head = Head(f"chatcmpl-{request_id}", _created(resumable), self._name(request.model, resumable), *kinds)
        form = ChoicesForm(request, head, writers, len(prompt_ids), len(prepared.prediction_ids))
        return await self._answer(request, request_id, form, prepared, deadline, resumable)

    async def respond(
        self, request: ResponsesRequest, request_id: str, resumable: ResumableStream | None = None
    ) -> Answer:
        """The answer to a request for a response.

        Raises:
            GPTJDistError: it cannot be served.
        """
        deadline = Deadline(request.timeout_s)
        prepared = await deadline.bound(self._prepare(request, self._reader.respond, resumable))
        name, num_tokens = self._name(request.model, resumable), prepared.num_prompt_tokens
        calls = self._call_reader(request)
        form = ResponseForm(request, request_id, _created(resumable), name, self._model.tokenizer, num_tokens, calls)
        return await self._answer(request, request_id, form, prepared, deadline, resumable)

    async def embed(self, request: EmbeddingRequest, request_id: str) -> EmbeddingAnswer:
        """The answer to a request for embeddings.

        Raises:
            GPTJDistError: it cannot be served.
        """
        prepared = await self._prepare(request, self._reader.embed)
        await self._accept(request, request_id, prepared)

        def open_streams() -> list[AsyncGenerator[Delta, None]]:
            return [
                self._source.streams(new_records(prompt_ids, prepared.params, 1, request_id))[0]
                for _, prompt_ids in prepared.prompts
            ]

        return EmbeddingAnswer(request, self._name(request.model), open_streams, prepared.num_prompt_tokens, self.work)

    async def tokenize(self, request: TokenizeRequest) -> JsonObject:
        """The tokens of a text or a conversation. Raises InvalidRequestError."""
        return await self._read(request, self._reader.tokenize)

    async def detokenize(self, request: DetokenizeRequest) -> JsonObject:
        """The text of tokens. Raises InvalidRequestError."""
        return await self._read(request, self._reader.detokenize)

    async def write(self, document: JsonObject) -> bytes:
        """A document as JSON."""
        return await self.work.run(writing_cost(document), partial(json_bytes, document))

    def tokenizer_info(self) -> JsonObject:
        """The tokenizer's settings."""
        return self._model.tokenizer_info

    def model_card(self, name: str) -> JsonObject:
        """The model, or an adapter, as `GET /v1/models` describes it. Raises UnknownModelError."""
        self.check_model(name)
        source = self._adapters.get(name)
        of_adapter = {} if source is None else {"root": source.path, "parent": self._model.names[0]}
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "gptj-dist",
            "max_model_len": self._model.max_model_len,
            **of_adapter,
        }

    def check_model(self, name: str | None) -> None:
        """Raises UnknownModelError if it is neither the model that is served here nor an adapter."""
        if name is not None and name not in self._model.names and name not in self._adapters:
            served = " and ".join(map(repr, self._model.names))
            adapters = f", and of adapters {listing(self._adapters)}" if self._adapters else ""
            raise UnknownModelError(f"model {name!r:.200} is not served here; {served} is{adapters}", "model")

    def _name(self, asked: str | None, resumable: ResumableStream | None = None) -> str:
        """What an answer calls its model: the adapter that the request names as its model, or the model."""
        is_adapter = asked in self._adapters or (resumable is not None and asked in resumable.adapters)
        return asked if asked is not None and is_adapter else self._model.names[0]

    def _call_reader(self, request: ChatRequest | ResponsesRequest) -> CallReader | None:
        """Reads the calls of one text, if the request has tools."""
        form = self._model.form_of_calls if request.tool_use.shown else None
        return None if form is None else CallReader(form)

    async def _read(self, request: R, read: Callable[[R, EngineLimits], T], knows_model: bool = False) -> T:
        """Renders, tokenises and checks, a request at a time."""
        await self.work.turns.next()
        if not knows_model:
            self.check_model(request.model)
        limits = self._source.limits()
        with naming(request):
            return await self.work.run(reading_cost(request), partial(read, request, limits))

    async def _prepare(
        self, request: P, read: Callable[[P, EngineLimits], Prepared], resumable: ResumableStream | None = None
    ) -> Prepared:
        """As `_read`, with the sources of the request's adapters. A resumed stream keeps those that it began with."""
        own = {} if resumable is None else resumable.adapters
        prepared = await self._read(request, read, knows_model=request.model in own)
        adapters, sources = prepared.params.adapters, {**self._adapters, **own}
        if request.model in sources and request.model not in self._model.names:
            adapters = (AdapterChoice(request.model), *adapters)
        if not adapters:
            return prepared
        return replace(prepared, params=with_sources(replace(prepared.params, adapters=adapters), sources))

    def adapters_of(self, request: SamplingFields) -> tuple[tuple[str, AdapterSource], ...]:
        """The adapters that a request names, as they are now; those that are not loaded are left out."""
        names = dict.fromkeys([request.model, *(each.name for each in request.adapters)])
        return tuple((name, self._adapters[name]) for name in names if name is not None and name in self._adapters)

    async def _answer(
        self,
        request: SamplingFields,
        request_id: str,
        form: Form,
        prepared: Prepared,
        deadline: Deadline,
        resumable: ResumableStream | None,
    ) -> Answer:
        await deadline.bound(self._accept(request, request_id, prepared))
        params, number = prepared.params, request.num_sampled
        if resumable is not None:
            form = ResumableForm(form, resumable.received(len(prepared.prompts) * number))

        def open_streams() -> list[AsyncGenerator[TextDelta, None]]:
            streams: list[AsyncGenerator[TextDelta, None]] = []
            for _, prompt_ids in prepared.prompts:
                records = new_records(prompt_ids, params, number, request_id, prepared.prediction_ids)
                tokens = (
                    self._source.streams(records)
                    if resumable is None
                    else resumable.streams(self._source, records, len(streams))
                )
                for each in choices(tokens, params):
                    text = stream_text(each, self._model.tokenizer, params, prepared.stops, prepared.prediction_ids)
                    streams.append(text)
            return list(map(self._watched, streams))

        most_tokens = len(prepared.prompts) * number * params.max_tokens
        num_prompt_tokens = prepared.num_prompt_tokens
        return Answer(request, form, open_streams, num_prompt_tokens, most_tokens, deadline, self.work, self._on_end)

    async def _accept(self, request: SamplingFields | EmbeddingRequest, request_id: str, prepared: Prepared) -> None:
        """Has prompts moderated, and logs them.

        Raises:
            ContentRefusedError, ModerationTimeoutError: a prompt does not pass.
        """
        if self._moderation is not None:
            with naming(request):
                for text, _ in prepared.prompts:
                    await self._moderation.check_prompt(text)
        user = request.user
        logger.info(
            "request accepted",
            extra=values(
                request_id=request_id,
                choices=len(prepared.prompts) * prepared.params.n,
                prompt_tokens=prepared.num_prompt_tokens,
                user=None if user is None else user[:MAX_USER_CHARS],
                prompts=[text for text, _ in prepared.prompts] if self._logs_prompts else None,
            ),
        )

    def _watched(self, stream: AsyncGenerator[TextDelta, None]) -> AsyncGenerator[TextDelta, None]:
        return stream if self._moderation is None else self._moderation.watch(stream)


def _created(resumable: ResumableStream | None) -> int:
    """When the request arrived, in seconds since 1970."""
    return int(time.time()) if resumable is None else resumable.created
