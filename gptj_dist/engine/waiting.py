"""The queue of waiting requests, in the order in which they will run. Decides nothing."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator

from gptj_dist.engine.request import Request, run_order


class WaitingQueue:
    """Sorted by `run_order`.

    Attributes:
        num_tokens: estimated number of tokens to compute for all waiting requests.
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
