"""Builds the wheel, and installs it alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def build_wheel(directory: Path) -> Path:
    """The wheel of this clone."""
    options = ["--quiet", "--no-deps", "--no-build-isolation", "-w", str(directory)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(ROOT)], timeout=120, check=True)
    (wheel,) = directory.glob("*.whl")
    return wheel


def install_wheel(wheel: Path, directory: Path, python: str = sys.executable) -> None:
    """Puts what is in the wheel into a directory for `PYTHONPATH`, if its metadata allow this Python."""
    options = ["--quiet", "--no-deps", "--no-compile", "--no-index", "--target", str(directory)]
    subprocess.run([python, "-m", "pip", "install", *options, str(wheel)], timeout=120, check=True)
