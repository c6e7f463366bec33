"""Which parts of a copy are there: a JSON file beside it, replaced as a whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gptj_dist.checkpoint.manifest import ModelFile, is_safe_name
from gptj_dist.checkpoint.pieces import Piece
from gptj_dist.checkpoint.spans import Span, merged
from gptj_dist.errors import CheckpointError


def record_path(home: Path) -> Path:
    """The record of a copy."""
    return home / "parts.json"


class CopyRecord:
    """The files of a copy, and what is there of them.

    Args:
        home: the directory of the copy and its record.
        origin: the directory of the files on their own machine.

    Attributes:
        parts: by the names of files.

    Raises:
        CheckpointError: a file would lie elsewhere than in the directory of the copy.
    """

    def __init__(
        self, home: Path, origin: str, files: Sequence[ModelFile], parts: dict[str, list[Span]] | None = None
    ) -> None:
        for file in files:
            if not is_safe_name(file.name):
                raise CheckpointError(f"a file of a model cannot be called {file.name[:100]!r}")
        self._home = home
        self._origin = origin
        self.files = tuple(files)
        self.parts = {file.name: list((parts or {}).get(file.name, ())) for file in files}

    @classmethod
    def read(cls, home: Path, directory: Path) -> CopyRecord | None:
        """The record of a copy; None if there is none that can be read.

        A file that has another size than it should, as somebody has changed it, is not there.
        """
        content = _content(home)
        try:
            files = [ModelFile(name, size, _spans(plain)) for name, size, plain in content["files"]]
            parts = {name: list(_spans(spans)) for name, spans in content["parts"].items()}
            record = cls(home, content["origin"], files, parts)
        except (KeyError, TypeError, ValueError, AttributeError, CheckpointError):
            return None
        for file in record.files:
            path = directory / file.name
            if path.is_symlink() or not path.is_file() or path.stat().st_size != file.size_bytes:
                record.parts[file.name] = []
        return record

    @staticmethod
    def origin_of(home: Path) -> str | None:
        """The directory of the files on their own machine."""
        origin = _content(home).get("origin")
        return origin if isinstance(origin, str) else None

    def add(self, pieces: Iterable[Piece]) -> None:
        """Records pieces that are on the disk."""
        for piece in pieces:
            self.parts[piece.name].append((piece.begin, piece.end))
        self.parts = {name: merged(spans) for name, spans in self.parts.items()}
        files = [(file.name, file.size_bytes, file.plain) for file in self.files]
        path, new = record_path(self._home), self._home / "parts.new"
        with new.open("w") as file:
            json.dump({"origin": self._origin, "files": files, "parts": self.parts}, file)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)

    def delete(self) -> None:
        """Nothing is there any more."""
        record_path(self._home).unlink(missing_ok=True)
        self.parts = {name: [] for name in self.parts}


def _content(home: Path) -> dict[str, Any]:
    try:
        content = json.loads(record_path(home).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _spans(given: Any) -> tuple[Span, ...]:
    spans = tuple((begin, end) for begin, end in given)
    if not all(type(edge) is int and edge >= 0 for span in spans for edge in span):
        raise ValueError("no spans")
    return spans
