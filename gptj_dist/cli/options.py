"""Arguments that several commands share, and their parsers."""

from __future__ import annotations

import glob
from math import isfinite
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from gptj_dist.cli.streams import as_text
from gptj_dist.text.tool_calls import ToolFormatName

PIPELINE_PANEL = "Pipeline"


def finite(value: str | float) -> float:
    """Parser of options that take a number. Refuses infinity and NaN.

    Raises:
        typer.BadParameter: the text is no number, or not a finite one.
    """
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if not isfinite(number):
        raise typer.BadParameter(f"{value!r:.80} is not a finite number.")
    return number


def seconds(value: str | float) -> float:
    """Parser of options that take a time. Refuses what `finite` does, and negative numbers.

    Raises:
        typer.BadParameter: the text is no such number.
    """
    number = finite(value)
    if number < 0:
        raise typer.BadParameter(f"{number:g} is negative.")
    return number


def complete_model(incomplete: str) -> list[str]:
    """What a shell offers for a model: `demo`, and directories that hold one."""
    directories = [str(path.parent) for path in Path().glob(f"{glob.escape(incomplete)}*/config.json")]
    return [name for name in ("demo", *sorted(directories)) if name.startswith(incomplete)]


Model: TypeAlias = Annotated[
    str,
    typer.Argument(
        help="'demo', a directory in the Hugging Face layout, or a hub name.",
        show_default=False,
        autocompletion=complete_model,
    ),
]
Revision: TypeAlias = Annotated[
    str | None, typer.Option(help="Branch, tag or commit on the hub.", metavar="NAME", parser=as_text)
]
ServedModelName: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(help="What clients call the model; again for an alias.", metavar="NAME", parser=as_text),
]
TemplateFile: TypeAlias = Annotated[
    Path | None, typer.Option(help="Jinja template that makes conversations prompts.", metavar="FILE")
]
ChatMaxTokens: TypeAlias = Annotated[
    int, typer.Option(help="Most tokens of a chat's answer, where the request sets no limit.", metavar="N")
]
ChatStop: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        help="String that ends a chat's answer, where the request has no stop; again for another, '' for none. By "
        "default the text by which the chat template begins a user's message.",
        metavar="STRING",
        show_default=False,
    ),
]
ToolFormat: TypeAlias = Annotated[
    ToolFormatName | None,
    typer.Option(help="How the model writes calls of tools; by default as the chat template does.", show_default=False),
]
Host: TypeAlias = Annotated[str, typer.Option(help="Address to listen at.")]
Port: TypeAlias = Annotated[int, typer.Option(help="Port to listen at.")]
DrainS: TypeAlias = Annotated[
    float, typer.Option(metavar="SECONDS", parser=seconds, help="How long requests under way may take to end.")
]
TraceFile: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Write when each stage computed what, for https://ui.perfetto.dev.", show_default=False
    ),
]

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8000
DEFAULT_START_TIMEOUT_S = 120.0
DEFAULT_WAIT_NODES_S = 600.0


def parse_chat_stop(given: list[str] | None) -> tuple[str, ...] | None:
    """The strings of `--chat-stop`; None takes the chat template's."""
    return None if given is None else tuple(text for text in given if text)
