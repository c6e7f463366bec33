"""`gptj-dist top`: a live look at the stages of a running server."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from gptj_dist.cli.request_options import DEFAULT_URL, KeyOption, ServerUrl, Timeout
from gptj_dist.cli.streams import print_json
from gptj_dist.errors import NotReadyError, ServerError

if TYPE_CHECKING:
    from gptj_dist.cli.client import Server

PERIOD_S = 1.0
TIMEOUT_S = 10.0


def top(
    once: Annotated[bool, typer.Option("--once", help="Print the table once, as where there is no terminal.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print what the server says, and no table.")] = False,
    url: ServerUrl = DEFAULT_URL,
    api_key: KeyOption = None,
    timeout: Timeout = TIMEOUT_S,
) -> None:
    """Show what the stages of a running server are doing: busy, bubbles, queue, time a step, KV cache."""
    from gptj_dist.cli.client import Server, ServerAddress
    from gptj_dist.cli.server.server_state import fetch_pipelines

    with Server(ServerAddress.of(url, api_key, timeout)) as server:
        if json:
            print_json(asdict(fetch_pipelines(server)))
        elif once or not sys.stdout.isatty():
            from rich.console import Console

            from gptj_dist.cli.server.top_view import render

            console = Console(highlight=False)
            console.print(render(fetch_pipelines(server), console.width))
        else:
            _watch(server)


def _watch(server: Server) -> None:
    """Draws the table anew each second until Ctrl-C; once a server has answered, it may go and come back."""
    from rich.console import Console
    from rich.live import Live

    from gptj_dist.cli.server.server_state import fetch_pipelines
    from gptj_dist.cli.server.top_view import render, render_waiting

    console = Console(highlight=False)
    view = render(fetch_pipelines(server), console.width)
    with Live(view, console=console, screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(PERIOD_S)
            try:
                view = render(fetch_pipelines(server), console.width)
                live.update(view, refresh=True)
            except (NotReadyError, ServerError) as error:
                live.update(render_waiting(view, str(error)), refresh=True)
