"""How far a call of `LLM` has got: a bar on standard error, where that is a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table


@dataclass(slots=True)
class Meter:
    """Counts what is done; any thread may count, and the bar reads.

    Args:
        num_prompts: all prompts of the call.
    """

    num_prompts: int
    num_done: int = 0
    num_tokens: int = 0
    begin_s: float = field(default_factory=time.monotonic)

    def __rich__(self) -> Table:
        """The bar as it is drawn now."""
        elapsed_s = max(time.monotonic() - self.begin_s, 1e-3)
        text = f"{self.num_done} of {self.num_prompts} prompts, {self.num_tokens / elapsed_s:,.0f} tokens/s"
        grid = Table.grid(padding=(0, 1))
        grid.add_row(ProgressBar(self.num_prompts, self.num_done, width=30), text)
        return grid


@contextmanager
def metered(num_prompts: int, is_shown: bool) -> Iterator[Meter]:
    """A meter, with a bar while the context lasts.

    Args:
        is_shown: whether a terminal gets a bar.
    """
    meter = Meter(num_prompts)
    console = Console(stderr=True)
    if not is_shown or not console.is_terminal:
        yield meter
        return
    with Live(meter, console=console, transient=True, refresh_per_second=8):
        yield meter
