"""Limits how many requests an ingress answers at a time."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gptj_dist.answers.request_limits import MAX_COMPLETIONS
from gptj_dist.engine.fairness import has_room
from gptj_dist.errors import TooManyRequestsError
from gptj_dist.serving.outages import ServerOutage
from gptj_dist.serving.retry_after import retry_after_s

RETRY_AFTER_S = 5
"""When to come back while it is not known how fast requests are answered."""

MAX_ENDS = 256
"""The last answers, whose rate is measured."""


class Admission:
    """Refuses requests at once that the pipelines would refuse later, at the cost of their time.

    Args:
        most: maximum number of requests at a time. Beyond it only those of keys with less than an equal share.
        most_completions: the same of completions; a request that begins below may exceed it.
        clock: seconds.
        outage: the present one; None while a pipeline computes.
    """

    def __init__(
        self,
        most: int,
        most_completions: int = MAX_COMPLETIONS,
        clock: Callable[[], float] = time.monotonic,
        outage: Callable[[], ServerOutage | None] = lambda: None,
    ) -> None:
        self._most, self._most_completions = most, max(most, most_completions)
        self._clock = clock
        self._outage = outage
        self._num_of_keys: Counter[str | None] = Counter()
        self._num_completions_of_keys: Counter[str | None] = Counter()
        self._end_times_s: deque[float] = deque(maxlen=MAX_ENDS)
        self.num_admitted = 0

    def require_room(self, key: str | None = None) -> None:
        """Raises TooManyRequestsError if another request of this key would be refused, whatever it asks for."""
        if not has_room(self._num_of_keys, key, self._most):
            message = f"this server is answering {self.num_admitted} requests, its most; try again later"
            raise TooManyRequestsError(message, self._retry_after_s())

    @contextmanager
    def admitted(self, key: str | None = None, num_completions: int = 1) -> Iterator[None]:
        """Counts a request until the context ends.

        Args:
            key: the name of the client's, where several keys share the server.
            num_completions: that it asks for.

        Raises:
            TooManyRequestsError: there are too many.
        """
        self.require_room(key)
        if not has_room(self._num_completions_of_keys, key, self._most_completions):
            number = sum(self._num_completions_of_keys.values())
            message = f"this server is answering requests for {number} completions, its most; try again later"
            raise TooManyRequestsError(message, self._retry_after_s())
        self.num_admitted += 1
        self._num_of_keys[key] += 1
        self._num_completions_of_keys[key] += num_completions
        try:
            yield
        finally:
            self._note_end(key, num_completions)

    def _note_end(self, key: str | None, num_completions: int) -> None:
        self.num_admitted -= 1
        self._num_of_keys[key] -= 1
        self._num_completions_of_keys[key] -= num_completions
        if not self._num_of_keys[key]:
            del self._num_of_keys[key], self._num_completions_of_keys[key]
        if 2 * self.num_admitted < self._most:
            self._end_times_s.clear()  # fewer end than could: so few have come
        else:
            self._end_times_s.append(self._clock())

    def _retry_after_s(self) -> int:
        """Seconds until the requests of now have ended: the rest of an outage, and then at the rate before it."""
        down_s, back_in_s = self._outage() or (0.0, 0.0)
        wait_s: float = RETRY_AFTER_S
        if len(self._end_times_s) >= 2:
            until_s = max(self._clock() - down_s, self._end_times_s[-1])
            wait_s = self.num_admitted * (until_s - self._end_times_s[0]) / (len(self._end_times_s) - 1)
        return retry_after_s(back_in_s + wait_s)
