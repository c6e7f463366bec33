"""`gptj-dist top`: a live look at the stages of a running server."""

from __future__ import annotations

import sys
import time
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import typer

from gptj_dist.cli.options import DEFAULT_HOST, DEFAULT_PORT
from gptj_dist.errors import ConfigurationError, NotReadyError

if TYPE_CHECKING:
    from gptj_dist.serving.debug import DebugDocument

PERIOD_S = 1.0
TIMEOUT_S = 10.0
_INTERRUPTED = 130
"""The exit code of a program that ended by Ctrl-C, 128 + SIGINT."""


def top(
    url: Annotated[str, typer.Argument(help="Where `gptj-dist serve` listens.")] = f"{DEFAULT_HOST}:{DEFAULT_PORT}",
    once: Annotated[bool, typer.Option("--once", help="Print the table once, as where there is no terminal.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print what the server says, and no table.")] = False,
) -> None:
    """Show what the stages of a running server are doing: busy, bubbles, queue, time a step, KV cache."""
    base = _base(url)
    if json:
        print(_fetch(base).model_dump_json(indent=2))
    elif once or not sys.stdout.isatty():
        from rich.console import Console

        from gptj_dist.cli.top_view import render

        console = Console(highlight=False)
        console.print(render(_fetch(base), console.width))
    else:
        _watch(base)


def _base(url: str) -> str:
    """The URL without a path.

    Raises:
        ConfigurationError: not the URL of an HTTP server.
    """
    parts = urlsplit(url if "//" in url else f"http://{url}")
    try:
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return f"{parts.scheme}://{parts.netloc}"
    except ValueError:  # the port is no number
        pass
    raise ConfigurationError(f"{url!r} is no address of a server, such as {DEFAULT_HOST}:{DEFAULT_PORT}")


def _fetch(base: str) -> DebugDocument:
    """What the server says.

    Raises:
        NotReadyError: nothing listens there, or the model is still loading.
        ConfigurationError: something else listens there.
    """
    from pydantic import ValidationError

    from gptj_dist.serving.debug import DebugDocument

    try:
        with urllib.request.urlopen(f"{base}/debug/pipeline", timeout=TIMEOUT_S) as response:
            return DebugDocument.model_validate_json(response.read())
    except urllib.error.HTTPError as error:
        if error.code == 503:
            raise NotReadyError(f"the model at {base} is still loading; try again shortly") from None
        raise ConfigurationError(f"the server at {base} is not gptj-dist, or an older one: {error}") from None
    except ValidationError:
        raise ConfigurationError(f"the server at {base} is not gptj-dist, or of another version") from None
    except OSError as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        what = reason.strerror if isinstance(reason, OSError) and reason.strerror else reason
        raise NotReadyError(f"no server answers at {base}: {what}") from None


def _watch(base: str) -> None:
    """Draws the table anew each second until Ctrl-C; once a server has answered, it may go and come back."""
    from rich.console import Console
    from rich.live import Live

    from gptj_dist.cli.top_view import render, render_waiting

    console = Console(highlight=False)
    try:
        view = render(_fetch(base), console.width)
        with Live(view, console=console, screen=True, auto_refresh=False) as live:
            while True:
                time.sleep(PERIOD_S)
                try:
                    view = render(_fetch(base), console.width)
                    live.update(view, refresh=True)
                except NotReadyError as error:
                    live.update(render_waiting(view, str(error)), refresh=True)
    except KeyboardInterrupt:
        raise typer.Exit(_INTERRUPTED) from None
