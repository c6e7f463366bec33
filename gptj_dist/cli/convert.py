"""`gptj-dist convert`: any form of checkpoint to safetensors of one file a layer, resumable, without filling memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from gptj_dist.cli.options import Model, Revision
from gptj_dist.sizes import bytes_text

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from gptj_dist.checkpoint.convert import Conversion, Observer
    from gptj_dist.config import DTypeName

_INTERRUPTED = 130
"""The exit code of a program that ended by Ctrl-C, 128 + SIGINT."""


def convert(
    source: Model,
    destination: Annotated[Path, typer.Argument(help="The directory to write.", show_default=False)],
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="'auto' takes the checkpoint's.")
    ] = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the checkpoint there, once the new one is whole.")
    ] = False,
    revision: Revision = None,
) -> None:
    """Rewrite a checkpoint as one safetensors file a layer, so that a stage's files are its own.

    Killed or interrupted, the same command resumes.
    """
    start_s = time.monotonic()
    try:
        conversion = _convert(source, revision, destination, None if dtype == "auto" else dtype, overwrite)
    except KeyboardInterrupt:
        print("gptj-dist: interrupted; running it again resumes", file=sys.stderr)
        raise typer.Exit(_INTERRUPTED) from None
    print(
        f"{conversion.directory}: {bytes_text(conversion.num_bytes)} in {conversion.num_files} files, "
        f"{conversion.dtype}, {time.monotonic() - start_s:.1f} s"
    )
    print(f"gptj-dist serve {conversion.directory}")


def _convert(
    source: str, revision: str | None, destination: Path, dtype: DTypeName | None, overwrite: bool
) -> Conversion:
    from gptj_dist.checkpoint.convert import check_destination, convert_checkpoint
    from gptj_dist.checkpoint.hub import fetch_weights, resolve_model
    from gptj_dist.checkpoint.index import read_model_config
    from gptj_dist.config import LayerRange

    directory = resolve_model(source, revision)
    check_destination(directory, destination, overwrite)  # before a download, which may take an hour
    config = read_model_config(directory)
    fetch_weights(source, directory, LayerRange(0, 1, 0, config.num_layers), config)
    with _observer() as observer:
        return convert_checkpoint(directory, destination, dtype, overwrite, observer)


@contextmanager
def _observer() -> Iterator[Observer]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines()
        return
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        yield _Bar(progress)


class _Bar:
    """A bar of bytes, at a terminal."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: TaskID | None = None

    def note(self, text: str) -> None:
        self._progress.console.print(text, soft_wrap=True, highlight=False, markup=False)

    def progress(self, done_bytes: int, total_bytes: int) -> None:
        if self._task is None:
            self._task = self._progress.add_task("", total=total_bytes, completed=done_bytes)
        self._progress.update(self._task, completed=done_bytes)


class _Lines:
    """A line for each tenth, where there is no terminal."""

    def __init__(self) -> None:
        self._num_tenths = 0

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def progress(self, done_bytes: int, total_bytes: int) -> None:
        num_tenths = 10 * done_bytes // total_bytes
        if num_tenths > self._num_tenths:
            self._num_tenths = num_tenths
            self.note(f"{bytes_text(done_bytes)} of {bytes_text(total_bytes)}")
