"""`gptj-dist leave`: takes this machine out of its cluster."""

from __future__ import annotations

from typing import Annotated

import typer

from gptj_dist.cli.options import seconds


def leave(
    pid: Annotated[
        int | None, typer.Option(help="Of the `gptj-dist join`, if several run on this machine.", show_default=False)
    ] = None,
    timeout_s: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            parser=seconds,
            help="How long to wait until it has left; by default as long as the `join` takes (its --drain-s).",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Have this machine leave its cluster: its stages move to other nodes first. The same as Ctrl-C of `join`."""
    from gptj_dist.operate.cluster.leaving import leave_cluster

    left = leave_cluster(pid, timeout_s)
    print(f"The node of process {left} has left the cluster.")
