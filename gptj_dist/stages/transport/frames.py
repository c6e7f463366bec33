"""What travels along the ring of coordinator and stages. A frame is a header and, for hidden states, their raw bytes.

Every frame carries the epoch of its pipeline, its number on its edge and a checksum of all its bytes. Frames of another
epoch are leftovers and are dropped. Any other frame than the next one is a fault of the edge.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Annotated, Any, NamedTuple

import msgspec

from gptj_dist.config import DTYPE_BYTES, WireDType
from gptj_dist.engine.plan import Embedding, Plan, Result, StageTiming
from gptj_dist.planning.moves import LayerMove
from gptj_dist.stages.transport.codec import Codec, CodecError

NO_DATA = memoryview(b"")
SCALE_BYTES = 4

Count = Annotated[int, msgspec.Meta(ge=0)]


@dataclass(frozen=True, slots=True)
class HiddenStates:
    """A tensor on the wire.

    Args:
        shape: rows, d_model.
        data: the tensor's bytes, row by row; in int8 each row begins with its scale, a float32.
    """

    dtype: WireDType
    shape: tuple[Count, Count]
    data: memoryview

    @property
    def num_bytes(self) -> int:
        """Bytes of a tensor of this shape and type."""
        num_rows, d_model = self.shape
        if self.dtype == "int8":
            return num_rows * (SCALE_BYTES + d_model)
        return num_rows * d_model * DTYPE_BYTES[self.dtype]


class EdgeTraffic(NamedTuple):
    """What a receiving end has received and dropped.

    Args:
        frame_bytes: size of the frame that was received last.
        num_dropped: refused connections since the end was opened.
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


@dataclass(frozen=True, slots=True)
class SwitchFrame:
    """From the next plan on, a layer is another stage's. Passes all stages, and comes back to the coordinator."""

    move: LayerMove


Frame = PlanFrame | ResultFrame | SwitchFrame | EndFrame


class FrameFault(StrEnum):
    """What an edge did to its frames."""

    MISSING = "missing"
    """A frame was lost, or a later one overtook it."""
    REPEATED = "repeated"
    CORRUPTED = "corrupted"


class FrameFaultError(Exception):
    """A receiving end did not get the next frame of its edge as it was sent. The sender and the receiver are well."""

    def __init__(self, fault: FrameFault, detail: str) -> None:
        super().__init__(fault, detail)
        self.fault = fault
        self.detail = detail

    def __str__(self) -> str:
        return f"a frame is {self.fault}: {self.detail}"


class _Header(NamedTuple):
    epoch: int
    number: int
    kind: str
    frame: msgspec.Raw


_HEADERS: Codec[Any] = Codec(_Header)
_FRAMES: dict[str, Codec[Any]] = {
    kind.__name__: Codec(kind) for kind in (PlanFrame, ResultFrame, SwitchFrame, EndFrame)
}
_CHECKSUM_BYTES = 4


class FrameWriter:
    """Turns the frames of an edge into messages, and numbers them. End frames, which others may send, have no number.

    Args:
        epoch: of the ring.
    """

    def __init__(self, epoch: int) -> None:
        self._epoch = epoch
        self._num_frames = 0

    def write(self, frame: Frame) -> list[bytes | memoryview]:
        """The parts of the frame's message: checksum and header, and the bytes of its hidden states if it has any."""
        data: list[bytes | memoryview] = []
        bare = frame
        if isinstance(frame, PlanFrame) and frame.hidden is not None:
            bare = replace(frame, hidden=replace(frame.hidden, data=NO_DATA))
            data = [frame.hidden.data]
        header = _HEADERS.encode((self._epoch, self._num_frames, type(frame).__name__, bare))
        self._num_frames += not isinstance(frame, EndFrame)
        return [_checksum([header, *data]) + header, *data]


class FrameReader:
    """Turns messages into the frames of an edge, and checks that each is the next one.

    Args:
        epoch: of the ring.
    """

    def __init__(self, epoch: int) -> None:
        self._epoch = epoch
        self._num_frames = 0

    def read(self, parts: Sequence[bytes]) -> Frame | None:
        """The frame of a message, or None if it belongs to another epoch.

        Args:
            parts: one or more.

        Raises:
            FrameFaultError: it is not the next frame as it was sent.
        """
        try:
            header, frame = _decode(parts, self._epoch)
        except CodecError as error:
            raise FrameFaultError(FrameFault.CORRUPTED, str(error)) from error
        if frame is None or isinstance(frame, EndFrame):
            return frame
        if header.number != self._num_frames:
            fault = FrameFault.MISSING if header.number > self._num_frames else FrameFault.REPEATED
            raise FrameFaultError(fault, f"number {header.number} arrived, expected {self._num_frames}")
        self._num_frames += 1
        return frame


def _checksum(parts: Sequence[bytes | memoryview]) -> bytes:
    value = 0
    for part in parts:
        value = zlib.crc32(part, value)
    return value.to_bytes(_CHECKSUM_BYTES, "big")


def _decode(parts: Sequence[bytes], epoch: int) -> tuple[_Header, Frame | None]:
    """Header and frame of a message; None for a frame of another epoch.

    Raises:
        CodecError: the message is not a frame.
    """
    head, *data = parts
    packed = memoryview(head)[_CHECKSUM_BYTES:]
    if head[:_CHECKSUM_BYTES] != _checksum([packed, *data]):
        raise CodecError("wrong checksum")
    header: _Header = _HEADERS.decode(packed)
    if header.epoch != epoch:
        return header, None
    if header.kind not in _FRAMES:
        raise CodecError("unknown kind of frame")
    frame: Frame = _FRAMES[header.kind].decode(header.frame)
    if isinstance(frame, PlanFrame) and frame.hidden is not None:
        return header, replace(frame, hidden=_with_data(frame.hidden, data))
    if data:
        raise CodecError(f"{len(data)} parts after the header of a frame without hidden states")
    return header, frame


def _with_data(hidden: HiddenStates, data: Sequence[bytes]) -> HiddenStates:
    if [len(part) for part in data] != [hidden.num_bytes]:
        raise CodecError(f"parts of {[len(part) for part in data]} bytes are not the hidden states of the header")
    return replace(hidden, data=memoryview(data[0]))
