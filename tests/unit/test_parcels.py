"""Parcels arrive as they were sent, in order, from a sender with the key; an end that is not wanted returns."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from gptj_dist.stages.transport import parcels
from gptj_dist.stages.transport.frames import FrameFaultError
from gptj_dist.stages.transport.parcels import AbandonedError, ParcelInbound, ParcelOutbound

Header = tuple[int, ...]
HOST = "127.0.0.1"


@pytest.fixture
def inbound() -> Iterator[ParcelInbound[Header]]:
    with closing(ParcelInbound(HOST, tuple[int, ...], lambda: False)) as end:
        yield end


def outbound(address: str) -> ParcelOutbound[Header]:
    return ParcelOutbound(address, tuple[int, ...], lambda: False)


def send_many(end: ParcelOutbound[Header], num_parcels: int, num_bytes: int) -> None:
    for _ in range(num_parcels):
        end.send((1,), [memoryview(bytes(num_bytes))])


def test_parcels_arrive_in_order_with_their_bytes(inbound: ParcelInbound[Header]) -> None:
    data = [memoryview(bytes([number]) * 100_000) for number in range(20)]

    def send() -> None:
        with closing(outbound(inbound.address)) as end:
            for number, each in enumerate(data):
                end.send((number, 7), [each, each[:3]])
            done.wait(60)

    done = threading.Event()
    sender = threading.Thread(target=send)
    sender.start()
    for number, each in enumerate(data):
        parcel = inbound.receive()
        assert parcel.header == (number, 7)
        assert list(parcel.data) == [bytes(each), bytes(each[:3])]
    done.set()
    sender.join()


def test_a_sender_waits_for_a_slow_receiver_and_returns_when_nobody_wants_its_parcels() -> None:
    asked = 0

    def is_abandoned() -> bool:
        nonlocal asked
        asked += 1
        return asked > 2

    with closing(ParcelInbound(HOST, tuple[int, ...], lambda: True)) as inbound:
        end = ParcelOutbound(inbound.address, tuple[int, ...], is_abandoned)
        with closing(end), pytest.raises(AbandonedError):
            send_many(end, 1000, 1 << 20)


def test_a_receiver_returns_when_nothing_is_wanted() -> None:
    with closing(ParcelInbound(HOST, tuple[int, ...], lambda: True)) as end, pytest.raises(AbandonedError):
        end.receive()


def test_without_the_key_nothing_arrives() -> None:
    asked = 0

    def is_abandoned() -> bool:
        nonlocal asked
        asked += 1
        return asked > 10

    with closing(ParcelInbound(HOST, tuple[int, ...], is_abandoned)) as inbound:
        endpoint, *_ = inbound.address.split("#")
        with closing(ParcelOutbound(f"{endpoint}#guess", tuple[int, ...], lambda: True)) as end:
            with pytest.raises(AbandonedError):
                send_many(end, 100, 1)
            with pytest.raises(AbandonedError):
                inbound.receive()


@pytest.mark.parametrize("fault", ["corrupted", "repeated", "missing"])
def test_a_parcel_that_is_not_the_next_one_is_refused(
    fault: str, inbound: ParcelInbound[Header], monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(outbound(inbound.address)) as end:
        end.send((0,), [memoryview(b"abc")])
        inbound.receive()
        if fault == "corrupted":
            monkeypatch.setattr(parcels, "_checksum", lambda _: b"none")
            end.send((1,))
            monkeypatch.undo()
        else:
            end._num_parcels += 1 if fault == "missing" else -1
            end.send((1,))
        with pytest.raises(FrameFaultError, match=f"a frame is {fault}"):
            inbound.receive()
