"""The switch between machines of network namespaces, without any: which frames wait for what."""

from __future__ import annotations

import time

import pytest

from benchmarks.namespaces import Switch
from benchmarks.wire import _options

NUM_TAPS = 3
RATE_BYTES_S, DELAY_S = 1.0, 1000.0
PAYLOAD = bytes(100)


def address(port: int) -> bytes:
    return bytes(5) + bytes([port + 1])


def frame(source: int, target: int) -> bytes:
    return address(target) + address(source) + PAYLOAD


def wait_s(switch: Switch, source: int, target: int) -> float:
    """How long a new frame is held back."""
    switch._take(source, frame(source, target))
    [(due_s, _, found, _)] = switch._due
    switch._due.clear()
    assert found == target
    return due_s - time.monotonic()


@pytest.fixture
def switch() -> Switch:
    """One that has seen a frame of this machine, 0, and of two others, at a low rate and with a long delay."""
    made = Switch([-1] * NUM_TAPS)
    for port in range(NUM_TAPS):
        made._take(port, frame(port, NUM_TAPS))
    made._due.clear()
    made._free_s = [0.0] * NUM_TAPS
    made._obey("rate", RATE_BYTES_S)
    made._obey("delay", DELAY_S)
    return made


def test_frames_between_machines_wait_for_the_rate_of_their_sender_and_the_delay(switch: Switch) -> None:
    frame_s = len(frame(1, 2)) / RATE_BYTES_S
    assert wait_s(switch, 1, 2) == pytest.approx(DELAY_S + frame_s, abs=frame_s / 2)
    assert wait_s(switch, 1, 2) == pytest.approx(DELAY_S + 2 * frame_s, abs=frame_s / 2)
    assert wait_s(switch, 2, 1) == pytest.approx(DELAY_S + frame_s, abs=frame_s / 2)


def test_frames_from_this_machine_and_to_it_wait_for_nothing_and_hold_nothing_back(switch: Switch) -> None:
    frame_s = len(frame(1, 2)) / RATE_BYTES_S
    for _ in range(3):
        assert wait_s(switch, 1, 0) <= 0
        assert wait_s(switch, 0, 1) <= 0
    assert wait_s(switch, 1, 2) == pytest.approx(DELAY_S + frame_s, abs=frame_s / 2)
    assert wait_s(switch, 1, 0) <= 0


def test_a_machine_that_is_cut_off_sends_nothing(switch: Switch) -> None:
    switch._obey("cut", 1)
    switch._take(1, frame(1, 2))
    assert switch._due == []
    switch._obey("heal", 1)
    assert wait_s(switch, 1, 2) > 0


def test_a_rate_that_is_named_twice_is_measured_once() -> None:
    assert _options(["deep", "--rates", "100", "10", "100"]).rates == [100, 10]
