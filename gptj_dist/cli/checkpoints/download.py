"""`gptj-dist download`: fetches from the hub what serving needs, before it is needed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from gptj_dist.checkpoint.files import CONFIG_FILE, GENERATION_FILE, TOKENIZER_FILES, WEIGHT_FORMS
from gptj_dist.cli.options import Model
from gptj_dist.cli.pipeline_settings import Settings, takes_settings
from gptj_dist.config import LayerRange, PipelineConfig
from gptj_dist.errors import ConfigurationError


@takes_settings("stages", "layers", "revision")
def download(
    model: Model,
    settings: Settings,
    stage: Annotated[
        int | None, typer.Option(help="Fetch this stage's files alone, for the machine that will run it; from 0.")
    ] = None,
) -> None:
    """Fetch a model's files from the hub, and say where they lie. What is there already is not fetched again."""
    config = PipelineConfig(model, **settings)
    try:
        files = _fetch(config, stage)
    except KeyboardInterrupt:
        typer.echo("\nStopped. Complete files are kept: run the same again to fetch the rest.", err=True)
        raise
    from gptj_dist.sizes import bytes_text

    num_bytes = sum(file.stat().st_size for file in files)
    typer.echo(f"{len(files)} files, {num_bytes:,} bytes ({bytes_text(num_bytes)}): {files[0].parent}")


def _fetch(config: PipelineConfig, stage: int | None) -> list[Path]:
    """The files of all stages, or of one, and those that every machine needs.

    Raises:
        CheckpointError: the hub does not give them out, or they are not a GPT-J's.
        ConfigurationError: there is no such stage.
    """
    from gptj_dist.checkpoint.hub import fetch_weights, resolve_model
    from gptj_dist.stages.blueprint import draw_blueprint

    blueprint = draw_blueprint(config)
    directory = resolve_model(config.model, blueprint.config.revision)
    layers = LayerRange.whole(blueprint.model.num_layers) if stage is None else _choose(blueprint.layers, stage)
    weights = fetch_weights(config.model, directory, layers, blueprint.model, _print_file)
    metadata = [CONFIG_FILE, GENERATION_FILE, *TOKENIZER_FILES, *(form.index for form in WEIGHT_FORMS)]
    return [path for name in metadata if (path := directory / name).exists()] + weights


def _choose(layers: Sequence[LayerRange], stage: int) -> LayerRange:
    if len(layers) == 1:
        raise ConfigurationError("--stage needs --stages or --layers, as `gptj-dist serve` will be given them")
    if not 0 <= stage < len(layers):
        raise ConfigurationError(f"there is no stage {stage}: of {len(layers)} stages the last is {len(layers) - 1}")
    return layers[stage]


def _print_file(file: str) -> None:
    """Names a file where the progress bars of the hub's client, which do so, are not shown."""
    if not sys.stderr.isatty():
        typer.echo(f"Fetching {file} ...", err=True)
