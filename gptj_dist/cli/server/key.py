"""`gptj-dist key`: makes an API key."""

from __future__ import annotations

from typing import Annotated

import typer
import yaml

from gptj_dist.cli.streams import as_text


def key(
    name: Annotated[
        str | None,
        typer.Option(help="Its owner; also prints the entry for --api-keys.", metavar="NAME", parser=as_text),
    ] = None,
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="Most requests a minute.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(min=1, help="Most tokens a minute.")] = None,
) -> None:
    """Make an API key. It is shown once and kept nowhere."""
    from gptj_dist.errors import ConfigurationError
    from gptj_dist.serving.keys import hash_key, new_key

    limits = {"requests_per_minute": requests_per_minute, "tokens_per_minute": tokens_per_minute}
    if name is None and any(limits.values()):
        raise ConfigurationError("limits belong to a named key: give --name too")
    made = new_key()
    typer.echo(made)
    if name is not None:
        entry = {"name": name, "sha256": hash_key(made)} | {k: v for k, v in limits.items() if v is not None}
        typer.echo("\n" + yaml.safe_dump([entry], sort_keys=False), nl=False)
