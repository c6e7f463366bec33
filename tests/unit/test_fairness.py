"""Keys take turns, whatever one of them sends; requests without keys run by arrival."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence

import pytest

from gptj_dist.engine.fairness import FairShares, has_room
from gptj_dist.engine.record import RequestRecord
from gptj_dist.engine.request import Prompt, Request, run_order
from gptj_dist.engine.waiting import WaitingQueue
from gptj_dist.params import SamplingParams
from tests.unit.test_async_engine import MAX_BATCH_SIZE, Rig, collect, running

PROMPT_TOKENS, MAX_TOKENS = 4, 10


class Line:
    """A queue whose requests run one after the other."""

    def __init__(self) -> None:
        self.shares, self.queue, self.num_made = FairShares(), WaitingQueue(), 0

    def add(self, key: str | None, number: int = 1, max_tokens: int = MAX_TOKENS, priority: int = 0) -> list[Request]:
        params = SamplingParams(max_tokens=max_tokens, priority=priority)
        return [self._add(Request(self._id(), Prompt((1,) * PROMPT_TOKENS), params, 0, key=key)) for _ in range(number)]

    def _id(self) -> int:
        self.num_made += 1
        return self.num_made

    def _add(self, request: Request) -> Request:
        self.shares.enter(request, self.queue.place_now(request.params.priority))
        self.queue.add(request)
        return request

    def run(self, number: int, num_tokens: int | None = None) -> list[str]:
        """Begins and ends requests; returns their keys."""
        keys = []
        for request in [*self.queue][:number]:
            assert request is self.queue[0]
            self.queue.remove(request)
            self.queue.last_place = max(self.queue.last_place, request.place)
            request.token_ids += [1] * (request.params.max_tokens if num_tokens is None else num_tokens)
            self.shares.leave(request)
            keys.append(request.key or "-")
        return keys


def test_a_key_with_one_request_comes_at_most_one_behind_a_flood_of_another() -> None:
    line = Line()
    line.add("a", 1000)
    line.run(10)
    line.add("b")
    assert "b" in line.run(2)


def test_keys_with_many_requests_alternate() -> None:
    line = Line()
    line.add("a", 100)
    line.add("b", 100)
    line.add("c", 100)
    assert set(Counter(line.run(30)).values()) == {10}


def test_turns_are_weighted_by_tokens() -> None:
    line = Line()
    line.add("large", 100, max_tokens=3 * (PROMPT_TOKENS + MAX_TOKENS) - PROMPT_TOKENS)
    line.add("small", 100)
    served = Counter(line.run(40))
    assert served["small"] == pytest.approx(3 * served["large"], abs=3)


def test_tokens_that_were_not_used_do_not_count() -> None:
    line = Line()
    for _ in range(50):
        line.add("brief", max_tokens=1000)
        line.run(1, num_tokens=1)
        line.add("full", max_tokens=1)
        line.run(1)
    line.add("brief", 10, max_tokens=1)
    line.add("full", 10, max_tokens=1)
    assert Counter(line.run(10))["brief"] == 5


def test_a_key_that_comes_back_has_no_credit_for_its_pause() -> None:
    line = Line()
    line.add("a", 500)
    line.run(400)
    line.add("b", 100)
    assert Counter(line.run(40))["b"] == 20


def test_a_key_does_not_get_ahead_of_another_by_the_end_of_its_own_flood() -> None:
    """A request far down the line that runs early, for its priority, does not move the line."""
    line = Line()
    line.add("a", 500)
    line.add("a", priority=-1)
    assert line.run(1) == ["a"]
    line.add("b")
    assert "b" in line.run(2)


def test_priority_comes_before_turns() -> None:
    line = Line()
    line.add("a", 5)
    line.add("b", 5)
    line.add("a", 5, priority=-1)
    assert line.run(5) == ["a"] * 5


@pytest.mark.parametrize("key", [None, "a"])
def test_requests_of_one_key_or_none_run_by_arrival_whatever_they_use(key: str | None) -> None:
    line, rng = Line(), random.Random(0)
    for _ in range(300):
        line.add(key, rng.randint(0, 3), rng.randint(1, 50))
        line.run(rng.randint(0, 2), num_tokens=rng.choice((None, 0, 1)))
        ids = [request.request_id for request in line.queue]
        assert ids == sorted(ids)
        assert [*line.queue] == sorted(line.queue, key=run_order)


def records(key: str, number: int) -> list[RequestRecord]:
    """With different prompts, so that none waits for another's."""
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    return [RequestRecord((5, 6, 7 + index), params, index, key=key) for index in range(number)]


def test_in_an_engine_a_flood_of_one_key_lets_anothers_request_run_next() -> None:
    """Another key's first token comes as soon as one of the requests that run has ended, and two plans later."""

    async def start(rig: Rig, of: Sequence[RequestRecord]) -> list[asyncio.Task[list[int]]]:
        streams = [rig.engine.generate_all([record])[0] for record in of]
        tasks = [asyncio.create_task(collect(stream)) for stream in streams]
        await asyncio.sleep(0)
        return tasks

    async def main() -> None:
        async with running(is_paused=True) as rig:
            flood = await start(rig, records("a", 40))
            await rig.submitted(1)
            [other] = await start(rig, records("b", 1))
            rig.executor.go_on()
            await other
            assert sum(task.done() for task in flood) <= 3 * MAX_BATCH_SIZE
            await asyncio.gather(*flood)

    asyncio.run(main())


def test_a_full_queue_takes_requests_of_keys_with_less_than_an_equal_share() -> None:
    assert has_room({}, "a", 8)
    assert has_room({"a": 7}, "a", 8)
    assert not has_room({"a": 8}, "a", 8)
    assert has_room({"a": 8}, "b", 8)
    assert has_room({"a": 8, "b": 3}, "b", 8)
    assert not has_room({"a": 8, "b": 4}, "b", 8)
    assert has_room({"a": 8, "b": 4}, "c", 8)
    assert not has_room({None: 8}, None, 8)


def test_however_many_keys_there_are_the_queue_is_bounded() -> None:
    of_keys: Counter[str | None] = Counter()
    for number in range(20):
        while has_room(of_keys, str(number), 100):
            of_keys[str(number)] += 1
    assert sum(of_keys.values()) < 4 * 100
