"""Shows the progress of a long command on standard error: a bar at a terminal, otherwise a line for each tenth."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from rich.console import Console
from rich.progress import Progress, ProgressColumn, TaskID


@contextmanager
def displayed(*columns: ProgressColumn, as_text: Callable[[int, int], str]) -> Iterator[Display]:
    """A display while the context lasts.

    Args:
        columns: of the bar.
        as_text: what a line says of what is done, and of all.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(as_text)
        return
    with Progress(*columns, console=console, transient=True) as progress:
        yield _Bar(progress)


class _Bar:
    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: TaskID | None = None

    def note(self, text: str) -> None:
        self._progress.console.print(text, soft_wrap=True, highlight=False, markup=False)

    def progress(self, num_done: int, num_all: int) -> None:
        if self._task is None:
            self._task = self._progress.add_task("", total=num_all, completed=num_done)
        self._progress.update(self._task, completed=num_done)


class _Lines:
    def __init__(self, as_text: Callable[[int, int], str]) -> None:
        self._as_text = as_text
        self._num_tenths = 0

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def progress(self, num_done: int, num_all: int) -> None:
        num_tenths = 10 * num_done // num_all
        if num_tenths > self._num_tenths:
            self._num_tenths = num_tenths
            self.note(self._as_text(num_done, num_all))


Display: TypeAlias = _Bar | _Lines
"""Shows progress: `note` prints a line beside it, `progress` updates it."""
