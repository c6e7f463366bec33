"""Gives commands the options that set a pipeline, so that each option is declared once.

A command with a parameter `settings` takes the options that its decorator names in its place, and gets their values as
`PipelineConfig` and `LLM` want them.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeAlias, get_args

import typer

from gptj_dist.cli.options import PIPELINE_PANEL, Revision, finite
from gptj_dist.config import DeviceChoice, DTypeChoice, PipelineConfig, WireChoice
from gptj_dist.errors import ConfigurationError

Settings: TypeAlias = dict[str, Any]
"""Fields of `PipelineConfig`."""


def _option(
    help: str,
    metavar: str | None = None,
    parser: Callable[[str], Any] | None = None,
    complete: Callable[[str], list[str]] | None = None,
) -> Any:
    return typer.Option(
        help=help,
        metavar=metavar,
        rich_help_panel=PIPELINE_PANEL,
        case_sensitive=False,
        parser=parser,
        autocompletion=complete,
    )


def complete_devices(incomplete: str) -> list[str]:
    """What a shell offers for a kind of device, or for the last one of several."""
    before, comma, last = incomplete.rpartition(",")
    return [before + comma + kind for kind in get_args(DeviceChoice) if kind.startswith(last)]


OPTIONS: dict[str, Any] = {
    "stages": Annotated[int | None, _option("Number of stages; layers are cut by cost.")],
    "layers": Annotated[str | None, _option("Layers of each stage, such as 8,7,7,6.", "NUMBERS")],
    "device": Annotated[
        str,
        _option(
            "cpu, cuda or 'auto': GPUs where there are any. One for each stage: cpu,cuda.",
            "KIND",
            str.lower,
            complete_devices,
        ),
    ],
    "stage_nodes": Annotated[
        str | None,
        _option("Node of each stage: its address, a label of it, or 'any': 10.0.0.2,zone=b,any.", "NODES"),
    ],
    "interface": Annotated[
        str | None, _option("Network interface, by name or address, between stages; by default Ray's.", "NAME")
    ],
    "plan": Annotated[
        Literal["auto", "none"],
        _option("'auto' measures the devices and chooses number, layers and nodes of the stages."),
    ],
    "dtype": Annotated[
        DTypeChoice,
        _option(
            "float32, bfloat16, float16, or 'auto': the checkpoint's, or float32 if the device is bad at it.", "TYPE"
        ),
    ],
    "wire_dtype": Annotated[
        WireChoice, _option("Type of hidden states between stages: bfloat16, float16 or int8 for slow links.", "TYPE")
    ],
    "quantize": Annotated[
        str | None,
        _option(
            "int8 or int4: weights of fewer bits; or the bits of stages: 0-1:int8,2:int4. 'none': numbers of weights "
            "that another tool has quantised.",
            "BITS",
        ),
    ],
    "threads_per_stage": Annotated[
        int | None, _option("Most threads of a CPU stage; by default stages share the cores.")
    ],
    "cpus_per_stage": Annotated[float | None, _option("Ray CPUs of a stage.", "NUMBER", finite)],
    "gpus_per_stage": Annotated[float | None, _option("Ray GPUs of a stage, such as 0.5.", "NUMBER", finite)],
    "max_model_len": Annotated[int | None, _option("Most tokens of prompt and output together.")],
    "kv_cache_gb": Annotated[
        str, _option("KV cache of a pipeline in GB; 'auto' takes what is free, less a margin.", "GB")
    ],
    "max_batch_size": Annotated[int, _option("Most requests that run at once; more wait.")],
    "max_queued_requests": Annotated[int, _option("Most requests that wait in a pipeline; more are refused.")],
    "max_queued_tokens": Annotated[int, _option("Most prompt tokens that wait in a pipeline; then more are refused.")],
    "spares": Annotated[
        int, _option("Idle processes on each node that can take the place of a stage: a shorter pause when one dies.")
    ],
    "rebalance": Annotated[
        bool,
        typer.Option(
            "--rebalance/--no-rebalance",
            help="Move layers away from a stage that stays the slowest.",
            rich_help_panel=PIPELINE_PANEL,
        ),
    ],
    "prefix_cache": Annotated[
        bool,
        typer.Option(
            "--prefix-cache/--no-prefix-cache",
            help="Begin a prompt with what the KV cache still holds of its first tokens.",
            rich_help_panel=PIPELINE_PANEL,
        ),
    ],
    "speculation": Annotated[
        bool,
        typer.Option(
            "--speculation/--no-speculation",
            help="Guess the next tokens of repetitive text, and compute several in one step.",
            rich_help_panel=PIPELINE_PANEL,
        ),
    ],
    "generation_config": Annotated[
        Literal["auto", "none"],
        _option("'none' leaves out what generation_config.json says of sampling; its end tokens stay."),
    ],
    "peer_files": Annotated[
        bool | None,
        typer.Option(
            "--peer-files/--no-peer-files",
            help="Nodes without the model's files get those of their stages from this machine; by default where the "
            "model is a directory.",
            rich_help_panel=PIPELINE_PANEL,
        ),
    ],
    "revision": Revision,
}
"""By the names of the fields."""

_DEFAULTS = {field.name: field.default for field in dataclasses.fields(PipelineConfig)} | {"kv_cache_gb": "auto"}


def takes_settings(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replaces the parameter `settings` of a command by the options of these names."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def called(**given: Any) -> None:
            settings = {name: given.pop(name) for name in names}
            settings |= {name: parse(settings[name]) for name, parse in _PARSERS.items() if name in names}
            command(**given, settings=settings)

        called.__signature__ = _with_options(command, names)  # type: ignore[attr-defined]
        return called

    return decorate


def _with_options(command: Callable[..., None], names: tuple[str, ...]) -> inspect.Signature:
    """The signature that typer reads the options from."""
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        if parameter.name == "settings":
            parameters += [
                inspect.Parameter(name, parameter.kind, default=_DEFAULTS[name], annotation=OPTIONS[name])
                for name in names
            ]
        else:
            parameters.append(parameter)
    return inspect.Signature(parameters)


def parse_layers(text: str | None) -> tuple[int, ...] | None:
    """`8,7,7,6` as numbers.

    Raises:
        ConfigurationError: something else.
    """
    try:
        return None if text is None else tuple(map(int, text.split(",")))
    except ValueError:
        raise ConfigurationError(
            f"--layers takes numbers with commas between them, such as 8,7,7,6, not {text!r}"
        ) from None


def _parse_kv_cache_gb(text: str) -> float | None:
    """A number of GB, or None for `auto`.

    Raises:
        ConfigurationError: something else.
    """
    try:
        return None if text == "auto" else float(text)
    except ValueError:
        raise ConfigurationError(f"--kv-cache-gb takes a number or 'auto', not {text!r}") from None


def _parse_stage_nodes(text: str | None) -> tuple[str, ...] | None:
    """`10.0.0.2,zone=b,any` as the entries of `PipelineConfig.stage_nodes`."""
    return None if text is None else tuple(part.strip() for part in text.split(","))


_PARSERS: dict[str, Callable[[Any], Any]] = {
    "layers": parse_layers,
    "kv_cache_gb": _parse_kv_cache_gb,
    "stage_nodes": _parse_stage_nodes,
}
"""For fields whose option is a text."""
