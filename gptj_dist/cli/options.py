"""Arguments that several verbs share, and their parsers."""

from __future__ import annotations

import glob
from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import typer

from gptj_dist.cli.streams import as_text
from gptj_dist.errors import ConfigurationError

PIPELINE_PANEL = "Pipeline"


def finite(value: str | float) -> float:
    """Parser of options that take a number. Refuses infinity and NaN.

    Raises:
        typer.BadParameter: the text is no number, or not a finite one.
    """
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if not isfinite(number):
        raise typer.BadParameter(f"{value!r:.80} is not a finite number.")
    return number


def _setting(help: str, metavar: str | None = None, parser: Callable[[str], Any] | None = None) -> Any:
    """An option of a pipeline; `--help` groups them."""
    return typer.Option(help=help, metavar=metavar, rich_help_panel=PIPELINE_PANEL, case_sensitive=False, parser=parser)


def complete_model(incomplete: str) -> list[str]:
    """What a shell offers for a model: `demo`, and directories that hold one."""
    directories = [str(path.parent) for path in Path().glob(f"{glob.escape(incomplete)}*/config.json")]
    return [name for name in ("demo", *sorted(directories)) if name.startswith(incomplete)]


Model: TypeAlias = Annotated[
    str,
    typer.Argument(
        help="'demo', a directory in the Hugging Face layout, or a hub name.",
        show_default=False,
        autocompletion=complete_model,
    ),
]
Stages: TypeAlias = Annotated[int | None, _setting("Number of stages; layers are cut by cost.")]
Layers: TypeAlias = Annotated[str | None, _setting("Layers of each stage, such as 8,7,7,6.", "NUMBERS")]
Device: TypeAlias = Annotated[Literal["auto", "cpu", "cuda"], _setting("'auto' takes GPUs where there are any.")]
DType: TypeAlias = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    _setting("float32, bfloat16, float16, or 'auto': the checkpoint's, or float32 if the device is bad at it.", "TYPE"),
]
ThreadsPerStage: TypeAlias = Annotated[
    int | None, _setting("Most threads of a CPU stage; by default stages share the cores.")
]
CPUsPerStage: TypeAlias = Annotated[float | None, _setting("Ray CPUs of a stage.", "NUMBER", finite)]
GPUsPerStage: TypeAlias = Annotated[float | None, _setting("Ray GPUs of a stage, such as 0.5.", "NUMBER", finite)]
MaxModelLen: TypeAlias = Annotated[int | None, _setting("Most tokens of prompt and output together.")]
KVCacheGB: TypeAlias = Annotated[
    str, _setting("KV cache of a pipeline in GB; 'auto' takes what is free, less a margin.", "GB")
]
GenerationConfig: TypeAlias = Annotated[
    Literal["auto", "none"],
    _setting("'none' leaves out what generation_config.json says of sampling; its end tokens stay."),
]
MaxBatchSize: TypeAlias = Annotated[int, _setting("Most requests that run at once; more wait.")]
MaxQueuedRequests: TypeAlias = Annotated[int, _setting("Most requests that wait in a pipeline; more are refused.")]
Revision: TypeAlias = Annotated[
    str | None, typer.Option(help="Branch, tag or commit on the hub.", metavar="NAME", parser=as_text)
]
ServedModelName: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(help="What clients call the model; again for an alias.", metavar="NAME", parser=as_text),
]
TemplateFile: TypeAlias = Annotated[
    Path | None, typer.Option(help="Jinja template that makes conversations prompts.", metavar="FILE")
]
ChatMaxTokens: TypeAlias = Annotated[
    int, typer.Option(help="Most tokens of a chat's answer, where the request sets no limit.", metavar="N")
]
ChatStop: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        help="String that ends a chat's answer, where the request has no stop; again for another, '' for none. By "
        "default the text by which the chat template begins a user's message.",
        metavar="STRING",
        show_default=False,
    ),
]
Host: TypeAlias = Annotated[str, typer.Option(help="Address to listen at.")]
Port: TypeAlias = Annotated[int, typer.Option(help="Port to listen at.")]
TraceFile: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Write when each stage computed what, for https://ui.perfetto.dev.", show_default=False
    ),
]

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8000
DEFAULT_APP_NAME = "gptj-dist"
DEFAULT_DRAIN_S = 30.0
DEFAULT_START_TIMEOUT_S = 120.0


def parse_chat_stop(given: list[str] | None) -> tuple[str, ...] | None:
    """The strings of `--chat-stop`; None takes the chat template's."""
    return None if given is None else tuple(text for text in given if text)


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
