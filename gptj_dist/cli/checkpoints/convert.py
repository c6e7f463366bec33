"""`gptj-dist convert`: any form of checkpoint to safetensors of one file a layer, resumable, without filling memory."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from gptj_dist.cli.options import Model, Revision
from gptj_dist.config import DTypeChoice, DTypeName, LayerRange
from gptj_dist.errors import ConfigurationError
from gptj_dist.quantization import BITS_OF, Bits, weights_text
from gptj_dist.sizes import bytes_text

if TYPE_CHECKING:
    from torch import Tensor

    from gptj_dist.checkpoint.convert import Conversion


def convert(
    source: Model,
    destination: Annotated[Path, typer.Argument(help="The directory to write.", show_default=False)],
    dtype: Annotated[
        DTypeChoice, typer.Option(help="float32, bfloat16, float16, or 'auto': the checkpoint's.", metavar="TYPE")
    ] = "auto",
    quantize: Annotated[
        Literal["int8", "int4"] | None,
        typer.Option(
            help="int8 or int4: weights of fewer bits, which need no quantising when they load.", metavar="BITS"
        ),
    ] = None,
    form: Annotated[
        Literal["gptq"] | None, typer.Option(help="gptq: weights of --quantize int4 as AutoGPTQ's readers read them.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the checkpoint there, once the new one is whole.")
    ] = False,
    revision: Revision = None,
    delta: Annotated[
        str | None, typer.Option(metavar="BASE", help="Write only what SOURCE has more than this model: an adapter.")
    ] = None,
) -> None:
    """Rewrite a checkpoint as one safetensors file a layer, so that a stage's files are its own.

    Killed or interrupted, the same command resumes.
    """
    if delta is not None and quantize is not None:
        raise ConfigurationError("--delta writes an adapter, whose weights keep their type: leave out --quantize")
    if form is not None and quantize != "int4":
        raise ConfigurationError("--form gptq is for weights of 4 bits: add --quantize int4")
    if delta is not None:
        _convert_delta(source, revision, destination, delta)
        return
    start_s = time.monotonic()
    try:
        conversion = _convert(
            source, revision, destination, None if dtype == "auto" else dtype, quantize, form, overwrite
        )
    except KeyboardInterrupt:
        print("gptj-dist: interrupted; running it again resumes", file=sys.stderr)
        raise
    print(
        f"{conversion.directory}: {bytes_text(conversion.num_bytes)} in {conversion.num_files} files, "
        f"{weights_text(conversion.quantized, conversion.dtype)}, {time.monotonic() - start_s:.1f} s"
    )
    print(f"gptj-dist serve {conversion.directory}")


def _convert_delta(source: str, revision: str | None, destination: Path, base: str) -> None:
    from gptj_dist.checkpoint.delta import write_delta
    from gptj_dist.checkpoint.hub import fetch_weights, resolve_model
    from gptj_dist.checkpoint.index import read_model_config

    directories = []
    for model, commit in ((base, None), (source, revision)):
        directory = resolve_model(model, commit)
        config = read_model_config(directory)
        fetch_weights(model, directory, LayerRange.whole(config.num_layers), config)
        directories.append(directory)
    ranks = write_delta(directories[0], directories[1], destination)
    changed = "1 weight" if len(ranks) == 1 else f"{len(ranks)} weights"
    print(f"{destination}: {changed} changed, of rank {max(ranks.values())} at most")
    print(f"gptj-dist serve BASE --lora-modules {destination.stem}={destination}")


def _convert(
    source: str,
    revision: str | None,
    destination: Path,
    dtype: DTypeName | None,
    quantize: Literal["int8", "int4"] | None,
    form: Literal["gptq"] | None,
    overwrite: bool,
) -> Conversion:
    from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn

    from gptj_dist.checkpoint.convert import check_destination, convert_checkpoint
    from gptj_dist.checkpoint.hub import fetch_weights, resolve_model
    from gptj_dist.checkpoint.index import read_model_config
    from gptj_dist.cli.progress import displayed
    from gptj_dist.model.quantized import quantize as quantize_matrix

    directory = resolve_model(source, revision)
    check_destination(directory, destination, overwrite)  # before a download, which may take an hour
    config = read_model_config(directory)
    fetch_weights(source, directory, LayerRange.whole(config.num_layers), config)
    bits = None if quantize is None else BITS_OF[quantize]

    def in_bits(matrix: Tensor, bits: Bits) -> tuple[Tensor, Tensor]:
        made = quantize_matrix(matrix, bits)
        return made.values, made.scales

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with displayed(*columns, as_text=lambda done, all_: f"{bytes_text(done)} of {bytes_text(all_)}") as observer:
        return convert_checkpoint(directory, destination, dtype, overwrite, observer, bits, in_bits, form == "gptq")
