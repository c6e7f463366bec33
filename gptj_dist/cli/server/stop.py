"""`gptj-dist stop`: removes what a `gptj-dist serve` left whose terminal or process is gone."""

from __future__ import annotations

from typing import Annotated

import typer

from gptj_dist.cli.options import DrainS
from gptj_dist.config import DEFAULT_APP_NAME, DEFAULT_DRAIN_S


def stop(
    address: Annotated[
        str | None, typer.Option(help="Ray cluster that serves the application.", envvar="RAY_ADDRESS")
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the Serve application on the cluster.")] = DEFAULT_APP_NAME,
    drain_s: DrainS = DEFAULT_DRAIN_S,
) -> None:
    """Remove a server whose launcher is gone: an application from a cluster, or processes from this machine.

    Servers whose launcher still runs on this machine are listed, and left alone: Ctrl-C or SIGTERM ends them.
    """
    if address is None:
        _stop_here()
    else:
        from gptj_dist.operate.launch.cluster import connected
        from gptj_dist.operate.launch.leftovers import remove_application

        with connected(address):
            num_cut = remove_application(name, drain_s)
        cut = f"; {num_cut} requests took longer than {drain_s:g} s and were cut" if num_cut else ""
        print(f"Removed the application {name!r} from the cluster at {address}{cut}.")


def _stop_here() -> None:
    from gptj_dist.operate.launch.leftovers import end, find_servers

    servers = find_servers()
    for server in servers:
        if server.is_orphaned:
            end(server)
            print(f"Ended {len(server.pids)} processes of the launcher with pid {server.launcher}, which is gone.")
        else:
            print(f"The launcher with pid {server.launcher} still runs; `kill {server.launcher}` stops its server.")
    if not servers:
        print("No server that you started with a local Ray runs on this machine; for one on a cluster, give --address.")
