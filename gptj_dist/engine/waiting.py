"""The queue of requests that do not run. Decides nothing."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator

from gptj_dist.engine.request import Request, run_order


class WaitingQueue:
    """Waiting requests, sorted by `run_order`.

    Attributes:
        num_tokens: estimate of the tokens that are to be computed for all of them, see `Request.num_expected`.
        num_of_keys: requests by their key, without those that have run: a lost stage or a preemption sent them back.
        num_tokens_of_keys: `num_tokens` of the same requests.
        last_place: the highest place of the requests that have begun to run.
    """

    def __init__(self) -> None:
        self._requests: list[Request] = []
        self.num_tokens = 0
        self.num_of_keys: Counter[str | None] = Counter()
        self.num_tokens_of_keys: Counter[str | None] = Counter()
        self.last_place = 0

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def __getitem__(self, index: int) -> Request:
        return self._requests[index]

    def add(self, request: Request) -> None:
        insort(self._requests, request, key=run_order)
        self.num_tokens += request.num_expected
        if not request.has_run:
            self.num_of_keys[request.key] += 1
            self.num_tokens_of_keys[request.key] += request.num_expected

    def remove(self, request: Request) -> None:
        self._requests.remove(request)
        self.num_tokens -= request.num_expected
        if request.has_run:
            return
        self.num_of_keys[request.key] -= 1
        self.num_tokens_of_keys[request.key] -= request.num_expected
        if not self.num_of_keys[request.key]:
            del self.num_of_keys[request.key], self.num_tokens_of_keys[request.key]

    def num_until_fewer(self, num_tokens: int) -> int:
        """How many requests that have not run must leave until fewer tokens than this wait; 1 or more."""
        rest = sum(self.num_tokens_of_keys.values())
        for number, request in enumerate((request for request in self._requests if not request.has_run), 1):
            rest -= request.num_expected
            if rest < num_tokens:
                return number
        return 1

    def place_now(self, priority: int) -> int:
        """The place of the request of this priority that is next; if none waits, of the last one that began to run."""
        index = bisect_left(self._requests, (priority, True, -1, -1), key=run_order)  # after those that were moved
        if index < len(self) and self._requests[index].params.priority == priority:
            return self._requests[index].place
        return self.last_place
