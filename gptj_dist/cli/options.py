"""Arguments that several verbs share, and what becomes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import typer

from gptj_dist.errors import ConfigurationError

Model: TypeAlias = Annotated[
    str, typer.Argument(help="'demo', a directory in the Hugging Face layout, or a hub name.", show_default=False)
]
Revision: TypeAlias = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
Stages: TypeAlias = Annotated[int | None, typer.Option(help="Number of stages; layers are cut by cost.")]
Layers: TypeAlias = Annotated[str | None, typer.Option(help="Layers of each stage, such as 8,7,7,6.")]
Device: TypeAlias = Annotated[
    Literal["auto", "cpu", "cuda"], typer.Option(help="'auto' takes GPUs where there are any.")
]
DType: TypeAlias = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(help="'auto' takes the checkpoint's, or float32 if the device is bad at that."),
]
ThreadsPerStage: TypeAlias = Annotated[
    int | None, typer.Option(help="Threads of a CPU stage; by default stages share the cores.")
]
CPUsPerStage: TypeAlias = Annotated[float | None, typer.Option(help="Ray CPUs that a stage takes.")]
GPUsPerStage: TypeAlias = Annotated[float | None, typer.Option(help="Ray GPUs that a stage takes, such as 0.5.")]
Host: TypeAlias = Annotated[str, typer.Option(help="Address to listen at.")]
Port: TypeAlias = Annotated[int, typer.Option(help="Port to listen at.")]
MaxModelLen: TypeAlias = Annotated[int | None, typer.Option(help="Most tokens of prompt and output together.")]
KVCacheGB: TypeAlias = Annotated[
    str, typer.Option(help="KV cache of a pipeline in GB; 'auto' takes what is free, less a margin.")
]
MaxBatchSize: TypeAlias = Annotated[int, typer.Option(help="Most requests that run at once; more wait.")]
Trace: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Write when each stage computed what, for https://ui.perfetto.dev.", show_default=False
    ),
]

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8000
DEFAULT_APP_NAME = "gptj-dist"


def parse_layers(text: str | None) -> tuple[int, ...] | None:
    """`8,7,7,6` as numbers.

    Raises:
        ConfigurationError: something else.
    """
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigurationError(
            f"--layers takes numbers with commas between them, such as 8,7,7,6, not {text!r}"
        ) from None


def parse_kv_cache_gb(text: str) -> float | None:
    """A number of GB, or None for `auto`.

    Raises:
        ConfigurationError: something else.
    """
    if text == "auto":
        return None
    try:
        return float(text)
    except ValueError:
        raise ConfigurationError(f"--kv-cache-gb takes a number or 'auto', not {text!r}") from None
