"""`gptj-dist inspect`: what a checkpoint holds, and what is odd about it, without reading a weight."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from gptj_dist.cli.options import Model, Revision
from gptj_dist.config import DTYPE_BYTES, LayerRange, ModelConfig
from gptj_dist.quantization import weights_text
from gptj_dist.sizes import bytes_text

if TYPE_CHECKING:
    from gptj_dist.checkpoint.inspection import Inspection

_MAX_LISTED = 8


def inspect(model: Model, revision: Revision = None) -> None:
    """Show what a checkpoint holds, and what is odd about it. Reads no weights, and downloads none."""
    from gptj_dist.checkpoint.hub import local_directory, resolve_model
    from gptj_dist.checkpoint.index import read_model_config
    from gptj_dist.checkpoint.inspection import inspect_checkpoint, missing_files
    from gptj_dist.operate.text_settings import odd_text_settings, text_rows

    directory = resolve_model(model, revision)
    config = read_model_config(directory)
    rows = [("model", _shape_text(config))]
    oddities: Sequence[str] = ()
    advice: Iterable[str] = ()
    if local_directory(model) is None and (missing := missing_files(directory)):
        rows.append(("weights", _undownloaded(config, len(missing))))
    else:
        inspection = inspect_checkpoint(directory)
        rows += _weight_rows(inspection)
        oddities, advice = inspection.oddities, _advice(model, inspection)
    rows += text_rows(directory, config)
    remarks = [*oddities, *odd_text_settings(directory, config), *advice]
    print(directory)
    for name, text in rows:  # not wrapped, so that what is piped or copied stays whole
        print(f"{name:<10}  {text}")
    for remark in remarks:
        print(f"- {remark}")


def _shape_text(config: ModelConfig) -> str:
    return (
        f"{config.num_layers} layers of width {config.d_model}, {config.num_heads} heads, "
        f"context of {config.context_length} tokens, vocabulary of {config.vocab_size}"
    )


def _weight_rows(inspection: Inspection) -> Iterator[tuple[str, str]]:
    num_files = len(inspection.file_bytes)
    files = "1 file" if num_files == 1 else f"{num_files} files"
    yield "weights", f"{inspection.form}, {files}, {bytes_text(inspection.num_bytes)}"
    yield "parameters", f"{inspection.num_parameters:,}"
    texts = [f"{dtype}: {bytes_text(num_bytes)}" for dtype, num_bytes in inspection.bytes_of_dtype.items()]
    yield "dtype", next(iter(inspection.bytes_of_dtype)) if len(texts) == 1 else _listing(texts)
    yield "embedding", bytes_text(inspection.embedding_bytes)
    yield "layers", _layers_text(inspection.layer_bytes)
    tied = ", tied to the embedding" if inspection.config.has_tied_embeddings else ""
    yield "head", bytes_text(inspection.head_bytes) + tied


def _layers_text(layer_bytes: Sequence[int]) -> str:
    usual = Counter(layer_bytes).most_common(1)[0][0]
    odd = [f"layer {i}: {bytes_text(n)}" for i, n in enumerate(layer_bytes) if n != usual]
    return f"{len(layer_bytes)} of {bytes_text(usual)}" + (f", but {_listing(odd)}" if odd else "")


def _undownloaded(config: ModelConfig, num_missing: int) -> str:
    from gptj_dist.checkpoint.index import expected_tensors
    from gptj_dist.planning.cost import weight_bytes
    from gptj_dist.stages.blueprint import quantized_name

    whole = LayerRange.whole(config.num_layers)
    num_parameters = sum(map(math.prod, expected_tensors(replace(config, quantization=None), whole).values()))
    num_bytes = num_parameters * DTYPE_BYTES[config.dtype]
    size = bytes_text(num_bytes if config.quantization is None else weight_bytes(config, whole, config.dtype))
    files = "1 file is" if num_missing == 1 else f"{num_missing} files are"
    weights = weights_text(quantized_name(config, whole), config.dtype)
    return f"{files} not downloaded; by config.json {num_parameters:,} parameters, {weights}, {size}"


def _advice(model: str, inspection: Inspection) -> Iterator[str]:
    (file, num_bytes), *others = inspection.file_bytes.items()
    quantization = inspection.config.quantization
    anew = " --quantize int8" if quantization is not None and quantization.is_foreign else ""
    if not others:
        yield (
            f"every stage has to fetch all of {file}, {bytes_text(num_bytes)}: "
            f"`gptj-dist convert {model} DIRECTORY{anew}` gives each stage its own files"
            f"{', of weights quantised anew' if anew else ''}"
        )


def _listing(parts: Sequence[str]) -> str:
    more = f" and {len(parts) - _MAX_LISTED} more" if len(parts) > _MAX_LISTED else ""
    return ", ".join(parts[:_MAX_LISTED]) + more
