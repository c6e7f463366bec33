"""The ingress's HTTP application on a real socket, with a source of known tokens. Without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import httpx
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from benchmarks.servers import free_port
from gptj_dist.answers.moderation import Moderation
from gptj_dist.answers.served_model import ServedModel
from gptj_dist.answers.service import AnswerService
from gptj_dist.answers.work import Work
from gptj_dist.checkpoint.hub import resolve_model
from gptj_dist.engine.limits import EngineLimits
from gptj_dist.engine.mailbox import Delta
from gptj_dist.engine.record import RequestRecord
from gptj_dist.engine.request import FinishReason
from gptj_dist.params import SamplingParams, TokenLogprobs
from gptj_dist.serving.allowances import Allowances
from gptj_dist.serving.counters import IngressMetrics
from gptj_dist.serving.http.admission import Admission
from gptj_dist.serving.http.application import make_http_app
from gptj_dist.serving.http.endpoints import Endpoints
from gptj_dist.serving.http.gate import Gate
from gptj_dist.serving.http.listener import Address, Listener
from gptj_dist.serving.keeper import Keeper
from gptj_dist.serving.keys import ApiKey
from gptj_dist.serving.pipeline_client import PipelineClient
from gptj_dist.serving.scrape import Scrape
from gptj_dist.text.chat import ChatTemplate
from gptj_dist.text.tokenizer import Tokenizer
from gptj_dist.token_rules import TokenRules

WAIT_S = 30
TOKENIZER = Tokenizer.load(resolve_model("demo"))
LIMITS = EngineLimits(rules=TokenRules(50400), max_model_len=2048, kv_tokens=1 << 20, num_layers=28)
TEMPLATE = ChatTemplate(
    "{% for tool in tools %}{{ tool | tojson }}<tool_call>{% endfor %}"
    "{% for message in messages %}{{ message.content }}"
    "{% for call in message.tool_calls %}{{ call | tojson }}{% endfor %}{% endfor %}",
    {},
)
TOP = tuple((token_id, -0.5) for token_id in range(40, 60))


@dataclass(slots=True)
class Source:
    """A `TokenSource` that continues every prompt by repeating one token.

    Attributes:
        asked: prompts and parameters of all requests.
        num_open: streams that are being read.
        may_go_on: streams wait until it is set.
    """

    token_id: int = TOKENIZER.encode("a")[0]
    asked: list[tuple[Sequence[int], SamplingParams]] = field(default_factory=list)
    num_open: int = 0
    may_go_on: asyncio.Event = field(default_factory=asyncio.Event)

    def limits(self) -> EngineLimits:
        return LIMITS

    def streams(self, records: Sequence[RequestRecord]) -> list[AsyncGenerator[Delta, None]]:
        self.asked.append((records[0].prompt_ids, records[0].params))
        return [self._stream(record.prompt_ids, record.params) for record in records]

    async def _stream(self, prompt_ids: Sequence[int], params: SamplingParams) -> AsyncGenerator[Delta, None]:
        self.num_open += 1
        try:
            await self.may_go_on.wait()
            of_prompt = _logprobs(prompt_ids[1:], params.prompt_logprobs)
            for number in range(params.max_tokens):
                is_last = number == params.max_tokens - 1
                reason = FinishReason.LENGTH if is_last else None
                yield Delta((self.token_id,), reason, _logprobs([self.token_id], params.logprobs), of_prompt)
                of_prompt = ()
                await asyncio.sleep(0)
        finally:
            self.num_open -= 1


@dataclass(frozen=True, slots=True)
class Pipelines:
    """The part of `PipelineClient` that pages and probes use."""

    unready: Exception | None
    unhealthy: Exception | None = None

    async def prove_ready(self) -> bool:
        if self.unready is not None:
            raise self.unready
        return True

    def check_health(self) -> None:
        if self.unhealthy is not None:
            raise self.unhealthy


def _logprobs(token_ids: Sequence[int], number: int | None) -> tuple[TokenLogprobs, ...]:
    if number is None:
        return ()
    return tuple(TokenLogprobs(token_id, -1.5, 30, TOP[:number]) for token_id in token_ids)


async def eventually(is_true: Callable[[], bool]) -> None:
    """Returns when the condition is true."""
    async with asyncio.timeout(WAIT_S):
        while not is_true():  # noqa: ASYNC110  # conditions set no event
            await asyncio.sleep(0.001)


@dataclass(slots=True)
class FrontApp:
    """A running application and a client of it."""

    client: httpx.AsyncClient
    source: Source
    metrics: IngressMetrics
    work: Work
    admission: Admission
    call: ASGIApp
    port: int


@asynccontextmanager
async def front_app(
    moderation: Moderation | None = None,
    keys: Sequence[ApiKey] = (),
    names: tuple[str, ...] = ("demo",),
    unready: Exception | None = None,
    unhealthy: Exception | None = None,
    max_requests: int = 1000,
    source: Any = None,
    streams: DeploymentHandle | None = None,
    pipelines: Any = None,
    cors_origins: Sequence[str] = (),
) -> AsyncIterator[FrontApp]:
    """Runs the application on a free port of loopback until the context ends.

    Args:
        unready, unhealthy: the errors of the checks of readiness and health; None if they pass.
        max_requests: the most requests that are answered at a time.
        source: a `TokenSource`; None takes a `Source` that waits for nothing.
        streams: keeps streams, as the deployment of `Streams`.
        pipelines: the part of a `PipelineClient` that is used; None takes `Pipelines`.
        cors_origins: web pages that browsers may call it from.
    """
    metrics = IngressMetrics("i")
    if source is None:
        source = Source()
        source.may_go_on.set()
    model = ServedModel(names, TOKENIZER, (50256,), TEMPLATE)
    texts = AnswerService(model, source, moderation, metrics.note_end)
    admission = Admission(max_requests)
    pipelines = cast("PipelineClient", pipelines or Pipelines(unready, unhealthy))
    keeper = None if streams is None else Keeper(streams, texts.work)
    endpoints = Endpoints(names, texts, pipelines, Allowances(None), cast("Scrape", None), admission, keeper)
    app = make_http_app(endpoints.table(), metrics, keys, cors_origins, has_proxy=False, gate=Gate())
    address = Address("127.0.0.1", free_port())
    listener = Listener(app, address, drain_s=1)
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{address.port}", timeout=WAIT_S) as client:
            yield FrontApp(client, source, metrics, texts.work, admission, app, address.port)
    finally:
        if keeper is not None:
            await keeper.close()
        await listener.close()
