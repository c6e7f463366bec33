"""Moves a layer from a stage to its neighbour while both compute: its keys and values go ahead, and then the rest.

A block that was copied may be written again, by a token in its last block, or when another request gets it. So the
giver notes which blocks steps write, and sends those again; the last of them at the switch, between two steps. Does not
use Ray.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gptj_dist.engine.clock import SteadyClock
from gptj_dist.engine.plan import StageTiming
from gptj_dist.model.block_tables import BlockTables, LayerKV
from gptj_dist.planning.moves import LayerMove
from gptj_dist.stages.embeddings import MovedPool
from gptj_dist.stages.runner import StageRunner
from gptj_dist.stages.transport.parcels import LOOK_MS, AbandonedError, ParcelInbound, ParcelOutbound

PARCEL_BYTES = 4 << 20
"""Keys and values in one parcel, at most, unless a block is larger."""

MAX_PASSES = 4
"""Times that changed blocks are sent ahead. Each pass takes less time than the one before, and leaves less behind."""

NICENESS = 10
"""Of the thread that loads and sends while steps are computed: it gets a tenth of a core that both want."""


@dataclass(frozen=True, slots=True)
class KVParcel:
    """The header of a parcel. Its data are the keys and the values of the blocks.

    Args:
        end: what ends with this parcel: what goes ahead, or the rest; None if nothing does.
        pools: of embeddings that are computed from the layer's output; with the last parcel.
    """

    blocks: tuple[int, ...] = ()
    end: Literal["ahead", "rest"] | None = None
    pools: tuple[MovedPool, ...] = ()


@dataclass(frozen=True, slots=True)
class MoveReport:
    """What a stage did for a move.

    Args:
        span: its part of the switch.
        num_bytes_ahead, num_bytes_rest: what the giver sent before the switch, and in it.
    """

    span: StageTiming
    num_bytes_ahead: int = 0
    num_bytes_rest: int = 0


class LayerGiver:
    """Sends the keys and values of a layer.

    Args:
        cache: the stage's.
        kv: the layer's memory in it.
        note_progress: called with each parcel.
    """

    def __init__(
        self, cache: BlockTables, kv: LayerKV, outbound: ParcelOutbound[KVParcel], note_progress: Callable[[], None]
    ) -> None:
        self._cache = cache
        self._kv = kv
        self._outbound = outbound
        self._note_progress = note_progress
        self._changed = cache.watch()
        self.num_bytes_ahead = self.num_bytes_rest = 0

    def send_ahead(self) -> None:
        """Sends what there is, while steps go on. Raises AbandonedError."""
        for _ in range(MAX_PASSES):
            if not (blocks := self._changed.take()):
                break
            self.num_bytes_ahead += self._send(blocks)
        self._outbound.send(KVParcel(end="ahead"))

    def send_rest(self, pools: Sequence[MovedPool]) -> None:
        """Sends what has changed since, between two steps. Raises AbandonedError."""
        self.num_bytes_rest = self._send(self._changed.take())
        self._outbound.send(KVParcel(end="rest", pools=tuple(pools)))

    def close(self) -> None:
        """Sends no more."""
        self._cache.unwatch()
        self._outbound.close()

    def _send(self, blocks: Sequence[int]) -> int:
        """Returns the bytes of the blocks."""
        num_each = max(1, PARCEL_BYTES // self._kv.block_bytes)
        for first in range(0, len(blocks), num_each):
            some = blocks[first : first + num_each]
            index = torch.tensor(some, device=self._kv.keys.device)
            self._outbound.send(KVParcel(tuple(some)), [_bytes_of(part[index]) for part in self._kv])
            self._note_progress()
        return len(blocks) * self._kv.block_bytes


class LayerTaker:
    """Receives the keys and values of a layer.

    Args:
        kv: the layer's memory.
        note_progress: called with each parcel.
    """

    def __init__(self, kv: LayerKV, inbound: ParcelInbound[KVParcel], note_progress: Callable[[], None]) -> None:
        self._kv = kv
        self._inbound = inbound
        self._note_progress = note_progress

    def take_ahead(self) -> None:
        """Receives what goes ahead, while steps go on. Raises AbandonedError, FrameFaultError."""
        self._take("ahead")

    def take_rest(self) -> Sequence[MovedPool]:
        """Receives the rest, between two steps; returns the pools. Raises AbandonedError, FrameFaultError."""
        return self._take("rest")

    def close(self) -> None:
        """Receives no more."""
        self._inbound.close()

    def _take(self, end: Literal["ahead", "rest"]) -> Sequence[MovedPool]:
        while True:
            parcel = self._inbound.receive()
            self._note_progress()
            if blocks := parcel.header.blocks:
                index = torch.tensor(blocks, device=self._kv.keys.device)
                for part, data in zip(self._kv, parcel.data, strict=True):
                    part[index] = _tensor_of(data, part, len(blocks))
            if parcel.header.end == end:
                return parcel.header.pools


class StageMover:
    """A stage's part of moves of layers, one at a time.

    First the receiver's `prepare`, then its `take_ahead` and, at the same time, the giver's `send_ahead`, all on a
    thread beside the one that computes. Then `switch` of all stages, on the thread that computes, and `end` of giver
    and receiver on the other one. Until then both hold the layer, so that each can go back to the cut before the move.

    Args:
        runner: the stage's.
    """

    def __init__(self, runner: StageRunner) -> None:
        self._runner = runner
        self._clock = SteadyClock()
        self._giver: LayerGiver | None = None
        self._taker: LayerTaker | None = None
        self._is_cancelled = False
        self._switched = threading.Event()
        self._span = StageTiming(0, 0)

    def prepare(self, move: LayerMove, host: str) -> str:
        """Loads the layer. Returns the address to send its keys and values to.

        Raises:
            CheckpointError, ConfigurationError: the layer cannot be read, or there is no memory for it.
        """
        self._begin()
        layers = move.after[move.receiver]
        held = self._runner.load_layer(move.layer, layers)
        inbound = ParcelInbound(host, KVParcel, lambda: self._is_cancelled)
        self._taker = LayerTaker(held.kv, inbound, self._note_progress)
        return inbound.address

    def take_ahead(self) -> None:
        """Receives what there is, while steps go on. Raises AbandonedError, FrameFaultError."""
        assert self._taker is not None, "prepare() comes first"
        with torch.inference_mode():
            self._taker.take_ahead()

    def send_ahead(self, move: LayerMove, address: str) -> None:
        """Sends what there is, while steps go on. Raises AbandonedError."""
        self._begin()
        tables = self._runner.tables
        kv = tables.layer(move.layer - self._runner.layers.start)
        outbound = ParcelOutbound(address, KVParcel, lambda: self._is_cancelled)
        self._giver = LayerGiver(tables, kv, outbound, self._note_progress)
        with torch.inference_mode():
            self._giver.send_ahead()

    @torch.inference_mode()
    def switch(self, move: LayerMove, pass_on: Callable[[], None]) -> None:
        """Between two steps, gives the layer away or takes it over; a stage that does neither only passes it on.

        A receiver before the giver passes on first, because the giver has yet to compute earlier plans with the layer.

        Args:
            pass_on: sends the frame of the switch to the next stage.

        Raises:
            AbandonedError: the ring has ended.
            FrameFaultError: what arrived is not what was sent.
        """
        stage, begin_ns = self._runner.layers.stage, self._clock()
        after = move.after[stage]
        if stage == move.giver:
            assert self._giver is not None, "send_ahead() comes first"
            self._giver.send_rest(self._runner.arrange(after))
        elif stage == move.receiver:
            assert self._taker is not None, "prepare() comes first"
            if move.receiver < move.giver:
                pass_on()
            self._runner.arrange(after, self._taker.take_rest())
        if stage in (move.giver, move.receiver):
            self._span = StageTiming(begin_ns, self._clock())
            self._switched.set()
        if not (stage == move.receiver and move.receiver < move.giver):
            pass_on()

    def end(self) -> MoveReport:
        """Waits for the switch, and frees what the stage no longer needs. The cut before the move is gone with it.

        Raises:
            AbandonedError: the ring has ended.
        """
        while not self._switched.wait(LOOK_MS / 1e3):
            if self._is_cancelled:
                raise AbandonedError
        giver = self._giver
        self.forget()
        if giver is None:
            return MoveReport(self._span)
        return MoveReport(self._span, giver.num_bytes_ahead, giver.num_bytes_rest)

    def cancel(self) -> None:
        """Has all other calls that wait return at once. Any thread may call it."""
        self._is_cancelled = True

    def forget(self) -> None:
        """Closes connections, and frees a layer that is not the stage's."""
        for side in (self._giver, self._taker):
            if side is not None:
                side.close()
        self._giver = self._taker = None
        self._runner.forget_held()

    def _begin(self) -> None:
        self.forget()
        self._is_cancelled = False
        self._switched.clear()
        work_in_background()

    def _note_progress(self) -> None:
        self._runner.num_beats += 1


def work_in_background() -> None:
    """Makes the calling thread one that computes alone and gives way to the thread that computes steps."""
    torch.set_num_threads(1)  # of this thread only: a team of its own would slow down that of the steps
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.cpu().contiguous().view(torch.uint8).flatten().numpy().data


def _tensor_of(data: bytes, like: Tensor, num_blocks: int) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=like.dtype).view(num_blocks, *like.shape[1:]).to(like.device)
