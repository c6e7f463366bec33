"""Reads YAML that others wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def read_yaml(path: Path) -> Any:
    """The value in a file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not YAML in UTF-8, or holds an impossible value, such as a date in month 99.
    """
    text = path.read_text("utf-8")
    try:
        return yaml.safe_load(text)
    except Exception as error:  # besides its own errors: those of Python's constructors, and RecursionError
        raise ValueError(error) from error
