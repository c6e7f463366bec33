"""A copy of a model's files on this machine, which has the parts that its stages need. Another machine has them all.

Its files have the sizes of the originals, and holes where nothing was needed so far. A part counts as there once it is
on the disk and recorded, so a process can be killed at any moment. Below the directory of all copies lies, for each,

    DIGITS/NAME             the directory of the model; the digits are those of its version
    DIGITS/parts.json       the files, and which of their bytes are there
    DIGITS/in-use           locked, shared, by every process that may read the copy: without any, it may be deleted
    DIGITS/being-filled     locked by the one process that adds parts
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import socket
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Protocol

from gptj_dist.checkpoint.copy_record import CopyRecord, record_path
from gptj_dist.checkpoint.manifest import Manifest, ModelFile
from gptj_dist.checkpoint.pieces import Piece, cut
from gptj_dist.checkpoint.spans import Span, num_bytes, without
from gptj_dist.errors import CheckpointError
from gptj_dist.sizes import bytes_text

RECORD_BYTES = 256 << 20
"""What may arrive before it is recorded; at most this is fetched again after a crash."""

SPARE_BYTES = 256 << 20
"""What is left free on the disk."""

NUM_ATTEMPTS = 3
"""Times in a row that a source may be lost without having sent anything."""

_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)

_DELETED = ".deleted"

Note = Callable[[int, int], None]
"""Called with the bytes that have arrived, and all that will; with zeros while another process adds parts."""


class SourceLostError(Exception):
    """The other machine, or the way to it, was lost, or what it sent was damaged. Asking again may help."""


class Source(Protocol):
    """A machine with all files of the model.

    Attributes:
        name: for people.
        directory: where the files lie there.
    """

    name: str
    directory: str

    def manifest(self) -> Manifest:
        """The files. Raises CheckpointError if they are not there, SourceLostError."""

    def read(self, pieces: Sequence[Piece]) -> Generator[bytes, None, None]:
        """The bytes of the pieces, one after another.

        Raises:
            SourceLostError: asking again may help.
            CheckpointError: the files have changed; what has arrived is worth nothing.
        """


class LocalCopy:
    """A copy. It is not deleted as long as the object lives.

    Args:
        root: the directory of all copies; it belongs to this user alone.
        name: of the model's directory.
        version: of the files, see `version_of`.

    Attributes:
        directory: of the model. `fill` makes it readable.
    """

    def __init__(self, root: Path, name: str, version: str) -> None:
        self._root = root
        self._home = root / version
        self.directory = self._home / name
        self._version = version
        self._in_use = _held(self._home)

    def close(self) -> None:
        """From now on it may be deleted."""
        if self._in_use >= 0:
            os.close(self._in_use)
            self._in_use = -1

    def fill(
        self,
        source: Source,
        wanted: Callable[[Path], Mapping[str, Sequence[Span]]] | None = None,
        note: Note = lambda _, __: None,
    ) -> int:
        """Fetches what is not there yet. Processes that fill the same copy take turns.

        Args:
            wanted: the bytes of tensors that are needed, by file, given a directory with all other bytes; None for
                those others alone.

        Returns:
            The bytes that were fetched.

        Raises:
            CheckpointError: the disk is full, the source is lost for good, or its files have changed.
        """
        try:
            with self._filling(note):
                record = CopyRecord.read(self._home, self.directory)
                if record is None:
                    record = self._begin(source)
                plain = {file.name: file.plain for file in record.files}
                num_fetched = self._fetch(record, plain, source, note)
                if wanted is not None:
                    num_fetched += self._fetch(record, wanted(self.directory), source, note)
                return num_fetched
        except OSError as error:
            problem = self._broken(error)
            if error.errno in _DISK_IS_FULL:  # what did not fit helps nobody, unless another stage reads the rest
                self.close()
                _delete_unused(self._home)
                self._in_use = _held(self._home)
            raise problem from error

    def _begin(self, source: Source) -> CopyRecord:
        for _ in range(NUM_ATTEMPTS):
            try:
                manifest = source.manifest()
                break
            except SourceLostError as error:
                reason = error
        else:
            raise self._lost(source, reason)
        if manifest.version != self._version:
            raise CheckpointError(_changed(source))
        for other in _copies(self._root):
            if CopyRecord.origin_of(other) == source.directory:  # an earlier version
                _delete_unused(other)
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir(mode=0o700)
        return CopyRecord(self._home, source.directory, manifest.files)

    def _fetch(self, record: CopyRecord, wanted: Mapping[str, Sequence[Span]], source: Source, note: Note) -> int:
        missing = {name: without(spans, record.parts[name]) for name, spans in wanted.items()}
        all_bytes = sum(map(num_bytes, missing.values()))
        self._make_room(all_bytes)
        num_done, num_lost = 0, 0
        while pieces := [piece for name, spans in missing.items() for piece in cut(name, spans)]:
            before = num_done
            try:
                for part_bytes in self._receive(record, pieces, source):
                    num_done += part_bytes
                    note(num_done, all_bytes)
            except SourceLostError as error:
                num_lost = 1 if num_done > before else num_lost + 1
                if num_lost >= NUM_ATTEMPTS:
                    raise self._lost(source, error) from error
            except CheckpointError:
                record.delete()
                raise
            missing = {name: without(spans, record.parts[name]) for name, spans in wanted.items()}
        self._create_empty(record)
        return num_done

    def _receive(self, record: CopyRecord, pieces: Sequence[Piece], source: Source) -> Iterator[int]:
        """Writes pieces as they arrive, and records them; yields the bytes of each."""
        with ExitStack() as stack:
            sizes = {file.name: file for file in record.files}
            opened = {name: stack.enter_context(self._opened(sizes[name])) for name in {p.name for p in pieces}}
            arrived: list[Piece] = []

            def save() -> None:
                for descriptor in opened.values():
                    os.fsync(descriptor)
                record.add(arrived)
                arrived.clear()

            try:
                parts = stack.enter_context(closing(source.read(pieces)))
                for piece in pieces:
                    data = next(parts, b"")
                    if len(data) != piece.num_bytes:
                        raise SourceLostError(f"{len(data)} bytes of {piece.num_bytes} arrived")
                    _write(opened[piece.name], data, piece.begin)
                    arrived.append(piece)
                    if sum(each.num_bytes for each in arrived) >= RECORD_BYTES:
                        save()
                    yield piece.num_bytes
                for _ in parts:
                    raise SourceLostError("more arrived than was asked for")
            except SourceLostError:
                save()
                raise
            save()

    @contextmanager
    def _opened(self, file: ModelFile) -> Iterator[int]:
        """A file of the copy, which has the size of the original."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(self.directory / file.name, flags, 0o600)
        try:
            if os.fstat(descriptor).st_size != file.size_bytes:
                os.ftruncate(descriptor, file.size_bytes)
            yield descriptor
        finally:
            os.close(descriptor)

    def _create_empty(self, record: CopyRecord) -> None:
        """Creates files of which nothing was wanted, such as those of no bytes."""
        for file in record.files:
            if not (self.directory / file.name).exists():
                with self._opened(file):
                    pass

    @contextmanager
    def _filling(self, note: Note) -> Iterator[None]:
        descriptor = os.open(self._home / "being-filled", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                note(0, 0)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _make_room(self, wanted_bytes: int) -> None:
        """Deletes copies that no process uses, those first that were not used for the longest time, if it must.

        Raises:
            CheckpointError: there is no room all the same.
        """
        if not wanted_bytes:
            return
        for other in _copies(self._root):
            if self._free_bytes() >= wanted_bytes + SPARE_BYTES:
                return
            _delete_unused(other)
        if self._free_bytes() < wanted_bytes + SPARE_BYTES:
            raise CheckpointError(self._full(wanted_bytes))

    def _free_bytes(self) -> int:
        return shutil.disk_usage(self._root).free

    def _full(self, wanted_bytes: int | None = None) -> str:
        needed = "" if wanted_bytes is None else f" {bytes_text(wanted_bytes)} of the model's files are to go there;"
        return (
            f"the disk of {socket.gethostname()}:{self._root} is full:{needed} {bytes_text(self._free_bytes())} are "
            f"free, and {bytes_text(SPARE_BYTES)} stay free; XDG_CACHE_HOME names another place"
        )

    def _broken(self, error: OSError) -> CheckpointError:
        if error.errno in _DISK_IS_FULL:
            return CheckpointError(self._full())
        return CheckpointError(f"{socket.gethostname()} cannot keep the model's files in {self._home}: {error}")

    def _lost(self, source: Source, reason: Exception) -> CheckpointError:
        return CheckpointError(
            f"{socket.gethostname()} cannot get the model's files in {source.directory} from {source.name}: {reason}"
        )


def _changed(source: Source) -> str:
    return f"the model's files in {source.directory} of {source.name} have changed since the server started: restart it"


def _write(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        num_written = os.pwrite(descriptor, view, offset)
        view, offset = view[num_written:], offset + num_written


def _held(home: Path) -> int:
    """A shared lock on a copy, which may be new. One that is being deleted is gone by then, and made anew."""
    path = home / "in-use"
    while True:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    os.utime(home)  # `_copies` sorts by this
                    return descriptor
            os.close(descriptor)


def _copies(root: Path) -> list[Path]:
    """All copies, those first that were not used for the longest time."""
    homes = [path for path in root.iterdir() if record_path(path).exists()]
    return sorted(homes, key=lambda home: home.stat().st_mtime_ns)


def _delete_unused(home: Path) -> None:
    """Deletes a copy, unless a process may read it."""
    if home.name.endswith(_DELETED):  # by a process that was killed meanwhile
        shutil.rmtree(home, ignore_errors=True)
        return
    try:
        descriptor = os.open(home / "in-use", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        doomed = home.with_name(f"{home.name}-{secrets.token_hex(4)}{_DELETED}")
        home.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(descriptor)
