"""`gptj-dist repartition`: moves layers between the stages of a running server."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from gptj_dist.cli.pipeline_settings import parse_layers
from gptj_dist.cli.request_options import DEFAULT_URL, KeyOption, ServerUrl, Timeout
from gptj_dist.cli.streams import print_json

NOT_DONE = 1
REPARTITION_TIMEOUT_S = 1800.0


def repartition(
    layers: Annotated[str, typer.Option(help="Layers of each stage, such as 8,7,7,6.", metavar="N,N,...")],
    json: Annotated[bool, typer.Option("--json", help="Print the moves as a JSON document.")] = False,
    url: ServerUrl = DEFAULT_URL,
    api_key: KeyOption = None,
    timeout: Timeout = REPARTITION_TIMEOUT_S,
) -> None:
    """Move layers between the stages of a running server. Its requests go on, and their texts do not change.

    The number of stages stays. The server wants the key of an admin. Exit code 1 if not all layers have moved.
    """
    from gptj_dist.cli.client import Server, ServerAddress

    with Server(ServerAddress.of(url, api_key, timeout)) as server:
        response: dict[str, Any] = server.post("/debug/repartition", {"layers": list(parse_layers(layers) or ())})
    if json:
        print_json(response)
    else:
        for pipeline in response["pipelines"]:
            print("\n".join(_lines(pipeline)))
    if any(pipeline["problem"] for pipeline in response["pipelines"]):
        raise typer.Exit(NOT_DONE)


def _lines(pipeline: dict[str, Any]) -> list[str]:
    """What a pipeline did, for people."""
    lines = [
        f"layer {moved['layer']}: stage {moved['giver']} -> {moved['receiver']}, "
        f"pause {moved['pause_ms']:g} ms, {moved['took_s']:.1f} s in all"
        for moved in pipeline["moved"]
    ]
    cut = "/".join(map(str, pipeline["layers"]))
    problem = "" if pipeline["problem"] is None else f"; {pipeline['problem']}"
    return [*lines, f"pipeline {pipeline['name']}: {cut}{problem}"]
