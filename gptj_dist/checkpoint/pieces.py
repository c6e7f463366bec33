"""Parts of a model's files, small enough to be sent in one message, and where they are read from. Stdlib only."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gptj_dist.checkpoint.spans import Span

PIECE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive bytes of a file.

    Args:
        name: of the file, in the model's directory.
        begin, end: the first byte, and the one after the last.
    """

    name: str
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.begin


def cut(name: str, spans: Iterable[Span]) -> Iterator[Piece]:
    """Spans of a file as pieces of at most `PIECE_BYTES`."""
    for begin, end in spans:
        for at in range(begin, end, PIECE_BYTES):
            yield Piece(name, at, min(at + PIECE_BYTES, end))


class PieceReader:
    """Reads pieces of the files of a directory. Use it in a `with` statement.

    Args:
        names: of the files that may be read.
    """

    def __init__(self, directory: Path, names: Iterable[str]) -> None:
        self._directory = directory
        self._names = frozenset(names)
        self._files: dict[str, int] = {}

    def read(self, piece: Piece) -> memoryview:
        """The bytes of a piece, which do not stay in the page cache; fewer if the file ends before.

        Raises:
            PermissionError: the file is none of those that may be read.
            OSError: it cannot be read.
        """
        file = self._open(piece.name)
        data = bytearray(piece.num_bytes)
        num_read = os.preadv(file, [data], piece.begin)
        if sys.platform == "linux":
            os.posix_fadvise(file, piece.begin, piece.num_bytes, os.POSIX_FADV_DONTNEED)
        return memoryview(data)[:num_read]

    def __enter__(self) -> PieceReader:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    def _open(self, name: str) -> int:
        if name not in self._files:
            if name not in self._names:
                raise PermissionError(f"{name!r} is no file of the model")
            # Links are followed, as the hub's cache has them; without the flag a pipe would be waited for.
            file = os.open(self._directory / name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            if not stat.S_ISREG(os.fstat(file).st_mode):
                os.close(file)
                raise PermissionError(f"{name!r} is no ordinary file")
            self._files[name] = file
        return self._files[name]
