"""Frames survive the wire byte for byte; those of another epoch are dropped; nothing on it is a pickle."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import random

import msgpack
import pytest
import torch

from gptj_dist.engine.plan import Chunk, Embedding, NewRequest, Plan, PromptCopy, PromptLogprobs, Result, StageTiming
from gptj_dist.params import Pooling, SamplingControls, TokenLogprobs
from gptj_dist.stages.actor import _to_tensor, _to_wire
from gptj_dist.stages.transport.codec import (
    EndFrame,
    Frame,
    HiddenStates,
    PlanFrame,
    ResultFrame,
    decode,
    encode,
)
from gptj_dist.stages.transport.zeromq import AsyncInbound, Inbound, Outbound

TIME_LIMIT_S = 20

CONTROLS = SamplingControls(3, 0.5, -0.5, 1.2, ((7, 1.5),), (7, 8), ((1, 2), (3,)), (9,), 5, 0)
TOLD = TokenLogprobs(5, -0.25, 1, ((5, -0.25), (6, -2.0)))
TELLING = Chunk(5, 3, (8,), (), False, None, True)
EMBEDDING = Embedding(5, bytes(range(256)))
PLAN = Plan(
    plan_id=7,
    released=(1, 2),
    new_requests=(
        NewRequest(3, 0.7, 0.9, 40, 0.05, 2**64 - 1, 12),
        NewRequest(4, 0.0, 1.0, -1, 0.0, 0, 0, CONTROLS, "a request", PromptCopy(3, 17, (9,))),
        NewRequest(5, 0.0, 1.0, -1, 0.0, 0, 0, pooling=Pooling("last", 7)),
    ),
    chunks=(Chunk(3, 0, (5, 6, 7), (9, 8), False, 11), Chunk(4, 12, (50_399,), (), True), TELLING),
)
TIMINGS = (StageTiming(1_753_000_000_000_000_000, 1_753_000_000_004_000_001), StageTiming(0, 2**63))
FRAMES: list[Frame] = [
    PlanFrame(PLAN, None),
    PlanFrame(Plan(8, (), (), ()), None),
    PlanFrame(PLAN, HiddenStates("float16", (4, 2), bytes(range(16))), TIMINGS[:1]),
    ResultFrame(Result(7, (50_399, 0))),
    ResultFrame(Result(8, ())),
    ResultFrame(Result(9, (1,), TIMINGS)),
    ResultFrame(Result(10, (5, 6), (), (TOLD, None), (PromptLogprobs(3, 1, (TOLD, TOLD)), PromptLogprobs(4, 9, ())))),
    PlanFrame(PLAN, HiddenStates("float16", (4, 2), bytes(range(16))), TIMINGS, (1, 2), (EMBEDDING, Embedding(6, b""))),
    ResultFrame(Result(11, (), embeddings=(EMBEDDING,))),
    EndFrame(),
]


def as_bytes(parts: list[bytes | memoryview]) -> list[bytes]:
    return [bytes(part) for part in parts]


@pytest.mark.parametrize("frame", FRAMES)
def test_a_frame_comes_out_as_it_went_in(frame: Frame) -> None:
    assert decode(as_bytes(encode(3, frame)), epoch=3) == frame


@pytest.mark.parametrize("frame", FRAMES)
def test_a_frame_of_another_epoch_is_none(frame: Frame) -> None:
    assert decode(as_bytes(encode(2, frame)), epoch=3) is None


def test_random_plans_survive() -> None:
    chooser = random.Random(0)
    for _ in range(200):
        chunks = tuple(
            Chunk(
                chooser.randrange(2**40),
                chooser.randrange(2048),
                tuple(chooser.randrange(50_400) for _ in range(chooser.randrange(1, 9))),
                tuple(chooser.randrange(10_000) for _ in range(chooser.randrange(3))),
                chooser.random() < 0.5,
            )
            for _ in range(chooser.randrange(6))
        )
        frame = PlanFrame(Plan(chooser.randrange(2**40), (), (), chunks), None)
        assert decode(as_bytes(encode(0, frame)), epoch=0) == frame


@pytest.mark.parametrize(
    "message", [msgpack.packb((0, "evil", 1)), msgpack.packb((0, "plan")), pickle.dumps((0, "end")), b""]
)
def test_what_is_no_frame_is_an_error_and_is_not_unpickled(message: bytes) -> None:
    with pytest.raises((ValueError, msgpack.exceptions.UnpackException)):
        decode([message], epoch=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hidden_states_keep_every_bit(dtype: torch.dtype) -> None:
    hidden = torch.randn(3, 10).to(dtype)[:, 2:7]  # not contiguous
    frame = decode(as_bytes(encode(0, PlanFrame(PLAN, _to_wire(hidden)))), epoch=0)
    assert isinstance(frame, PlanFrame)
    found = _to_tensor(frame.hidden)
    assert found is not None
    assert found.dtype == dtype
    assert torch.equal(found, hidden)


def test_an_edge_delivers_in_order_and_drops_frames_of_an_older_epoch() -> None:
    with contextlib.closing(Inbound("127.0.0.1", epoch=5)) as inbound:
        old, new = Outbound(inbound.address, epoch=4), Outbound(inbound.address, epoch=5)
        with contextlib.closing(old), contextlib.closing(new):
            old.send(ResultFrame(Result(0, (1,))))
            for frame in FRAMES:
                new.send(frame)
            assert [inbound.receive() for _ in FRAMES] == FRAMES


def test_each_receiving_end_binds_a_free_port_of_its_host() -> None:
    with (
        contextlib.closing(Inbound("127.0.0.1", epoch=0)) as one,
        contextlib.closing(Inbound("127.0.0.1", epoch=0)) as other,
    ):
        assert one.address != other.address
        assert one.address.startswith("tcp://127.0.0.1:")
        assert int(one.address.rpartition(":")[2]) > 0


def test_an_event_loop_receives_too() -> None:
    async def receive() -> list[Frame]:
        inbound = AsyncInbound("127.0.0.1", epoch=1)
        outbound = Outbound(inbound.address, epoch=1)
        with contextlib.closing(inbound), contextlib.closing(outbound):
            for frame in FRAMES:
                outbound.send(frame)
            async with asyncio.timeout(TIME_LIMIT_S):
                return [await inbound.receive() for _ in FRAMES]

    assert asyncio.run(receive()) == FRAMES
