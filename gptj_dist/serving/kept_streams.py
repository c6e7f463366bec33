"""Keeps the streams of all ingresses of an application, so that any of them can go on with one. Knows no tokens."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from gptj_dist.params import AdapterSource
from gptj_dist.serving.loopback import keep_replica_on_node_address

LIFETIME_S = 60.0
"""How long a stream is kept after its end, or after its ingress was last heard of."""

MAX_KEPT_BYTES, MAX_KEPT_STREAMS = 256 * 2**20, 10_000
"""Beyond that, the streams that began first are no longer kept."""

PURGE_S = 10.0

Names = tuple[str | None, str]
"""A stream's names: that of the key that asked for it, or None, and the request's id."""


@dataclass(frozen=True, slots=True)
class Opening:
    """A request as it arrived, and what else its answer depends on.

    Args:
        kind: name of the body's class.
        created, noise, adapters: see `ResumableStream`.
    """

    kind: str
    body: bytes
    created: int
    noise: int
    adapters: tuple[tuple[str, AdapterSource], ...] = ()


@dataclass(frozen=True, slots=True)
class News:
    """What an ingress has to say of one of its streams.

    Args:
        run: identifies one connection's part in the stream. A stream that is resumed has a new one.
        opening: comes first, and again where the stream was forgotten.
        num_before: parts of the stream before these.
        parts: new tokens.
    """

    names: Names
    run: int
    opening: Opening | None
    num_before: int
    parts: tuple[bytes, ...]


class Reply(NamedTuple):
    """What an ingress learns when it sends news.

    Args:
        store: identifies what keeps the streams: another one has forgotten all. None if it does not answer.
        taken: runs that must end, because another one goes on with their streams.
    """

    store: int | None
    taken: list[int]


@dataclass(slots=True)
class KeptStream:
    """A stream as far as it is known.

    Args:
        run: may add to it; those of `former_runs` were resumed by others.
    """

    opening: Opening
    run: int
    seen_s: float
    num_bytes: int
    parts: list[bytes] = field(default_factory=list)
    former_runs: set[int] = field(default_factory=set)


class KeptStreams:
    """The streams, the oldest first.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._number = secrets.randbits(64)
        self._streams: dict[Names, KeptStream] = {}
        self._num_bytes = 0

    def update(self, news: Sequence[News]) -> Reply:
        """Adds news."""
        return Reply(self._number, [one.run for one in news if not self._add(one)])

    def take(self, names: Names, run: int) -> KeptStream | None:
        """The stream, to which only `run` adds from now on; None if it is not kept."""
        self.purge()
        if (stream := self._streams.get(names)) is None:
            return None
        stream.former_runs.add(stream.run)
        stream.run, stream.seen_s = run, self._clock()
        return stream

    def purge(self) -> None:
        """Forgets streams of which nothing was heard for long."""
        since_s = self._clock() - LIFETIME_S
        for names in [names for names, stream in self._streams.items() if stream.seen_s < since_s]:
            self._forget(names)

    def _add(self, news: News) -> bool:
        """Adds news, if they are of a stream that is kept. Returns False if another run goes on with it."""
        stream = self._streams.get(news.names)
        if stream is not None and news.run in stream.former_runs:
            return False
        if news.opening is not None:
            former_runs = stream.former_runs if stream is not None and stream.run == news.run else set()
            self._forget(news.names)
            stream = KeptStream(news.opening, news.run, self._clock(), len(news.opening.body), [], former_runs)
            self._streams[news.names] = stream
            self._num_bytes += stream.num_bytes
        if stream is None or stream.run != news.run:
            return True
        stream.seen_s = self._clock()
        if news.num_before != len(stream.parts):  # something was lost on its way
            self._forget(news.names)
            return True
        stream.parts += news.parts
        num_bytes = sum(map(len, news.parts))
        stream.num_bytes += num_bytes
        self._num_bytes += num_bytes
        while self._num_bytes > MAX_KEPT_BYTES or len(self._streams) > MAX_KEPT_STREAMS:
            self._forget(next(iter(self._streams)))
        return True

    def _forget(self, names: Names) -> None:
        if (stream := self._streams.pop(names, None)) is not None:
            self._num_bytes -= stream.num_bytes


class Streams:
    """The deployment that keeps them; `KeptStreams` on the clock of its replica."""

    def __init__(self) -> None:
        keep_replica_on_node_address()
        self._kept = KeptStreams(time.monotonic)
        self._purging: asyncio.Task[None] | None = None

    async def update(self, news: Sequence[News]) -> Reply:
        """Implements `KeptStreams.update`."""
        if self._purging is None:
            self._purging = asyncio.create_task(self._purge())
        return self._kept.update(news)

    async def take(self, names: Names, run: int) -> KeptStream | None:
        """Implements `KeptStreams.take`."""
        return self._kept.take(names, run)

    async def _purge(self) -> None:
        while True:
            await asyncio.sleep(PURGE_S)
            self._kept.purge()
