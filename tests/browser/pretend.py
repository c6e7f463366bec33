"""The ingress's HTTP application with known tokens and a pipeline that exists only on paper, for tests in a browser.

Everything that a browser talks to is real: listener, middleware, endpoints, schemas, text and server-sent events. What
comes from stages is not: `Story` writes the tokens of a text, with log probabilities that are made up.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import log
from typing import Any

from gptj_dist.engine.limits import EngineLimits
from gptj_dist.engine.mailbox import Delta
from gptj_dist.engine.record import RequestRecord
from gptj_dist.engine.request import FinishReason
from gptj_dist.errors import GPTJDistError
from gptj_dist.params import TokenLogprobs
from gptj_dist.serving.broadcast import Replies
from gptj_dist.serving.debug import DownPipeline, PipelineDocument, StageDocument
from gptj_dist.stages.loss import StageLoss
from tests.front_app import LIMITS, TOKENIZER, FrontApp, front_app

TEXT = (
    " He had taken eighty-four days now without a fish. In the first forty days a boy had been with him, but after"
    " forty days his parents had told him that the old man was surely and finally unlucky. The boats came home in the"
    " evening, and the sea was dark and quiet under a thin moon, as though nothing in it had ever moved. He counted the"
    " lights along the shore, and waited."
)
TOKEN_IDS = TOKENIZER.encode(TEXT)
OTHERS = [
    TOKENIZER.encode(word)[0] for word in (" the", " a", " and", " sea", ".", " moon", " it", ",", " his", " was")
]
SHARES = (0.62, 0.11, 0.33, 0.9, 0.03, 0.48, 0.21, 0.75, 0.007, 0.55)
"""Probabilities of the tokens, again and again."""


def said(num_tokens: int, number: int = 0) -> str:
    """The first tokens of the `number`-th continuation."""
    return TOKENIZER.decode([TOKEN_IDS[(7 * number + place) % len(TOKEN_IDS)] for place in range(num_tokens)])


def scored(token_id: int, number: int, num_top: int | None) -> tuple[TokenLogprobs, ...]:
    """A token's log probability, and those of the likeliest in its place."""
    if num_top is None:
        return ()
    share = SHARES[number % len(SHARES)]
    rivals = [other for other in OTHERS if other != token_id][: len(OTHERS) - 1]
    pairs = [(token_id, log(share)), *((one, log((1 - share) * 0.5 ** (k + 1))) for k, one in enumerate(rivals))]
    pairs.sort(key=lambda pair: -pair[1])
    rank = 1 + [pair[0] for pair in pairs].index(token_id)
    return (TokenLogprobs(token_id, log(share), rank, tuple(pairs[:num_top])),)


@dataclass(slots=True)
class Story:
    """A `TokenSource`: continuation k of a prompt begins k words further into `TEXT`.

    Attributes:
        pace_s: seconds from token to token.
        cached: prompt tokens that are said to be cached.
        drafted: of each continuation, tokens that are said to be guessed.
        fails_after: a stream fails after this number of tokens; None for never.
        num_open: streams that are being read.
    """

    pace_s: float = 0.0
    cached: int = 16
    drafted: int = 3
    fails_after: tuple[int, GPTJDistError] | None = None
    num_open: int = 0

    def limits(self) -> EngineLimits:
        return LIMITS

    def streams(self, records: Sequence[RequestRecord]) -> list[AsyncGenerator[Delta, None]]:
        return [self._stream(record, number) for number, record in enumerate(records)]

    async def _stream(self, record: RequestRecord, number: int) -> AsyncGenerator[Delta, None]:
        self.num_open += 1
        params = record.params
        try:
            wanted = params.prompt_logprobs
            of_prompt = tuple(
                one for place, id_ in enumerate(record.prompt_ids[1:]) for one in scored(id_, place + 3, wanted)
            )
            if params.max_tokens == 0:
                yield Delta((), FinishReason.LENGTH, (), of_prompt)
            for place in range(params.max_tokens):
                if self.fails_after is not None and place == self.fails_after[0]:
                    raise self.fails_after[1]
                token_id = TOKEN_IDS[(place + 7 * number) % len(TOKEN_IDS)]
                reason = FinishReason.LENGTH if place == params.max_tokens - 1 else None
                cached = self.cached if place == 0 and number == 0 else 0
                logprobs = scored(token_id, place + number, params.logprobs)
                drafted = int(place < self.drafted)
                yield Delta((token_id,), reason, logprobs, of_prompt, num_cached_tokens=cached, num_drafted=drafted)
                of_prompt = ()
                await asyncio.sleep(self.pace_s)
        finally:
            self.num_open -= 1


def stage(number: int, layers: tuple[int, int]) -> StageDocument:
    return StageDocument(
        stage=number, layers=layers, device="cpu", node="desk", dtype="float32", pid=100 + number,
        weight_bytes=6_050_000_000, kv_used_bytes=180_000_000, kv_total_bytes=1_900_000_000,
        busy_share=0.81 - 0.1 * number, bubble_share=0.06, step_ms=38.2, queue=0.4, wait_ms=2.0,
    )  # fmt: skip


PIPELINE = PipelineDocument(
    name="Pipeline#1", state="up", pid=99, num_running=2, num_waiting=0, num_in_flight=3, num_used_blocks=12,
    num_blocks=128, num_preemptions=0, num_restarts=0, num_drafts=60, num_accepted=41, window_s=10.0, plans_per_s=25.0,
    prompt_tokens_per_s=4.0, output_tokens_per_s=47.5, coordinator_share=0.02,
    stages=(stage(0, (0, 13)), stage(1, (14, 27))),
)  # fmt: skip


LOSS = StageLoss(1, "was killed by SIGKILL", "desk", 101, None)


def restarting(problem: str = "stage 1 was killed by SIGKILL") -> PipelineDocument:
    """The pipeline while a stage is missing."""
    return replace(PIPELINE, state="restarting", problem=problem, down_s=0.7, num_in_flight=0, losses=(LOSS,))


def back() -> PipelineDocument:
    """The pipeline after that."""
    return replace(PIPELINE, num_restarts=1, losses=(replace(LOSS, back_after_s=3.2),))


@dataclass(slots=True)
class PaperPipelines:
    """The part of `PipelineClient` that the page's endpoints use; a test may change it at any time."""

    documents_now: tuple[PipelineDocument, ...] = (PIPELINE,)
    down: tuple[DownPipeline, ...] = ()
    unready: Exception | None = None

    async def prove_ready(self) -> bool:
        if self.unready is not None:
            raise self.unready
        return True

    def check_health(self) -> None:
        pass

    async def documents(self) -> Replies[PipelineDocument]:
        return Replies(self.documents_now, 0)


@dataclass(slots=True)
class PretendServer:
    """A running application, and what it pretends."""

    base: str
    story: Story
    pipelines: PaperPipelines
    front: FrontApp = field(repr=False)

    def reset(self) -> None:
        """Pretends again what it pretends at first."""
        self.story.pace_s, self.story.fails_after = 0.0, None
        self.pipelines.documents_now, self.pipelines.down, self.pipelines.unready = (PIPELINE,), (), None


@contextmanager
def pretend_server(**application: Any) -> Iterator[PretendServer]:
    """Runs the application in a thread, on a free port of loopback, until the context ends."""
    story, pipelines = Story(), PaperPipelines()
    begun: list[PretendServer | BaseException] = []
    has_begun, loop = threading.Event(), asyncio.new_event_loop()
    end = asyncio.Event()

    async def run() -> None:
        async with front_app(source=story, pipelines=pipelines, **application) as front:
            begun.append(PretendServer(f"http://127.0.0.1:{front.port}", story, pipelines, front))
            has_begun.set()
            await end.wait()

    def work() -> None:
        try:
            loop.run_until_complete(run())
        except BaseException as error:
            begun.append(error)
        finally:
            has_begun.set()
            loop.close()

    thread = threading.Thread(target=work)
    thread.start()
    has_begun.wait()
    if isinstance(begun[0], BaseException):
        thread.join()
        raise begun[0]
    try:
        yield begun[0]
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join()
