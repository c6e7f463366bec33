"""A directory that appears only when it is complete. Writing it can be killed at any moment and resumed.

Handles files and their checksums, not their contents. Beside the destination lies `DESTINATION.partial` with

    lock         held by the process that writes the directory
    state.json   what is being made, and the SHA-256 of each file that is finished
    unfinished   the file that is being written
    new/         the finished files
    old/         the destination that is being replaced, from just before `new/` takes its name until it is deleted
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from gptj_dist.errors import ConversionError

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
    """Where the files of a directory are made; to be used in a `with` statement, which one process at a time enters.

    Entering cleans up after a killed process: it restores or deletes a destination that was being replaced.

    Args:
        destination: final path of the complete directory; absolute.

    Attributes:
        path: `DESTINATION.partial`.

    Raises:
        ConversionError: on entering, if another process is writing the directory.
        OSError: the disk is full, broken, or may not be written.
    """

    def __init__(self, destination: Path) -> None:
        self._destination = destination
        self.path = destination.with_name(destination.name + ".partial")
        self._new, self._old = self.path / "new", self.path / "old"
        self._unfinished, self._state_file = self.path / "unfinished", self.path / "state.json"
        self._identity: Mapping[str, Any] = {}
        self._sha256_of: dict[str, str] = {}

    def __enter__(self) -> Self:
        self._lock = _lock(self.path / "lock")
        self._unfinished.unlink(missing_ok=True)
        self._clear_old()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with suppress(OSError):
            self._clear_old()
            if not self._new.exists() or not any(self._new.iterdir()):
                self.discard()
                (self.path / "lock").unlink()
                self.path.rmdir()
        os.close(self._lock)

    def was_published(self, identity: Mapping[str, Any]) -> bool:
        """Whether an earlier process has published this directory, and was killed before it cleaned up."""
        state = self._read_state()
        return (
            state.get("identity") == identity
            and not self._new.exists()
            and all(_has_sha256(self._destination / name, sha256) for name, sha256 in state["sha256"].items())
        )

    def resume(self, identity: Mapping[str, Any]) -> bool:
        """Resumes the work of a process with the same identity. Keeps its files if their checksums still match.

        Args:
            identity: JSON that describes source and result; equal identities produce equal files.

        Returns:
            False if the earlier work had another identity. Its files are deleted.
        """
        state = self._read_state()
        is_other = state.get("identity", identity) != identity
        if is_other or not state:
            self.discard()
            state = {"sha256": {}}
        self._new.mkdir(exist_ok=True)
        self._identity = identity
        self._sha256_of = {name: sha for name, sha in state["sha256"].items() if _has_sha256(self._new / name, sha)}
        for path in self._new.iterdir():
            if path.name not in self._sha256_of:
                path.unlink()
        return not is_other

    @contextmanager
    def create(self, name: str) -> Iterator[DurableFile]:
        """A file to be written, which counts as finished at the end of the `with` statement."""
        with self._replace(self._new / name) as file:
            yield file
        self._sha256_of[name] = file.sha256()
        with self._replace(self._state_file) as state_file:
            state_file.write(json.dumps({"identity": self._identity, "sha256": self._sha256_of}, indent=2).encode())

    def checksums(self) -> dict[str, str]:
        """Name -> SHA-256, in hexadecimal, of each finished file."""
        return dict(self._sha256_of)

    def publish(self) -> None:
        """Moves the directory to its destination. A directory that it replaces is deleted on leaving."""
        _sync_directory(self._new)
        if self._destination.exists():
            self._destination.rename(self._old)
        self._new.rename(self._destination)
        _sync_directory(self._destination.parent)

    def discard(self) -> None:
        """Deletes all files written so far."""
        self._state_file.unlink(missing_ok=True)
        if self._new.exists():
            shutil.rmtree(self._new)

    def _clear_old(self) -> None:
        """Deletes the replaced directory, or restores it if there is no new one in its place."""
        if self._old.exists() and self._destination.exists():
            shutil.rmtree(self._old)
        elif self._old.exists():
            self._old.rename(self._destination)

    def _read_state(self) -> dict[str, Any]:
        try:
            state = json.loads(self._state_file.read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
        return state if isinstance(state, dict) and isinstance(state.get("sha256"), dict) else {}

    @contextmanager
    def _replace(self, path: Path) -> Iterator[DurableFile]:
        """A temporary file that gets its name once it is completely on disk, and is deleted on an error."""
        descriptor = os.open(self._unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            file = DurableFile(descriptor)
            yield file
            file.sync()
            self._unfinished.replace(path)
        except BaseException:
            self._unfinished.unlink(missing_ok=True)  # its bytes are wanted, on a disk that is full
            raise
        finally:
            os.close(descriptor)


def _lock(path: Path) -> int:
    """Makes the file and its directories, and takes its lock, which ends with the process or with the descriptor."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A process that ends deletes the file: it may be gone before it is open, or before it is locked.
        with suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            if _is_locked(descriptor, path):
                return descriptor


def _is_locked(descriptor: int, path: Path) -> bool:
    """Takes the lock of an open file, if the file still has this name; otherwise closes it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_same = path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())
    except BlockingIOError:
        os.close(descriptor)
        raise ConversionError(f"another process is at work in {path.parent}: wait until it has ended") from None
    if not is_same:
        os.close(descriptor)
    return is_same


def _has_sha256(path: Path, sha256: str) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        _give_pages_back(file.fileno())
    return digest == sha256


def _give_pages_back(file: int) -> None:
    if sys.platform == "linux":
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
