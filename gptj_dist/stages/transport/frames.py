"""What travels along the ring of coordinator and stages. A frame is a header and, for hidden states, their raw bytes.

Every frame carries the epoch of its pipeline. Frames of another epoch are leftovers and are dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, NamedTuple

import msgspec

from gptj_dist.config import DTYPE_BYTES, DTypeName
from gptj_dist.engine.plan import Embedding, Plan, Result, StageTiming
from gptj_dist.stages.transport.codec import Codec, CodecError

NO_DATA = memoryview(b"")

Count = Annotated[int, msgspec.Meta(ge=0)]


@dataclass(frozen=True, slots=True)
class HiddenStates:
    """A tensor on the wire.

    Args:
        shape: rows, d_model.
        data: the tensor's bytes, row by row.
    """

    dtype: DTypeName
    shape: tuple[Count, Count]
    data: memoryview

    @property
    def num_bytes(self) -> int:
        """Bytes of a tensor of this shape and type."""
        num_rows, d_model = self.shape
        return num_rows * d_model * DTYPE_BYTES[self.dtype]


class EdgeTraffic(NamedTuple):
    """What a receiving end has received and dropped.

    Args:
        frame_bytes: size of the frame that was received last.
        num_dropped: refused connections and malformed messages since the end was opened.
    """

    frame_bytes: int
    num_dropped: int


@dataclass(frozen=True, slots=True)
class PlanFrame:
    """A plan on its way to the next stage.

    Args:
        hidden: the output of the stage before; None for stage 0.
        timings: one for each stage that the plan has passed.
        edges: one for each edge that the plan has passed.
        embeddings: those that these stages have completed.
    """

    plan: Plan
    hidden: HiddenStates | None
    timings: tuple[StageTiming, ...] = ()
    edges: tuple[EdgeTraffic, ...] = ()
    embeddings: tuple[Embedding, ...] = ()


@dataclass(frozen=True, slots=True)
class ResultFrame:
    """A result on its way from the last stage to the coordinator.

    Args:
        edges: one for each edge that the plan has passed.
    """

    result: Result
    edges: tuple[EdgeTraffic, ...] = ()


@dataclass(frozen=True, slots=True)
class EndFrame:
    """The last frame: a stage passes it on and ends."""


Frame = PlanFrame | ResultFrame | EndFrame


class _Header(NamedTuple):
    epoch: int
    kind: str
    frame: msgspec.Raw


_HEADERS: Codec[Any] = Codec(_Header)
_FRAMES: dict[str, Codec[Any]] = {kind.__name__: Codec(kind) for kind in (PlanFrame, ResultFrame, EndFrame)}


def encode(epoch: int, frame: Frame) -> list[bytes | memoryview]:
    """The parts of the frame's message: the header, and the bytes of its hidden states if it has any."""
    if isinstance(frame, PlanFrame) and frame.hidden is not None:
        bare = replace(frame, hidden=replace(frame.hidden, data=NO_DATA))
        return [_HEADERS.encode((epoch, "PlanFrame", bare)), frame.hidden.data]
    return [_HEADERS.encode((epoch, type(frame).__name__, frame))]


def decode(parts: Sequence[bytes], epoch: int) -> Frame | None:
    """The frame of a message, or None if it belongs to another epoch.

    Args:
        parts: one or more.

    Raises:
        CodecError: the message is not a frame.
    """
    head, *data = parts
    header = _HEADERS.decode(head)
    if header.epoch != epoch:
        return None
    if header.kind not in _FRAMES:
        raise CodecError("unknown kind of frame")
    frame: Frame = _FRAMES[header.kind].decode(header.frame)
    if isinstance(frame, PlanFrame) and frame.hidden is not None:
        return replace(frame, hidden=_with_data(frame.hidden, data))
    if data:
        raise CodecError(f"{len(data)} parts after the header of a frame without hidden states")
    return frame


def _with_data(hidden: HiddenStates, data: Sequence[bytes]) -> HiddenStates:
    if [len(part) for part in data] != [hidden.num_bytes]:
        raise CodecError(f"parts of {[len(part) for part in data]} bytes are not the hidden states of the header")
    return replace(hidden, data=memoryview(data[0]))
