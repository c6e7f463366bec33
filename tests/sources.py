"""The package's source files as syntax trees."""

from __future__ import annotations

import ast
import gc
from collections.abc import Iterator
from pathlib import Path

import gptj_dist

PACKAGE = Path(gptj_dist.__file__).parent


def syntax_trees() -> Iterator[tuple[Path, ast.Module]]:
    """All modules, in order.

    The garbage collector stands still while one is parsed: a finalizer that fails has pytest parse a line for its
    traceback, and Python 3.11 raises SystemError if one parse runs within another (pytest's issue 10763).
    """
    for path in sorted(PACKAGE.rglob("*.py")):
        gc.disable()
        try:
            tree = ast.parse(path.read_text(), filename=str(path))
        finally:
            gc.enable()
        yield path, tree
