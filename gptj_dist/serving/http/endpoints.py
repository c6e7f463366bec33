"""The table of HTTP endpoints, and their handlers."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import asdict
from functools import partial, wraps
from typing import TypeAlias

from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

import gptj_dist
from gptj_dist.answers.answer import Answer
from gptj_dist.answers.embedding import EmbeddingAnswer
from gptj_dist.answers.error_responses import error_response, response_headers
from gptj_dist.answers.schema.chat import ChatRequest
from gptj_dist.answers.schema.completions import CompletionRequest
from gptj_dist.answers.schema.embeddings import EmbeddingRequest
from gptj_dist.answers.schema.responses import ResponsesRequest
from gptj_dist.answers.schema.tokens import DetokenizeRequest, TokenizeRequest
from gptj_dist.answers.service import AnswerService
from gptj_dist.errors import GPTJDistError
from gptj_dist.logs import values
from gptj_dist.serving.allowances import Allowances
from gptj_dist.serving.debug import DebugDocument
from gptj_dist.serving.http.admission import Admission
from gptj_dist.serving.http.body import read_body
from gptj_dist.serving.http.disconnect import CLIENT_CLOSED_REQUEST, unless_gone
from gptj_dist.serving.http.endpoint import EVENTS, HTML, JSON, Endpoint, Handler
from gptj_dist.serving.http.middleware import is_stranger
from gptj_dist.serving.http.openapi import openapi_document
from gptj_dist.serving.http.pages import docs_page, front_page
from gptj_dist.serving.keys import ApiKey
from gptj_dist.serving.pipeline_client import PipelineClient
from gptj_dist.serving.scrape import Scrape
from gptj_dist.stages.trace import TraceEvents

logger = logging.getLogger(__name__)

Understand: TypeAlias = Callable[[], Awaitable[Answer | EmbeddingAnswer]]


class Endpoints:
    """The handlers of all endpoints.

    Args:
        names: of the model.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        texts: AnswerService,
        pipelines: PipelineClient,
        allowances: Allowances,
        scrape: Scrape,
        admission: Admission,
    ) -> None:
        self._names = names
        self._texts = texts
        self._pipelines = pipelines
        self._allowances = allowances
        self._scrape = scrape
        self._admission = admission

    def table(self) -> list[Endpoint]:
        """All endpoints."""
        return [
            Endpoint("POST", "/v1/completions", self.completions, "Continue texts.", CompletionRequest, (JSON, EVENTS)),
            Endpoint(
                "POST", "/v1/chat/completions", self.chat, "Continue a conversation.", ChatRequest, (JSON, EVENTS)
            ),
            Endpoint(
                "POST",
                "/v1/responses",
                self.respond,
                "Answer a text or a conversation.",
                ResponsesRequest,
                (JSON, EVENTS),
            ),
            Endpoint("POST", "/v1/embeddings", self.embeddings, "Compute vectors of texts.", EmbeddingRequest),
            Endpoint("POST", "/tokenize", self.tokenize, "Turn a text into tokens.", TokenizeRequest),
            Endpoint("POST", "/detokenize", self.detokenize, "Turn tokens into a text.", DetokenizeRequest),
            Endpoint("GET", "/tokenizer_info", self.tokenizer_info, "The tokenizer's settings."),
            Endpoint("GET", "/v1/models", self.models, "The model, under each of its names."),
            Endpoint("GET", "/v1/models/{model:path}", self.model, "The model, if it has this name."),
            Endpoint("GET", "/health", self.health, "Whether the server lives."),
            Endpoint("GET", "/ready", self.ready, "Whether a token can be made."),
            Endpoint("GET", "/version", self.version, "The version of gptj-dist."),
            Endpoint("GET", "/metrics", self.metrics, "Counters and gauges, for Prometheus.", media=("text/plain",)),
            Endpoint("GET", "/debug/pipeline", self.debug_pipeline, "The state of every pipeline and its stages."),
            Endpoint("GET", "/debug/trace", self.debug_trace, "The last plans of every pipeline, as a Chrome trace."),
            Endpoint("GET", "/", self.front, "A page with links.", media=(HTML,), is_open=True),
            Endpoint("GET", "/openapi.json", self.openapi, "This list, for programs.", is_open=True),
            Endpoint("GET", "/docs", self.docs, "This list, as a page.", media=(HTML,), is_open=True),
        ]

    async def completions(self, request: Request) -> Response:
        """OpenAI's completions."""
        body = await self._texts.parse(await read_body(request), CompletionRequest)
        return await self._respond(request, partial(self._texts.complete, body, request.state.request_id))

    async def chat(self, request: Request) -> Response:
        """OpenAI's chat."""
        body = await self._texts.parse(await read_body(request), ChatRequest)
        return await self._respond(request, partial(self._texts.chat, body, request.state.request_id))

    async def respond(self, request: Request) -> Response:
        """OpenAI's responses, for plain text."""
        body = await self._texts.parse(await read_body(request), ResponsesRequest)
        return await self._respond(request, partial(self._texts.respond, body, request.state.request_id))

    async def embeddings(self, request: Request) -> Response:
        """OpenAI's embeddings."""
        body = await self._texts.parse(await read_body(request), EmbeddingRequest)
        return await self._respond(request, partial(self._texts.embed, body, request.state.request_id))

    async def tokenize(self, request: Request) -> Response:
        """Tokens of a text."""
        body = await self._texts.parse(await read_body(request), TokenizeRequest)
        return Response(await self._texts.write(await self._texts.tokenize(body)), media_type=JSON)

    async def detokenize(self, request: Request) -> Response:
        """Text of tokens."""
        body = await self._texts.parse(await read_body(request), DetokenizeRequest)
        return JSONResponse(await self._texts.detokenize(body))

    async def tokenizer_info(self, _: Request) -> Response:
        """The tokenizer's settings, as vLLM returns them."""
        return JSONResponse(self._texts.tokenizer_info())

    async def models(self, _: Request) -> Response:
        """The model, once for each of its names."""
        return JSONResponse({"object": "list", "data": list(map(self._texts.model_card, self._names))})

    async def model(self, request: Request) -> Response:
        """The model, by name."""
        return JSONResponse(self._texts.model_card(request.path_params["model"]))

    async def health(self, _: Request) -> Response:
        """Whether this process lives."""
        return JSONResponse({"status": "ok"})

    async def ready(self, _: Request) -> Response:
        """Whether a token can be made."""
        await self._pipelines.prove_ready()
        return JSONResponse({"status": "ready"})

    async def version(self, _: Request) -> Response:
        """The version."""
        return JSONResponse({"version": gptj_dist.__version__})

    async def metrics(self, request: Request) -> Response:
        """The counters and gauges of pipelines and ingresses."""
        text, content_type = (await self._scrape.take()).encoded(request.headers.get("accept", ""))
        return Response(text, headers={"content-type": content_type})

    async def debug_pipeline(self, _: Request) -> Response:
        """The state of every pipeline and its stages."""
        answers = await self._pipelines.documents()
        pipelines = tuple(sorted(answers.given, key=lambda pipeline: pipeline.name))
        return JSONResponse(asdict(DebugDocument(self._names[0], answers.num_silent, pipelines)))

    async def debug_trace(self, _: Request) -> Response:
        """The last plans of every pipeline, as a Chrome trace."""
        answers = await self._pipelines.trace_parts()
        return JSONResponse(TraceEvents().of(answers.given))

    async def front(self, request: Request) -> Response:
        """A page with links. A caller who has not shown a key sees neither the model's names nor its state."""
        root_path, base = request.scope.get("root_path", ""), str(request.base_url).rstrip("/")
        if is_stranger(request.scope):
            return HTMLResponse(front_page((), "Calls to this server need an API key", base, root_path, needs_key=True))
        try:
            await self._pipelines.prove_ready()
            state = "ready"
        except GPTJDistError as error:
            state = f"not ready ({error})"
        needs_key = "api_key" in request.scope["state"]
        return HTMLResponse(front_page(self._names, state, base, root_path, needs_key))

    async def openapi(self, request: Request) -> Response:
        """The endpoints as an OpenAPI document."""
        return JSONResponse(openapi_document(self.table(), request.scope.get("root_path", "")))

    async def docs(self, request: Request) -> Response:
        """The endpoints as a page."""
        return HTMLResponse(docs_page(openapi_document(self.table(), request.scope.get("root_path", ""))))

    async def _respond(self, request: Request, understand: Understand) -> Response:
        """Computes the answer, unless the client leaves first, and sends it whole or as it is made."""
        key = request.scope["state"].get("api_key")
        return await unless_gone(request, self._response(understand, key))

    async def _response(self, understand: Understand, key: ApiKey | None) -> Response:
        async with AsyncExitStack() as stack:
            stack.enter_context(self._admission.admitted())
            answer = await understand()
            await stack.enter_async_context(self._allowances.charged(key, answer))
            if isinstance(answer, EmbeddingAnswer) or not answer.is_streamed:
                return Response(await answer.body(), media_type=JSON)
            events = answer.events()
            stack.push_async_callback(events.aclose)
            first = await anext(events)  # an error before the first token still gets its own HTTP status
            return EventResponse(_chain(first, events), stack.pop_all())


class EventResponse(StreamingResponse):
    """A response of server-sent events. Closes its resources even if the client leaves before the first event."""

    def __init__(self, events: AsyncIterator[bytes], stack: AsyncExitStack) -> None:
        super().__init__(events, media_type=EVENTS)
        self._stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._stack:
            await super().__call__(scope, receive, send)


async def _chain(first: bytes, rest: AsyncGenerator[bytes, None]) -> AsyncIterator[bytes]:
    yield first
    async for event in rest:
        yield event


def answering(handler: Handler) -> Handler:
    """The handler, with its errors turned into responses."""

    @wraps(handler)
    async def respond(request: Request) -> Response:
        try:
            return await handler(request)
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        except Exception as error:
            if not isinstance(error, GPTJDistError):
                logger.exception("endpoint failed", extra=values(request_id=request.state.request_id))
            return refusal(error)

    return respond


def refusal(error: BaseException) -> Response:
    """The response that reports an error to a client."""
    status, body = error_response(error)
    return JSONResponse(body, status, response_headers(error))
