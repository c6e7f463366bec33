"""Pieces of files arrive over a guarded port as they were asked for, or not at all."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from gptj_dist.checkpoint.pieces import PIECE_BYTES, Piece, PieceReader, cut
from gptj_dist.errors import CheckpointError
from gptj_dist.stages.transport.files import PieceInbound, send_pieces
from gptj_dist.stages.transport.frames import FrameFaultError
from gptj_dist.stages.transport.parcels import AbandonedError, ParcelOutbound

HOST = "127.0.0.1"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "weights").write_bytes(bytes(range(256)) * ((2 * PIECE_BYTES + 1024) // 256))
    (tmp_path / "config").write_bytes(b"{}")
    return tmp_path


PIECES = [Piece("config", 0, 2), *cut("weights", [(3, 2 * PIECE_BYTES), (2 * PIECE_BYTES + 5, 2 * PIECE_BYTES + 6)])]


@contextmanager
def sender(address: str, directory: Path, pieces: Sequence[Piece]) -> Iterator[None]:
    """Sends these pieces on a thread, and keeps the connection until the context ends."""
    received = threading.Event()

    def send() -> None:
        outbound: ParcelOutbound[Piece] = ParcelOutbound(address, Piece, received.is_set)
        with closing(outbound), PieceReader(directory, ["weights", "config"]) as reader:
            send_pieces(reader, pieces, outbound)
            received.wait(60)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        received.set()
        thread.join(60)


def test_pieces_arrive_in_order_with_their_bytes(directory: Path) -> None:
    with closing(PieceInbound(HOST, lambda: False)) as inbound, sender(inbound.address, directory, PIECES):
        for piece, data in zip(PIECES, inbound.receive(PIECES), strict=True):
            assert data == (directory / piece.name).read_bytes()[piece.begin : piece.end]
    assert max(piece.num_bytes for piece in PIECES) == PIECE_BYTES


@pytest.mark.parametrize("sent", [PIECES[1:], [Piece("config", 0, 1)], [Piece("config", 1, 2)]])
def test_another_piece_than_was_asked_for_is_refused(directory: Path, sent: Sequence[Piece]) -> None:
    with (
        closing(PieceInbound(HOST, lambda: False)) as inbound,
        sender(inbound.address, directory, sent),
        pytest.raises(FrameFaultError, match="arrived, expected"),
    ):
        list(inbound.receive(PIECES))


def test_a_stranger_sends_nothing(directory: Path) -> None:
    looks: list[int] = []

    def is_enough() -> bool:
        looks.append(1)
        return len(looks) > 5

    with closing(PieceInbound(HOST, is_enough)) as inbound:
        stranger = f"{inbound.address.partition('#')[0]}#another password"
        outbound: ParcelOutbound[Piece] = ParcelOutbound(stranger, Piece, lambda: True)
        with closing(outbound), PieceReader(directory, ["config"]) as reader:
            with pytest.raises(AbandonedError):
                send_pieces(reader, PIECES[:1] * 100, outbound)
            with pytest.raises(AbandonedError):
                list(inbound.receive(PIECES))


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        (Piece("config", 0, 3), "config was truncated"),
        (Piece("gone", 0, 3), "gone cannot be read"),
        (Piece("../secret", 0, 3), "no file of the model"),
    ],
)
def test_what_cannot_be_read_is_an_error_of_the_sender(directory: Path, piece: Piece, message: str) -> None:
    with closing(PieceInbound(HOST, lambda: False)) as inbound:
        outbound: ParcelOutbound[Piece] = ParcelOutbound(inbound.address, Piece, lambda: False)
        reader = PieceReader(directory, ["config", "gone"])
        with closing(outbound), reader, pytest.raises(CheckpointError, match=message):
            send_pieces(reader, [piece], outbound)
