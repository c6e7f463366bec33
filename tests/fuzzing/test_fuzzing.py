"""Whatever others wrote, the part that reads it deals with it as its description says; see `tests.fuzzing.run`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

NUM_CASES = 1000
LIMIT_S = 280


def test_hostile_inputs_are_dealt_with() -> None:
    command = [sys.executable, "-m", "tests.fuzzing.run", "--cases", str(NUM_CASES)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-5000:]}"
