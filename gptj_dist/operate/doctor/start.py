"""What would keep a Ray from starting on this machine, or make its start slower: its directory and the user's home.

Asks the functions that the launcher and the stages themselves use. Imports no Ray.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from gptj_dist.errors import ConfigurationError
from gptj_dist.operate.doctor.cluster import Finding
from gptj_dist.operate.launch.session_room import (
    LEAST_FREE_BYTES,
    LONGEST_SOCKET,
    MOST_SOCKET_PATH_BYTES,
    find_room,
)
from gptj_dist.own_directory import own_directory
from gptj_dist.sizes import bytes_text

_LONGEST_DIRECTORY = MOST_SOCKET_PATH_BYTES - len(os.fsencode(Path("/ray") / LONGEST_SOCKET))
_ROOM_CURE = (
    f"set RAY_TMPDIR to a directory that this user can write, with {bytes_text(LEAST_FREE_BYTES)} free and a path of "
    f"at most {_LONGEST_DIRECTORY} bytes"
)


def find_in_start(environment: Mapping[str, str] = os.environ) -> list[Finding]:
    """Findings about a Ray that `serve` would start here.

    Args:
        environment: of `serve`.
    """
    return [_room(environment), *_home()]


def _room(environment: Mapping[str, str]) -> Finding:
    try:
        room = find_room(environment)
    except ConfigurationError as error:
        return Finding("failure", "Ray's files", str(error), _ROOM_CURE)
    if room.passed_over is not None:
        return Finding("warning", "Ray's files", f"{room.passed_over}; Ray uses {room.directory} instead", _ROOM_CURE)
    chosen = " (RAY_TMPDIR)" if environment.get("RAY_TMPDIR") else ""
    return Finding("ok", "Ray's files", f"{room.directory}{chosen} can be written, and its path is short enough")


def _home() -> Iterator[Finding]:
    """Without a directory of the user's own, nothing is kept there from one start to the next."""
    cure = "set HOME, or XDG_CACHE_HOME, to a directory that only this user can write"
    try:
        if own_directory() is None:
            yield Finding(
                "warning",
                "home",
                "this user has no home directory that can be written: the C code is compiled anew at each start, and "
                "Ray's token is not kept, so other commands cannot join this Ray",
                cure,
            )
    except OSError as error:
        yield Finding("warning", "home", f"{error}; stages do not run C code that is kept there, and are slower", cure)
