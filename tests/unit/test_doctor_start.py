"""`gptj-dist doctor`: obstacles of Ray's start on this machine are found without starting Ray."""

from __future__ import annotations

import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from gptj_dist.operate.doctor.cluster import Finding
from gptj_dist.operate.doctor.start import find_in_start
from gptj_dist.operate.launch import session_room
from gptj_dist.operate.launch.session_room import LONGEST_SOCKET, MOST_SOCKET_PATH_BYTES, why_unusable
from tests.unit.test_doctor import only, troubles

Usage = namedtuple("Usage", "total used free")

PRIVATE = f"gptj-dist-{os.getuid()}"


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What stands for /tmp, with room for long paths of pytest, and a home beside it."""
    directory = tmp_path / "tmp"
    directory.mkdir()
    monkeypatch.setattr(session_room, "DEFAULT_DIRECTORY", directory)
    longest = len(os.fsencode(directory / "file" / PRIVATE / "ray" / LONGEST_SOCKET))
    monkeypatch.setattr(session_room, "MOST_SOCKET_PATH_BYTES", longest)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    return directory


def files(**environment: str) -> Finding:
    return only(find_in_start(environment), "Ray's files")


def test_a_healthy_machine_has_one_line_that_names_the_directory(room: Path) -> None:
    (finding,) = find_in_start({})
    assert (finding.severity, finding.cure) == ("ok", None)
    assert f"{room / PRIVATE / 'ray'} can be written" in finding.what
    finding = files(RAY_TMPDIR=str(room / "mine"))
    assert (finding.severity, finding.what.split(" can be")[0]) == ("ok", f"{room / 'mine' / 'ray'} (RAY_TMPDIR)")


@pytest.mark.parametrize("variable", ["RAY_TMPDIR", "TMPDIR"])
def test_a_path_that_is_too_long_or_cannot_be_written_fails_where_ray_must_use_it(room: Path, variable: str) -> None:
    file = room / "file"
    file.touch()
    severity = "failure" if variable == "RAY_TMPDIR" else "warning"  # /tmp takes the place of TMPDIR
    for directory, reason in ((room / ("d" * 60), "is too long by"), (file, "cannot be written")):
        finding = files(**{variable: str(directory)})
        assert (finding.severity, reason in finding.what) == (severity, True)
        assert str(directory) in finding.what
        assert "set RAY_TMPDIR to a directory" in (finding.cure or "")
        assert (f"Ray uses {room / PRIVATE / 'ray'} instead" in finding.what) == (variable == "TMPDIR")


def test_a_full_disk_is_a_failure_that_says_how_much_is_free(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9 - 10**6, 10**6))
    for environment in ({}, {"RAY_TMPDIR": str(room)}):
        finding = files(**environment)
        assert finding.severity == "failure"
        assert "is full: 1 MB free, Ray needs 100 MB" in finding.what


def test_the_longest_path_that_the_cure_names_is_one_that_ray_can_use() -> None:
    cure = find_in_start({"RAY_TMPDIR": "/" + "d" * MOST_SOCKET_PATH_BYTES})[0].cure or ""
    longest = int(cure.rpartition("at most ")[2].split()[0])
    fits, too_long = (Path("/proc/" + "d" * (length - len("/proc/"))) / "ray" for length in (longest, longest + 1))
    assert "too long" not in (why_unusable(fits) or "")
    assert "too long by 1 bytes" in (why_unusable(too_long) or "")


def test_a_home_that_is_missing_or_cannot_be_written_is_a_warning(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = room / "file"
    file.touch()
    monkeypatch.setenv("HOME", str(file))
    assert troubles(find_in_start({})) == ["warning home"]

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    finding = only(find_in_start({}), "home")
    assert "Ray's token is not kept" in finding.what
    assert "set HOME" in (finding.cure or "")


@pytest.mark.usefixtures("room")
def test_a_cache_that_others_may_write_is_a_warning_that_names_it(tmp_path: Path) -> None:
    cache = tmp_path / ".cache" / "gptj-dist"
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    finding = only(find_in_start({}), "home")
    assert (finding.severity, str(cache) in finding.what) == ("warning", True)
