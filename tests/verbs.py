"""Runs commands of the command line as separate processes, like a shell."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

OF_A_SERVER = ("GPTJ_URL", "GPTJ_API_KEY", "RAY_ADDRESS")


def environment(**variables: str) -> dict[str, str]:
    """This process's environment, without variables that name a server, with buffered output, and with `variables`."""
    inherited = {name: value for name, value in os.environ.items() if name not in {*OF_A_SERVER, "PYTHONUNBUFFERED"}}
    return inherited | {"COLUMNS": "200"} | variables


def command_line(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "gptj_dist", *map(str, arguments)]


def run_verb(
    *arguments: str | Path, typed: str = "", cwd: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end, with `typed` on standard input. Its output is text."""
    return subprocess.run(
        command_line(*arguments),
        input=typed,
        env=environment(**variables),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
