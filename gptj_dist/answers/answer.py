"""The answer to a request for text, whole or event by event. Knows neither Ray nor HTTP's routes."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing
from functools import partial
from typing import Protocol

from gptj_dist.answers.completion import TextDelta, TokenCounts, whole
from gptj_dist.answers.deadline import Deadline
from gptj_dist.answers.json_writing import json_bytes
from gptj_dist.answers.merge import merge
from gptj_dist.answers.schema.sampling import SamplingFields
from gptj_dist.answers.work import Work
from gptj_dist.json_types import JsonObject

LOGPROB_US = 3
"""Microseconds that it takes to write a log probability."""


class Form(Protocol):
    """Writes one answer in an endpoint's shape. The numbers of tokens are those of all completions so far."""

    def whole(self, completions: Iterator[TextDelta], counts: TokenCounts) -> JsonObject:
        """The body of a response that is not streamed, as `json_bytes` writes it."""

    def event(self, index: int, delta: TextDelta) -> bytes:
        """The frames of a completion's next piece; empty if the piece says nothing."""

    def end(self, counts: TokenCounts) -> bytes:
        """The frames after the last piece."""

    def failure(self, error: Exception) -> bytes:
        """The frames that end a stream which failed after its first piece."""

    def renumber(self, num_events: int) -> None:
        """Where events have numbers, the next one's is the number of events before it."""


class Answer:
    """A request that was understood and can be served. Nothing is computed before `whole` or `events` is called.

    Args:
        open_streams: starts the completions, `request.num_streams` for each prompt.
        num_prompt_tokens: of all prompts.
        most_tokens: the most that all completions together may have.
        deadline: of the whole request.
        work: runs what takes CPU time.
        on_end: called with how each completion ended: a `FinishReason`, `error`, or `abort` if the client left.
    """

    def __init__(
        self,
        request: SamplingFields,
        form: Form,
        open_streams: Callable[[], Sequence[AsyncGenerator[TextDelta, None]]],
        num_prompt_tokens: int,
        most_tokens: int,
        deadline: Deadline,
        work: Work,
        on_end: Callable[[str], None],
    ) -> None:
        self._request = request
        self._form = form
        self._open_streams = open_streams
        self.num_prompt_tokens = num_prompt_tokens
        self.most_tokens = most_tokens
        self._deadline = deadline
        self._work = work
        self._on_end = on_end
        self._counts = TokenCounts()

    @property
    def is_streamed(self) -> bool:
        return self._request.stream

    @property
    def num_tokens(self) -> int:
        """Generated so far, in all completions."""
        return self._counts.output

    async def whole(self) -> JsonObject:
        """The response that is not streamed. Raises the error that the request failed with."""
        document: JsonObject = json.loads(await self.body())
        return document

    async def body(self) -> bytes:
        """The response that is not streamed, as JSON. Raises as `whole`."""
        streams = self._open_streams()
        deltas_of: list[list[TextDelta]] = [[] for _ in streams]
        cost = 0
        try:
            async with aclosing(self._deltas(streams)) as deltas:
                async for index, delta in deltas:
                    deltas_of[index].append(delta)
                    cost += _writing_cost(delta)
        except (Exception, asyncio.CancelledError):
            await self._work.run(cost, partial(_free, deltas_of))
            raise
        return await self._work.run(cost, partial(self._write, deltas_of))

    def _write(self, deltas_of: list[list[TextDelta]]) -> bytes:
        body = json_bytes(self._form.whole(self._kept(deltas_of), self._counts))
        _free(deltas_of)
        return body

    def _kept(self, deltas_of: Sequence[Sequence[TextDelta]]) -> Iterator[TextDelta]:
        """The completions that are returned, each as one piece."""
        number, num_kept = self._request.num_streams, self._request.num_choices
        for first in range(0, len(deltas_of), number):
            completions = map(whole, deltas_of[first : first + number])
            yield from best(completions, num_kept) if number > num_kept else completions

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The streamed response, frame by frame. After its first frame a failure is a frame, too.

        Raises:
            GPTJDistError: the request failed before its first frame.
        """
        has_begun, total_cost = False, 0
        try:
            async with aclosing(self._deltas(self._open_streams())) as deltas:
                async for index, delta in deltas:
                    cost = _writing_cost(delta)
                    total_cost += cost
                    if frames := await self._work.run(cost, partial(self._form.event, index, delta)):
                        has_begun = True
                        yield frames
        except Exception as error:
            if not has_begun:
                raise
            yield self._form.failure(error)
            return
        # A response repeats all.
        if frames := await self._work.run(total_cost, partial(self._form.end, self._counts)):
            yield frames

    async def _deltas(
        self, streams: Sequence[AsyncGenerator[TextDelta, None]]
    ) -> AsyncGenerator[tuple[int, TextDelta], None]:
        num_open, end = len(streams), "abort"
        try:
            async with aclosing(self._deadline.until(merge(streams))) as deltas:
                async for index, delta in deltas:
                    self._counts = self._counts.plus(delta)
                    if delta.finish_reason is not None:
                        num_open -= 1
                        self._on_end(delta.finish_reason)
                    yield index, delta
        except Exception:
            end = "error"
            raise
        finally:
            for _ in range(num_open):
                self._on_end(end)


def _writing_cost(delta: TextDelta) -> int:
    """An estimate of the microseconds that it takes to write a piece of a completion."""
    if not delta.logprobs and not delta.prompt_logprobs:
        return len(delta.token_ids)
    logprobs = (*delta.logprobs, *delta.prompt_logprobs)
    return len(delta.token_ids) + LOGPROB_US * sum(1 + len(token.top) for token in logprobs)


def _free(lists: list[list[TextDelta]]) -> None:
    """Frees lists one by one: to free all at once would hold Python's interpreter lock for long."""
    while lists:
        lists.pop()


def best(completions: Iterable[TextDelta], number: int) -> list[TextDelta]:
    """The `number` completions with the highest mean log probability of their tokens, the highest first.

    One without tokens, of which the moderator has let nothing pass, comes last.
    """

    def mean(completion: TextDelta) -> float:
        logprobs = [token.logprob for token in completion.logprobs]
        return sum(logprobs) / len(logprobs) if logprobs else -math.inf

    return sorted(completions, key=mean, reverse=True)[:number]
