"""Where tokens come from, as those who make answers of them see it: pipelines behind a handle, or an engine at hand."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from gptj_dist.engine.limits import EngineLimits
from gptj_dist.engine.mailbox import Delta
from gptj_dist.params import SamplingParams


class TokenSource(Protocol):
    """Continues prompts."""

    def limits(self) -> EngineLimits:
        """What requests are checked against. Raises NotReadyError while nobody can make a token."""

    def streams(
        self, prompt_ids: Sequence[int], params: SamplingParams, num_choices: int, log_id: str
    ) -> list[AsyncGenerator[Delta, None]]:
        """So many completions of one prompt, to be read at the same time.

        Nothing is asked for before a stream is read; closing one cancels it.

        Args:
            log_id: what logs call the request.
        """
