"""Whatever is in a checkpoint's files, reading them ends soon, in numbers or a CheckpointError, and runs nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzzing.bombs import BOMBS, SLOW_BOMBS

SEED = 20260
NUM_CASES = 750
MAX_MEMORY_BYTES = 1 << 30
"""Of the whole process, of which Python, torch and the tokenizer library take a quarter."""
LIMIT_S = 280


@pytest.fixture
def directory() -> Iterator[Path]:
    """In memory where that can be: the loader gives pages back, which on a disk waits until they are written."""
    shared_memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared_memory if shared_memory.is_dir() else None) as name:
        yield Path(name)


def _run(directory: Path, module: str, *arguments: object) -> str:
    """What a module of the fuzzer prints at last: it stops at the first case that does something else than it may."""
    command = [sys.executable, "-m", f"tests.fuzzing.{module}", str(directory), *map(str, arguments)]
    done = subprocess.run(
        command,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # the tensors are tiny
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    case = directory / "case"
    where = f" at or after {case.read_text()}" if case.exists() else ""
    assert done.returncode == 0, f"exit code {done.returncode}{where}:\n{done.stdout}\n{done.stderr[-3000:]}"
    return done.stdout.splitlines()[-1]


def test_damaged_files_are_read_or_refused_in_one_line(directory: Path) -> None:
    assert int(_run(directory, "worker", SEED, 0, NUM_CASES)) < MAX_MEMORY_BYTES


def test_files_made_to_exhaust_memory_or_time_do_not(directory: Path) -> None:
    assert int(_run(directory, "bombs", *(BOMBS.keys() - SLOW_BOMBS))) < MAX_MEMORY_BYTES
