"""`gptj-dist join`: this machine becomes a node of the cluster whose code is given, until it leaves."""

from __future__ import annotations

from typing import Annotated

import typer

from gptj_dist.cli.cluster.options import Cpus, Gpus, Interface
from gptj_dist.cli.options import seconds

DEFAULT_LEAVE_S = 60.0


def join(
    code: Annotated[
        str, typer.Argument(help="What `gptj-dist up` printed.", show_default=False, envvar="GPTJ_DIST_JOIN_CODE")
    ],
    interface: Interface = None,
    cpus: Cpus = None,
    gpus: Gpus = None,
    discover: Annotated[
        bool, typer.Option("--discover", help="Ask the local network for the head; the code may be the short one.")
    ] = False,
    drain_s: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            parser=seconds,
            help="How long, when it leaves, stages may take to move away and the last answers to end. A node that "
            "clients connect to needs 30 at least.",
        ),
    ] = DEFAULT_LEAVE_S,
) -> None:
    """Join this machine to a cluster, and stay until Ctrl-C. Then its stages move to other nodes, and it leaves."""
    from gptj_dist.errors import ConfigurationError
    from gptj_dist.operate.cluster.code import JoinCode
    from gptj_dist.operate.cluster.run import Offer, run_member, start_signals

    parsed = JoinCode.parse(code)
    if parsed.place is None and not discover:
        raise ConfigurationError("this code has no address: give --discover too, or the longer code")
    signals = start_signals()
    run_member(parsed.without_place if discover else parsed, Offer(interface, cpus, gpus, drain_s), signals)
