"""Sends the streams of a pipeline to the ingresses that asked for them. Knows no Ray and makes no tokens."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing

from gptj_dist.engine.mailbox import Delta
from gptj_dist.serving.feed import BEAT_S, FeedOutbox, ReplyTo
from gptj_dist.stages.background import run_in_background

logger = logging.getLogger(__name__)

MAX_INBOXES = 64
"""Inboxes whose newest stream is remembered: more than there are ingresses."""


class StreamSender:
    """Reads streams and puts what comes into the outbox.

    Args:
        name: see `FeedOutbox`.
        weights: of the pipeline, see `serving.weights`.

    Attributes:
        received: the number of the newest stream for each inbox, by its endpoint.
    """

    def __init__(self, name: str = "", weights: str = "") -> None:
        self._weights = weights
        self.received: dict[str, int] = {}
        self._outbox = FeedOutbox(self._stop_one, name)
        self._sending: dict[ReplyTo, asyncio.Task[None]] = {}
        self._beating = run_in_background("beat of the pipeline", self._beat(), _note_no_beat)

    @property
    def num_malformed(self) -> int:
        """See `FeedOutbox`."""
        return self._outbox.num_malformed

    def computing(self) -> Mapping[str, Sequence[int]]:
        """The numbers of the streams that have not ended, by the endpoints of their inboxes."""
        computing: defaultdict[str, list[int]] = defaultdict(list)
        for stream in self._sending:
            computing[stream.inbox.endpoint].append(stream.stream_id)
        return dict(computing)

    async def send(self, streams: Sequence[AsyncGenerator[Delta, None]], reply_to: ReplyTo) -> None:
        """Returns when all streams have ended; raises the first error of one. If it is cancelled, all are closed.

        Args:
            reply_to: of the first stream; the others follow it. A single one is closed when its ingress no longer
                reads it.
        """
        tasks = {
            (to := reply_to.plus(choice)): asyncio.create_task(self._send_one(to, stream))
            for choice, stream in enumerate(streams)
        }
        self._sending |= tasks
        try:
            ends = await asyncio.gather(*tasks.values(), return_exceptions=True)
        finally:
            for to in tasks:
                del self._sending[to]
        for end in ends:
            if isinstance(end, Exception):  # and not the cancellation of one
                raise end

    def stop(self) -> None:
        """Sends nothing more."""
        self._beating.cancel()
        self._outbox.stop()

    async def _send_one(self, reply_to: ReplyTo, stream: AsyncGenerator[Delta, None]) -> None:
        number, inbox = 0, reply_to.inbox.endpoint
        self.received[inbox] = max(self.received.pop(inbox, 0), reply_to.stream_id)
        if len(self.received) > MAX_INBOXES:
            del self.received[next(iter(self.received))]
        async with aclosing(stream) as deltas:
            async for delta in deltas:
                self._outbox.put(reply_to, number, delta if number else delta._replace(weights=self._weights))
                number += 1

    def _stop_one(self, reply_to: ReplyTo) -> None:
        if (task := self._sending.get(reply_to)) is not None:
            task.cancel()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            self._outbox.beat({to.inbox for to in self._sending})


def _note_no_beat(error: Exception) -> None:
    logger.error("pipeline has no beat", exc_info=error)
