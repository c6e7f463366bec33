"""However a background task ends, its pipeline restarts or its replica fails its health check."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import uvicorn
from ray.exceptions import ActorDiedError, RayTaskError
from starlette.applications import Starlette

from gptj_dist.answers.local import running_engine
from gptj_dist.config import LayerRange
from gptj_dist.engine.async_engine import AsyncEngine
from gptj_dist.engine.limits import EngineLimits
from gptj_dist.engine.plan import Plan, Result
from gptj_dist.engine.scheduler import Scheduler
from gptj_dist.errors import NotReadyError, StageFailedError
from gptj_dist.params import SamplingParams
from gptj_dist.serving import pipeline
from gptj_dist.serving.adapters import AdapterList
from gptj_dist.serving.http.listener import Address, Listener
from gptj_dist.serving.outages import Outages
from gptj_dist.serving.pipeline import MAX_LOSSES_IN_WINDOW, MAX_RESTARTS_IN_A_ROW, Pipeline
from gptj_dist.serving.sockets import why_not_listen
from gptj_dist.stages.background import run_in_background
from gptj_dist.stages.blueprint import DeviceReport, StageReport
from gptj_dist.stages.loss import StageLoss
from gptj_dist.stages.pulse import Pulse
from gptj_dist.stages.ring import Ring
from gptj_dist.stages.transport import open_transport
from gptj_dist.stages.transport.frames import EndFrame, Frame, PlanFrame
from tests.fakes import FakeExecutor
from tests.unit.test_async_engine import (
    LIMITS,
    PROMPT,
    collect,
    expected_tokens,
    make_executor,
    make_scheduler,
    until,
)

TIMEOUT_S = 20
PARAMS = SamplingParams(max_tokens=5, seed=3)
CPU = DeviceReport("cpu", "here/cpu", 2, 10**9, ("float32",))
LOSS = StageLoss(0, "died", "here", 7, "a line")
TOO_MANY_FILES = OSError(24, "Too many open files")


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await scenario()

    asyncio.run(limited())


class FakeGroup:
    """Stages over fake executors.

    Args:
        joins: for each time that the stages are joined after the first, an error or the next executor.
    """

    num_dropped = (0, 0)
    num_faults: ClassVar[dict[Any, int]] = {}

    @property
    def loaded(self) -> FakeLoaded:
        return FakeLoaded()

    def __init__(self, joins: Iterator[Exception | FakeExecutor]) -> None:
        self.executor = make_executor(is_paused=True)
        self.is_killed = False
        self._joins = joins

    def submit(self, plan: Plan) -> None:
        self.executor.submit(plan)

    async def receive(self) -> Result:
        return await self.executor.receive()

    async def join(self, _: int) -> FakeLoaded:
        joined = next(self._joins)
        if isinstance(joined, Exception):
            raise joined
        self.executor = joined
        return self.loaded

    def kill(self) -> None:
        self.is_killed = True

    async def losses(self) -> list[StageLoss]:
        return [LOSS]


class FakeLoaded:
    """Stages that have loaded."""

    num_blocks = 10
    num_kv_tokens = 160

    @property
    def reports(self) -> list[StageReport]:
        return [StageReport(LayerRange.whole(4), CPU, "cpu", "float32", 1, 1, 1, 7)]

    def make_scheduler(self) -> Scheduler:
        return make_scheduler()

    def limits(self) -> EngineLimits:
        return LIMITS


class Replica(Pipeline):
    """A pipeline over fake stages, without Ray."""

    def __init__(self, group: FakeGroup) -> None:
        self._name = "replica"
        self._epoch = 0
        self._end = None
        self._outages = Outages(1.0)
        self._loss_times_s = deque(maxlen=MAX_LOSSES_IN_WINDOW)
        self._group: Any = group
        self._sender: Any = SimpleNamespace(num_malformed=0)
        self._adapters = AdapterList()
        self._engine = AsyncEngine(make_scheduler(), self._group, LIMITS)
        self._driver = run_in_background("driver", self._drive(), self._note_end)

    def __del__(self) -> None:  # type: ignore[override]
        """Nothing was started."""


@pytest.fixture(autouse=True)
def _no_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "RESTART_DELAY_S", 0.0)


@pytest.mark.parametrize("error", [TOO_MANY_FILES, StageFailedError("no"), RuntimeError("no"), KeyError("no")])
@pytest.mark.parametrize("num_failures", range(1, MAX_RESTARTS_IN_A_ROW))
def test_after_any_error_while_stages_start_the_next_attempt_serves_requests(
    error: Exception, num_failures: int
) -> None:
    async def scenario() -> None:
        group = FakeGroup(iter([*[error] * num_failures, make_executor()]))
        replica = Replica(group)
        await until(lambda: replica._engine.is_up)
        group.executor.fail()
        await until(lambda: replica._epoch == num_failures + 1 and replica._engine.is_up)
        assert await collect(replica._engine.generate(PROMPT, PARAMS)) == expected_tokens(PROMPT, PARAMS)
        replica.check_health()
        await until(lambda: replica._outages.losses[0].back_after_s is not None)
        assert [replace(loss, back_after_s=None, lost_at=None) for loss in replica._outages.losses] == [LOSS]
        replica._driver.cancel()

    run(scenario)


@pytest.mark.parametrize("error", [TOO_MANY_FILES, StageFailedError("no"), RuntimeError("no")])
def test_a_pipeline_whose_stages_never_start_again_is_lost_and_fails_its_health_check(error: Exception) -> None:
    async def scenario() -> None:
        states: list[str] = []

        def joins() -> Iterator[Exception]:
            for _ in range(MAX_RESTARTS_IN_A_ROW):
                states.append(replica._facts().state)
                yield error

        group = FakeGroup(joins())
        replica = Replica(group)
        states.append(replica._facts().state)
        replica.check_health()
        group.executor.fail()
        await until(replica._driver.done)
        states.append(replica._facts().state)
        assert states == ["up", *["restarting"] * MAX_RESTARTS_IN_A_ROW, "lost"]
        assert group.is_killed
        with pytest.raises(StageFailedError, match="could not be restarted in 3 attempts"):
            replica.check_health()
        with pytest.raises(NotReadyError):
            await collect(replica._engine.generate(PROMPT, PARAMS))

    run(scenario)


def test_when_stages_die_again_and_again_requests_fail_and_the_pipeline_comes_back() -> None:
    async def scenario() -> None:
        dying = [make_executor(is_paused=True) for _ in range(MAX_LOSSES_IN_WINDOW - 1)]
        group = FakeGroup(iter([*dying, make_executor()]))
        replica = Replica(group)
        request = asyncio.ensure_future(collect(replica._engine.generate(PROMPT, PARAMS)))
        await until(lambda: replica._engine.scheduler.num_running == 1)
        for executor in (group.executor, *dying):
            executor.fail()
        with pytest.raises(StageFailedError, match=f"died {MAX_LOSSES_IN_WINDOW} times"):
            await request
        await until(lambda: replica._epoch == MAX_LOSSES_IN_WINDOW and replica._engine.is_up)
        assert await collect(replica._engine.generate(PROMPT, PARAMS)) == expected_tokens(PROMPT, PARAMS)
        replica._driver.cancel()

    run(scenario)


class FakeInbound:
    """Receives nothing, or fails."""

    address = "nowhere"

    def __init__(self, error: Exception | None) -> None:
        self._error = error

    async def receive(self) -> Frame:
        if self._error is None:
            await asyncio.Future()
        assert self._error is not None
        raise self._error

    def close(self) -> None:
        """Nothing is open."""


class FakeOutbound:
    """Takes frames that nobody reads."""

    def send(self, frame: Frame) -> None:
        assert isinstance(frame, PlanFrame | EndFrame)

    def close(self, linger_ms: int = 0) -> None:
        assert linger_ms >= 0


def ring_of(runs: list[Any], receiving: Exception | None = None) -> Ring:
    inbound: Any = FakeInbound(receiving)
    return Ring(inbound, FakeOutbound(), runs, no_pulse, never, Counter())


async def no_pulse(_: int) -> Pulse:
    raise AssertionError("no plan is in flight")


async def never(_: int) -> bool:
    return False


async def _end_of_run(error: Exception | None) -> None:
    if error is not None:
        raise error


@pytest.mark.parametrize(
    "error",
    [
        ActorDiedError(),
        RayTaskError("run", "a traceback", ValueError("broken")),
        ImportError("a class of the error is unknown here"),
        None,
    ],
)
def test_however_the_run_of_a_stage_ends_the_stage_counts_as_dead(error: Exception | None) -> None:
    async def scenario() -> None:
        ring = ring_of([asyncio.Future(), _end_of_run(error)])
        with pytest.raises(StageFailedError, match="stage 1"):
            await ring.receive()
        ring.close()

    run(scenario)


@pytest.mark.parametrize("error", [TOO_MANY_FILES, RuntimeError("no")])
def test_a_coordinator_that_can_no_longer_receive_fails_its_requests(error: Exception) -> None:
    async def scenario() -> None:
        ring = ring_of([asyncio.Future()], receiving=error)
        with pytest.raises(StageFailedError, match="can no longer receive results"):
            await ring.receive()
        ring.close()

    run(scenario)


class EndingExecutor:
    """Fails when the first plan comes.

    Args:
        end: how.
    """

    def __init__(self, end: BaseException) -> None:
        self._end = end
        self._has_plan = asyncio.Event()
        self.is_closed = False

    def submit(self, _: Plan) -> None:
        self._has_plan.set()

    async def receive(self) -> Result:
        await self._has_plan.wait()
        raise self._end

    def close(self) -> None:
        self.is_closed = True


@pytest.mark.parametrize("end", [RuntimeError("no"), asyncio.CancelledError("no")])
def test_when_the_engine_of_this_process_ends_present_and_later_requests_fail(end: BaseException) -> None:
    async def scenario() -> None:
        executor: Any = EndingExecutor(end)
        loaded: Any = FakeLoaded()
        async with running_engine(loaded, executor) as engine:
            with pytest.raises(StageFailedError):
                await collect(engine.generate(PROMPT, PARAMS))
            with pytest.raises(NotReadyError, match="the model can no longer be used"):
                await collect(engine.generate(PROMPT, PARAMS))
        assert executor.is_closed

    run(scenario)


def test_a_closed_ring_can_be_ended() -> None:
    """As when a replica is drained while a stage is replaced."""

    async def scenario() -> None:
        transport = open_transport(epoch=0)
        inbound = transport.async_inbound("127.0.0.1")
        ring = Ring(inbound, transport.outbound(inbound.address), [], no_pulse, never, Counter())
        ring.close()
        await ring.end()
        port = inbound.address.partition("#")[0].rpartition(":")[2]
        assert not why_not_listen("127.0.0.1", int(port))

    run(scenario)


def test_an_http_server_that_ends_by_itself_fails_the_health_check(monkeypatch: pytest.MonkeyPatch) -> None:
    async def serve(_: uvicorn.Server, sockets: list[socket.socket]) -> None:
        sockets[0].close()
        raise TOO_MANY_FILES

    async def scenario() -> None:
        monkeypatch.setattr(uvicorn.Server, "serve", serve)
        listener = Listener(Starlette(), Address("127.0.0.1", 0), 0)
        listener.check_health()
        await until(listener._task.done)
        with pytest.raises(NotReadyError, match="Too many open files"):
            listener.check_health()

    run(scenario)


def test_an_http_server_that_is_closed_passes_the_health_check() -> None:
    async def scenario() -> None:
        listener = Listener(Starlette(), Address("127.0.0.1", 0), 0)
        await until(lambda: listener._server.started)
        await listener.close()
        listener.check_health()
        assert listener._task.done()

    run(scenario)


@pytest.mark.parametrize("is_cancelled_from_within", [True, False])
def test_a_background_task_that_is_cancelled_ends_silently_unless_the_reason_is_within(
    is_cancelled_from_within: bool,
) -> None:
    async def scenario() -> None:
        ends: list[Exception] = []
        inner: asyncio.Future[None] = asyncio.Future()

        async def work() -> None:
            await inner

        task = run_in_background("work", work(), ends.append)
        await asyncio.sleep(0)
        if is_cancelled_from_within:
            inner.cancel()
        else:
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert len(ends) == is_cancelled_from_within

    run(scenario)
