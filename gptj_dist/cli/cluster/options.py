"""Options that `up` and `join` share."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import typer

Interface: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Network interface, or an address of it, for the cluster; by default the one that leads to the other "
        "machines. `lo` stays on this machine.",
        show_default=False,
    ),
]
Cpus: TypeAlias = Annotated[int | None, typer.Option(min=0, help="CPUs to offer; by default all.", show_default=False)]
Gpus: TypeAlias = Annotated[int | None, typer.Option(min=0, help="GPUs to offer; by default all.", show_default=False)]
