"""Refuses requests for which a pipeline's queue has no room, and says when there will be some."""

from __future__ import annotations

from gptj_dist.engine.async_engine import AsyncEngine
from gptj_dist.engine.fairness import has_room
from gptj_dist.errors import TooManyRequestsError
from gptj_dist.serving.outages import Outages
from gptj_dist.serving.retry_after import retry_after_s


class QueueRoom:
    """The limits of a pipeline's queue.

    Args:
        max_requests, max_tokens: see `PipelineConfig.max_queued_requests` and `max_queued_tokens`.
    """

    def __init__(self, max_requests: int, max_tokens: int, engine: AsyncEngine, outages: Outages) -> None:
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._engine = engine
        self._outages = outages

    def require(self, key: str | None) -> None:
        """Returns if one more request may wait.

        Args:
            key: whose request it is.

        Raises:
            TooManyRequestsError: too many requests or tokens wait already.
        """
        waiting = self._engine.scheduler.waiting
        if not has_room(waiting.num_of_keys, key, self._max_requests):
            raise self._refusal(f"{sum(waiting.num_of_keys.values())} requests", 1)
        if not has_room(waiting.num_tokens_of_keys, key, self._max_tokens):
            num_before = waiting.num_until_fewer(self._max_tokens)
            raise self._refusal(f"requests of {sum(waiting.num_tokens_of_keys.values())} tokens", num_before)

    def _refusal(self, what: str, num_before: int) -> TooManyRequestsError:
        """The error for a full queue.

        Args:
            num_before: requests that must leave it before there is room.
        """
        room_after_s = self._outages.back_in_s + num_before * self._engine.room_after_s()
        return TooManyRequestsError(f"{what} are waiting already; try again later", retry_after_s(room_after_s))
