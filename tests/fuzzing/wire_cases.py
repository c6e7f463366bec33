"""Server-sent events, frames between stages and messages of the feed, with hostile content."""

from __future__ import annotations

import asyncio
import json
import re
import zlib
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import msgspec
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from gptj_dist.answers.sse import SSE_DONE, sse_event, sse_frame
from gptj_dist.cli.events import read_events
from gptj_dist.engine.mailbox import Delta, Mailbox
from gptj_dist.engine.plan import Chunk, Embedding, KVPrefix, NewRequest, Plan, Result, StageTiming
from gptj_dist.engine.request import FinishReason
from gptj_dist.errors import ServerError
from gptj_dist.params import Pooling, SamplingParams, TokenLogprobs
from gptj_dist.serving.feed import StreamPart
from gptj_dist.stages.transport.codec import Codec, CodecError
from gptj_dist.stages.transport.frames import (
    EdgeTraffic,
    EndFrame,
    FrameFaultError,
    FrameReader,
    FrameWriter,
    HiddenStates,
    PlanFrame,
    ResultFrame,
)
from tests.fuzzing.strategies import Target, cut, damage, texts

EPOCH = 3


def _check_events(case: tuple[list[Any], int]) -> None:
    """What we write is read the same by our client and by the standard's rules, however it is cut."""
    payloads, size = case
    frames = [sse_event("x", payload) if i % 2 else sse_frame(payload) for i, payload in enumerate(payloads)]
    parts = cut(b"".join(frames) + SSE_DONE, size)
    for read in (list(read_events(parts)), _by_the_standard(b"".join(parts))):
        *events, done = read
        assert done == "[DONE]"
        assert [json.loads(event) for event in events] == payloads


def _by_the_standard(data: bytes) -> list[str]:
    """Data of all events, by https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation."""
    events, lines = list[str](), list[str]()
    for line in re.split("\r\n|\n|\r", data.decode()):
        field, _, value = line.partition(":")
        if not line and lines:
            events.append("\n".join(lines))
            lines = []
        elif field == "data":
            lines.append(value.removeprefix(" "))
    return events


def _check_any_bytes(case: tuple[bytes, int]) -> None:
    """Any bytes are read as the same events, however they are cut."""
    data, size = case
    read: list[list[str] | str] = []
    for parts in ([data], cut(data, size)):
        try:
            read.append(list(read_events(parts)))
        except ServerError as error:
            read.append(str(error))
    assert read[0] == read[1]


_PARAMS = SamplingParams(stop=("a",), logit_bias=((1, 0.5),), bad_words=((1, 2),), logprobs=2)
_NEW = NewRequest(1, _PARAMS, 2**64 - 1, 5, "log", KVPrefix(0, 3, (1, 2)))
_EMBEDDING = NewRequest(2, SamplingParams(max_tokens=0, pooling=Pooling("last", 1)), 1, 5)
_PLAN = Plan(7, (0,), (_NEW, _EMBEDDING), (Chunk(1, 0, (5, 6), (1,), True), Chunk(2, 0, (5,), (2,), False)))
_LOGPROBS = TokenLogprobs(5, -0.5, 1, ((5, -0.5),))
_FRAMES = (
    PlanFrame(
        _PLAN, HiddenStates("bfloat16", (3, 2), memoryview(bytes(12))), (StageTiming(1, 2),), (EdgeTraffic(1, 2),)
    ),
    PlanFrame(_PLAN, None, embeddings=(Embedding(2, bytes(8)),)),
    ResultFrame(Result(7, (5, 6), (StageTiming(1, 2),), (_LOGPROBS, None)), (EdgeTraffic(1, 2),)),
    EndFrame(),
)
_MESSAGES = tuple([bytes(part) for part in FrameWriter(EPOCH).write(frame)] for frame in _FRAMES)
_DELTAS = (
    Delta((1, 2), None, (_LOGPROBS, _LOGPROBS), (_LOGPROBS,)),
    Delta((), FinishReason.STOP, embedding=bytes(8)),
)
_FEED = Codec(tuple[StreamPart, ...])
_FEED_MESSAGES = (_FEED.encode(tuple(StreamPart(1, number, delta) for number, delta in enumerate(_DELTAS))),)

_LEAVES = (
    st.none()
    | st.booleans()
    | st.sampled_from((0, 1, -1, 2**31, 2**63 - 1, 2**64 - 1, -(2**63)))
    | st.sampled_from((0.5, float("nan"), float("inf"), -1e308))
    | st.sampled_from(("", "a", "PlanFrame", "float16", "stop", "a" * 300))
    | st.binary(max_size=20)
)
_PACKED = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def _repacked(draw: DrawFn, message: bytes) -> bytes:
    """The msgpack message with up to three of its values replaced, or damaged."""
    value = msgspec.msgpack.decode(message)
    for _ in range(draw(st.integers(0, 3))):
        value = _replaced(draw, value)
    return damage(draw, msgspec.msgpack.encode(value))


def _replaced(draw: DrawFn, value: Any) -> Any:
    """The value with one at a random place below it replaced."""
    if isinstance(value, list | dict) and value and draw(st.integers(0, 5)):
        place = draw(st.sampled_from(range(len(value)) if isinstance(value, list) else sorted(value)))
        if draw(st.integers(0, 9)) == 0:
            del value[place]
        else:
            value[place] = _replaced(draw, value[place])
        return value
    return draw(_PACKED)


@st.composite
def _frame_messages(draw: DrawFn) -> list[bytes]:
    """Nine in ten have the right checksum: their sender has the key, and means harm."""
    head, *data = draw(st.sampled_from(_MESSAGES))
    data = draw(st.sampled_from((data, [], [*data, b"x"], [bytes(12)], [bytes(24)])))
    packed = draw(_repacked(head[4:]))
    if draw(st.integers(0, 9)) == 0:
        return [head[:4] + packed, *data]
    return [zlib.crc32(b"".join((packed, *data))).to_bytes(4, "big") + packed, *data]


def _check_frame(message: list[bytes]) -> None:
    """A message is a frame that can be sent on, or none of this epoch, or an error."""
    try:
        frame = FrameReader(EPOCH).read(message)
    except FrameFaultError:
        return
    if frame is not None:
        parts = [bytes(part) for part in FrameWriter(EPOCH).write(frame)]
        again = FrameReader(EPOCH).read(parts)
        assert [bytes(part) for part in FrameWriter(EPOCH).write(again or EndFrame())] == parts


def _check_feed(messages: Sequence[bytes]) -> None:
    """A mailbox gives what well-formed messages hold; others are errors."""

    async def read() -> None:
        mailbox = Mailbox()
        for message in messages:
            with suppress(CodecError):
                for part in _FEED.decode(message):
                    mailbox.put(part.delta)
                    assert (await mailbox.take()) == part.delta or part.delta != part.delta

    asyncio.run(read())


_PAYLOADS: SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | texts(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts(), inner, max_size=3),
    max_leaves=6,
)
_PIECES = (
    b"data:",
    b"data: ",
    b"\n",
    b"\r\n",
    b"\r",
    b"event: x",
    b":",
    b"id",
    b"[DONE]",
    "é\u2028".encode(),
    b"\xff\0",
)

TARGETS = (
    Target("events", st.tuples(st.lists(_PAYLOADS, max_size=4), st.integers(1, 60)), _check_events, 8),
    Target(
        "any events",
        st.tuples(st.lists(st.sampled_from(_PIECES) | st.binary(max_size=4)).map(b"".join), st.integers(1, 9)),
        _check_any_bytes,
        4,
    ),
    Target("frames", _frame_messages(), _check_frame, 10),
    Target("feed", st.lists(st.sampled_from(_FEED_MESSAGES).flatmap(_repacked), max_size=3), _check_feed, 6),
)
