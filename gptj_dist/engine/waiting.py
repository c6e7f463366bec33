"""The queue of requests that do not run. Decides nothing."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator

from gptj_dist.engine.request import Request, run_order


class WaitingQueue:
    """Waiting requests, sorted by `run_order`.

    Attributes:
        num_tokens: estimate of the tokens that are to be computed for all of them, see `Request.num_expected`.
    """

    def __init__(self) -> None:
        self._requests: list[Request] = []
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def __getitem__(self, index: int) -> Request:
        return self._requests[index]

    def add(self, request: Request) -> None:
        insort(self._requests, request, key=run_order)
        self.num_tokens += request.num_expected

    def remove(self, request: Request) -> None:
        self._requests.remove(request)
        self.num_tokens -= request.num_expected
