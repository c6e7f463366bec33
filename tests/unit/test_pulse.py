"""Which stages hang, from their signs of life; and what a ring makes of it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from gptj_dist.engine.plan import Chunk, Plan, Result, StageTiming
from gptj_dist.errors import StageFailedError
from gptj_dist.stages import ring
from gptj_dist.stages.pulse import (
    BASE_LIMIT_S,
    FIRST_LIMIT_S,
    LOST_FRAME_LIMIT_S,
    MAX_CUT_LOOKS,
    PERIOD_S,
    Pulse,
    Pulses,
)
from gptj_dist.stages.ring import Ring
from gptj_dist.stages.transport.frames import EdgeTraffic, Frame, ResultFrame

PLAN = Plan(0, (), (), (Chunk(0, 0, (1,), (), True),))


def silence(pulses: Pulses, seconds: float) -> None:
    for _ in range(round(seconds / PERIOD_S)):
        pulses.pass_time()


def test_a_stage_that_no_longer_answers_hangs_after_the_limit() -> None:
    pulses = Pulses(3)
    pulses.note_result([0.01, 0.4, 0.02])
    assert pulses.limit_s == pytest.approx(BASE_LIMIT_S + 3 * 0.4)
    for beat in range(6):
        pulses.pass_time()
        pulses.note_answer(0, Pulse(beat, True, 0))
        pulses.note_answer(2, Pulse(5, False, 0))
    assert not pulses.hung()
    pulses.pass_time()
    assert set(pulses.hung()) == {1}
    assert str(pulses.hung()[1]) == "hung: it made no progress for 3.5 s, and was killed"


def test_before_the_first_result_the_limit_is_longer() -> None:
    pulses = Pulses(1)
    silence(pulses, FIRST_LIMIT_S)
    assert not pulses.hung()
    pulses.pass_time()
    assert set(pulses.hung()) == {0}


def test_a_stage_that_answers_but_stays_at_its_layer_hangs() -> None:
    pulses = Pulses(1)
    pulses.note_result([0.0])
    pulses.note_answer(0, Pulse(7, True, 0))
    for _ in range(4):
        pulses.pass_time()
        pulses.note_answer(0, Pulse(7, True, 0))
    assert not pulses.hung()
    pulses.pass_time()
    assert set(pulses.hung()) == {0}


def test_a_stage_that_is_ever_so_slow_does_not_hang() -> None:
    pulses = Pulses(1)
    pulses.note_result([0.0])
    for beat in range(100):
        silence(pulses, BASE_LIMIT_S)
        pulses.note_answer(0, Pulse(beat, True, 0))
        assert not pulses.hung()
        assert pulses.silent_edge(1, 0) is None


def test_long_steps_extend_the_limit_as_long_as_they_are_recent() -> None:
    pulses = Pulses(1)
    pulses.note_result([5.0])
    silence(pulses, BASE_LIMIT_S + 14)
    assert not pulses.hung()
    for _ in range(64):
        pulses.note_result([0.001])
    silence(pulses, BASE_LIMIT_S + 1)
    assert set(pulses.hung()) == {0}


def test_a_result_or_an_idle_ring_begins_anew() -> None:
    for begin_anew in (lambda pulses: pulses.note_result([0.0]), Pulses.restart):
        pulses = Pulses(2)
        silence(pulses, LOST_FRAME_LIMIT_S + 1)
        begin_anew(pulses)
        assert pulses.silent_edge(1, 0) is None
        assert not pulses.hung()


@pytest.mark.parametrize(("received", "edge"), [((4, 4), 0), ((5, 4), 1), ((5, 5), 2)])
def test_a_frame_is_lost_on_its_edge_when_all_stages_wait_for_it(received: tuple[int, int], edge: int) -> None:
    pulses = Pulses(2)
    pulses.note_result([0.0])
    for _ in range(round(LOST_FRAME_LIMIT_S / PERIOD_S)):
        pulses.pass_time()
        for index in range(2):
            pulses.note_answer(index, Pulse(3, False, received[index]))
        assert pulses.silent_edge(5, 4) is None
    pulses.pass_time()
    assert pulses.silent_edge(5, 4) == edge


def test_a_stage_that_is_cut_off_is_given_time_and_so_are_the_frames_on_their_way() -> None:
    pulses = Pulses(2)
    pulses.note_result([0.0])
    for _ in range(MAX_CUT_LOOKS):
        pulses.pass_time()
        pulses.note_answer(0, Pulse(3, False, 1))
        for index in pulses.suspects():
            pulses.note_cut_off(index)
        assert not pulses.hung()
        assert pulses.silent_edge(1, 0) is None
    silence(pulses, BASE_LIMIT_S)
    assert set(pulses.hung()) == {1}


def test_a_stage_that_stays_cut_off_is_lost_in_the_end() -> None:
    pulses = Pulses(1)
    pulses.note_result([0.0])
    for _ in range(MAX_CUT_LOOKS + 10):
        pulses.pass_time()
        for index in pulses.suspects():
            pulses.note_cut_off(index)
    assert set(pulses.hung()) == {0}


class Inbound:
    """Hands out the frames that a test puts."""

    address = "nowhere"
    traffic = EdgeTraffic(0, 0)

    def __init__(self) -> None:
        self.frames: asyncio.Queue[Frame] = asyncio.Queue()

    async def receive(self) -> Frame:
        return await self.frames.get()

    def close(self) -> None:
        """Nothing is open."""


class Outbound:
    """Sends nowhere."""

    def send(self, frame: Frame) -> None:
        """Nobody reads the frame."""

    def close(self, linger_ms: int = 0) -> None:
        """Nothing is open."""


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "PERIOD_S", 0.0)


async def never(_: int) -> bool:
    return False


def ring_of(
    inbound: Inbound, feel: Callable[[int], Awaitable[Pulse]], is_cut_off: Callable[[int], Awaitable[bool]] = never
) -> Ring:
    runs: list[Any] = [asyncio.get_running_loop().create_future() for _ in range(2)]
    return Ring(inbound, Outbound(), runs, feel, is_cut_off, Counter())


def test_a_ring_reports_the_stage_that_hangs_and_no_other() -> None:
    async def feel(index: int) -> Pulse:
        if index == 1:
            await asyncio.Future()
        return Pulse(3, False, 0)

    async def run() -> None:
        there = ring_of(Inbound(), feel)
        there.submit(PLAN)
        with pytest.raises(StageFailedError, match=r"stage 1 hung: it made no progress for 10\.5 s"):
            await there.receive()
        assert set(there.deaths) == {1}
        there.close()

    asyncio.run(run())


def test_a_ring_waits_for_a_stage_that_is_cut_off() -> None:
    looks = 0

    async def feel(_: int) -> Pulse:
        await asyncio.Future()
        raise AssertionError

    async def is_cut_off(_: int) -> bool:
        nonlocal looks
        looks += 1
        return looks < 2 * MAX_CUT_LOOKS

    async def run() -> None:
        inbound = Inbound()
        there = ring_of(inbound, feel, is_cut_off)
        there.submit(PLAN)
        while looks < MAX_CUT_LOOKS:  # noqa: ASYNC110  # no event says so
            await asyncio.sleep(0)
        assert not there.deaths
        inbound.frames.put_nowait(ResultFrame(Result(0, (1,), (StageTiming(0, 5), StageTiming(5, 9)))))
        assert (await there.receive()).plan_id == 0
        there.close()

    asyncio.run(run())


def test_a_ring_asks_no_stage_while_nothing_is_in_flight() -> None:
    async def feel(_: int) -> Pulse:
        raise AssertionError("asked")

    async def run() -> None:
        inbound = Inbound()
        there = ring_of(inbound, feel)
        there.submit(PLAN)
        result = Result(0, (1,), (StageTiming(0, 5), StageTiming(5, 9)))
        inbound.frames.put_nowait(ResultFrame(result))
        assert await there.receive() == result
        for _ in range(100):
            await asyncio.sleep(0)
        assert not there.deaths
        there.close()

    asyncio.run(run())


def test_a_ring_without_frames_fails() -> None:
    async def feel(_: int) -> Pulse:
        return Pulse(3, False, 0)

    async def run() -> None:
        there = ring_of(Inbound(), feel)
        there.submit(PLAN)
        with pytest.raises(StageFailedError, match=r"on the edge coordinator->0 a frame is missing"):
            await there.receive()
        assert not there.deaths
        there.close()

    asyncio.run(run())
