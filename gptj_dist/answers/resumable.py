"""The tokens of a streamed answer, kept so that another process can go on with it. Does not know where."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace

from gptj_dist.answers.event_ids import EventId, Received
from gptj_dist.answers.source import TokenSource
from gptj_dist.engine.mailbox import Delta, joined
from gptj_dist.engine.record import RequestRecord, noise_key
from gptj_dist.errors import NotReadyError
from gptj_dist.params import AdapterSource

TAKEN = NotReadyError("this stream goes on at another connection, which has resumed it")


class ResumableStream:
    """The completions of one request: what came before, and then what a `TokenSource` makes of the rest.

    Args:
        created: when the request arrived, in seconds since 1970.
        noise: 64 bits, from which completions without a seed get their noise keys.
        past: the tokens that came before, of each completion by its index.
        last_id: the id of the last event that the client has received, empty if it has none; None for a new stream.
        adapters: those that the request names, as they were when it arrived.

    Attributes:
        is_taken: another connection goes on with the stream. It ends here, with its next token.
    """

    def __init__(
        self,
        created: int,
        noise: int,
        past: Sequence[tuple[int, Delta]] = (),
        last_id: str | None = None,
        adapters: Mapping[str, AdapterSource] | None = None,
    ) -> None:
        self.created = created
        self.adapters = adapters or {}
        self.is_taken = False
        self._news: list[tuple[int, Delta]] = []
        self._noise = noise
        self._past: defaultdict[int, list[Delta]] = defaultdict(list)
        for index, delta in past:
            self._past[index].append(delta)
        self._is_resumed = last_id is not None
        self._last_id = last_id or None
        self._received: Sequence[Received] = ()

    def received(self, num_completions: int) -> EventId:
        """What the client has received. Raises InvalidRequestError if that cannot be of this stream."""
        if self._last_id is None:
            received = EventId.none(num_completions)
        else:
            received = EventId.parsed(self._last_id, num_completions)
        self._received = received.completions
        return received

    def take_news(self) -> list[tuple[int, Delta]]:
        """The tokens since the last call, with the indices of their completions."""
        news, self._news = self._news, []
        return news

    def streams(
        self, source: TokenSource, records: Sequence[RequestRecord], first: int
    ) -> list[AsyncGenerator[Delta, None]]:
        """The completions of one prompt. The first delta of each has the tokens that the client has received.

        Args:
            records: before their first tokens.
            first: index of the first of them.
        """
        if records[0].params.seed is None:
            records = [
                replace(record, noise_key=noise_key(self._noise, index)) for index, record in enumerate(records, first)
            ]
        if not self._is_resumed:
            return [self._noted(index, stream) for index, stream in enumerate(source.streams(records), first)]
        pasts = {index: self._past[index] for index in range(first, first + len(records))}
        left = {
            index: record.resumed(_token_ids(past), past[0].weights if past else "")
            for record, (index, past) in zip(records, pasts.items(), strict=True)
            if not past or past[-1].finish_reason is None
        }
        rest = dict(zip(left, source.streams(list(left.values())) if left else (), strict=True))
        return [self._resumed(index, past, rest.get(index)) for index, past in pasts.items()]

    async def _noted(self, index: int, stream: AsyncGenerator[Delta, None]) -> AsyncGenerator[Delta, None]:
        async with aclosing(stream):
            async for delta in stream:
                if self.is_taken:
                    raise TAKEN
                self._news.append((index, delta))
                yield delta

    async def _resumed(
        self, index: int, past: Sequence[Delta], rest: AsyncGenerator[Delta, None] | None
    ) -> AsyncGenerator[Delta, None]:
        received, held, is_begun = self._received[index], None, False
        last = received.partly or received
        async with aclosing(self._all(index, past, rest)) as deltas:
            async for delta in deltas:
                if is_begun:
                    yield delta
                    continue
                held = delta if held is None else joined(held, delta)
                if held.finish_reason is not None or len(held.token_ids) >= last.num_tokens + last.has_end:
                    is_begun = True
                    for piece in _cut(held, received):
                        yield piece

    async def _all(
        self, index: int, past: Sequence[Delta], rest: AsyncGenerator[Delta, None] | None
    ) -> AsyncGenerator[Delta, None]:
        for delta in past:
            yield delta
        if rest is not None:
            async with aclosing(self._noted(index, rest)) as deltas:
                async for delta in deltas:
                    yield delta


def _token_ids(deltas: Sequence[Delta]) -> list[int]:
    return [token_id for delta in deltas for token_id in delta.token_ids]


def _cut(delta: Delta, received: Received) -> list[Delta]:
    """The tokens that were received, those that were partly, and the rest; each if there are any."""
    pieces, begin, num_tokens = list[Delta](), 0, len(delta.token_ids)
    for mark in (received, received.partly):
        if mark is None or (mark.has_end and num_tokens <= mark.num_tokens):
            break
        if mark.num_tokens > begin:
            pieces.append(_part(delta, begin, mark.num_tokens))
            begin = mark.num_tokens
    if begin < num_tokens or delta.finish_reason is not None or not pieces:
        pieces.append(_part(delta, begin, num_tokens)._replace(finish_reason=delta.finish_reason))
    return pieces


def _part(delta: Delta, begin: int, end: int) -> Delta:
    """Some of the tokens, without a finish. What comes with a stream's first tokens comes with its first part."""
    tokens, logprobs = delta.token_ids[begin:end], delta.logprobs[begin:end]
    if begin:
        return Delta(tokens, None, logprobs)
    return delta._replace(token_ids=tokens, finish_reason=None, logprobs=logprobs)
