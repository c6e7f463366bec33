"""Where Ray keeps its sessions, and what the user is told where it cannot."""

from __future__ import annotations

import errno
import os
import socket
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest

from gptj_dist.errors import ConfigurationError
from gptj_dist.operate.launch import session_room
from gptj_dist.operate.launch.local_ray import lasting_cause
from gptj_dist.operate.launch.session_room import (
    LONGEST_SOCKET,
    MOST_SOCKET_PATH_BYTES,
    OwnSessions,
    find_room,
    why_unusable,
)

PRIVATE = f"gptj-dist-{os.getuid()}"


def long_directory(parent: Path) -> Path:
    return parent / ("d" * (MOST_SOCKET_PATH_BYTES - len(os.fsencode(parent))))


@pytest.fixture
def default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What stands for /tmp."""
    directory = tmp_path / "tmp"
    directory.mkdir()
    monkeypatch.setattr(session_room, "DEFAULT_DIRECTORY", directory)
    monkeypatch.setattr(
        session_room, "MOST_SOCKET_PATH_BYTES", len(os.fsencode(directory / PRIVATE / "ray" / LONGEST_SOCKET))
    )
    return directory


def test_a_path_that_is_called_too_long_is_one_that_the_system_refuses(tmp_path: Path) -> None:
    name = tmp_path / ("s" * (MOST_SOCKET_PATH_BYTES - len(os.fsencode(tmp_path)) - 1))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(name))
        with pytest.raises(OSError, match="too long"):
            listener.bind(f"{name}x")


def test_ray_goes_where_the_environment_says(default: Path, tmp_path: Path) -> None:
    assert find_room({}).directory == default / PRIVATE / "ray"
    assert find_room({"TMPDIR": str(tmp_path)}).directory == tmp_path / PRIVATE / "ray"
    assert find_room({"TMPDIR": str(default), "RAY_TMPDIR": str(tmp_path)}).directory == tmp_path / "ray"


def test_a_temporary_directory_that_cannot_be_used_is_passed_over_and_the_reason_kept(
    default: Path, tmp_path: Path
) -> None:
    file = tmp_path / "f"
    file.touch()
    for directory, reason in ((long_directory(tmp_path), "too long by"), (file, "cannot be written")):
        room = find_room({"TMPDIR": str(directory)})
        assert room.directory == default / PRIVATE / "ray"
        assert room.passed_over is not None
        assert reason in room.passed_over


def test_only_this_user_can_enter_the_directory_whatever_ray_opens_in_it(default: Path) -> None:
    for _ in range(2):  # when it is made, and when it is found
        find_room({}).directory.chmod(0o777)
        assert (default / PRIVATE).stat().st_mode & 0o777 == 0o700


def test_the_longest_private_path_is_short_enough_for_rays_sockets() -> None:
    longest = Path("/tmp") / f"gptj-dist-{2**32 - 1}" / "ray" / LONGEST_SOCKET
    assert len(os.fsencode(longest)) <= MOST_SOCKET_PATH_BYTES


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (lambda path: path.symlink_to(path.parent), "is a link or a file"),
        (lambda path: path.symlink_to("nowhere"), "is a link or a file"),
        (Path.touch, "is a link or a file"),
        (lambda path: (path.mkdir(), path.chmod(0o750)), "is open to other users"),
    ],
    ids=["link", "dangling link", "file", "open"],
)
def test_a_directory_that_others_could_enter_or_replace_is_passed_over_or_refused(
    default: Path, tmp_path: Path, prepare: Callable[[Path], object], reason: str
) -> None:
    prepare(tmp_path / PRIVATE)
    room = find_room({"TMPDIR": str(tmp_path)})
    assert room.directory == default / PRIVATE / "ray"
    assert str(room.passed_over).startswith(f"{tmp_path / PRIVATE} {reason}")
    (default / PRIVATE / "ray").rmdir()
    (default / PRIVATE).rmdir()
    prepare(default / PRIVATE)
    with pytest.raises(ConfigurationError, match=rf"{default / PRIVATE} {reason}.*; set RAY_TMPDIR to another"):
        find_room({})


def test_a_directory_of_another_user_is_refused(default: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = os.getuid() + 1
    monkeypatch.setattr("os.getuid", lambda: other)
    with pytest.raises(
        ConfigurationError, match=rf"{default}/gptj-dist-{other} belongs to another user; set RAY_TMPDIR"
    ):
        find_room({})


def test_a_directory_that_was_named_for_ray_is_not_replaced_but_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"too long by .* bytes .* set RAY_TMPDIR to another directory"):
        find_room({"RAY_TMPDIR": str(long_directory(tmp_path))})


def test_a_full_disk_is_called_that(default: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    assert "is full" in str(why_unusable(default))
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert lasting_cause(full, default) == f"the disk of {default} is full"


def test_sessions_of_this_process_and_no_others_are_removed_and_what_ray_printed_is_kept_where_told(
    tmp_path: Path,
) -> None:
    def session(name: str, pid: int) -> Path:
        logs = tmp_path / f"session_{name}_{pid}" / "logs"
        logs.mkdir(parents=True)
        return logs

    earlier, others = session("1", os.getpid()), session("2", 1)
    sessions = OwnSessions(tmp_path, "launcher")
    first, last = session("3", os.getpid()), session("4", os.getpid())
    assert sessions.begun() == [first.parent, last.parent]
    with sessions.noise.open("w") as file:
        assert sessions.keep_noise(tmp_path / "none" / "launcher.err") == ""
        assert sessions.noise.exists()
        assert sessions.keep_noise(last / "launcher.err") == f"; its logs are in {last}"
        file.write("printed later")
    assert (last / "launcher.err").read_text() == "printed later"
    sessions.discard_with_noise()
    assert sorted(tmp_path.iterdir()) == [earlier.parent, others.parent]


def test_failures_that_will_come_again_are_named_and_others_are_not(tmp_path: Path) -> None:
    denied = PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/root/.ray/auth_token")
    assert lasting_cause(denied, tmp_path) == "/root/.ray/auth_token cannot be written: Permission denied"
    too_long = OSError("validate_socket_filename failed: AF_UNIX path length cannot exceed 107 bytes: /x")
    assert "too long for its sockets" in str(lasting_cause(too_long, tmp_path))
    assert lasting_cause(Exception("The current node timed out during startup."), tmp_path) is None
