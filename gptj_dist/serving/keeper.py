"""The ingress's side of resumable streams: has the tokens of its streams kept, and takes over those of others."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from gptj_dist.answers.error_responses import UnknownStreamError
from gptj_dist.answers.resumable import ResumableStream
from gptj_dist.answers.work import Work
from gptj_dist.engine.mailbox import Delta
from gptj_dist.errors import NotReadyError, excerpt
from gptj_dist.logs import values
from gptj_dist.params import AdapterSource
from gptj_dist.serving.kept_streams import KeptStream, Names, News, Opening, Reply
from gptj_dist.stages.background import run_in_background
from gptj_dist.stages.transport.codec import Codec

logger = logging.getLogger(__name__)

INTERVAL_S, MIN_INTERVAL_S = 0.5, 0.2
"""Between two calls that have new tokens kept; the shorter one if a stream has begun. Tokens that were not kept when an
ingress dies are computed again."""

CALL_TIMEOUT_S = 5.0

PREFIXES = ("cmpl-", "chatcmpl-", "resp_")
"""What the ids of answers have before the request's id."""

TURN_BYTES = 20_000
"""A larger part is the last that is written in a turn of the event loop."""

BYTES_READ_PER_US = 50

_PART = Codec(tuple[tuple[int, Delta], ...])


@dataclass(slots=True)
class Run:
    """One connection's part in a stream.

    Args:
        number: identifies it, see `News`.
        parts: of the stream; the first `num_kept` of them are kept.
        is_kept: the opening is.
    """

    names: Names
    opening: Opening
    stream: ResumableStream
    number: int
    parts: list[bytes] = field(default_factory=list)
    num_kept: int = 0
    is_kept: bool = False
    is_over: bool = False

    def news(self) -> News:
        """What is not kept yet."""
        if tokens := self.stream.take_news():
            self.parts.append(_PART.encode(tuple(tokens)))
        opening = None if self.is_kept else self.opening
        return News(self.names, self.number, opening, self.num_kept, tuple(self.parts[self.num_kept :]))

    def note(self, is_kept: bool) -> None:
        """Whether all of the news is kept now, and what came before, or nothing of the stream."""
        self.is_kept = is_kept
        self.num_kept = len(self.parts) if is_kept else 0


class Keeper:
    """Has tokens kept by the deployment of `Streams`. Made on a running event loop.

    If they cannot be kept, the streams go on. They cannot be resumed until all of their tokens were sent again.

    Args:
        streams: handle to the deployment.
        work: reads what was kept.
    """

    def __init__(self, streams: DeploymentHandle, work: Work) -> None:
        self._streams = streams
        self._work = work
        self._runs: dict[int, Run] = {}
        self._sending = asyncio.Lock()
        self._has_begun = asyncio.Event()
        self._store: int | None = None
        self._task = run_in_background("keeper of streams", self._keep(), self._note_end)

    def new_run(
        self, names: Names, kind: str, body: bytes, adapters: tuple[tuple[str, AdapterSource], ...] = ()
    ) -> Run:
        """The first connection's part in a stream.

        Args:
            kind, body, adapters: see `Opening`.
        """
        opening = Opening(kind, body, int(time.time()), secrets.randbits(64), adapters)
        return Run(names, opening, _stream(opening), secrets.randbits(64))

    async def take(self, names: Names, last_id: str) -> Run:
        """Takes a stream over from the connection that has had it.

        Args:
            names: an answer's id is taken for its request's.
            last_id: see `ResumableStream`.

        Raises:
            UnknownStreamError: the stream is not kept, or another key asked for it.
            NotReadyError: the replica that keeps streams cannot be reached.
        """
        key, given = names
        inner = next((given.removeprefix(prefix) for prefix in PREFIXES if given.startswith(prefix)), given)
        for request_id in dict.fromkeys((given, inner)):
            number = secrets.randbits(64)
            if (kept := await self._take((key, request_id), number)) is not None:
                parts = list(kept.parts)
                read = partial(_read, parts)
                past = await self._work.run(kept.num_bytes // BYTES_READ_PER_US, read)
                stream = _stream(kept.opening, past, last_id)
                return Run((key, request_id), kept.opening, stream, number, parts, len(parts), is_kept=True)
        raise UnknownStreamError(f"the stream {excerpt(given)} is not kept: it is unknown, or ended too long ago")

    @contextmanager
    def keeping(self, run: Run) -> Iterator[None]:
        """Has the tokens of the stream kept until the context ends."""
        self._runs[run.number] = run
        self._has_begun.set()
        try:
            yield
        finally:
            run.is_over = True

    async def close(self) -> None:
        """Has the last tokens kept, and no more."""
        if self._runs:
            await self._send()
        self._task.cancel()

    async def _take(self, names: Names, number: int) -> KeptStream | None:
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                kept: KeptStream | None = await self._streams.take.remote(names, number)
        except (RayError, RayServeException, TimeoutError) as error:
            raise NotReadyError("kept streams cannot be reached right now") from error
        return kept

    async def _keep(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(INTERVAL_S - MIN_INTERVAL_S if self._runs else None):
                    await self._has_begun.wait()
            await asyncio.sleep(MIN_INTERVAL_S)
            self._has_begun.clear()
            await self._send()

    async def _send(self) -> None:
        """Has the news of all streams kept, and forgets those that are over."""
        async with self._sending:
            news: list[News] = []
            over = [number for number, run in self._runs.items() if run.is_over]
            for run in list(self._runs.values()):
                news.append(run.news())
                if sum(map(len, news[-1].parts)) > TURN_BYTES:
                    await asyncio.sleep(0)
            try:
                async with asyncio.timeout(CALL_TIMEOUT_S):
                    reply: Reply = await self._streams.update.remote(news)
            except Exception as error:  # whatever it is, the streams go on
                logger.warning("streams cannot be resumed", extra=values(streams=len(news), error=repr(error)))
                reply = Reply(None, [])
            is_same, self._store = reply.store == self._store, reply.store
            for one in news:
                self._runs[one.run].note(reply.store is not None and (is_same or one.opening is not None))
            for number in reply.taken:
                self._runs[number].stream.is_taken = True
            for number in {*over, *reply.taken}:
                del self._runs[number]

    def _note_end(self, error: Exception) -> None:
        logger.error("streams can no longer be resumed", extra=values(error=repr(error)))


def _stream(opening: Opening, past: Sequence[tuple[int, Delta]] = (), last_id: str | None = None) -> ResumableStream:
    return ResumableStream(opening.created, opening.noise, past, last_id, dict(opening.adapters))


def _read(parts: list[bytes]) -> list[tuple[int, Delta]]:
    return [item for part in parts for item in _PART.decode(part)]
