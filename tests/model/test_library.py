"""The library of compiled C: made once, found again, and done without where it cannot be had."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptj_dist import LLM, SamplingParams
from gptj_dist.config import DTypeName
from gptj_dist.model.native import library
from gptj_dist.model.native.library import COMPILE, HEADERS, SOURCES, load_library

GCC = shutil.which("gcc")
needs_gcc = pytest.mark.skipif(GCC is None, reason="there is no gcc")
TIMEOUT_S = 120
PROMPTS = ["The meaning of life is", "Once upon a time", "In the beginning"]
NUM_TOKENS = 24
NUM_SAME_ROUNDED = 8
"""Other sums round otherwise in 16 bit, which sooner or later makes another token."""
UNOPTIMIZED = (*COMPILE, "-O0")
"""Compiles in a fraction of the time."""

LOAD = f"""
import torch
from gptj_dist.model.native import library
library.COMPILE = {UNOPTIMIZED}
print(library.load_library() is not None)
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the user keeps caches: none is there yet, and this process has looked for none."""
    monkeypatch.setattr(library, "COMPILE", UNOPTIMIZED)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    load_library.cache_clear()
    yield tmp_path / "cache"
    load_library.cache_clear()


def put_compiler(directory: Path, script: str) -> Path:
    """A directory for PATH whose gcc tells its version as the real one does, and then runs the script to compile."""
    directory.mkdir()
    compiler = directory / "gcc"
    real = f"PATH={os.environ['PATH']} exec {GCC}"
    compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] && {real} --version\n{script}\n{real} "$@"\n')
    compiler.chmod(0o755)
    return directory


def libraries(home: Path) -> list[Path]:
    return sorted((home / "gptj-dist").iterdir())


@needs_gcc
def test_it_is_compiled_once_and_found_again_in_a_directory_of_the_users_alone(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    monkeypatch.setenv("PATH", str(put_compiler(tmp_path / "bin", f"echo once more >>{log}")))
    for _ in range(3):
        assert load_library() is not None
        load_library.cache_clear()
    (made,) = libraries(home)
    assert made.suffix == ".so"
    assert len(log.read_text().splitlines()) == 2  # compiled, and linked
    assert (home / "gptj-dist").stat().st_mode & 0o777 == 0o700


@needs_gcc
def test_another_compiler_makes_another_library(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_library() is not None
    load_library.cache_clear()
    path = put_compiler(tmp_path / "bin", "")
    compiler = path / "gcc"
    compiler.write_text(compiler.read_text().replace("&& PATH", "&& echo of tomorrow && PATH"))
    monkeypatch.setenv("PATH", str(path))
    assert load_library() is not None
    assert len(libraries(home)) == 2


@needs_gcc
def test_two_processes_that_compile_at_the_same_time_both_get_it(home: Path, tmp_path: Path) -> None:
    """Each compiler waits until the other has been started, too."""
    arrived = tmp_path / "arrived"
    os.mkfifo(arrived)
    processes, gates = [], [tmp_path / "gate0", tmp_path / "gate1"]
    for index, gate in enumerate(gates):
        os.mkfifo(gate)
        wait = f"case $* in *' -c '*) echo >{arrived}; read line <{gate};; esac"
        environment = {**os.environ, "PATH": str(put_compiler(tmp_path / f"bin{index}", wait))}
        command = [sys.executable, "-c", LOAD]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    with arrived.open() as arrivals:  # open as long as one of them writes
        num_arrived = len(arrivals.readlines())
    while num_arrived < len(processes):
        with arrived.open() as arrivals:
            num_arrived += len(arrivals.readlines())
    for gate in gates:
        gate.write_text("go\n")
    assert [process.communicate(timeout=TIMEOUT_S)[0] for process in processes] == ["True\n"] * 2
    (made,) = libraries(home)
    assert made.suffix == ".so"


def greedy(dtype: DTypeName) -> list[tuple[int, ...]]:
    """What the demo goes on with."""
    with LLM("demo", dtype=dtype, device="cpu") as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True))
    return [tuple(completion.token_ids) for output in outputs for completion in output.completions]


@pytest.fixture(scope="module")
def compiled() -> dict[DTypeName, list[tuple[int, ...]]]:
    """The same by the library that all tests use."""
    assert load_library() is not None
    return {"float32": greedy("float32"), "bfloat16": greedy("bfloat16")}


@needs_gcc
@pytest.mark.parametrize(
    ("script", "said", "dtype"),
    [(None, "there is no C compiler", "float32"), ("echo it broke >&2; exit 1", "it broke", "bfloat16")],
)
def test_without_it_the_log_says_why_and_the_model_goes_on_the_same(
    compiled: dict[DTypeName, list[tuple[int, ...]]],
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    script: str | None,
    said: str,
    dtype: DTypeName,
) -> None:
    bin_directory = tmp_path / "bin"
    monkeypatch.setenv("PATH", str(bin_directory if script is None else put_compiler(bin_directory, script)))
    with caplog.at_level("WARNING"):
        num_same = NUM_TOKENS if dtype == "float32" else NUM_SAME_ROUNDED
        assert [ids[:num_same] for ids in greedy(dtype)] == [ids[:num_same] for ids in compiled[dtype]]
    assert [said in record.getMessage() for record in caplog.records] == [True]
    assert load_library() is None
    assert libraries(home) == []


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_directory_that_others_may_write_to_is_refused(
    home: Path, caplog: pytest.LogCaptureFixture, mode: int
) -> None:
    (home / "gptj-dist").mkdir(parents=True)
    (home / "gptj-dist").chmod(mode)
    assert load_library() is None
    assert "no other user may write to it" in caplog.text
    assert libraries(home) == []


@needs_gcc
def test_for_a_user_without_a_home_it_is_compiled_at_each_start(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as where the user id has no entry
    assert load_library() is not None
    assert not home.exists()
    assert list((tmp_path / "tmp").iterdir()) == []


@needs_gcc
def test_beside_a_file_in_the_way_it_is_compiled_at_each_start(home: Path) -> None:
    home.write_text("not a directory")
    assert load_library() is not None


def test_the_wheel_brings_the_source(tmp_path: Path) -> None:
    from hatchling.builders.wheel import WheelBuilder

    root = SOURCES[0].parents[3]
    if not (root / "pyproject.toml").exists():
        pytest.skip("the package is not in its repository")
    (wheel,) = WheelBuilder(str(root)).build(directory=str(tmp_path), versions=["standard"])
    for path in (*SOURCES, *HEADERS):
        assert zipfile.ZipFile(wheel).read(f"gptj_dist/model/native/{path.name}") == path.read_bytes()
