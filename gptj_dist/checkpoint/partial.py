"""A directory that appears only when it is complete. Writing it can be killed at any moment and resumed.

Handles files and their checksums, not their contents. Until it is complete, beside it lie

    DESTINATION.partial-1a2b3c4d    the finished files, in a directory whose digits follow from what is being made
    DESTINATION.partial-5e6f7a8b    the file that is being written; its digits are random
    DESTINATION.partial-replaced    the destination that is being replaced, until the new one has its name

Nothing is locked. Processes that make the same at once use each other's finished files, and one of them publishes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_SYNC_BYTES = 64 << 20
"""What is written before it is waited for and its pages are given back: a checkpoint would fill the page cache."""


class DurableFile:
    """A new file that is hashed while it is written, and whose bytes do not stay in the page cache.

    Args:
        file: a descriptor, open for writing; the caller closes it.
    """

    def __init__(self, file: int) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self._num_unsynced_bytes = 0

    def write(self, data: bytes | memoryview, /) -> None:
        """Writes all of the bytes.

        Raises:
            OSError: the disk is full or broken.
        """
        view = memoryview(data)
        for begin in range(0, len(view), _SYNC_BYTES):
            piece = view[begin : begin + _SYNC_BYTES]
            self._hash.update(piece)
            self._num_unsynced_bytes += len(piece)
            while piece:
                piece = piece[os.write(self._file, piece) :]
            if self._num_unsynced_bytes >= _SYNC_BYTES:
                self.sync()

    def sync(self) -> None:
        """Returns when everything written is on the disk."""
        os.fsync(self._file)
        _give_pages_back(self._file)
        self._num_unsynced_bytes = 0

    def sha256(self) -> str:
        """Of what was written so far, in hexadecimal."""
        return self._hash.hexdigest()


class PartialDirectory:
    """Where the files of a directory are made. Files that an earlier process has finished are kept.

    Args:
        destination: final path of the complete directory.
        identity: JSON that describes what is made; equal identities produce equal files.

    Attributes:
        path: the directory of the finished files. It is gone if another process has published or deleted it.
    """

    def __init__(self, destination: Path, identity: object) -> None:
        self._destination = destination
        self.path = _sibling(destination, hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:8])
        self._sha256_of: dict[str, str] = {}

    def begin(self) -> list[Path]:
        """Creates the directory if need be, and deletes what other processes left, or are still writing, beside it.

        Returns:
            The deleted directories: each has held files of another identity.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        others = set(siblings(self._destination)) - {self.path, _replaced(self._destination)}
        directories = [path for path in others if path.is_dir()]
        for path in directories:
            _delete(path)
        for path in others.difference(directories):
            path.unlink(missing_ok=True)
        return directories

    def finished(self) -> dict[str, int]:
        """Name -> size in bytes of each finished file.

        Raises:
            FileNotFoundError: another process has published or deleted the directory.
        """
        with os.scandir(self.path) as entries:
            return {entry.name: entry.stat().st_size for entry in entries}

    @contextmanager
    def create(self, name: str) -> Iterator[DurableFile]:
        """A file to be written, which is finished at the end of the `with` statement.

        Ask `finished` afterwards: the file is not if another process has begun meanwhile, or took the directory.
        """
        unfinished = _sibling(self._destination, secrets.token_hex(4))
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            file = DurableFile(descriptor)
            yield file
            file.sync()
            with suppress(FileNotFoundError):
                unfinished.replace(self.path / name)
                self._sha256_of[name] = file.sha256()
        finally:
            unfinished.unlink(missing_ok=True)  # its bytes are wanted, on a disk that is full
            os.close(descriptor)

    def sha256(self, name: str) -> str:
        """Of a finished file, in hexadecimal. Reads the file if another process has written it."""
        if name not in self._sha256_of:
            with (self.path / name).open("rb") as file:
                self._sha256_of[name] = hashlib.file_digest(file, "sha256").hexdigest()
                _give_pages_back(file.fileno())
        return self._sha256_of[name]

    def publish(self, overwrite: bool) -> None:
        """Gives the directory its name.

        Args:
            overwrite: replace a directory of that name. It keeps the name on an error, and is deleted otherwise.

        Raises:
            OSError: there is such a directory and it must not be replaced, or another process has published this one.
        """
        _sync_directory(self.path)
        try:
            if overwrite and self._destination.exists():
                self._destination.rename(_replaced(self._destination))
            self.path.rename(self._destination)
            _sync_directory(self._destination.parent)
        finally:
            settle(self._destination)

    def discard(self) -> None:
        """Deletes the finished files. Does nothing once they are published."""
        _delete(self.path)


def siblings(destination: Path) -> list[Path]:
    """What lies beside a directory because it is being made or replaced."""
    name = re.compile(re.escape(destination.name) + r"\.partial-([0-9a-f]{8}|replaced)")
    return [path for path in destination.parent.glob("*") if name.fullmatch(path.name)]


def settle(destination: Path) -> None:
    """Ends a replacement: deletes the replaced directory, or restores it if no other has taken its name."""
    replaced = _replaced(destination)
    if replaced.exists():
        if destination.exists():
            _delete(replaced)
        else:
            replaced.rename(destination)


def _replaced(destination: Path) -> Path:
    return _sibling(destination, "replaced")


def _sibling(destination: Path, suffix: str) -> Path:
    return destination.with_name(f"{destination.name}.partial-{suffix}")


def _delete(directory: Path) -> None:
    """Deletes a directory as far as it can. Renames it first, so that no half of it is published or restored."""
    doomed = directory.with_suffix(f".partial-{secrets.token_hex(4)}")
    with suppress(OSError):
        directory.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _give_pages_back(file: int) -> None:
    if sys.platform == "linux":
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
