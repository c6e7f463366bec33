"""The texts that a beam search has found, as streams. Knows no tokens' text."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from gptj_dist.engine.mailbox import Delta
from gptj_dist.engine.request import finish_reason
from gptj_dist.errors import StageFailedError
from gptj_dist.params import SamplingParams

Stream = AsyncGenerator[Delta, None]


def choices(streams: Sequence[Stream], params: SamplingParams) -> list[Stream]:
    """One stream for each completion of a prompt: of a beam search, for each of its `n` best texts.

    Args:
        streams: of the prompt's records.
    """
    if not params.use_beam_search:
        return list(streams)
    [search] = streams
    found = _Found(search)
    return [found.stream(rank) for rank in range(params.n)]


class _Found:
    """What a search finds. It begins when a text is first asked for, and ends when that one's reader leaves."""

    def __init__(self, search: Stream) -> None:
        self._search = search
        self._delta: Delta | None = None
        self._lock = asyncio.Lock()

    async def stream(self, rank: int) -> Stream:
        """The text of the rank in one delta. The prompt's cached tokens count for the first one."""
        async with self._lock:
            if self._delta is None:
                async with aclosing(self._search):
                    async for delta in self._search:
                        self._delta = delta
        if self._delta is None:
            raise StageFailedError("the beam search has been cancelled")
        beam = self._delta.beams[rank] if rank < len(self._delta.beams) else None
        yield self._delta._replace(
            token_ids=() if beam is None else beam.token_ids,
            finish_reason=finish_reason(beam),
            logprobs=() if beam is None else beam.logprobs,
            num_cached_tokens=0 if rank else self._delta.num_cached_tokens,
            beams=() if beam is None else (beam,),
        )
