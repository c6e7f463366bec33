"""Frames survive the wire byte for byte; those of another epoch are dropped; all others are a fault of the edge."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import random
import zlib
from dataclasses import dataclass
from typing import Literal

import msgspec
import pytest
import torch

from gptj_dist.config import WireChoice
from gptj_dist.engine.plan import Chunk, Embedding, KVPrefix, NewRequest, Plan, PromptLogprobs, Result, StageTiming
from gptj_dist.engine.request import Prompt, Request
from gptj_dist.params import Pooling, SamplingParams, TokenLogprobs
from gptj_dist.stages.transport import open_transport
from gptj_dist.stages.transport.codec import Codec, CodecError
from gptj_dist.stages.transport.frames import (
    EdgeTraffic,
    EndFrame,
    Frame,
    FrameFault,
    FrameFaultError,
    FrameReader,
    FrameWriter,
    HiddenStates,
    PlanFrame,
    ResultFrame,
)
from gptj_dist.stages.wire import decode_hidden, encode_hidden
from tests.settings import FIELD_NAMES, changed

TIME_LIMIT_S = 20

TOLD = TokenLogprobs(5, -0.25, 1, ((5, -0.25), (6, -2.0)))
TELLING = Chunk(5, 3, (8,), (), False, None, True)
EMBEDDING = Embedding(5, bytes(range(256)))
PLAN = Plan(
    plan_id=7,
    released=(1, 2),
    new_requests=(
        NewRequest(3, SamplingParams(), 2**64 - 1, 12),
        NewRequest(4, SamplingParams(seed=2**64 - 1), 0, 5, "a request", KVPrefix(3, 17, (9,))),
        NewRequest(5, SamplingParams(max_tokens=0, seed=-(2**63), pooling=Pooling("last", 7)), 0, 5),
    ),
    chunks=(Chunk(3, 0, (5, 6, 7), (9, 8), False, 11), Chunk(4, 12, (50_399,), (), True), TELLING),
)
HIDDEN = HiddenStates("float16", (4, 2), memoryview(bytes(range(16))))
EDGES = (EdgeTraffic(1, 0), EdgeTraffic(2, 3))
TIMINGS = (StageTiming(1_753_000_000_000_000_000, 1_753_000_000_004_000_001), StageTiming(0, 2**63))
FRAMES: list[Frame] = [
    PlanFrame(PLAN, None),
    PlanFrame(Plan(8, (), (), ()), None),
    PlanFrame(PLAN, HIDDEN, TIMINGS[:1]),
    ResultFrame(Result(7, (50_399, 0))),
    ResultFrame(Result(8, ())),
    ResultFrame(Result(9, (1,), TIMINGS)),
    ResultFrame(Result(10, (5, 6), (), (TOLD, None), (PromptLogprobs(3, 1, (TOLD, TOLD)), PromptLogprobs(4, 9, ())))),
    PlanFrame(PLAN, HIDDEN, TIMINGS, EDGES, (EMBEDDING, Embedding(6, b""))),
    ResultFrame(Result(11, (), embeddings=(EMBEDDING,))),
    EndFrame(),
]


def written(epoch: int, frame: Frame) -> list[bytes]:
    """The parts of the message of an edge's first frame."""
    return [bytes(part) for part in FrameWriter(epoch).write(frame)]


@pytest.mark.parametrize("frame", FRAMES)
def test_a_frame_comes_out_as_it_went_in(frame: Frame) -> None:
    assert FrameReader(3).read(written(3, frame)) == frame


@pytest.mark.parametrize("name", FIELD_NAMES)
def test_every_sampling_parameter_reaches_the_stages_unchanged(name: str) -> None:
    params = SamplingParams(**changed(name))
    request = Request(3, Prompt((5, 6)), params, noise_key=7)
    frame = FrameReader(0).read(written(0, PlanFrame(Plan(0, (), (request.introduction(),), ()), None)))
    assert isinstance(frame, PlanFrame)
    [met] = frame.plan.new_requests
    assert met.params == params != SamplingParams()


@pytest.mark.parametrize("frame", FRAMES)
def test_a_frame_of_another_epoch_is_none(frame: Frame) -> None:
    assert FrameReader(3).read(written(2, frame)) is None


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
        assert FrameReader(0).read(written(0, frame)) == frame


def packed(*fields: object) -> bytes:
    return msgspec.msgpack.encode(fields)


def sealed(parts: list[bytes]) -> list[bytes]:
    """The parts of a message with the right checksum."""
    return [zlib.crc32(b"".join(parts)).to_bytes(4, "big") + parts[0], *parts[1:]]


def plan_parts(**changes: object) -> list[bytes]:
    """The message of a plan with hidden states, with some fields of its header changed."""
    header, data = written(0, PlanFrame(PLAN, HIDDEN))
    epoch, number, kind, frame = msgspec.msgpack.decode(header[4:])
    return [packed(epoch, number, kind, frame | changes), data]


def hidden_header(shape: tuple[int, int], dtype: str = "float16") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data": b""}


MALFORMED = {
    "nothing": [b""],
    "no envelope": [packed(7)],
    "an unknown kind": [packed(0, 0, "evil", 1)],
    "a kind without a frame": [packed(0, 0, "PlanFrame")],
    "a pickle": [pickle.dumps((0, 0, "EndFrame"))],
    "deep nesting": [packed(0, 0, "PlanFrame")[:-1] + b"\x91" * 100_000],
    "a longer array than bytes": [b"\xdd\xff\xff\xff\xff"],
    "an HTTP request": [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"],
    "an epoch that is text": [packed("0", 0, "EndFrame", {})],
    "a plan without chunks": plan_parts(plan={"plan_id": 1, "released": (), "new_requests": ()}),
    "a plan id that is text": plan_parts(plan={"plan_id": "1", "released": (), "new_requests": (), "chunks": ()}),
    "a chunk of too few fields": plan_parts(plan={"plan_id": 1, "released": (), "new_requests": (), "chunks": [[1]]}),
    "another dtype": plan_parts(hidden=hidden_header((4, 2), "float64")),
    "a dtype of other width": plan_parts(hidden=hidden_header((4, 2), "float32")),
    "more rows than bytes": plan_parts(hidden=hidden_header((5, 2))),
    "negative rows": plan_parts(hidden=hidden_header((-4, -2))),
    "bytes without a shape": plan_parts(hidden=None),
    "a shape without bytes": plan_parts()[:1],
    "a part too many": [*plan_parts(), b""],
}


@pytest.mark.parametrize("parts", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_message_is_a_fault_even_with_the_right_checksum(parts: list[bytes]) -> None:
    for message in (parts, sealed(parts)):
        with pytest.raises(FrameFaultError) as raised:
            FrameReader(0).read(message)
        assert raised.value.fault == FrameFault.CORRUPTED


def test_a_header_that_was_cut_or_changed_anywhere_is_a_frame_or_a_fault_and_nothing_else() -> None:
    chooser, outcomes = random.Random(1), set[type]()
    header, data = written(0, PlanFrame(PLAN, HIDDEN, TIMINGS, EDGES, (EMBEDDING,)))
    for _ in range(3000):
        start = chooser.randrange(4, len(header))
        stop = start + chooser.randrange(3)
        broken = header[4:start] + chooser.randbytes(chooser.randrange(3)) + header[stop:]
        for parts in ([broken, data], [chooser.randbytes(chooser.randrange(200))]):
            try:
                outcomes.add(type(FrameReader(0).read(sealed(parts))))
            except FrameFaultError:
                outcomes.add(FrameFaultError)
    assert {PlanFrame, FrameFaultError} <= outcomes
    assert outcomes <= {PlanFrame, ResultFrame, EndFrame, type(None), FrameFaultError}


def test_each_single_bit_that_was_changed_is_a_fault() -> None:
    parts = written(0, PlanFrame(PLAN, HIDDEN))
    for index, part in enumerate(parts):
        for bit in range(8 * len(part)):
            changed_part = bytearray(part)
            changed_part[bit // 8] ^= 1 << bit % 8
            with pytest.raises(FrameFaultError, match="a frame is corrupted"):
                FrameReader(0).read([*parts[:index], bytes(changed_part), *parts[index + 1 :]])


@pytest.mark.parametrize(
    ("order", "fault", "detail"),
    [
        ((0, 2), FrameFault.MISSING, "number 2 arrived, expected 1"),
        ((1,), FrameFault.MISSING, "number 1 arrived, expected 0"),
        ((0, 1, 1), FrameFault.REPEATED, "number 1 arrived, expected 2"),
        ((0, 1, 2, 0), FrameFault.REPEATED, "number 0 arrived, expected 3"),
    ],
)
def test_a_frame_that_is_not_the_next_one_is_a_fault(order: tuple[int, ...], fault: FrameFault, detail: str) -> None:
    writer, reader = FrameWriter(0), FrameReader(0)
    messages = [[bytes(part) for part in writer.write(PlanFrame(PLAN, HIDDEN))] for _ in range(3)]
    for number in order[:-1]:
        reader.read(messages[number])
    with pytest.raises(FrameFaultError) as raised:
        reader.read(messages[order[-1]])
    error = pickle.loads(pickle.dumps(raised.value))
    assert (error.fault, str(error)) == (fault, f"a frame is {fault}: {detail}")


def test_end_frames_have_no_number_and_frames_of_other_epochs_do_not_count() -> None:
    writer, old, reader = FrameWriter(1), FrameWriter(0), FrameReader(1)
    for frame in FRAMES:
        assert reader.read([bytes(part) for part in writer.write(frame)]) == frame
        assert reader.read([bytes(part) for part in old.write(frame)]) is None
        assert reader.read(written(1, EndFrame())) == EndFrame()


def test_a_message_type_needs_no_wire_code_of_its_own() -> None:
    @dataclass(frozen=True)
    class Sighting:
        where: tuple[float, float]
        species: Literal["whale", "gull"]
        note: str | None = None

    codec = Codec(tuple[Sighting, ...])
    sightings = (Sighting((1.5, -2.0), "whale"), Sighting((0.0, 0.0), "gull", "far off"))
    assert codec.decode(codec.encode(sightings)) == sightings
    with pytest.raises(CodecError):
        codec.decode(codec.encode(sightings).replace(b"gull", b"tuna"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hidden_states_keep_every_bit(dtype: torch.dtype) -> None:
    hidden = torch.randn(3, 10).to(dtype)[:, 2:7]  # not contiguous
    frame = FrameReader(0).read(written(0, PlanFrame(PLAN, encode_hidden(hidden))))
    assert isinstance(frame, PlanFrame)
    assert frame.hidden is not None
    found = decode_hidden(frame.hidden)
    assert found.dtype == dtype
    assert torch.equal(found, hidden)


@pytest.mark.parametrize(("wire", "row_bytes", "error"), [("bfloat16", 128, 2**-8), ("int8", 68, 0.51 / 127)])
def test_a_shorter_type_on_the_wire_takes_fewer_bytes_and_rounds_no_more_than_it_must(
    wire: WireChoice, row_bytes: int, error: float
) -> None:
    hidden = torch.randn(5, 64) * torch.tensor([[0.0], [1e-3], [1.0], [50.0], [1e4]])
    frame = FrameReader(0).read(written(0, PlanFrame(PLAN, encode_hidden(hidden, wire))))
    assert isinstance(frame, PlanFrame)
    assert frame.hidden is not None
    assert len(frame.hidden.data) == frame.hidden.num_bytes == 5 * row_bytes
    found = decode_hidden(frame.hidden, "float32")
    assert found.dtype == torch.float32
    assert ((found - hidden).abs() <= error * hidden.abs().amax(1, keepdim=True)).all()
    assert not torch.equal(found, hidden)


def test_numbers_beyond_float16_become_its_largest() -> None:
    found = decode_hidden(encode_hidden(torch.tensor([[1e6, -1e6, 2.0]]), "float16"), "float32")
    assert found.tolist() == [[65504.0, -65504.0, 2.0]]


def test_an_edge_delivers_in_order_and_drops_frames_of_an_older_epoch() -> None:
    with contextlib.closing(open_transport(epoch=5).inbound("127.0.0.1")) as inbound:
        old, new = (open_transport(epoch).outbound(inbound.address) for epoch in (4, 5))
        with contextlib.closing(old), contextlib.closing(new):
            old.send(ResultFrame(Result(0, (1,))))
            for frame in FRAMES:
                new.send(frame)
            assert [inbound.receive() for _ in FRAMES] == FRAMES


def test_each_receiving_end_binds_a_free_port_of_its_host() -> None:
    transport = open_transport(epoch=0)
    with (
        contextlib.closing(transport.inbound("127.0.0.1")) as one,
        contextlib.closing(transport.inbound("127.0.0.1")) as other,
    ):
        assert one.address != other.address
        assert one.address.startswith("tcp://127.0.0.1:")
        assert int(one.address.rpartition(":")[2].partition("#")[0]) > 0


def test_an_event_loop_receives_too() -> None:
    async def receive() -> list[Frame]:
        transport = open_transport(epoch=1)
        inbound = transport.async_inbound("127.0.0.1")
        outbound = transport.outbound(inbound.address)
        with contextlib.closing(inbound), contextlib.closing(outbound):
            for frame in FRAMES:
                outbound.send(frame)
            async with asyncio.timeout(TIME_LIMIT_S):
                return [await inbound.receive() for _ in FRAMES]

    assert asyncio.run(receive()) == FRAMES
