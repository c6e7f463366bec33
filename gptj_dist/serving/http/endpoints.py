"""The table of HTTP endpoints, and their handlers."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict
from functools import partial, wraps
from typing import TypeAlias, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

import gptj_dist
from gptj_dist.answers.answer import Answer
from gptj_dist.answers.embedding import EmbeddingAnswer
from gptj_dist.answers.json_writing import json_bytes
from gptj_dist.answers.schema.adapters import LoadAdapterRequest, UnloadAdapterRequest
from gptj_dist.answers.schema.base import Body
from gptj_dist.answers.schema.chat import ChatRequest
from gptj_dist.answers.schema.completions import CompletionRequest
from gptj_dist.answers.schema.embeddings import EmbeddingRequest
from gptj_dist.answers.schema.repartition import RepartitionRequest
from gptj_dist.answers.schema.responses import ResponsesRequest
from gptj_dist.answers.schema.tokens import DetokenizeRequest, TokenizeRequest
from gptj_dist.answers.service import AnswerService, TextRequest
from gptj_dist.errors import GPTJDistError, NotPermittedError
from gptj_dist.logs import values
from gptj_dist.serving.adapter_registry import AdapterRegistry
from gptj_dist.serving.allowances import Allowances
from gptj_dist.serving.debug import DebugDocument
from gptj_dist.serving.http.admission import Admission
from gptj_dist.serving.http.body import BodyRoom, read_body
from gptj_dist.serving.http.disconnect import CLIENT_CLOSED_REQUEST, unless_gone
from gptj_dist.serving.http.endpoint import EVENTS, HTML, JSON, Endpoint, Handler, refusal
from gptj_dist.serving.http.openapi import openapi_document
from gptj_dist.serving.http.page_files import FILES, page_file
from gptj_dist.serving.http.pages import docs_page
from gptj_dist.serving.keeper import Keeper, Run
from gptj_dist.serving.keys import CALLER, ApiKey
from gptj_dist.serving.pipeline_client import PipelineClient
from gptj_dist.serving.scrape import Scrape
from gptj_dist.stages.trace import TraceEvents

logger = logging.getLogger(__name__)

MEDIA = (JSON, EVENTS)
"""Types of the answers to requests for text."""

PARTS = ("text/javascript", "text/css")
"""Types of the page's parts."""

TRACED_PLAN_US = 50
"""Microseconds that it takes to write a plan's events."""

B = TypeVar("B", bound=Body)
Understand: TypeAlias = Callable[[], Awaitable[Answer | EmbeddingAnswer]]
"""Makes the answer to a request."""

KINDS: Mapping[str, type[TextRequest]] = {
    kind.__name__: kind for kind in (CompletionRequest, ChatRequest, ResponsesRequest)
}


class Endpoints:
    """The handlers of all endpoints; `table` says what each is for.

    Args:
        names: of the model.
        keeper: makes streams resumable.
        adapters: loads and unloads adapters.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        texts: AnswerService,
        pipelines: PipelineClient,
        allowances: Allowances,
        scrape: Scrape,
        admission: Admission,
        keeper: Keeper | None = None,
        adapters: AdapterRegistry | None = None,
    ) -> None:
        self._names = names
        self._texts = texts
        self._pipelines = pipelines
        self._allowances = allowances
        self._scrape = scrape
        self._admission = admission
        self._room = BodyRoom()
        self._keeper = keeper
        self._adapters = adapters

    def table(self) -> tuple[Endpoint, ...]:
        """All endpoints."""
        path, summary = "/v1/streams/{id:path}", "Get the rest of a stream."
        resume = Endpoint("GET", path, self.resume, summary, media=(EVENTS,), header="Last-Event-ID")
        return (
            *(() if self._keeper is None else (resume,)),
            *(() if self._adapters is None else self._adapter_endpoints(self._adapters)),
            Endpoint("POST", "/v1/completions", self.completions, "Continue texts.", CompletionRequest, MEDIA),
            Endpoint("POST", "/v1/chat/completions", self.chat, "Continue a conversation.", ChatRequest, MEDIA),
            Endpoint("POST", "/v1/responses", self.respond, "Answer a text or conversation.", ResponsesRequest, MEDIA),
            Endpoint("POST", "/v1/embeddings", self.embeddings, "Compute vectors of texts.", EmbeddingRequest),
            Endpoint("POST", "/tokenize", self.tokenize, "Turn a text into tokens.", TokenizeRequest),
            Endpoint("POST", "/detokenize", self.detokenize, "Turn tokens into a text.", DetokenizeRequest),
            Endpoint("GET", "/tokenizer_info", self.tokenizer_info, "The tokenizer's settings."),
            Endpoint("GET", "/v1/models", self.models, "The model, under each of its names, and its adapters."),
            Endpoint("GET", "/v1/models/{model:path}", self.model, "The model or adapter of this name."),
            Endpoint("GET", "/health", self.health, "Whether the server lives."),
            Endpoint("GET", "/ready", self.ready, "Whether a token can be made."),
            Endpoint("GET", "/version", self.version, "The version of gptj-dist."),
            Endpoint("GET", "/metrics", self.metrics, "Counters and gauges, for Prometheus.", media=("text/plain",)),
            Endpoint("GET", "/debug/pipeline", self.debug_pipeline, "The state of every pipeline and its stages."),
            Endpoint("GET", "/debug/trace", self.debug_trace, "The last plans of every pipeline, as a Chrome trace."),
            Endpoint(
                "POST", "/debug/repartition", self.repartition, "Move layers, with an admin's key.", RepartitionRequest
            ),
            Endpoint("GET", "/", self.front, "The page: write with the model.", media=(HTML,), is_open=True),
            Endpoint("GET", "/page/{name}", self.page_part, "A part of that page.", media=PARTS, is_open=True),
            Endpoint("GET", "/openapi.json", self.openapi, "This list, for programs.", is_open=True),
            Endpoint("GET", "/docs", self.docs, "This list, as a page.", media=(HTML,), is_open=True),
        )

    def _adapter_endpoints(self, adapters: AdapterRegistry) -> tuple[Endpoint, ...]:
        async def load_adapter(request: Request) -> Response:
            require_admin(request)
            body = await self._body(request, LoadAdapterRequest)
            await adapters.load(body.lora_name, body.lora_path, body.load_inplace)
            return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

        async def unload_adapter(request: Request) -> Response:
            require_admin(request)
            body = await self._body(request, UnloadAdapterRequest)
            await adapters.unload(body.lora_name)
            return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

        load, unload, text = "/v1/load_lora_adapter", "/v1/unload_lora_adapter", ("text/plain",)
        return (
            Endpoint("POST", load, load_adapter, "Load an adapter, with an admin's key.", LoadAdapterRequest, text),
            Endpoint("POST", unload, unload_adapter, "Forget one, with an admin's key.", UnloadAdapterRequest, text),
        )

    async def completions(self, request: Request) -> Response:
        return await self._text(request, CompletionRequest)

    async def chat(self, request: Request) -> Response:
        return await self._text(request, ChatRequest)

    async def respond(self, request: Request) -> Response:
        return await self._text(request, ResponsesRequest)

    async def embeddings(self, request: Request) -> Response:
        self._admission.require_room(CALLER.get())
        body = await self._body(request, EmbeddingRequest)
        await self._find_adapters([body.model])
        understand = partial(self._texts.embed, body, request.state.request_id)
        return await self._answer(request, body.num_completions, understand)

    async def resume(self, request: Request) -> Response:
        """What follows the event whose id is in `Last-Event-ID`; without that, the stream from its beginning."""
        if self._keeper is None or request.method != "GET":  # a HEAD would take the stream over
            return Response(media_type=EVENTS)
        names = (CALLER.get(), request.path_params["id"])
        run = await self._keeper.take(names, request.headers.get("last-event-id", ""))
        logger.info("stream resumed", extra=values(request_id=run.names[1]))
        body: TextRequest = await self._texts.parse(run.opening.body, KINDS[run.opening.kind])
        understand = partial(self._texts.answer, body, run.names[1], run.stream)
        return await self._answer(request, body.num_completions, understand, run)

    async def tokenize(self, request: Request) -> Response:
        document = await self._texts.tokenize(await self._body(request, TokenizeRequest))
        return Response(await self._texts.write(document), media_type=JSON)

    async def detokenize(self, request: Request) -> Response:
        document = await self._texts.detokenize(await self._body(request, DetokenizeRequest))
        return Response(await self._texts.write(document), media_type=JSON)

    async def tokenizer_info(self, _: Request) -> Response:
        return JSONResponse(self._texts.tokenizer_info())

    async def models(self, _: Request) -> Response:
        adapters = () if self._adapters is None else self._adapters.sources
        cards = [self._texts.model_card(name) for name in (*self._names, *adapters)]
        return JSONResponse({"object": "list", "data": cards})

    async def model(self, request: Request) -> Response:
        return JSONResponse(self._texts.model_card(request.path_params["model"]))

    async def health(self, _: Request) -> Response:
        """Raises StageFailedError if the ingress can receive no tokens any more: Serve replaces it."""
        self._pipelines.check_health()
        return JSONResponse({"status": "ok"})

    async def ready(self, _: Request) -> Response:
        is_up = await self._pipelines.prove_ready()
        return JSONResponse({"status": "ready" if is_up else "asleep"})

    async def version(self, _: Request) -> Response:
        return JSONResponse({"version": gptj_dist.__version__})

    async def metrics(self, request: Request) -> Response:
        text, content_type = (await self._scrape.take()).encoded(request.headers.get("accept", ""))
        return Response(text, headers={"content-type": content_type})

    async def debug_pipeline(self, _: Request) -> Response:
        answers = await self._pipelines.documents()
        pipelines = tuple(sorted(answers.given, key=lambda pipeline: pipeline.name))
        document = DebugDocument(self._names[0], answers.num_silent, pipelines, self._pipelines.down)
        return JSONResponse(asdict(document))

    async def repartition(self, request: Request) -> Response:
        require_admin(request)
        body = await self._body(request, RepartitionRequest)
        recuts = await self._pipelines.repartition(body.layers)
        return JSONResponse({"pipelines": [recut.as_json() for recut in recuts]})

    async def debug_trace(self, _: Request) -> Response:
        parts = (await self._pipelines.trace_parts()).given
        cost = TRACED_PLAN_US * sum(len(part.records) for part in parts)
        trace = await self._texts.work.run(cost, lambda: json_bytes(TraceEvents().of(parts)))
        return Response(trace, media_type=JSON)

    async def front(self, request: Request) -> Response:
        return page_file("index.html", request.scope.get("root_path", "")).answer(request)

    async def page_part(self, request: Request) -> Response:
        """A file of the page at `/`. It holds nothing about the model, so no key is needed."""
        name = request.path_params["name"]
        if name not in FILES:
            raise HTTPException(404)
        return page_file(name).answer(request)

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(openapi_document(self.table(), request.scope.get("root_path", "")))

    async def docs(self, request: Request) -> Response:
        return HTMLResponse(docs_page(self.table(), request.scope.get("root_path", "")))

    async def _body(self, request: Request, kind: type[B]) -> B:
        return await self._texts.parse(await read_body(request, self._texts.work, room=self._room), kind)

    async def _find_adapters(self, names: Sequence[str | None]) -> None:
        if self._adapters is not None:
            await self._adapters.find(names)

    async def _text(self, request: Request, kind: type[TextRequest]) -> Response:
        self._admission.require_room(CALLER.get())  # before the body costs anything
        data, request_id = await read_body(request, self._texts.work, room=self._room), request.state.request_id
        body = await self._texts.parse(data, kind)
        await self._find_adapters([body.model, *(each.name for each in body.adapters)])
        run = None
        if self._keeper is not None and body.stream:
            run = self._keeper.new_run((CALLER.get(), request_id), kind.__name__, data, self._texts.adapters_of(body))
        stream = None if run is None else run.stream
        understand = partial(self._texts.answer, body, request_id, stream)
        return await self._answer(request, body.num_completions, understand, run)

    async def _answer(
        self, request: Request, num_completions: int, understand: Understand, run: Run | None = None
    ) -> Response:
        """Computes the answer, unless the client leaves first, and sends it whole or as it is made.

        Args:
            run: the stream of the answer, if it is resumable.
        """
        async with AsyncExitStack() as stack:  # or its response closes what is open, whenever the task is cancelled
            stack.enter_context(self._admission.admitted(CALLER.get(), num_completions))
            if run is not None and self._keeper is not None:
                stack.enter_context(self._keeper.keeping(run))
            answer = await unless_gone(request, understand())
            key = request.scope["state"].get("api_key")
            await stack.enter_async_context(self._allowances.charged(key, answer))
            if isinstance(answer, EmbeddingAnswer) or not answer.is_streamed:
                return Response(await unless_gone(request, answer.body()), media_type=JSON)
            events = answer.events()
            stack.push_async_callback(events.aclose)
            # An error before the first token still gets its own HTTP status.
            first = await unless_gone(request, anext(events, None))
            if first is None:  # all was received before; the status stops a browser's EventSource
                return Response(status_code=204)
            return EventResponse(_chain(first, events), stack.pop_all())


def require_admin(request: Request) -> None:
    """Raises NotPermittedError if the call has not shown the key of an admin."""
    key: ApiKey | None = request.scope["state"].get("api_key")
    if key is None:
        raise NotPermittedError(
            "this needs the key of an admin, and the server has no keys: start it with `gptj-dist serve --api-key`, or "
            "with an entry with admin: true in --api-keys"
        )
    if not key.is_admin:
        raise NotPermittedError(
            "this needs the key of an admin, and the given one is none: use the key of `gptj-dist serve --api-key`, or "
            "one with admin: true in --api-keys"
        )


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
        except HTTPException:  # the application's own answer
            raise
        except Exception as error:
            if not isinstance(error, GPTJDistError):
                logger.exception("endpoint failed", extra=values(request_id=request.state.request_id))
            return refusal(error)

    return respond
