"""Makes standard input and output safe to use when they are closed, full, in another encoding, or hold invalid bytes.

A character that the terminal cannot show is written as an escape, and bytes that are not UTF-8 are read as U+FFFD.
"""

from __future__ import annotations

import codecs
import errno
import io
import json
import os
import sys
from contextlib import suppress
from typing import Any

from gptj_dist.errors import ConfigurationError
from gptj_dist.file_kinds import known_form

_OUTPUT_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)


def prepare_streams() -> None:
    """Opens closed standard streams on the null device, and lets no character end the program with an error."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    sys.stdin = sys.stdin or open(0)  # noqa: SIM115
    sys.stdout = sys.stdout or open(1, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w")  # noqa: SIM115
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding=sys.stdin.encoding if sys.stdin.isatty() else "utf-8", errors="replace")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def flush_output() -> OSError | None:
    """Flushes standard output. Returns the error if that fails; the unwritten text is dropped."""
    try:
        sys.stdout.flush()
        return None
    except OSError as error:
        # Python writes it once more when it ends, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return error


def complain(message: str) -> None:
    """Writes to standard error, or nothing where that is gone or full. Control characters become spaces."""
    shown = "".join(char if char.isprintable() or char == "\n" else " " for char in message)
    with suppress(OSError):
        print(f"gptj-dist: {shown}", file=sys.stderr, flush=True)


def os_error_text(error: OSError) -> str:
    """The operating system's error, in one line."""
    reason = error.strerror or str(error)
    if error.filename is not None:
        return f"{error.filename}: {reason}"
    return f"the output cannot be written: {reason}" if error.errno in _OUTPUT_ERRORS else reason


def print_json(value: Any) -> None:
    """Prints a JSON document; characters that the terminal's encoding may lack are written as JSON escapes."""
    is_unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    print(json.dumps(value, indent=2, ensure_ascii=not is_unicode))


def as_text(argument: str) -> str:
    """An argument of the command line as text; its bytes that are not UTF-8 become U+FFFD, with a note."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        data = os.fsencode(argument)  # as the shell gave it
        with suppress(UnicodeDecodeError):
            return data.decode()
        text = data.decode("utf-8", "replace")
        complain(f"{text[:40]!r} had bytes that are not UTF-8: each is replaced by U+FFFD")
        return text
    return argument


def read_standard_input() -> str:
    """All of standard input, as UTF-8.

    A character that is cut off at the end, as by `head -c`, is dropped; other bytes that are not UTF-8 become U+FFFD.
    Both are noted on standard error.

    Raises:
        ConfigurationError: the data has a known form that is no UTF-8.
    """
    data = sys.stdin.buffer.read()
    if (form := known_form(data)) is not None:
        raise ConfigurationError(f"standard input is {form}, not text in UTF-8")
    decoder = codecs.getincrementaldecoder("utf-8-sig")("replace")
    text = decoder.decode(data)
    if num_cut := len(decoder.getstate()[0]):
        cut = "byte is" if num_cut == 1 else f"{num_cut} bytes are"
        complain(f"standard input ends within a character: its last {cut} dropped")
    if (num_bad := text.count("\N{REPLACEMENT CHARACTER}") - data.count(b"\xef\xbf\xbd")) > 0:
        complain(f"standard input is not all UTF-8: U+FFFD replaces it in {num_bad} places")
    return text
