"""Turns prompts into streams of tokens: owns the scheduler and drives the executor. Knows no text, HTTP or devices.

Everything runs on one event loop. A stream is an async iterator. Closing it is the only way to cancel a request; its
blocks are free before `aclose()` returns.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from itertools import count, islice

from gptj_dist.engine.clock import SteadyClock
from gptj_dist.engine.executor import Executor
from gptj_dist.engine.fairness import FairShares
from gptj_dist.engine.journal import Journal
from gptj_dist.engine.limits import EngineLimits
from gptj_dist.engine.load import Arrivals, Load
from gptj_dist.engine.mailbox import Delta, Mailbox
from gptj_dist.engine.record import RequestRecord, noise_key
from gptj_dist.engine.request import FinishReason, Prompt, Request
from gptj_dist.engine.routing import RoutingFacts
from gptj_dist.engine.scheduler import Scheduler
from gptj_dist.engine.scheduling import TokenOutput
from gptj_dist.engine.stats import PipelineStats
from gptj_dist.errors import GPTJDistError, InvalidRequestError, NotReadyError, RequestTooLongError, StageFailedError
from gptj_dist.params import SamplingParams

BROKEN = "the model computed NaN in place of the next token's logits"
BROKEN_BY_ADAPTER = f"{BROKEN}; files of the request's adapters may be gone, or have changed since they were loaded"


class AsyncEngine:
    """Makes token streams with a scheduler and an executor.

    Args:
        scheduler: decides what is computed; the engine is its only caller.
        executor: computes plans; `resume` replaces it after a failure.
        limits: requests are checked against them.
        clock: seconds; for `last_token_s`.
        stats: notes every plan; None makes one with a `SteadyClock`, as stages have.

    Attributes:
        last_token_s: when the present executor's last token arrived; None before the first.
        journal: counts and logs requests.
        scheduler: the present one; for its counts.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        limits: EngineLimits,
        clock: Callable[[], float] = time.monotonic,
        stats: PipelineStats | None = None,
    ) -> None:
        self.scheduler = scheduler
        self._executor: Executor | None = executor
        self._limits = limits
        self._clock = clock
        self._refusal: str | None = None
        self._mailboxes: dict[int, Mailbox] = {}
        self._request_ids = count()
        self._shares = FairShares()
        self._is_pump_due = False
        self._broken: asyncio.Future[None] | None = None
        self.last_token_s: float | None = None
        self.stats = stats or PipelineStats(SteadyClock())
        self.journal = Journal()
        self._arrivals = Arrivals(clock())

    @property
    def is_up(self) -> bool:
        """Whether tokens are computed. Between a failure and `resume` requests wait, unless `fail` has ended them."""
        return self._executor is not None

    def generate(
        self, prompt_ids: Sequence[int], params: SamplingParams, choice: int = 0, log_id: str | None = None
    ) -> AsyncGenerator[Delta, None]:
        """Streams one completion of the prompt. The engine ignores `params.n`: the caller numbers its choices.

        Args:
            choice: number of the completion; others with the same seed get other noise.
            log_id: the request's name in logs; None for one that is neither logged nor counted.

        Raises:
            InvalidRequestError: the request can never be served. Raised at once; the stream raises the others:
            NotReadyError: the engine has failed; nothing was queued.
            StageFailedError: the engine failed before the stream ended.
        """
        [stream] = self.generate_all([RequestRecord(tuple(prompt_ids), params, noise_key(params.seed, choice), log_id)])
        return stream

    def generate_all(self, records: Sequence[RequestRecord]) -> list[AsyncGenerator[Delta, None]]:
        """Streams what is left of each completion. Those that start together compute the prompt once.

        Args:
            records: of one prompt, with the same parameters; one if they ask for a beam search.

        Raises:
            InvalidRequestError: the request can never be served. Other errors come out of each stream.
        """
        prompt_ids, params = records[0].prompt_ids, records[0].params
        self._limits.check(prompt_ids, params)
        if any(choice.source is None for choice in params.adapters):
            raise InvalidRequestError("adapters are loaded into an LLM or a server, and chosen there", "adapters")
        prompt = Prompt(prompt_ids, can_share=params.pooling is None)
        return [self._generate(prompt, record) for record in records]

    async def _generate(self, prompt: Prompt, record: RequestRecord) -> AsyncGenerator[Delta, None]:
        request, mailbox = self._admit(prompt, record)
        try:
            while True:
                delta = await mailbox.take()
                yield delta
                if delta.finish_reason is not None:
                    return
        finally:
            self._forget(request)

    async def run(self) -> None:
        """Drives the pipeline until cancelled.

        Raises:
            StageFailedError: the executor died: streams wait. Call `resume` and `run` again, or `fail`. Or the engine
                itself failed: every stream has ended with this error.
        """
        if self._executor is None:
            raise NotReadyError("the pipeline has no executor: resume() comes before run()")
        self._broken = broken = asyncio.get_running_loop().create_future()
        taking = asyncio.create_task(self._take_results(self._executor))
        self._pump_soon()
        try:
            await asyncio.wait((taking, broken), return_when=asyncio.FIRST_COMPLETED)
            await (broken if broken.done() else taking)
        except GPTJDistError:
            self._suspend()
            raise
        except Exception as error:  # tokens may be lost between scheduler and streams
            failure = StageFailedError(f"the coordinator failed: {error!r}")
            self.fail(failure)
            raise failure from error
        finally:
            taking.cancel()

    def fail(self, error: GPTJDistError) -> None:
        """Ends every stream with `error`, and refuses new ones, for the same reason, until `resume`."""
        self._refusal = str(error)
        self._suspend()
        for request in self.scheduler.drain():
            self._fail_request(request, error)

    def resume(self, scheduler: Scheduler, executor: Executor, limits: EngineLimits) -> None:
        """Continues with a new executor, and a scheduler and limits that fit it, after `run` has raised.

        Requests that were running compute their prompts and their tokens so far again, and go on with the next token.
        Those that do not fit a smaller cache fail.
        """
        requests = self.scheduler.drain()
        self._refusal = None
        self.scheduler = scheduler
        self._executor = executor
        self._limits = limits
        for request in requests:
            try:
                scheduler.add(request)
            except RequestTooLongError as error:
                self._fail_request(request, error)

    def room_after_s(self) -> float:
        """Estimate of the seconds of computing until the next request of the queue can run."""
        return self.scheduler.room_after_s(self.stats.token_s(), self._early_share)

    def routing_facts(self) -> RoutingFacts:
        """What a choice among pipelines needs to know of this one."""
        return RoutingFacts.of(self.scheduler, self.room_after_s(), self._early_share)

    def load(self) -> Load:
        """What requests ask of the pipeline."""
        return self._arrivals.load(
            self.scheduler,
            num_stages=max(1, len(self.stats.stages)),
            max_batch_size=self._limits.max_batch_size,
            early_share=self._early_share,
            has_requests=self.journal.num_open > 0,
            now_s=self._clock(),
        )

    @property
    def _early_share(self) -> float:
        totals = self.journal.totals
        return totals.num_early_ends / max(1, totals.num_generation_tokens)

    def _admit(self, prompt: Prompt, record: RequestRecord) -> tuple[Request, Mailbox]:
        if self._refusal is not None:
            raise NotReadyError(self._refusal)
        request_id, *_ = islice(self._request_ids, record.params.num_beams)
        request = Request(
            request_id,
            prompt,
            record.params,
            record.noise_key,
            record.log_id,
            generated=record.token_ids,
            is_moved=record.is_accepted,
            key=record.key,
            prediction_ids=record.prediction_ids,
        )
        self._shares.enter(request, self.scheduler.waiting.place_now(record.params.priority))
        self.scheduler.add(request)
        if record.token_ids:
            self.journal.totals.num_recomputed_tokens += request.num_tokens
        self.journal.note_arrival(request, self.stats.now_ns())
        if record.log_id is not None:
            self._arrivals.note(self._clock(), request.num_tokens, record.params.max_tokens - len(record.token_ids))
        mailbox = self._mailboxes[request.request_id] = Mailbox()
        self._pump_soon()
        return request, mailbox

    def _suspend(self) -> None:
        """Computes no more tokens. Requests wait in the scheduler, with the tokens that they have."""
        self._executor = self._broken = None
        self.journal.totals.num_recomputed_tokens += self.scheduler.num_kept_tokens
        self.last_token_s = None
        self.stats.note_lost()
        for request in self.scheduler.drain():
            self.scheduler.add(request)

    def _fail_request(self, request: Request, error: GPTJDistError) -> None:
        self._mailboxes[request.request_id].fail(error)
        self.journal.note_failed(request, error)

    def _forget(self, request: Request) -> None:
        self.scheduler.abort(request.request_id)
        self._shares.leave(request)
        self.journal.note_closed(request, self.stats.now_ns())
        del self._mailboxes[request.request_id]
        self._pump_soon()

    async def _take_results(self, executor: Executor) -> None:
        """Puts the tokens of results into their streams."""
        while True:
            result, landed_ns = await executor.receive(), self.stats.now_ns()
            for output in self.scheduler.update(result):
                if output.finish_reason == FinishReason.ERROR:
                    problem = BROKEN_BY_ADAPTER if output.request.params.adapters else BROKEN
                    self._fail_request(output.request, StageFailedError(problem))
                    continue
                self.last_token_s = self._clock()
                self._mailboxes[output.request.request_id].put(_delta(output))
                self.journal.note_output(output, landed_ns)
            self.stats.note_landed(result, landed_ns)
            self._pump()

    def _pump_soon(self) -> None:
        """Pumps in the next turn of the loop, so that requests that arrive together share a micro-batch."""
        if not self._is_pump_due:
            self._is_pump_due = True
            asyncio.get_running_loop().call_soon(self._pump_or_break)

    def _pump_or_break(self) -> None:
        """Passes an error to `run`. While that does not run, the loop, which calls this function, logs the error."""
        self._is_pump_due = False
        try:
            self._pump()
        except Exception as error:
            if self._broken is None or self._broken.done():
                raise
            self._broken.set_exception(error)

    def _pump(self) -> None:
        """Submits plans until enough are in flight or there is nothing to do."""
        if self._executor is None:
            return
        begin_ns = self.stats.now_ns()
        while (plan := self.scheduler.schedule()) is not None:
            self._executor.submit(plan)
            begin_ns = self.stats.note_submitted(plan, begin_ns)
            self.journal.note_plan(plan, begin_ns)
        if not self.scheduler.has_requests:
            self.scheduler.check_integrity()


def _delta(output: TokenOutput) -> Delta:
    """A token, or an embedding, as its stream gets it."""
    request = output.request
    token_ids = () if output.token_id is None else (output.token_id,)
    is_first = bool(output.beams) or request.num_output_tokens == len(token_ids)
    return Delta(
        token_ids=token_ids,
        finish_reason=output.finish_reason,
        logprobs=() if output.logprobs is None else (output.logprobs,),
        prompt_logprobs=tuple(request.prompt.logprobs) if is_first else (),
        embedding=output.embedding,
        num_cached_tokens=request.num_cached_tokens if is_first else 0,
        beams=output.beams,
        num_drafted=int(output.is_draft),
    )
