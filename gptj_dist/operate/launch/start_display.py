"""Shows what happens until the server is ready: at a terminal a bar for each stage, elsewhere lines."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gptj_dist.sizes import bytes_text
from gptj_dist.stages.load_progress import LoadProgress

LINE_EVERY_S = 5.0
"""Lines about the same step are at least this far apart."""

FRAMES_PER_S = 4
LEAST_RATE_S = 0.5
"""A rate is shown when it was measured for this long."""

WIDEST_BAR = 40
TEXT_WIDTH = 52
"""What is beside a bar."""


class StartDisplay:
    """Begins with the first `show`, and leaves nothing of its bars when it ends.

    Args:
        console: where it is shown.
        clock: seconds.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        # The launcher diverts the standard streams itself.
        live = Live(
            self,
            console=console,
            transient=True,
            refresh_per_second=FRAMES_PER_S,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live = live if console.is_terminal and not console.is_dumb_terminal else None
        self._step, self._begin_s = "", 0.0
        self._said, self._said_s = "", 0.0
        self._stages: dict[str, _Loading] = {}

    def show(self, step: str, stages: Mapping[str, LoadProgress] | None = None) -> None:
        """Shows what happens now.

        Args:
            step: such as `Starting Ray on this machine`.
            stages: by name, how far those that load are.
        """
        now_s = self._clock()
        is_new = step != self._step
        if is_new:
            self._step, self._begin_s = step, now_s
        for name, progress in (stages or {}).items():
            self._stages.setdefault(name, _Loading()).note(progress, now_s)
        details = ", ".join(f"{name}: {progress}" for name, progress in (stages or {}).items())
        line = f"{step} ({details}) ..." if details else f"{step} ..."
        is_due = is_new or now_s - self._said_s >= LINE_EVERY_S
        if self._live is not None:
            self._live.start()
        elif is_due and line != self._said:
            self._console.print(line, soft_wrap=True)
            self._said, self._said_s = line, now_s

    def end(self) -> None:
        """Ends it, if it has begun."""
        if self._live is not None:
            self._live.stop()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The step and its seconds, then a line for each stage."""
        yield Text(f"{self._step} ... {self._clock() - self._begin_s:.0f} s", no_wrap=True, overflow="ellipsis")
        table = Table.grid(padding=(0, 1, 0, 1))
        for _ in range(3):
            table.add_column(no_wrap=True, overflow="ellipsis")
        width = max(min(WIDEST_BAR, options.max_width - TEXT_WIDTH), 4)
        for name, loading in list(self._stages.items()):
            table.add_row(name, *loading.cells(width))
        if self._stages:
            yield table


class _Loading:
    """How a stage loads.

    Attributes:
        progress: the newest.
    """

    def __init__(self) -> None:
        self.progress = LoadProgress("starting")
        self._first: tuple[float, int] | None = None
        self._last_s = 0.0

    def note(self, progress: LoadProgress, now_s: float) -> None:
        """Takes what the stage says of itself. Its rate is measured anew when it reads what it has fetched."""
        if progress.source != self.progress.source:
            self._first = None
        if progress.num_bytes != self.progress.num_bytes:
            self._last_s = now_s
            self._first = self._first or (now_s, progress.num_bytes)
        self.progress = progress

    def cells(self, width: int) -> tuple[ProgressBar | str, str]:
        """A bar of this width with bytes, rate and time left; before there are bytes, only the activity."""
        progress = self.progress
        if not progress.all_bytes:
            return progress.activity, ""
        num_bytes = min(progress.num_bytes, progress.all_bytes)  # quantised tensors may be read twice
        text = f"{bytes_text(num_bytes)} of {bytes_text(progress.all_bytes)}"
        if num_bytes == progress.all_bytes:
            text = f"{bytes_text(num_bytes)}, {'fetched' if progress.source else 'loaded'}"
        elif (rate := self._rate()) > 0:
            text += f", {bytes_text(rate)}/s, {(progress.all_bytes - num_bytes) / rate:.0f} s left"
        if progress.source and num_bytes < progress.all_bytes:
            text += f", from {progress.source}"
        bar = ProgressBar(progress.all_bytes, num_bytes, width, complete_style="cyan", finished_style="green")
        return bar, text

    def _rate(self) -> float:
        """Bytes per second; 0 while it is not known."""
        if self._first is None or self._last_s - self._first[0] < LEAST_RATE_S:
            return 0.0
        return (self.progress.num_bytes - self._first[1]) / (self._last_s - self._first[0])
