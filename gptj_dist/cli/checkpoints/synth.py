"""`gptj-dist synth`: a checkpoint of random weights, to try things at any size without a download."""

from __future__ import annotations

import math
import secrets
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from gptj_dist.cli.options import finite
from gptj_dist.config import DTYPE_BYTES, DTypeName, LayerRange, ModelConfig
from gptj_dist.errors import ConfigurationError
from gptj_dist.text.vocabulary import eos_token_id

SHAPES = {
    "6b": ModelConfig(50400, 28, 4096, 16, 64, 16384, 2048, (50256,)),
    "wide": ModelConfig(50400, 7, 4096, 16, 64, 16384, 2048, (50256,)),
    "deep": ModelConfig(50400, 28, 1024, 16, 32, 4096, 2048, (50256,)),
    "tiny": ModelConfig(512, 4, 64, 4, 8, 256, 256, (511,)),
}
"""In this order: GPT-J-6B; a quarter of its layers; all its layers at a sixteenth of the size; tiny."""

MAX_SEED = 2**63 - 1
"""Of torch's generator."""

Size = Annotated[int | None, typer.Option(min=1)]


def synth(
    shape: Annotated[Literal["6b", "wide", "deep", "tiny"], typer.Argument(help="The shape to start from.")],
    dst: Annotated[Path, typer.Argument(help="Directory to write; it must not exist.")],
    dtype: Annotated[
        DTypeName, typer.Option(help="Of the weights: float32, bfloat16 or float16.", metavar="TYPE")
    ] = "bfloat16",
    form: Annotated[
        Literal["safetensors", "bin"], typer.Option(help="'bin' is PyTorch's pickle, causal masks and all.")
    ] = "safetensors",
    shard_gb: Annotated[
        float | None, typer.Option(help="Most GB in a file; by default one file has all.", metavar="GB", parser=finite)
    ] = None,
    seed: Annotated[int, typer.Option(min=-MAX_SEED, max=MAX_SEED, help="The same seed gives the same weights.")] = 0,
    num_layers: Size = None,
    d_model: Size = None,
    num_heads: Size = None,
    rotary_dim: Size = None,
    d_ff: Size = None,
    vocab_size: Size = None,
    context_length: Size = None,
) -> None:
    """Write random weights of GPT-J's architecture, with a tokenizer: for trials without a download.

    GPT-J-6B takes about 12 GB of disk: gptj-dist synth 6b /tmp/gptj-6b
    """
    if shard_gb is not None and shard_gb <= 0:
        raise ConfigurationError(f"--shard-gb must be positive, got {shard_gb:g}")
    model = SHAPES[shape]
    vocab_size = vocab_size or model.vocab_size
    config = replace(
        model,
        num_layers=num_layers or model.num_layers,
        d_model=d_model or model.d_model,
        num_heads=num_heads or model.num_heads,
        rotary_dim=rotary_dim or model.rotary_dim,
        d_ff=d_ff or 4 * (d_model or model.d_model),
        vocab_size=vocab_size,
        eos_token_ids=(eos_token_id(vocab_size),),
        bos_token_id=eos_token_id(vocab_size),
        context_length=context_length or model.context_length,
        dtype=dtype,
    )
    write(config, dst, form, shard_gb, seed)


def write(
    config: ModelConfig, dst: Path, form: Literal["safetensors", "bin"], shard_gb: float | None, seed: int
) -> None:
    """Writes beside `dst`, and renames when all is there.

    Raises:
        ConfigurationError: `dst` exists, or the numbers describe no GPT-J.
    """
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    from gptj_dist.checkpoint.files import PICKLED, SAFETENSORS
    from gptj_dist.checkpoint.index import expected_tensors
    from gptj_dist.checkpoint.partial import PartialDirectory, settle
    from gptj_dist.checkpoint.synthetic import hf_config, write_checkpoint
    from gptj_dist.text.vocabulary import write_tokenizer

    ModelConfig.from_hf(hf_config(config))
    settle(dst)
    if dst.exists():
        raise ConfigurationError(f"{dst} exists already; choose another name or remove it")
    partial = PartialDirectory(dst, secrets.token_hex())
    whole_model = LayerRange.whole(config.num_layers)
    num_parameters = sum(map(math.prod, expected_tensors(config, whole_model).values()))
    columns = (BarColumn(), DownloadColumn(), TimeRemainingColumn())
    try:
        partial.begin()
        write_tokenizer(partial.path, config.vocab_size)
        with Progress("Writing", *columns, transient=True) as progress:
            task = progress.add_task("", total=num_parameters * DTYPE_BYTES[config.dtype])
            write_checkpoint(
                partial.path,
                config,
                seed=seed,
                form=PICKLED if form == "bin" else SAFETENSORS,
                max_shard_bytes=None if shard_gb is None else int(shard_gb * 1e9),
                legacy_buffers=form == "bin",
                on_written=lambda num_bytes: progress.advance(task, num_bytes),
            )
        partial.publish(overwrite=False)
    except OSError as error:
        raise ConfigurationError(f"cannot write {dst}: {error.strerror or error}") from error
    finally:
        partial.discard()
    print(f"{dst}: a random GPT-J of {num_parameters:,} parameters in {config.dtype}.")
    print(f"Serve it with: gptj-dist serve {dst}")
