"""Writes random GPT-J checkpoints of any size in the Hugging Face layout, for trials, tests and benchmarks.

No tokenizer: that is `text.vocabulary`'s.

Every bias and LayerNorm differs from what it starts as in training, so that a test notices one which is left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.serialization import skip_data

from gptj_dist.checkpoint.files import CONFIG_FILE, PICKLED, SAFETENSORS, WeightForm
from gptj_dist.checkpoint.headers import DTYPE_CODES, ELEMENT_BYTES
from gptj_dist.checkpoint.index import expected_tensors
from gptj_dist.checkpoint.torch_file import read_torch_file
from gptj_dist.config import DTypeName, LayerRange, ModelConfig

_TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "BOOL": torch.bool,
}
_CODE_OF: Mapping[DTypeName, str] = {name: code for code, name in DTYPE_CODES.items()}

_Layout = dict[str, tuple[str, tuple[int, ...]]]
"""Tensor name -> safetensors dtype and shape, in the order of writing."""


def write_checkpoint(
    directory: Path,
    config: ModelConfig,
    *,
    seed: int = 0,
    init_std: float = 0.02,
    form: WeightForm = SAFETENSORS,
    max_shard_bytes: int | None = None,
    dtype: DTypeName | None = None,
    legacy_buffers: bool = False,
    on_written: Callable[[int], object] = lambda _: None,
) -> None:
    """Writes `config.json` and random weights, one tensor in memory at a time. The same seed gives the same weights.

    Args:
        directory: created if need be.
        init_std: standard deviation of all weights and biases; those of LayerNorm are around 1 instead of 0.
        max_shard_bytes: the most bytes of tensors in a file, unless one tensor has more; None puts all in one file.
        dtype: of the weights, in place of the config's.
        legacy_buffers: add the causal masks that old versions of transformers saved.
        on_written: called after each tensor with its bytes.
    """
    config = replace(config, dtype=dtype or config.dtype)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG_FILE).write_text(json.dumps(hf_config(config, init_std), indent=2) + "\n")
    shards = _cut(_layout(config, legacy_buffers), max_shard_bytes)
    files = [form.single]
    if len(shards) > 1:
        stem, _, suffix = form.single.partition(".")
        files = [f"{stem}-{i + 1:05}-of-{len(shards):05}.{suffix}" for i in range(len(shards))]
        _write_index(directory / form.index, dict(zip(files, shards, strict=True)))
    generator = torch.Generator().manual_seed(seed)
    for file, shard in zip(files, shards, strict=True):
        write = _write_torch_file if form is PICKLED else _write_safetensors
        write(directory / file, shard, _Values(generator, init_std, on_written))


def hf_config(config: ModelConfig, init_std: float = 0.02) -> dict[str, Any]:
    """The fields of `config.json`, as transformers names them."""
    return {
        "architectures": ["GPTJForCausalLM"],
        "model_type": "gptj",
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_embd": config.d_model,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "rotary_dim": config.rotary_dim,
        "n_inner": config.d_ff,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.layer_norm_eps,
        "initializer_range": init_std,
        "bos_token_id": config.eos_token_id,
        "eos_token_id": config.eos_token_id,
        "tie_word_embeddings": config.has_tied_embeddings,
        "dtype": config.dtype,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


def _layout(config: ModelConfig, legacy_buffers: bool) -> _Layout:
    code = _CODE_OF[config.dtype]
    whole_model = LayerRange(0, 1, 0, config.num_layers)
    layout: _Layout = {name: (code, shape) for name, shape in expected_tensors(config, whole_model).items()}
    if legacy_buffers:
        mask_shape = (1, 1, config.context_length, config.context_length)
        for layer in range(config.num_layers):
            layout[f"transformer.h.{layer}.attn.bias"] = ("BOOL", mask_shape)
            layout[f"transformer.h.{layer}.attn.masked_bias"] = ("F32", ())
    return layout


def _cut(layout: _Layout, max_shard_bytes: int | None) -> list[_Layout]:
    """Cuts the tensors, in order, into runs of at most `max_shard_bytes`, or of one tensor that has more."""
    shards: list[_Layout] = [{}]
    shard_bytes = 0
    for name, (code, shape) in layout.items():
        num_bytes = _num_bytes(code, shape)
        if max_shard_bytes is not None and shards[-1] and shard_bytes + num_bytes > max_shard_bytes:
            shards.append({})
            shard_bytes = 0
        shards[-1][name] = (code, shape)
        shard_bytes += num_bytes
    return shards


def _write_index(path: Path, shards: Mapping[str, _Layout]) -> None:
    total_bytes = sum(_num_bytes(code, shape) for shard in shards.values() for code, shape in shard.values())
    weight_map = {name: file for file, shard in shards.items() for name in shard}
    path.write_text(json.dumps({"metadata": {"total_size": total_bytes}, "weight_map": weight_map}, indent=2) + "\n")


class _Values:
    """Makes the numbers of one tensor after the other, as bytes."""

    def __init__(self, generator: torch.Generator, init_std: float, on_written: Callable[[int], object]) -> None:
        self._generator = generator
        self._init_std = init_std
        self._on_written = on_written

    def write(self, file: BinaryIO, name: str, code: str, shape: tuple[int, ...]) -> None:
        file.write(self._make(name, shape).to(_TORCH_DTYPES[code]).reshape(-1).view(torch.uint8).numpy().data)
        self._on_written(_num_bytes(code, shape))

    def _make(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name.endswith(".attn.bias"):
            return torch.ones(shape, dtype=torch.bool).tril()
        if name.endswith(".attn.masked_bias"):
            return torch.tensor(-1e9)
        values = torch.empty(shape).normal_(0.0, self._init_std, generator=self._generator)
        return values.add_(1.0) if name.endswith((".ln_1.weight", ".ln_f.weight")) else values


def _write_safetensors(path: Path, shard: _Layout, values: _Values) -> None:
    """Writes the safetensors format as a stream; the library's own writer wants the whole file in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (code, shape) in shard.items():
        begin, end = end, end + _num_bytes(code, shape)
        header[name] = {"dtype": code, "shape": shape, "data_offsets": (begin, end)}
    header_json = json.dumps(header).encode()
    header_json += b" " * (-len(header_json) % 8)
    with path.open("wb") as file:
        file.write(len(header_json).to_bytes(8, "little") + header_json)
        for name, (code, shape) in shard.items():
            values.write(file, name, code, shape)


def _write_torch_file(path: Path, shard: _Layout, values: _Values) -> None:
    """Has torch lay the file out for tensors that are never touched, so that they take no memory, then fills it."""
    with skip_data():
        torch.save({name: torch.empty(shape, dtype=_TORCH_DTYPES[code]) for name, (code, shape) in shard.items()}, path)
    with path.open("r+b") as file:
        for name, header in read_torch_file(path, file).items():
            file.seek(header.offset_bytes)
            values.write(file, name, *shard[name])


def _num_bytes(code: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * ELEMENT_BYTES[code]
