"""`gptj-dist nodes`: the machines of a cluster, their devices, links and stages."""

from __future__ import annotations

from typing import Annotated

import typer

from gptj_dist.cli.streams import print_json


def nodes(
    address: Annotated[
        str | None,
        typer.Option(help="Ray cluster to look at; by default the one of this machine.", envvar="RAY_ADDRESS"),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print it as a JSON document.")] = False,
) -> None:
    """Show a cluster's machines, devices, links and stages. A path that has become slower is named."""
    from gptj_dist.operate.cluster.overview import look_at, print_overview
    from gptj_dist.operate.launch.cluster import reachable

    overview = look_at(reachable(address))
    if json:
        print_json(overview.as_json())
    else:
        from rich.console import Console

        print_overview(overview, Console(markup=False, emoji=False, highlight=False))
