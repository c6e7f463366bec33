"""`gptj-dist plan`: the partition, its memory and the reason for it; its speed on devices named, or checked on this."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from gptj_dist.cli.options import Model
from gptj_dist.cli.pipeline_settings import Settings, takes_settings
from gptj_dist.config import BLOCK_SIZE_TOKENS, ModelConfig, PipelineConfig
from gptj_dist.errors import ConfigurationError
from gptj_dist.planning.partition import (
    OUTPUT_TOKEN_COST,
    PROMPT_TOKENS_PER_OUTPUT_TOKEN,
    cut_cost,
    lm_head_cost_layers,
)
from gptj_dist.sizes import bytes_text

if TYPE_CHECKING:
    from gptj_dist.stages.blueprint import Blueprint, StageReport


@takes_settings(
    "stages", "layers", "device", "dtype", "quantize", "max_model_len", "kv_cache_gb", "max_batch_size", "revision"
)
def plan(
    model: Model,
    settings: Settings,
    devices: Annotated[
        str | None,
        typer.Option(
            help="A YAML file that lists devices, 'cluster', or 'measured' for a cluster whose CPUs are measured: find "
            "the best cut for them, and its speed."
        ),
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster that '--devices cluster' or 'measured' asks.", envvar="RAY_ADDRESS")
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(
            help="Requests a second. With --devices: simulate how many pipelines of how many stages serve them.",
            min=0.001,
        ),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(help="With --rate: of each prompt, on average.", min=1)] = 512,
    output_tokens: Annotated[int, typer.Option(help="With --rate: of each output, on average.", min=1)] = 128,
    check: Annotated[
        bool, typer.Option("--check", help="Predict the speed on this machine, then load the model and measure it.")
    ] = False,
) -> None:
    """Show how a model would be cut into stages, and why. Loads no weights but with --check."""
    config = PipelineConfig(model, **settings)
    if devices is not None and check:
        raise ConfigurationError("--check measures this machine, --devices describes others: give one of them")
    if rate is not None:
        _print_simulation(config, devices, address, rate, prompt_tokens, output_tokens)
    elif devices is not None:
        from gptj_dist.cli.server.plan_devices import print_best_pipeline

        measured = ("device", "stages") if devices == "measured" else ()
        _refuse_beside("--devices", config, allowed=("dtype", "quantize", "max_model_len", *measured))
        print_best_pipeline(config, devices, address)
    elif check:
        from gptj_dist.cli.server.plan_check import print_check

        _refuse_beside("--check", config, allowed=("dtype",))
        if not print_check(config):
            raise typer.Exit(1)
    else:
        _print_cut(config)


def _print_simulation(
    config: PipelineConfig, devices: str | None, address: str | None, rate: float, prompt: int, output: int
) -> None:
    from gptj_dist.cli.server.plan_devices import workload_of
    from gptj_dist.cli.server.plan_simulation import print_simulation

    if devices is None:
        raise ConfigurationError("--rate simulates pipelines of devices: name them with --devices")
    _refuse_beside("--devices", config, allowed=("dtype", "quantize", "max_model_len", "max_batch_size"))
    print_simulation(config, *workload_of(config, devices, address), rate, prompt, output)


def _refuse_beside(option: str, config: PipelineConfig, allowed: tuple[str, ...]) -> None:
    """Refuses settings that would have no effect.

    Raises:
        ConfigurationError: there are such settings; the message names them.
    """
    given, default = asdict(config), asdict(PipelineConfig(config.model, revision=config.revision))
    changed = [name for name in given if name not in allowed and given[name] != default[name]]
    if changed:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in changed)
        raise ConfigurationError(f"{option} chooses for itself: it does not go with {names}")


def _print_cut(config: PipelineConfig) -> None:
    """The cut for equal devices, and what its stages would take of this machine's memory."""
    from rich.console import Console

    from gptj_dist.operate.tables import stage_table
    from gptj_dist.stages.blueprint import draw_blueprint
    from gptj_dist.stages.room import count_kv_blocks

    blueprint = draw_blueprint(config)
    reports = _foresee(blueprint)
    console = Console(markup=False, emoji=False)
    num_kv_tokens: int | None = None
    try:
        num_kv_tokens = count_kv_blocks(blueprint, reports) * BLOCK_SIZE_TOKENS
    except ConfigurationError as error:
        if config.kv_cache_gb is not None:
            raise
        # The cut may be for other machines.
        console.print(f"All stages together do not fit this machine: {error}.")
    console.print(stage_table(reports, num_kv_tokens))
    weights = sum(report.weight_bytes for report in reports)
    kv_bytes = sum(report.kv_bytes_per_token for report in reports)
    console.print(f"All stages on this machine: {bytes_text(weights)} of weights, {bytes_text(kv_bytes)} a KV token.")
    for line in _reasons(blueprint.model, tuple(r.num_layers for r in blueprint.layers), config.layers is not None):
        console.print(line)
    console.print("Speed is predicted by --devices (for devices you name) and --check (on this machine, and measured).")


def _foresee(blueprint: Blueprint) -> tuple[StageReport, ...]:
    """The reports of stages that are all on this machine, each on the first device of its kind."""
    from gptj_dist.stages.device import describe_device, free_bytes, local_device
    from gptj_dist.stages.room import foresee_reports

    kinds, devices = zip(*map(local_device, blueprint.config.devices), strict=True)
    reports = {device: describe_device(device) for device in set(devices)}
    free = {report.memory_pool: free_bytes(device) for device, report in reports.items()}
    return foresee_reports(blueprint, kinds, [reports[device] for device in devices], free)


def _reasons(model: ModelConfig, layers: tuple[int, ...], is_explicit: bool) -> list[str]:
    cost, head = cut_cost(model, layers), lm_head_cost_layers(model)
    lines = [
        f"lm_head counts as {head:.2f} layers, for output tokens only. Each of them is assumed to come with "
        f"{PROMPT_TOKENS_PER_OUTPUT_TOKEN} prompt tokens, and to cost as much as {OUTPUT_TOKEN_COST}.",
        f"The slowest stage costs {cost.prompt:g} layers for prompts, {cost.output:.2f} for outputs: it leaves "
        f"{sum(layers) / len(layers) / cost.prompt:.0%} and {(sum(layers) + head) / len(layers) / cost.output:.0%} of "
        "the ideal speed.",
    ]
    if is_explicit:
        lines.append("The layers were given; without --layers the planner makes that traffic as cheap as can be.")
    return lines
