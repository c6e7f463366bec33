"""Requests to the HTTP application, in this process, with a source of any tokens. Without Ray and without sockets."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple, cast

import httpx
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from gptj_dist.answers.schema.base import Body
from gptj_dist.answers.schema.chat import ChatRequest
from gptj_dist.answers.schema.completions import CompletionRequest
from gptj_dist.answers.schema.embeddings import EmbeddingRequest
from gptj_dist.answers.schema.responses import ResponsesRequest
from gptj_dist.answers.schema.tokens import DetokenizeRequest, TokenizeRequest
from gptj_dist.answers.served_model import ServedModel
from gptj_dist.answers.service import AnswerService
from gptj_dist.cli.events import read_events
from gptj_dist.engine.limits import EngineLimits
from gptj_dist.engine.mailbox import Delta
from gptj_dist.engine.record import RequestRecord
from gptj_dist.engine.request import FinishReason
from gptj_dist.params import TokenLogprobs
from gptj_dist.serving.allowances import Allowances
from gptj_dist.serving.counters import IngressMetrics
from gptj_dist.serving.http.admission import Admission
from gptj_dist.serving.http.application import make_http_app
from gptj_dist.serving.http.endpoints import Endpoints
from gptj_dist.serving.http.gate import Gate
from gptj_dist.serving.pipeline_client import PipelineClient
from gptj_dist.serving.scrape import Scrape
from gptj_dist.token_rules import TokenRules
from tests.front_app import TEMPLATE, TOKENIZER, Pipelines
from tests.fuzzing.strategies import Target, change, damage, to_json

MAX_MODEL_LEN = 48
"""Short, so that no request takes long."""

GOOD: Mapping[str, tuple[type[Body], dict[str, Any]]] = {
    "/v1/completions": (CompletionRequest, {"prompt": "a", "max_tokens": 3}),
    "/v1/chat/completions": (ChatRequest, {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3}),
    "/v1/responses": (ResponsesRequest, {"input": "a", "max_output_tokens": 3}),
    "/v1/embeddings": (EmbeddingRequest, {"input": "a"}),
    "/tokenize": (TokenizeRequest, {"prompt": "a b"}),
    "/detokenize": (DetokenizeRequest, {"tokens": [1, 2]}),
}
TEXT_OF: Mapping[str, Callable[[dict[str, Any]], list[str]]] = {
    "/v1/completions": lambda answer: [choice["text"] for choice in answer["choices"]],
    "/v1/chat/completions": lambda answer: [choice["message"]["content"] for choice in answer["choices"]],
    "/v1/responses": lambda answer: [part["text"] for item in answer["output"] for part in item["content"]],
}
PIECE_OF: Mapping[str, Callable[[dict[str, Any]], list[tuple[int, str]]]] = {
    "/v1/completions": lambda event: [(choice["index"], choice["text"]) for choice in event["choices"]],
    "/v1/chat/completions": lambda event: [
        (choice["index"], choice["delta"].get("content") or "") for choice in event["choices"]
    ],
    "/v1/responses": lambda event: [(0, event["delta"])] if event["type"] == "response.output_text.delta" else [],
}
"""The text that an event of a stream adds, and to which choice."""

_SENSIBLE = st.sampled_from(
    (
        True, False, 0, 1, 2, 3, 16.0, 0.5, -1, "a", "\n", ["a"], ["a", "b"], [1, 2], [[1, 2], [3]], {"1": 1.5}, None,
        {"include_usage": True}, [{"role": "user", "content": "b"}], [{"type": "text", "text": "c"}], "base64", "none",
    )
)  # fmt: skip


class Call(NamedTuple):
    """A request."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class AnySource:
    """Continues every prompt with the same tokens, which a case sets."""

    def __init__(self) -> None:
        self.token_ids: Sequence[int] = (64,)

    def limits(self) -> EngineLimits:
        return EngineLimits(rules=TokenRules(50400), max_model_len=MAX_MODEL_LEN, kv_tokens=1 << 16, num_layers=28)

    def streams(self, records: Sequence[RequestRecord]) -> list[AsyncGenerator[Delta, None]]:
        return [self._stream(record) for record in records]

    async def _stream(self, record: RequestRecord) -> AsyncGenerator[Delta, None]:
        params = record.params
        of_prompt = _logprobs(record.prompt_ids[1:], params.prompt_logprobs)
        if params.max_tokens == 0:
            yield Delta((), FinishReason.LENGTH, (), of_prompt, bytes(16) if params.pooling else None)
        for number in range(params.max_tokens):
            token_id = self.token_ids[number % len(self.token_ids)]
            reason = FinishReason.LENGTH if number == params.max_tokens - 1 else None
            yield Delta((token_id,), reason, _logprobs([token_id], params.logprobs), of_prompt)
            of_prompt = ()


def _logprobs(token_ids: Sequence[int], number: int | None) -> tuple[TokenLogprobs, ...]:
    top = tuple((token_id, -0.5) for token_id in range(number or 0))
    return () if number is None else tuple(TokenLogprobs(token_id, -1.5, 3, top) for token_id in token_ids)


class App:
    """The application and a client of it, with an event loop of their own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self.source = AnySource()
        model = ServedModel(("demo",), TOKENIZER, (50256,), TEMPLATE)
        texts = AnswerService(model, self.source)
        pipelines = cast("PipelineClient", Pipelines(None))
        endpoints = Endpoints(("demo",), texts, pipelines, Allowances(None), cast("Scrape", None), Admission(1000))
        app = make_http_app(endpoints.table(), IngressMetrics("i"), (), (), has_proxy=True, gate=Gate())
        self._http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://demo")

    def send(self, call: Call) -> httpx.Response:
        """The response. Raises what the application raises."""
        request = self._http.build_request(call.method, call.path, headers=call.headers, content=call.body)
        return self.run(self._http.send(request))

    def run(self, work: Coroutine[Any, Any, httpx.Response]) -> httpx.Response:
        return self._loop.run_until_complete(work)


@cache
def app() -> App:
    return App()


def _body(draw: DrawFn, path: str) -> bytes:
    kind, good = GOOD[path]
    served = sorted(kind.model_fields)
    return to_json(change(draw, good, [*served, *served, *sorted({*kind.hints, *kind.unserved})], _SENSIBLE))


_ENCODINGS: Mapping[str, Callable[[bytes], bytes]] = {
    "identity": bytes,
    "gzip": gzip.compress,
    "deflate": gzip.compress,
    "br": bytes,
}


@st.composite
def calls(draw: DrawFn) -> Call:
    """A request to an endpoint, whose body is well-formed JSON in most cases."""
    path = draw(st.sampled_from(list(GOOD)))
    body = damage(draw, _body(draw, path))
    headers = {"content-type": "application/json"}
    if draw(st.integers(0, 9)) == 0:
        encoding = draw(st.sampled_from(list(_ENCODINGS)))
        headers["content-encoding"] = encoding
        body = damage(draw, _ENCODINGS[encoding](body))
    if draw(st.integers(0, 9)) == 0:
        name = draw(st.sampled_from(("content-type", "x-request-id", "accept", "authorization", "content-length")))
        headers[name] = draw(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=200))
    if draw(st.integers(0, 19)):
        return Call("POST", path, headers, body)
    method = draw(st.sampled_from(("GET", "HEAD", "PUT", "OPTIONS", "DELETE", "X" * 50)))
    tail = draw(st.sampled_from(("", "/", "//", "?a=b", "/%00", "/..;/", "/%ff%fe", "/" + "a" * 3000)))
    return Call(method, draw(st.sampled_from((path, "/v1/models", "/health", "/docs", "/x"))) + tail, headers, body)


def _check_call(call: Call) -> None:
    """The answer is a document, events, or an error that names what is wrong; never an internal one."""
    app().source.token_ids = (64,)
    response = app().send(call)
    assert response.status_code < 500, response.text
    media = response.headers.get("content-type", "").partition(";")[0]
    if call.method == "HEAD" or not response.content:
        return
    if media == "text/event-stream":
        events = list(read_events([response.content]))
        assert events.pop() == "[DONE]" or call.path == "/v1/responses"
        assert all(isinstance(json.loads(event), dict) for event in events)
    elif response.status_code >= 400:
        error = response.json()["error"]
        assert error["message"]
        assert len(error["message"]) < 3000, error["message"]
        error["message"].encode()
    elif media == "application/json":
        response.json()


def _check_answer(case: tuple[str, list[int], dict[str, Any]]) -> None:
    """A stream adds up to the text of the answer that is not streamed, whatever the tokens are."""
    path, app().source.token_ids, fields = case
    body = {**GOOD[path][1], "temperature": 0, **fields}
    most = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    body[most] = len(app().source.token_ids)
    whole, stream = (app().send(Call("POST", path, {}, to_json({**body, "stream": on}))) for on in (False, True))
    assert whole.status_code == stream.status_code == 200, whole.text
    texts = TEXT_OF[path](whole.json())
    streamed = [""] * len(texts)
    for event in read_events([stream.content]):
        for index, piece in PIECE_OF[path](json.loads(event)) if event != "[DONE]" else ():
            streamed[index] += piece
    assert streamed == texts


def _texts_as_tokens() -> SearchStrategy[list[int]]:
    """Tokens of texts that are hostile to lines and terminals, and any tokens, of which some are no whole character."""
    hostile = ("\n\n", "\r\n", "\r", "\0", "\u2028", "\u0085", "data: x", "[DONE]", "\U0001f600", "é", "a", "</s>")
    ids = [TOKENIZER.encode(text) for text in hostile]
    return st.lists(st.sampled_from(ids) | st.integers(0, 50399).map(lambda id: [id]), min_size=1, max_size=6).map(
        lambda runs: [id for run in runs for id in run][: MAX_MODEL_LEN - 8]
    )


_ANSWERS: SearchStrategy[Any] = st.tuples(
    st.sampled_from(("/v1/completions", "/v1/chat/completions")),
    _texts_as_tokens(),
    st.fixed_dictionaries(
        {}, optional={"n": st.integers(1, 2), "stop": st.sampled_from(("\n", ["a", "\r\n"], "\u2028"))}
    ),
) | st.tuples(st.just("/v1/responses"), _texts_as_tokens(), st.just({}))

TARGETS = (
    Target("requests", calls(), _check_call, 30),
    Target("answers", _ANSWERS, _check_answer, 8),
)
