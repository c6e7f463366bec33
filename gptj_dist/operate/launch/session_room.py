"""Chooses the directory where Ray keeps its sessions, checks that Ray can start there, and cleans up in it."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Mapping
from contextlib import suppress
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
    """Chooses the directory: `$RAY_TMPDIR/ray`; else `gptj-dist-UID/ray` in `$TMPDIR`, or in `/tmp` where that fails.

    Ray opens its directories to all users, so `gptj-dist-UID` is closed to others. `$RAY_TMPDIR` is left as it is.

    Raises:
        ConfigurationError: none can be used; the message says why.
    """
    chosen = environment.get("RAY_TMPDIR")
    private = f"gptj-dist-{os.getuid()}"
    parents = (Path(environment.get("TMPDIR") or DEFAULT_DIRECTORY), DEFAULT_DIRECTORY)
    directories = [Path(chosen) / "ray"] if chosen else [parent / private / "ray" for parent in dict.fromkeys(parents)]
    reasons: list[str] = []
    for directory in directories:
        reason = why_unusable(directory, is_private=not chosen)
        if reason is None:
            return SessionRoom(directory, reasons[0] if reasons else None)
        reasons.append(reason)
    raise ConfigurationError(f"Ray cannot start: {', and '.join(reasons)}; set RAY_TMPDIR to another directory")


def why_unusable(directory: Path, *, is_private: bool = False) -> str | None:
    """Why Ray could not keep a session there, or None if it can. Creates the directory and writes to it.

    Args:
        is_private: only this user may enter its parent.
    """
    longest = len(os.fsencode(directory / LONGEST_SOCKET))
    if longest > MOST_SOCKET_PATH_BYTES:
        return (
            f"the path {directory} is too long by {longest - MOST_SOCKET_PATH_BYTES} bytes for the sockets that Ray "
            "makes in it"
        )
    try:
        if is_private and (reason := _why_not_private(directory.parent)):
            return reason
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


def _why_not_private(directory: Path) -> str | None:
    """Why others could reach what lies in the directory, or None if they cannot. Creates it for this user alone."""
    with suppress(FileExistsError):
        directory.mkdir(mode=0o700, parents=True)
    status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode):
        return f"{directory} is a link or a file, not a directory"
    if status.st_uid != os.getuid():
        return f"{directory} belongs to another user"
    if status.st_mode & 0o077:
        return f"{directory} is open to other users, which `chmod 700 {directory}` ends"
    return None


def why_unwritable(directory: Path, error: OSError) -> str:
    """What the system says of a directory that cannot be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk of {directory} is full"
    return f"{directory} cannot be written: {error.strerror or error}"


class OwnSessions:
    """The sessions of Ray that this process begins from now on, and what Ray prints in this process.

    A session has the process id of `serve` or `up` in its name. `join` begins none: it keeps its logs in a directory
    with the name of the head's session, which on the head's machine is the head's directory.

    Args:
        directory: where Ray keeps its sessions.
        name: of the file for what Ray prints.

    Attributes:
        noise: that file; after `keep_noise` it is among Ray's logs.
    """

    def __init__(self, directory: Path, name: str) -> None:
        self.directory = directory
        self.noise = directory / f"{name}_{os.getpid()}.err"
        self._earlier = frozenset(self._of_this_pid())  # process ids come again

    def begun(self) -> list[Path]:
        """The directories of the sessions, oldest first."""
        return [path for path in self._of_this_pid() if path not in self._earlier]

    def keep_noise(self, file: Path) -> str:
        """Moves the noise to a file among Ray's logs. It may be open.

        Returns:
            The end of a message for the user: where the logs are. Empty, and nothing is moved, if Ray has made none.
        """
        if not file.parent.is_dir():
            return ""
        self.noise = self.noise.replace(file)
        return f"; its logs are in {file.parent}"

    def discard(self) -> None:
        """Removes the sessions' files. Call when Ray has ended."""
        for session in self.begun():
            shutil.rmtree(session, ignore_errors=True)

    def discard_with_noise(self) -> None:
        """Does the same, and removes the noise."""
        self.noise.unlink(missing_ok=True)
        self.discard()

    def _of_this_pid(self) -> list[Path]:
        return sorted(self.directory.glob(f"session_*_{os.getpid()}"))
