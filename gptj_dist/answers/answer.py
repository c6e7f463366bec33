"""The answer to a request for text: all choices at once, or event by event. Knows neither Ray nor HTTP's routes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol, TypeVar

from gptj_dist.answers.completion import TextDelta, whole
from gptj_dist.answers.error_responses import error_response
from gptj_dist.answers.merge import merge
from gptj_dist.answers.schema.sampling import SamplingFields
from gptj_dist.answers.sse import SSE_DONE, sse_frame
from gptj_dist.errors import TimeoutReachedError
from gptj_dist.json_types import JsonObject

T = TypeVar("T")


class Writer(Protocol):
    """Writes one choice in an endpoint's shape."""

    def has_news(self, delta: TextDelta) -> bool:
        """Whether a piece would say anything."""

    def piece(self, delta: TextDelta) -> JsonObject:
        """The choice's next piece."""

    def whole(self, delta: TextDelta) -> JsonObject:
        """The choice, all at once."""


@dataclass(frozen=True, slots=True)
class Head:
    """What every response and event of one HTTP request begins with.

    Args:
        created: seconds since 1970.
        kind, chunk_kind: the `object` of a response, and of an event.
    """

    id: str
    created: int
    model: str
    kind: str
    chunk_kind: str

    def of(self, kind: str) -> JsonObject:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def usage(prompt_tokens: int, completion_tokens: int) -> JsonObject:
    """Token counts of a whole HTTP request: each prompt counts once, whatever n is."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


class Answer:
    """A request that was understood and can be served. Nothing is computed before `whole` or `events` is asked for.

    Args:
        open_streams: starts the completions, `request.num_sampled` for each prompt.
        writers: `request.n` for each prompt.
        num_prompt_tokens: of all prompts.
        most_tokens: the most that all completions together may have.
        on_end: told how each completion ended: a `FinishReason`, `error`, or `abort` if nobody wanted the rest.

    Attributes:
        num_tokens: that were generated so far, in all completions.
    """

    def __init__(
        self,
        request: SamplingFields,
        head: Head,
        open_streams: Callable[[], Sequence[AsyncGenerator[TextDelta, None]]],
        writers: Sequence[Writer],
        num_prompt_tokens: int,
        most_tokens: int,
        on_end: Callable[[str], None],
    ) -> None:
        self._request = request
        self._open_streams = open_streams
        self._writers = writers
        self.head = head
        self.num_prompt_tokens = num_prompt_tokens
        self.most_tokens = most_tokens
        self._on_end = on_end
        self.num_tokens = 0

    @property
    def is_streamed(self) -> bool:
        return self._request.stream

    async def whole(self) -> JsonObject:
        """The response that is not streamed. Raises what the request failed with."""
        request, streams = self._request, self._open_streams()
        deltas_of: list[list[TextDelta]] = [[] for _ in streams]
        async with aclosing(self._deltas(streams)) as deltas:
            async for index, delta in deltas:
                deltas_of[index].append(delta)
        sampled = [whole(deltas) for deltas in deltas_of]
        of_prompts = [sampled[i : i + request.num_sampled] for i in range(0, len(sampled), request.num_sampled)]
        if request.num_sampled > request.n:
            of_prompts = [best(completions, request.n) for completions in of_prompts]
        kept = [completion for completions in of_prompts for completion in completions]
        choices = [writer.whole(completion) for writer, completion in zip(self._writers, kept, strict=True)]
        return {**self.head.of(self.head.kind), "choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The streamed response, frame by frame. A failure under way is the last frame, and no `[DONE]` follows.

        Raises what the request failed with before it began.
        """
        has_begun = False
        try:
            async with aclosing(self._deltas(self._open_streams())) as deltas:
                async for index, delta in deltas:
                    has_begun = True
                    if self._writers[index].has_news(delta):
                        yield sse_frame(self._chunk([self._writers[index].piece(delta)]))
        except Exception as error:
            if not has_begun:
                raise
            yield sse_frame(error_response(error)[1])
            return
        if self._request.is_usage_streamed:
            yield sse_frame(self._chunk([]) | {"usage": self._usage()})
        yield SSE_DONE

    def _chunk(self, choices: list[JsonObject]) -> JsonObject:
        chunk = {**self.head.of(self.head.chunk_kind), "choices": choices}
        return chunk | {"usage": None} if self._request.is_usage_streamed else chunk

    def _usage(self) -> JsonObject:
        return usage(self.num_prompt_tokens, self.num_tokens)

    async def _deltas(
        self, streams: Sequence[AsyncGenerator[TextDelta, None]]
    ) -> AsyncGenerator[tuple[int, TextDelta], None]:
        num_open, end = len(streams), "abort"
        try:
            async with aclosing(_until(merge(streams), self._request.timeout_s)) as deltas:
                async for index, delta in deltas:
                    self.num_tokens += len(delta.token_ids)
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


async def _until(stream: AsyncGenerator[T, None], timeout_s: float | None) -> AsyncGenerator[T, None]:
    """What comes within so many seconds. Raises TimeoutReachedError when they are over."""
    end_s = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s
    async with aclosing(stream):
        while True:
            try:
                async with asyncio.timeout_at(end_s):
                    item = await anext(stream)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise TimeoutReachedError(f"not done after timeout_s = {timeout_s:g} seconds", "timeout_s") from None
            yield item


def best(completions: Sequence[TextDelta], number: int) -> list[TextDelta]:
    """Those with the highest mean log probability of their tokens, the highest first."""

    def mean(completion: TextDelta) -> float:
        return sum(token.logprob for token in completion.logprobs) / max(1, len(completion.logprobs))

    return sorted(completions, key=mean, reverse=True)[:number]
