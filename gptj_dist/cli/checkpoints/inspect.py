"""`gptj-dist inspect`: what a checkpoint holds, and what is odd about it, without reading a weight."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gptj_dist.checkpoint.files import TOKENIZER_FILES
from gptj_dist.cli.options import Model, Revision
from gptj_dist.config import DTYPE_BYTES, LayerRange, ModelConfig
from gptj_dist.errors import CheckpointError
from gptj_dist.sizes import bytes_text

if TYPE_CHECKING:
    from gptj_dist.checkpoint.inspection import Inspection

_MAX_LISTED = 8


def inspect(model: Model, revision: Revision = None) -> None:
    """Show what a checkpoint holds, and what is odd about it. Reads no weights, and downloads none."""
    from gptj_dist.checkpoint.hub import local_directory, resolve_model
    from gptj_dist.checkpoint.index import read_model_config
    from gptj_dist.checkpoint.inspection import inspect_checkpoint, missing_files, odd_generation

    directory = resolve_model(model, revision)
    is_remote = local_directory(model) is None
    if is_remote and (missing := missing_files(directory)):
        config = read_model_config(directory)
        rows = [*_shape_rows(config), ("weights", _undownloaded(config, len(missing)))]
        _show(directory, [*rows, *_text_rows(directory, config)], [*odd_generation(directory, config)])
        return
    inspection = inspect_checkpoint(directory)
    rows = [*_shape_rows(inspection.config), *_weight_rows(inspection)]
    rows += _text_rows(directory, inspection.config)
    _show(directory, rows, [*inspection.oddities, *_advice(model, inspection)])


def _show(directory: Path, rows: Sequence[tuple[str, str]], remarks: Sequence[str]) -> None:
    """Prints lines that are not wrapped, so that what is piped or copied stays whole."""
    print(directory)
    for name, text in rows:
        print(f"{name:<10}  {text}")
    for remark in remarks:
        print(f"- {remark}")


def _shape_rows(config: ModelConfig) -> Iterator[tuple[str, str]]:
    yield (
        "model",
        f"{config.num_layers} layers of width {config.d_model}, {config.num_heads} heads, "
        f"context of {config.context_length} tokens, vocabulary of {config.vocab_size}",
    )


def _weight_rows(inspection: Inspection) -> Iterator[tuple[str, str]]:
    num_files = len(inspection.file_bytes)
    form = "safetensors" if inspection.is_safetensors else "PyTorch's pickle"
    files = "1 file" if num_files == 1 else f"{num_files} files"
    yield "weights", f"{form}, {files}, {bytes_text(inspection.num_bytes)}"
    yield "parameters", f"{inspection.num_parameters:,}"
    dtypes = inspection.bytes_of_dtype
    yield (
        "dtype",
        next(iter(dtypes)) if len(dtypes) == 1 else _listing([f"{d}: {bytes_text(n)}" for d, n in dtypes.items()]),
    )
    yield "embedding", bytes_text(inspection.embedding_bytes)
    yield "layers", _layers_text(inspection.layer_bytes)
    tied = ", tied to the embedding" if inspection.config.has_tied_embeddings else ""
    yield "head", bytes_text(inspection.head_bytes) + tied


def _layers_text(layer_bytes: Sequence[int]) -> str:
    usual = Counter(layer_bytes).most_common(1)[0][0]
    odd = [f"layer {i}: {bytes_text(n)}" for i, n in enumerate(layer_bytes) if n != usual]
    return f"{len(layer_bytes)} of {bytes_text(usual)}" + (f", but {_listing(odd)}" if odd else "")


def _text_rows(directory: Path, config: ModelConfig) -> Iterator[tuple[str, str]]:
    """How texts are read, how they end and how they are sampled."""
    yield from _tokenizer_rows(directory, config)
    yield "template", _template_text(directory)
    yield "end", ", ".join(_named(directory, config.eos_token_ids)) or "no token ends a text"
    if generation := list(_generation_texts(config)):
        yield "generation", "; ".join(generation)


def _template_text(directory: Path) -> str:
    from gptj_dist.text.chat import load_chat_template

    try:
        return "none: chat needs --chat-template" if load_chat_template(directory) is None else "for chat"
    except CheckpointError as error:
        return f"cannot be loaded, {error}"


def _named(directory: Path, token_ids: Sequence[int]) -> list[str]:
    """Tokens by their ids and, where the tokenizer has them, their names."""
    from gptj_dist.text.tokenizer import Tokenizer

    try:
        names = {token_id: Tokenizer.load(directory).token_text(token_id) for token_id in token_ids}
    except CheckpointError:
        names = {}
    return [f"{token_id} {names[token_id]!r:.40}" if names.get(token_id) else str(token_id) for token_id in token_ids]


def _generation_texts(config: ModelConfig) -> Iterator[str]:
    generation = config.generation
    if generation.defaults:
        yield "defaults " + ", ".join(f"{name} {value:g}" for name, value in generation.defaults)
    num_banned = len(generation.suppressed_ids) + len(generation.bad_words) + len(generation.first_suppressed_ids)
    if num_banned:
        yield f"{num_banned} tokens or runs of tokens are ruled out"


def _tokenizer_rows(directory: Path, config: ModelConfig) -> Iterator[tuple[str, str]]:
    """A tokenizer that cannot be loaded is worth a row, not the end: its checkpoint can be converted."""
    from gptj_dist.text.tokenizer import Tokenizer

    if not any((directory / name).exists() for name in TOKENIZER_FILES):
        yield "tokenizer", "none"
        return
    try:
        tokenizer = Tokenizer.load(directory)
    except CheckpointError as error:
        yield "tokenizer", f"cannot be loaded, {error}"
        return
    num_spare = len(tokenizer.spare_ids(config.vocab_size))
    text = f"{tokenizer.num_entries} entries for {config.vocab_size} rows"
    if num_spare:
        text += f"; {num_spare} rows stand for no text and are generated only where they are named"
    if tokenizer.num_entries > config.vocab_size:
        text += f"; {tokenizer.num_entries - config.vocab_size} entries have no row: text with them cannot be served"
    yield "tokenizer", text


def _undownloaded(config: ModelConfig, num_missing: int) -> str:
    from math import prod

    from gptj_dist.checkpoint.index import expected_tensors

    shapes = expected_tensors(config, LayerRange.whole(config.num_layers))
    num_parameters = sum(map(prod, shapes.values()))
    size = bytes_text(num_parameters * DTYPE_BYTES[config.dtype])
    files = "1 file is" if num_missing == 1 else f"{num_missing} files are"
    return f"{files} not downloaded; by config.json {num_parameters:,} parameters, {config.dtype}, {size}"


def _advice(model: str, inspection: Inspection) -> Iterator[str]:
    (file, num_bytes), *others = inspection.file_bytes.items()
    if not others:
        yield (
            f"every stage has to fetch all of {file}, {bytes_text(num_bytes)}: "
            f"`gptj-dist convert {model} DIRECTORY` gives each stage its own files"
        )


def _listing(parts: Sequence[str]) -> str:
    more = f" and {len(parts) - _MAX_LISTED} more" if len(parts) > _MAX_LISTED else ""
    return ", ".join(parts[:_MAX_LISTED]) + more
