"""`gptj-dist adapter`: what an adapter changes, and whether it fits a model. Reads headers, and no weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from gptj_dist.cli.options import Revision
from gptj_dist.errors import ConfigurationError, one_line
from gptj_dist.sizes import bytes_text

if TYPE_CHECKING:
    from gptj_dist.checkpoint.adapters import StoredAdapter


def adapter(
    action: Annotated[Literal["inspect", "check"], typer.Argument(help="Show it, or check it against a model.")],
    path: Annotated[Path, typer.Argument(help="Directory of the adapter.")],
    model: Annotated[str | None, typer.Option(help="The model to check against.", metavar="MODEL")] = None,
    revision: Revision = None,
) -> None:
    """Show what an adapter changes, or check whether it fits a model. Reads no weights."""
    from gptj_dist.checkpoint.adapter_formats import open_adapter
    from gptj_dist.checkpoint.adapters import check_adapter
    from gptj_dist.checkpoint.hub import resolve_model
    from gptj_dist.checkpoint.index import read_model_config

    stored = open_adapter(path)
    if action == "inspect":
        for name, text in _rows(stored):
            print(f"{name:<10}  {text}")
        return
    if model is None:
        raise ConfigurationError("adapter check needs --model: a directory, a hub name or demo")
    check_adapter(stored, read_model_config(resolve_model(model, revision)))
    print(f"{path} fits {model}")


def _rows(stored: StoredAdapter) -> list[tuple[str, str]]:
    layers = sorted({part.layer for part in stored.parts if part.layer is not None})
    places = dict.fromkeys(part.place for part in stored.parts)
    positions = sorted({part.position for part in stored.parts if part.position is not None})
    scales = sorted({part.scale for part in stored.parts})
    return [
        ("adapter", f"{stored.form}, {bytes_text(stored.num_bytes)}"),
        ("base", one_line(stored.base or "not named")),
        ("ranks", ", ".join(map(str, stored.ranks)) or "none"),
        ("scales", ", ".join(f"{scale:g}" for scale in scales)),
        ("places", ", ".join(places)),
        ("layers", _ranges(layers) or "none"),
        *([("positions", _ranges(positions))] if positions else []),
    ]


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in short, such as `0-5, 7`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)
