"""Limits how many requests an ingress answers at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gptj_dist.errors import TooManyRequestsError

RETRY_AFTER_S = 5


class Admission:
    """Refuses requests at once that the pipelines would refuse later, at the cost of their time.

    Args:
        most: maximum number of requests at a time.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.num_admitted = 0

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Counts a request until the context ends. Raises TooManyRequestsError if there are too many."""
        if self.num_admitted >= self._most:
            message = f"this server is answering {self.num_admitted} requests, its most; try again later"
            raise TooManyRequestsError(message, RETRY_AFTER_S)
        self.num_admitted += 1
        try:
            yield
        finally:
            self.num_admitted -= 1
