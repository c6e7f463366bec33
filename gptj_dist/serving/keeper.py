"""The ingress's side of resumable streams: has the tokens of its streams kept, and takes over those of others."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
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
from gptj_dist.serving.kept_streams import KeptStream, Names, News, Opening
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
        num_parts: of the stream, that are kept.
        is_opened: the opening is kept.
    """

    names: Names
    opening: Opening
    stream: ResumableStream
    number: int
    num_parts: int = 0
    is_opened: bool = False
    is_over: bool = False


class Keeper:
    """Has tokens kept by the deployment of `Streams`. Made on a running event loop.

    If they cannot be kept, the streams go on and cannot be resumed.

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
        self._task = run_in_background("keeper of streams", self._keep(), self._note_end)

    def new_run(self, names: Names, kind: str, body: bytes) -> Run:
        """The first connection's part in a stream.

        Args:
            kind, body: see `Opening`.
        """
        opening = Opening(kind, body, int(time.time()), secrets.randbits(64))
        return Run(names, opening, ResumableStream(opening.created, opening.noise), secrets.randbits(64))

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
                read = partial(_read, kept.parts)
                past = await self._work.run(kept.num_bytes // BYTES_READ_PER_US, read)
                stream = ResumableStream(kept.opening.created, kept.opening.noise, past, last_id)
                return Run((key, request_id), kept.opening, stream, number, len(kept.parts), is_opened=True)
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
            over = [run.number for run in self._runs.values() if run.is_over]
            for run in list(self._runs.values()):
                news.append(_news(run))
                if len(news[-1].part) > TURN_BYTES:
                    await asyncio.sleep(0)
            try:
                async with asyncio.timeout(CALL_TIMEOUT_S):
                    taken: list[int] = await self._streams.update.remote(news)
            except Exception as error:  # whatever it is, the streams go on
                logger.warning("streams cannot be resumed", extra=values(streams=len(news), error=repr(error)))
                for one in news:
                    self._runs.pop(one.run).stream.give_up()
                return
            for one in news:
                self._runs[one.run].is_opened = True
                self._runs[one.run].num_parts += bool(one.part)
            for number in taken:
                self._runs[number].stream.is_taken = True
            for number in {*over, *taken}:
                del self._runs[number]

    def _note_end(self, error: Exception) -> None:
        logger.error("streams can no longer be resumed", extra=values(error=repr(error)))


def _news(run: Run) -> News:
    tokens = run.stream.take_news()
    part = _PART.encode(tuple(tokens)) if tokens else b""
    return News(run.names, run.number, None if run.is_opened else run.opening, run.num_parts, part)


def _read(parts: list[bytes]) -> list[tuple[int, Delta]]:
    return [item for part in parts for item in _PART.decode(part)]
