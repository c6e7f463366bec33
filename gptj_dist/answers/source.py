"""The source of an answer's tokens: pipelines that a Serve handle reaches, or an engine in this process."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from gptj_dist.engine.limits import EngineLimits
from gptj_dist.engine.mailbox import Delta
from gptj_dist.engine.record import RequestRecord


class TokenSource(Protocol):
    """Continues prompts."""

    def limits(self) -> EngineLimits:
        """The limits that requests are checked against. Raises NotReadyError while no pipeline can make a token."""

    def streams(self, records: Sequence[RequestRecord]) -> list[AsyncGenerator[Delta, None]]:
        """Streams of the completions of one prompt, to be read at the same time.

        The computation starts when a stream is first read; closing a stream cancels its completion.
        """
