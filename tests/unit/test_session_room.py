"""Where Ray keeps its sessions, and what the user is told where it cannot."""

from __future__ import annotations

import errno
import os
import socket
from collections import namedtuple
from pathlib import Path

import pytest

from gptj_dist.errors import ConfigurationError
from gptj_dist.operate.launch import session_room
from gptj_dist.operate.launch.local_ray import lasting_cause
from gptj_dist.operate.launch.session_room import (
    LONGEST_SOCKET,
    MOST_SOCKET_PATH_BYTES,
    find_room,
    why_unusable,
)


def long_directory(parent: Path) -> Path:
    return parent / ("d" * (MOST_SOCKET_PATH_BYTES - len(os.fsencode(parent))))


@pytest.fixture
def default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What stands for /tmp."""
    directory = tmp_path / "tmp"
    directory.mkdir()
    monkeypatch.setattr(session_room, "DEFAULT_DIRECTORY", directory)
    monkeypatch.setattr(
        session_room, "MOST_SOCKET_PATH_BYTES", len(os.fsencode(directory / "ray-00000" / LONGEST_SOCKET))
    )
    return directory


def test_a_path_that_is_called_too_long_is_one_that_the_system_refuses(tmp_path: Path) -> None:
    name = tmp_path / ("s" * (MOST_SOCKET_PATH_BYTES - len(os.fsencode(tmp_path)) - 1))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(name))
        with pytest.raises(OSError, match="too long"):
            listener.bind(f"{name}x")


def test_ray_goes_where_the_environment_says(default: Path, tmp_path: Path) -> None:
    assert find_room({}).directory == default / "ray"
    assert find_room({"TMPDIR": str(tmp_path)}).directory == tmp_path / "ray"
    assert find_room({"TMPDIR": str(default), "RAY_TMPDIR": str(tmp_path)}).directory == tmp_path / "ray"


def test_a_temporary_directory_that_cannot_be_used_is_passed_over_and_the_reason_kept(
    default: Path, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.touch()
    for directory, reason in ((long_directory(tmp_path), "too long by"), (file, "cannot be written")):
        room = find_room({"TMPDIR": str(directory)})
        assert room.directory == default / "ray"
        assert room.passed_over is not None
        assert reason in room.passed_over


def test_another_users_directory_of_ray_is_passed_over(default: Path) -> None:
    (default / "ray").touch()  # stands for one that cannot be written
    assert find_room({}).directory == default / f"ray-{os.getuid()}"


def test_a_directory_in_which_another_user_could_replace_files_is_passed_over(
    default: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_room, "_is_of_another", lambda directory: directory == default / "ray")
    room = find_room({})
    assert room.directory == default / f"ray-{os.getuid()}"
    assert room.passed_over == f"{default / 'ray'} belongs to another user"


def test_a_directory_that_was_named_for_ray_is_not_replaced_but_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"too long by .* bytes .* set RAY_TMPDIR to another directory"):
        find_room({"RAY_TMPDIR": str(long_directory(tmp_path))})


def test_a_full_disk_is_called_that(default: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    assert "is full" in str(why_unusable(default))
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert lasting_cause(full, default) == f"the disk of {default} is full"


def test_failures_that_will_come_again_are_named_and_others_are_not(tmp_path: Path) -> None:
    denied = PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/root/.ray/auth_token")
    assert lasting_cause(denied, tmp_path) == "/root/.ray/auth_token cannot be written: Permission denied"
    too_long = OSError("validate_socket_filename failed: AF_UNIX path length cannot exceed 107 bytes: /x")
    assert "too long for its sockets" in str(lasting_cause(too_long, tmp_path))
    assert lasting_cause(Exception("The current node timed out during startup."), tmp_path) is None
