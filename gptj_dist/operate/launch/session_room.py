"""Chooses the directory where Ray keeps its sessions, and checks that Ray can start there."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gptj_dist.errors import ConfigurationError
from gptj_dist.sizes import bytes_text

MOST_SOCKET_PATH_BYTES = 107
"""What the system takes as the path of a socket."""

LONGEST_SOCKET = "session_2026-11-29_04-02-01_719005_4194304/sockets/plasma_store.1"
"""The longest name that Ray gives a socket below its directory; a process id has seven digits at most."""

LEAST_FREE_BYTES = 100_000_000
"""Logs of a start take a few MB. Below this a server would soon fail for lack of room."""

DEFAULT_DIRECTORY = Path("/tmp")


@dataclass(frozen=True, slots=True)
class SessionRoom:
    """A directory that can hold Ray's sessions.

    Args:
        passed_over: why the directory that the environment names is not used; None if it is used.
    """

    directory: Path
    passed_over: str | None = None


def find_room(environment: Mapping[str, str] = os.environ) -> SessionRoom:
    """Chooses the directory: `$RAY_TMPDIR/ray`; else `$TMPDIR/ray`, or `/tmp/ray` where the former cannot be used.

    Raises:
        ConfigurationError: none can be used; the message says why.
    """
    chosen = environment.get("RAY_TMPDIR")
    directory = Path(chosen or environment.get("TMPDIR") or DEFAULT_DIRECTORY) / "ray"
    reason = why_unusable(directory)
    if reason is None and not chosen and _is_of_another(directory):
        reason = f"{directory} belongs to another user"
    if reason is None:
        return SessionRoom(directory)
    others = () if chosen else (DEFAULT_DIRECTORY / "ray", DEFAULT_DIRECTORY / f"ray-{os.getuid()}")
    for other in others:
        if why_unusable(other) is None and not _is_of_another(other):
            return SessionRoom(other, reason)
    raise ConfigurationError(f"Ray cannot start: {reason}; set RAY_TMPDIR to another directory")


def why_unusable(directory: Path) -> str | None:
    """Why Ray could not keep a session there, or None if it can. Creates the directory and writes to it."""
    longest = len(os.fsencode(directory / LONGEST_SOCKET))
    if longest > MOST_SOCKET_PATH_BYTES:
        return (
            f"the path {directory} is too long by {longest - MOST_SOCKET_PATH_BYTES} bytes for the sockets that Ray "
            "makes in it"
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory) as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
        free_bytes = shutil.disk_usage(directory).free
    except OSError as error:
        return why_unwritable(directory, error)
    if free_bytes < LEAST_FREE_BYTES:
        return (
            f"the disk of {directory} is full: {bytes_text(free_bytes)} free, Ray needs {bytes_text(LEAST_FREE_BYTES)}"
        )
    return None


def _is_of_another(directory: Path) -> bool:
    """Whether the directory, or the link in its place, belongs to another user, who could replace files in it."""
    return directory.lstat().st_uid != os.getuid()


def why_unwritable(directory: Path, error: OSError) -> str:
    """What the system says of a directory that cannot be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk of {directory} is full"
    return f"{directory} cannot be written: {error.strerror or error}"


def sessions_of(directory: Path, pid: int) -> list[Path]:
    """Sessions that a process has started."""
    return sorted(directory.glob(f"session_*_{pid}"))
