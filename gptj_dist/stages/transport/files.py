"""Sends pieces of files from one machine to another, as parcels. The receiver has asked for them and checks each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from gptj_dist.checkpoint.pieces import Piece, PieceReader
from gptj_dist.errors import CheckpointError
from gptj_dist.stages.transport.frames import FrameFault, FrameFaultError
from gptj_dist.stages.transport.parcels import ParcelInbound, ParcelOutbound


def send_pieces(reader: PieceReader, pieces: Sequence[Piece], outbound: ParcelOutbound[Piece]) -> None:
    """Sends pieces, one parcel each.

    Raises:
        CheckpointError: a file cannot be read, or ends before a piece does.
        AbandonedError: see `ParcelOutbound.send`.
    """
    for piece in pieces:
        try:
            data = reader.read(piece)
        except OSError as error:
            raise CheckpointError(f"{piece.name} cannot be read: {error}") from error
        if len(data) < piece.num_bytes:
            raise CheckpointError(f"{piece.name} was truncated while it was being read")
        outbound.send(piece, [data])


class PieceInbound:
    """Receives pieces that were asked for.

    Args:
        host, is_abandoned: see `ParcelInbound`.

    Attributes:
        address: what the sender's `ParcelOutbound` needs. It holds a secret: do not log it.
    """

    def __init__(self, host: str, is_abandoned: Callable[[], bool]) -> None:
        self._inbound = ParcelInbound(host, Piece, is_abandoned)
        self.address = self._inbound.address

    def receive(self, pieces: Sequence[Piece]) -> Iterator[bytes]:
        """The bytes of these pieces, one after another.

        Raises:
            AbandonedError: none is wanted any more.
            FrameFaultError: a piece has not arrived as it was sent, or is another one.
        """
        for piece in pieces:
            parcel = self._inbound.receive()
            if parcel.header != piece or parcel.num_bytes != piece.num_bytes:
                raise FrameFaultError(FrameFault.CORRUPTED, f"{parcel.header} arrived, expected {piece}")
            yield b"".join(parcel.data)

    def close(self) -> None:
        """Frees the port."""
        self._inbound.close()
