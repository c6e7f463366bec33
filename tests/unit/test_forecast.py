"""When a full queue has room again: what is told, against what then comes to pass, on a simulated clock."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import replace

import pytest

from gptj_dist.config import DEFAULT_MAX_QUEUED_TOKENS
from gptj_dist.engine.async_engine import AsyncEngine
from gptj_dist.engine.limits import EngineLimits
from gptj_dist.engine.plan import Plan, StageTiming
from gptj_dist.engine.record import new_records
from gptj_dist.engine.scheduler import Scheduler
from gptj_dist.engine.scheduling import SchedulerConfig
from gptj_dist.engine.stats import PipelineStats
from gptj_dist.errors import StageFailedError, TooManyRequestsError
from gptj_dist.params import SamplingParams
from gptj_dist.serving.outages import Outages
from gptj_dist.serving.queue_room import QueueRoom
from gptj_dist.token_rules import TokenRules
from tests.fakes import FAKE_EOS_TOKEN_ID, FAKE_VOCAB_SIZE, FakeExecutor, FakeStages
from tests.unit.test_async_engine import turns

NUM_STAGES, NUM_BLOCKS, BLOCK_SIZE, MAX_BATCH_SIZE, MAX_QUEUED = 2, 2000, 4, 8, 12
STEP_NS, ROW_NS = 60_000_000, 4_000_000
RECOVERY_S = 20.0
TIMEOUT_S = 60


class TimedExecutor(FakeExecutor):
    """Fake stages whose steps take simulated time, one plan at a time on each stage."""

    def __init__(self, now_ns: list[int]) -> None:
        super().__init__(FakeStages(NUM_BLOCKS, BLOCK_SIZE, MAX_BATCH_SIZE), is_paused=True)
        self._now_ns = now_ns
        self._free_ns = [0] * NUM_STAGES
        self._ends_ns: deque[int] = deque()

    def submit(self, plan: Plan) -> None:
        super().submit(plan)
        end_ns, timings = self._now_ns[0], []
        for stage in range(NUM_STAGES):
            begin_ns = max(end_ns, self._free_ns[stage])
            end_ns = self._free_ns[stage] = begin_ns + STEP_NS + plan.num_tokens * ROW_NS
            timings.append(StageTiming(begin_ns, end_ns))
        self._computed[-1] = replace(self._computed[-1], timings=tuple(timings))
        self._ends_ns.append(end_ns)

    def land(self) -> None:
        """Lets time pass until the oldest plan has come back."""
        self._now_ns[0] = self._ends_ns.popleft()
        self.step()


class Server:
    """A pipeline on a simulated clock, whose queue is kept full."""

    def __init__(self, max_tokens: int) -> None:
        self.now_ns = [0]
        self.rng = random.Random(5)
        self.executor = TimedExecutor(self.now_ns)
        limits = EngineLimits(TokenRules(FAKE_VOCAB_SIZE), 2048, NUM_BLOCKS * BLOCK_SIZE, num_layers=4)
        stats = PipelineStats(lambda: self.now_ns[0])
        self.engine = AsyncEngine(self.scheduler(), self.executor, limits, lambda: self.now_s, stats)
        self.limits = limits
        self.outages = Outages(RECOVERY_S, lambda: self.now_s)
        self.room = QueueRoom(MAX_QUEUED, max_tokens, self.engine, self.outages)
        self.driver = asyncio.create_task(self.engine.run())
        self.readers: list[asyncio.Task[None]] = []

    @staticmethod
    def scheduler() -> Scheduler:
        eos = (FAKE_EOS_TOKEN_ID,)
        return Scheduler(SchedulerConfig(NUM_STAGES, NUM_BLOCKS, BLOCK_SIZE, MAX_BATCH_SIZE, eos))

    @property
    def now_s(self) -> float:
        return self.now_ns[0] / 1e9

    def told_s(self) -> int | None:
        """What a request is told that comes now; None if it is let in."""
        try:
            self.room.require(None)
        except TooManyRequestsError as error:
            return error.retry_after_s
        return None

    async def fill(self, most_tokens: int, mean_read: int | None = None) -> int:
        """Requests come until one is refused. Returns what it is told."""
        while (told_s := self.told_s()) is None:
            params = SamplingParams(max_tokens=self.rng.randint(most_tokens // 4, most_tokens), ignore_eos=True)
            num_read = None if mean_read is None else round(self.rng.expovariate(1 / mean_read)) + 1
            self.readers.append(asyncio.create_task(self.read(self.rng.randint(20, 200), params, num_read)))
            await turns()
        return told_s

    async def read(self, num_prompt_tokens: int, params: SamplingParams, num_read: int | None) -> None:
        """Reads a completion, or leaves after some tokens."""
        prompt = [1 + self.rng.randrange(FAKE_VOCAB_SIZE - 1) for _ in range(num_prompt_tokens)]
        [stream] = self.engine.generate_all(new_records(prompt, params, 1, "r"))
        async with aclosing(stream) as deltas:
            async for delta in deltas:
                num_read = None if num_read is None else num_read - len(delta.token_ids)
                if num_read is not None and num_read <= 0:
                    return

    async def wait_for_room(self) -> float:
        """Returns the seconds until a request is let in."""
        begin_s = self.now_s
        while self.told_s() is not None:
            self.executor.land()
            await turns()
        return self.now_s - begin_s

    async def lose_stage(self) -> None:
        self.executor.fail()
        with suppress(StageFailedError):
            await self.driver
        self.outages.begin(StageFailedError("stage 1 died"))

    def recover(self) -> None:
        self.executor = TimedExecutor(self.now_ns)
        self.engine.resume(self.scheduler(), self.executor, self.limits)
        self.outages.end()
        self.driver = asyncio.create_task(self.engine.run())


@asynccontextmanager
async def serving(max_tokens: int = DEFAULT_MAX_QUEUED_TOKENS) -> AsyncIterator[Server]:
    """A server that has just proved that it makes tokens."""
    server = Server(max_tokens)
    proof = asyncio.create_task(server.read(1, SamplingParams(max_tokens=1, temperature=0), None))
    await turns()
    server.executor.land()
    await proof
    yield server
    for task in (*server.readers, server.driver):
        task.cancel()
    await asyncio.gather(*server.readers, server.driver, return_exceptions=True)


def run(scenario: Coroutine[None, None, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, TIMEOUT_S))


def is_right(told_s: float, waited_s: float) -> bool:
    """Within a factor of two, as far as whole seconds allow; the least is 1."""
    waited_s = max(1.0, waited_s)
    return waited_s / 2 <= told_s <= 2 * waited_s


@pytest.mark.parametrize("most_tokens", [20, 200, 800])
def test_a_new_server_tells_the_time_until_there_is_room(most_tokens: int) -> None:
    async def scenario() -> None:
        async with serving() as server:
            pairs = [(await server.fill(most_tokens), await server.wait_for_room()) for _ in range(MAX_BATCH_SIZE + 1)]
            assert all(is_right(*pair) for pair in pairs), pairs

    run(scenario())


@pytest.mark.parametrize("most_tokens", [20, 200])
def test_under_load_the_time_until_there_is_room_is_told(most_tokens: int) -> None:
    async def scenario() -> None:
        async with serving() as server:
            pairs = [(await server.fill(most_tokens), await server.wait_for_room()) for _ in range(50)]
            wrong = [pair for pair in pairs[10:] if not is_right(*pair)]
            assert len(wrong) <= 2, wrong

    run(scenario())


@pytest.mark.parametrize("max_tokens", [100, 500])
def test_where_the_tokens_that_wait_are_too_many_the_time_until_there_is_room_is_told(max_tokens: int) -> None:
    async def scenario() -> None:
        async with serving(max_tokens) as server:
            pairs = [(await server.fill(200), await server.wait_for_room()) for _ in range(50)]
            wrong = [pair for pair in pairs[10:] if not is_right(*pair)]
            assert server.engine.scheduler.num_waiting < MAX_QUEUED
            assert len(wrong) <= 4, wrong

    run(scenario())


@pytest.mark.parametrize("mean_read", [15, 100])
def test_requests_that_end_early_are_expected_as_often_as_they_do(mean_read: int) -> None:
    async def scenario() -> None:
        async with serving() as server:
            pairs = [(await server.fill(1600, mean_read), await server.wait_for_room()) for _ in range(60)]
            told_s, waited_s = (sum(values) / 40 for values in zip(*pairs[20:], strict=True))
            assert is_right(told_s, waited_s), (told_s, waited_s)

    run(scenario())


@pytest.mark.parametrize("elapsed_s", [0.0, 8.0, 17.0])
def test_while_a_stage_is_replaced_the_rest_of_the_outage_is_told_too(elapsed_s: float) -> None:
    async def scenario() -> None:
        async with serving() as server:
            for _ in range(20):
                await server.fill(200)
                await server.wait_for_room()
            await server.fill(200)
            await server.lose_stage()
            await turns()
            begin_s = server.now_s
            server.now_ns[0] += round(elapsed_s * 1e9)
            told_s = await server.fill(200)
            server.now_ns[0] += round((RECOVERY_S - elapsed_s) * 1e9)
            server.recover()
            await turns()
            await server.wait_for_room()
            waited_s = server.now_s - begin_s - elapsed_s
            assert is_right(told_s, waited_s), (told_s, waited_s)

    run(scenario())


def test_requests_that_ran_before_a_loss_take_no_place_in_the_queue() -> None:
    async def scenario() -> None:
        async with serving() as server:
            for _ in range(MAX_BATCH_SIZE):
                params = SamplingParams(max_tokens=500, ignore_eos=True)
                server.readers.append(asyncio.create_task(server.read(40, params, None)))
            while server.engine.scheduler.num_running < MAX_BATCH_SIZE:
                await turns()
                server.executor.land()
            await turns()
            await server.lose_stage()
            assert server.engine.scheduler.num_waiting == MAX_BATCH_SIZE
            assert not server.engine.scheduler.waiting.num_of_keys
            await server.fill(200)
            assert server.engine.scheduler.num_waiting == MAX_BATCH_SIZE + MAX_QUEUED
            server.recover()
            await turns()
            assert server.engine.scheduler.waiting.num_of_keys == {None: MAX_QUEUED}

    run(scenario())
