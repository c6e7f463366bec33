"""`gptj-dist up`: starts a cluster on its first machine, and prints the code by which others join."""

from __future__ import annotations

from typing import Annotated

import typer

from gptj_dist.cli.cluster.options import Cpus, Gpus, Interface


def up(
    interface: Interface = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port of the head; by default 6379 or a free one.")
    ] = None,
    cpus: Cpus = None,
    gpus: Gpus = None,
    discover: Annotated[
        bool, typer.Option("--discover", help="Answer machines of the local network that ask by `join --discover`.")
    ] = False,
) -> None:
    """Start a cluster on this machine, print its join code, and stay until Ctrl-C. The cluster ends with it."""
    from gptj_dist.operate.cluster.run import Offer, run_head, start_signals

    signals = start_signals()
    run_head(Offer(interface, cpus, gpus, drain_s=0.0), port, discover, signals)
