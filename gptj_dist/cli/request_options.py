"""Options of the commands that ask a running server, and the fields of a request that they become."""

from __future__ import annotations

import sys
from typing import Annotated, Any, TypeAlias

import typer

from gptj_dist.cli.options import finite
from gptj_dist.cli.streams import as_text, read_standard_input
from gptj_dist.errors import ConfigurationError

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT_S = 600.0
STANDARD_INPUT = "-"

ServerUrl: TypeAlias = Annotated[
    str, typer.Option(help="Address of the server.", envvar="GPTJ_URL", rich_help_panel="Server", metavar="URL")
]
KeyOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="The server's key, if it wants one.", envvar="GPTJ_API_KEY", rich_help_panel="Server", metavar="KEY"
    ),
]
Timeout: TypeAlias = Annotated[
    float,
    typer.Option(help="Most seconds of silence.", rich_help_panel="Server", metavar="SECONDS", parser=finite),
]

ModelName: TypeAlias = Annotated[
    str | None,
    typer.Option(help="The model to ask; by default the one that is served.", metavar="NAME", parser=as_text),
]

# Shared by `generate` and by the commands that leave the default values to the server.
MAX_TOKENS = typer.Option(help="Most tokens to generate.")
TEMPERATURE = typer.Option(help="0 is greedy; larger is more random.", metavar="NUMBER", parser=finite)
TOP_P = typer.Option(help="Keep the likeliest tokens up to this probability.", metavar="NUMBER", parser=finite)
TOP_K = typer.Option(help="Keep this many of the likeliest tokens; 0 keeps all.")
MIN_P = typer.Option(help="Drop tokens less likely than this part of the likeliest.", metavar="NUMBER", parser=finite)

Seed: TypeAlias = Annotated[int | None, typer.Option(help="Makes the output repeatable.")]
StopOption: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(help="Ends the text; may be given several times.", metavar="TEXT", parser=as_text),
]


def given(**fields: Any) -> dict[str, Any]:
    """The fields that have a value; the others are the server's to choose."""
    return {name: value for name, value in fields.items() if value is not None and value != []}


def read_text(text: str | None, what: str) -> str:
    """The text, or standard input without its last line break where the text is `-`, or is missing in a pipe.

    Raises:
        ConfigurationError: there is neither, or standard input holds no text.
    """
    if text is None and sys.stdin.isatty():
        raise ConfigurationError(f"give a {what}, or - to read it from standard input")
    if text is not None and text != STANDARD_INPUT:
        return text
    return read_standard_input().removesuffix("\n")
