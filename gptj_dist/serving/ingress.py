"""The deployment in front: HTTP, text, streaming. Starts in seconds, holds no weights, knows pipelines by a handle."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.handle import DeploymentHandle, DeploymentResponse
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from gptj_dist.checkpoint.hub import resolve_model
from gptj_dist.checkpoint.index import read_model_config
from gptj_dist.completion import TextDelta, stream_text, whole
from gptj_dist.engine.limits import EngineLimits
from gptj_dist.engine.mailbox import Delta, Mailbox
from gptj_dist.errors import GPTJDistError, InvalidRequestError, NotReadyError, StageFailedError
from gptj_dist.params import SamplingParams
from gptj_dist.serving.choices import ChoiceWriter, best
from gptj_dist.serving.debug import debug_document
from gptj_dist.serving.disconnect import unless_gone
from gptj_dist.serving.errors import BodyTooLargeError, UnknownModelError, error_response, retry_after_s
from gptj_dist.serving.everyone import statuses, trace_parts
from gptj_dist.serving.feed import FeedInbox
from gptj_dist.serving.listener import Listener
from gptj_dist.serving.loopback import keep_replica_on_node_address
from gptj_dist.serving.merge import merge
from gptj_dist.serving.protocol import (
    CompletionRequest,
    completion_chunk,
    completion_head,
    completion_response,
    model_list,
    parse_completion,
    usage,
    usage_chunk,
)
from gptj_dist.serving.settings import AppConfig
from gptj_dist.serving.sse import SSE_DONE, sse_frame
from gptj_dist.stages.trace import TraceEvents
from gptj_dist.text.tokenizer import Tokenizer

logger = logging.getLogger("ray.serve")

MAX_BODY_BYTES = 4_000_000
MAX_CHOICES = 1024
READY_TIMEOUT_S = 5.0

DRAIN_S = 5.0
"""How long answers under way may take when the application ends."""

LAST_TOKENS_S = 5.0
"""How long a stream's last tokens may be behind the answer of the call that made them."""


@serve.ingress()
class Ingress:
    """Takes HTTP requests, and has pipelines continue their prompts.

    Args:
        pipeline: handle to the deployment whose replicas are pipelines.
        listen: host and port of a server of its own; None leaves HTTP to Serve's proxies.
    """

    def __init__(self, config: AppConfig, pipeline: DeploymentHandle, listen: tuple[str, int] | None = None) -> None:
        keep_replica_on_node_address()
        directory = resolve_model(config.pipeline.model, config.pipeline.revision)
        self._model_name = config.model_name
        self._eos_token_id = read_model_config(directory).eos_token_id
        self._tokenizer = Tokenizer.load(directory)
        self._pipeline = pipeline
        self._feed = FeedInbox(ray.util.get_node_ip_address())
        self._created = int(time.time())
        self._limits: EngineLimits | None = None
        self._meeting = asyncio.get_running_loop().create_task(self._meet_pipeline())

        self._app = self._make_app()
        self._listener = None if listen is None else Listener(self._app, *listen, DRAIN_S)

    def __serve_build_asgi_app__(self) -> Starlette:
        """Called by Serve after the constructor."""
        return self._app

    async def __del__(self) -> None:
        """Called by Serve when the application ends."""
        if self._listener is not None:
            await self._listener.close()
        self._feed.stop()

    def _make_app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/health", self.health),
                Route("/ready", self.ready),
                Route("/debug/pipeline", self.debug_pipeline),
                Route("/debug/trace", self.debug_trace),
                Route("/v1/models", self.models),
                Route("/v1/completions", self.completions, methods=["POST"]),
            ],
            exception_handlers={HTTPException: _no_such_route},
        )

    async def health(self, _: Request) -> Response:
        """Whether this process lives."""
        return JSONResponse({"status": "ok"})

    async def ready(self, _: Request) -> Response:
        """Whether a token can be made."""
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                self._require_pipeline()
                await self._pipeline.prove_ready.remote()
        except (RayError, TimeoutError, GPTJDistError) as error:
            known = isinstance(error, GPTJDistError)
            return _refusal(error if known else NotReadyError("no pipeline makes a token right now"))
        return JSONResponse({"status": "ready"})

    async def debug_pipeline(self, _: Request) -> Response:
        """What every pipeline and its stages are doing."""
        try:
            self._require_pipeline()
            answers = await statuses(self._pipeline)
        except GPTJDistError as error:
            return _refusal(error)
        document = debug_document(self._model_name, answers.given, answers.num_silent)
        return JSONResponse(document.model_dump(mode="json"))

    async def debug_trace(self, _: Request) -> Response:
        """The last plans of every pipeline, as a Chrome trace."""
        try:
            self._require_pipeline()
            answers = await trace_parts(self._pipeline, {})
        except GPTJDistError as error:
            return _refusal(error)
        return JSONResponse(TraceEvents().of(answers.given))

    async def models(self, _: Request) -> Response:
        """The one model that is served."""
        return JSONResponse(model_list([self._model_name], self._created))

    async def completions(self, request: Request) -> Response:
        """OpenAI's completions."""
        try:
            completion = parse_completion(await _read_body(request))
            return await unless_gone(request, self._complete(completion))
        except Exception as error:
            if not isinstance(error, GPTJDistError):
                logger.exception("completion failed")
            return _refusal(error)

    async def _complete(self, request: CompletionRequest) -> Response:
        if request.model not in (None, self._model_name):
            raise UnknownModelError(f"model {request.model!r} is not served here; {self._model_name!r} is", "model")
        params = request.sampling_params(self._bad_token_ids(request.bad_words))
        prompts = [self._encode(prompt, request) for prompt in request.prompts()]
        if len(prompts) * request.num_sampled > MAX_CHOICES:
            raise InvalidRequestError(
                f"{len(prompts) * request.num_sampled} completions in one request, at most {MAX_CHOICES} are made", "n"
            )
        limits = self._require_pipeline()
        for _, prompt_ids in prompts:
            limits.check(prompt_ids, params)
        head = completion_head(uuid.uuid4().hex, int(time.time()), self._model_name)
        logger.info("%s: %d choices, user %r", head["id"], len(prompts) * request.n, request.user)
        streams = [
            stream_text(self._generate(prompt_ids, params, choice), self._tokenizer, params)
            for _, prompt_ids in prompts
            for choice in range(request.num_sampled)
        ]
        writers = [
            ChoiceWriter(i * request.n + choice, request, prompt, prompt_ids, self._tokenizer)
            for i, (prompt, prompt_ids) in enumerate(prompts)
            for choice in range(request.n)
        ]
        num_prompt_tokens = sum(len(prompt_ids) for _, prompt_ids in prompts)
        if not request.stream:
            return JSONResponse(await _collect(request, head, streams, writers, num_prompt_tokens))
        events = _events(request, head, streams, writers, num_prompt_tokens)
        first = await anext(events)  # an error before the first token still gets a status of its own
        return StreamingResponse(_chain(first, events), media_type="text/event-stream")

    def _encode(self, prompt: str | list[int], request: CompletionRequest) -> tuple[str, list[int]]:
        """A prompt's text and token ids, cut to what the request wants of it."""
        token_ids = self._tokenizer.encode_prompt(prompt, self._eos_token_id)
        most = request.truncate_prompt_tokens
        if most == -1:
            most = max(1, self._require_pipeline().max_model_len - request.max_tokens)
        if most is not None and len(token_ids) > most:
            token_ids = token_ids[-most:]
            return self._tokenizer.decode(token_ids), token_ids
        return prompt if isinstance(prompt, str) else self._tokenizer.decode(token_ids), token_ids

    def _bad_token_ids(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """The tokens of words, at the beginning of a text and within it."""
        texts = [text for word in words for text in (word.strip(), f" {word.strip()}")]
        return tuple(tuple(self._tokenizer.encode(text)) for text in texts)

    async def _generate(
        self, prompt_ids: Sequence[int], params: SamplingParams, choice: int
    ) -> AsyncGenerator[Delta, None]:
        """The tokens that `Pipeline.generate` makes, of whichever replica Serve chooses."""
        reply_to, mailbox = self._feed.open()
        call = self._pipeline.generate.remote(prompt_ids, params, choice, reply_to)
        watcher = asyncio.create_task(_watch(call, mailbox))
        try:
            while True:
                delta = await mailbox.take()
                yield delta
                if delta.finish_reason is not None:
                    return
        finally:
            self._feed.close(reply_to)
            watcher.cancel()
            call.cancel()

    def _require_pipeline(self) -> EngineLimits:
        if self._limits is None:
            raise NotReadyError("the model is still loading; try again shortly")
        return self._limits

    async def _meet_pipeline(self) -> None:
        """Waits for the first pipeline. Serve holds calls back until there is one, which a client must not feel."""
        while self._limits is None:
            try:
                self._limits = (await self._pipeline.status.remote()).limits
            except Exception:
                logger.exception("no pipeline yet")
                await asyncio.sleep(1)


async def _watch(call: DeploymentResponse, mailbox: Mailbox) -> None:
    """Ends a stream whose call fails, or whose tokens do not come."""
    try:
        await call
        await asyncio.sleep(LAST_TOKENS_S)
        mailbox.fail(StageFailedError("the pipeline's tokens were lost on their way"))
    except RayTaskError as error:
        mailbox.fail(error.cause if isinstance(error.cause, GPTJDistError) else error)
    except RayActorError:
        mailbox.fail(StageFailedError("the pipeline's coordinator died"))
    except Exception as error:
        mailbox.fail(error)


async def _read_body(request: Request) -> bytes:
    """The body, refused as soon as it is known to be too large."""
    declared = request.headers.get("content-length", "0")
    body = bytearray()
    if not declared.isdigit() or int(declared) <= MAX_BODY_BYTES:
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY_BYTES:
                break
        else:
            return bytes(body)
    raise BodyTooLargeError(f"the request's body is larger than {MAX_BODY_BYTES} bytes")


async def _collect(
    request: CompletionRequest,
    head: dict[str, Any],
    streams: Sequence[AsyncGenerator[TextDelta, None]],
    writers: Sequence[ChoiceWriter],
    num_prompt_tokens: int,
) -> dict[str, Any]:
    """The response that is not streamed."""
    deltas_of: list[list[TextDelta]] = [[] for _ in streams]
    async with aclosing(merge(streams)) as deltas:
        async for index, delta in deltas:
            deltas_of[index].append(delta)
    sampled = [whole(deltas) for deltas in deltas_of]
    num_tokens = sum(len(completion.token_ids) for completion in sampled)
    of_prompts = [sampled[i : i + request.num_sampled] for i in range(0, len(sampled), request.num_sampled)]
    if request.num_sampled > request.n:
        of_prompts = [best(completions, request.n) for completions in of_prompts]
    kept = [completion for completions in of_prompts for completion in completions]
    choices = [writer.write(completion) for writer, completion in zip(writers, kept, strict=True)]
    return completion_response(head, choices, usage(num_prompt_tokens, num_tokens))


async def _events(
    request: CompletionRequest,
    head: dict[str, Any],
    streams: Sequence[AsyncGenerator[TextDelta, None]],
    writers: Sequence[ChoiceWriter],
    num_prompt_tokens: int,
) -> AsyncGenerator[bytes, None]:
    """The streamed response, frame by frame. A failure under way is the last frame, and no `[DONE]` follows."""
    num_tokens, has_begun = 0, False
    try:
        async with aclosing(merge(streams)) as deltas:
            async for index, delta in deltas:
                has_begun = True
                num_tokens += len(delta.token_ids)
                if writers[index].has_news(delta):
                    choice = writers[index].write(delta)
                    yield sse_frame(completion_chunk(head, choice, is_usage_streamed=request.is_usage_streamed))
    except Exception as error:
        if not has_begun:
            raise
        yield sse_frame(error_response(error)[1])
        return
    if request.is_usage_streamed:
        yield sse_frame(usage_chunk(head, usage(num_prompt_tokens, num_tokens)))
    yield SSE_DONE


async def _chain(first: bytes, rest: AsyncGenerator[bytes, None]) -> AsyncIterator[bytes]:
    async with aclosing(rest):
        yield first
        async for event in rest:
            yield event


async def _no_such_route(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    message = f"{request.method} {request.url.path} is not served here; POST /v1/completions is"
    body = {"message": message, "type": "invalid_request_error", "param": None, "code": "not_found"}
    return JSONResponse({"error": body}, status)


def _refusal(error: BaseException) -> Response:
    status, body = error_response(error)
    retry = retry_after_s(error)
    return JSONResponse(body, status, headers={"Retry-After": str(retry)} if retry is not None else None)
