"""`gptj-dist drift`: what fewer bits change, measured on a text."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gptj_dist.cli.options import Model
from gptj_dist.cli.pipeline_settings import Settings, takes_settings
from gptj_dist.config import LayerRange, ModelConfig, PipelineConfig
from gptj_dist.errors import ConfigurationError
from gptj_dist.quantization import weights_text

if TYPE_CHECKING:
    from gptj_dist.operate.drift import Drift

WINDOW_TOKENS = 256
DEFAULT_BITS = ("int8", "int4")


@takes_settings("dtype", "quantize", "revision")
def drift(
    model: Model,
    settings: Settings,
    text: Annotated[
        Path | None, typer.Option(help="A file of UTF-8 text to read; for the demo, text that it has not seen.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the text to read.", min=WINDOW_TOKENS)] = 16 * WINDOW_TOKENS,
) -> None:
    """Measure how far a model with fewer bits is from itself in float32: perplexity, likeliest token, divergence.

    Without --quantize, int8 and int4 are both measured. The model reads windows of 256 tokens, layer by layer.
    """
    # What is wrong with the options is said before torch loads.
    configs = [PipelineConfig(model, **settings | {"quantize": settings["quantize"] or bits}) for bits in DEFAULT_BITS]
    configs = configs[:1] if settings["quantize"] else configs
    words = _read_text(model, text)

    from gptj_dist.checkpoint.hub import fetch_weights, resolve_model
    from gptj_dist.checkpoint.index import read_model_config
    from gptj_dist.operate.drift import measure, read
    from gptj_dist.stages.blueprint import choose_dtype, quantized_model
    from gptj_dist.stages.device import describe_device, open_device
    from gptj_dist.text.tokenizer import Tokenizer

    directory = resolve_model(model, configs[0].revision)
    found = read_model_config(directory)
    if found.quantization is not None:
        raise ConfigurationError(f"{model} is quantised already: measure the checkpoint that it was made of")
    token_ids = Tokenizer.load(directory).encode(words)[:tokens]
    windows = _windows(token_ids, found)
    models = [quantized_model(found, config, [found.num_layers]) for config in configs]
    fetch_weights(model, directory, LayerRange.whole(found.num_layers), found)
    rows = []
    _note(f"reading {sum(map(len, windows))} tokens in float32")
    reference = read(directory, found, "float32", windows)
    for config, quantized in zip(configs, models, strict=True):
        dtype = choose_dtype(config, quantized, [describe_device(open_device("cpu"))])
        name = weights_text(config.quantize, dtype)
        _note(f"reading them with {name}")
        rows.append((name, measure(reference, read(directory, quantized, dtype, windows), windows)))
    _print(rows)


def _read_text(model: str, path: Path | None) -> str:
    from gptj_dist.checkpoint.hub import DEMO, local_directory

    if path is None:
        demo = local_directory(DEMO)
        if model != DEMO or demo is None:
            raise ConfigurationError("--text names a file for the model to read; only the demo has one of its own")
        path = demo / "heldout.txt"
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"--text {path} cannot be read: {error}") from error


def _windows(token_ids: Sequence[int], config: ModelConfig) -> list[list[int]]:
    """Pieces of equal length, without what remains at the end."""
    length = min(WINDOW_TOKENS, config.context_length)
    starts = range(0, len(token_ids) - length + 1, length)
    if not starts:
        raise ConfigurationError(f"--text has {len(token_ids)} tokens, at least {length} are needed")
    return [list(token_ids[start : start + length]) for start in starts]


def _print(rows: Sequence[tuple[str, Drift]]) -> None:
    from rich.console import Console

    from gptj_dist.operate.tables import open_table

    table = open_table("weights", numbers=("perplexity", "change", "same top token", "KL, nats"))
    table.add_row("float32", f"{rows[0][1].reference_perplexity:.3f}", "", "", "")
    for name, found in rows:
        table.add_row(
            name,
            f"{found.perplexity:.3f}",
            f"{found.perplexity / found.reference_perplexity - 1:+.2%}",
            f"{found.num_alike / found.num_tokens:.2%}",
            f"{found.kl:.5f}",
        )
    console = Console(markup=False, emoji=False)
    console.print(table)
    console.print(f"{rows[0][1].num_tokens:,} tokens were predicted.")


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
