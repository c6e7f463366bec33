"""The launcher's terminal, which may go away while the server runs: closed, a pipe without a reader, a full disk."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

STDOUT, STDERR = 1, 2
SHOW_CURSOR, CLEAR_LINE = "\x1b[?25h", "\r\x1b[2K"


class LastingOutput(io.RawIOBase):
    """Standard output that drops what can no longer be written, so that a server goes on without its terminal."""

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return STDOUT

    def isatty(self) -> bool:
        return os.isatty(STDOUT)

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return os.write(STDOUT, data)
        except OSError:
            return memoryview(data).nbytes


def open_console() -> Console:
    """A console on standard output that prints text as it is, with question marks for what its encoding lacks."""
    encoding = sys.stdout.encoding or "utf-8"
    buffer = io.BufferedWriter(LastingOutput())
    file = io.TextIOWrapper(buffer, encoding=encoding, errors="replace", write_through=True)
    return Console(file=file, markup=False, emoji=False, highlight=False)


@contextmanager
def diverted(path: Path) -> Iterator[None]:
    """Meanwhile sends what libraries print to a file; `open_console` still prints to the terminal.

    Ray and gRPC print without being asked, most of all when a process of theirs dies, and partly not through Python.

    Raises:
        OSError: the file cannot be written.
    """
    streams = sys.stdout, sys.stderr
    with path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1) as file:
        try:
            terminal: int | None = os.dup(STDERR)
        except OSError:  # it was closed when the launcher started
            terminal = None
        os.dup2(file.fileno(), STDERR)
        sys.stdout = sys.stderr = file
        try:
            yield
        finally:
            sys.stdout, sys.stderr = streams
            if terminal is not None:
                os.dup2(terminal, STDERR)
                os.close(terminal)


def say_last(text: str) -> None:
    """Prints a line at once, whatever other threads are printing, and nothing after it.

    At a terminal it replaces a line of a progress display, and a hidden cursor is shown again.
    """
    line = f"{SHOW_CURSOR}{CLEAR_LINE}{text}\n" if os.isatty(STDOUT) else f"{text}\n"
    LastingOutput().write(line.encode(errors="replace"))
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)
