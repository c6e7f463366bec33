"""`gptj-dist status`: one look at a running server, for people and, as JSON or exit code, for programs."""

from __future__ import annotations

from typing import Annotated

import typer

from gptj_dist.cli.request_options import DEFAULT_URL, KeyOption, ServerUrl, Timeout
from gptj_dist.cli.streams import print_json

NOT_READY = 1
STATUS_TIMEOUT_S = 10.0


def status(
    json: Annotated[bool, typer.Option("--json", help="Print it as a JSON document.")] = False,
    url: ServerUrl = DEFAULT_URL,
    api_key: KeyOption = None,
    timeout: Timeout = STATUS_TIMEOUT_S,
) -> None:
    """Show whether a server is ready, its models, version, load, pipelines and stages. Exit code 1 if it is not ready.

    `gptj-dist top` goes on looking, and shows how busy each stage is.
    """
    from gptj_dist.cli.client import Server, ServerAddress
    from gptj_dist.cli.server.server_state import look

    with Server(ServerAddress.of(url, api_key, timeout)) as server:
        state = look(server)
    if json:
        print_json(state.as_json())
    else:
        from rich.console import Console

        from gptj_dist.cli.server.status_view import render

        console = Console(highlight=False)
        console.print(render(state, console.width))
    if state.problem is not None:
        raise typer.Exit(NOT_READY)
