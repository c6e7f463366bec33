"""Writes random GPT-J checkpoints of any size in the Hugging Face layout, for trials, tests and benchmarks.

No tokenizer: that is `text.vocabulary`'s.

Every bias and LayerNorm differs from what it starts as in training, so that a test notices one which is left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.serialization import skip_data

from gptj_dist.checkpoint.files import CONFIG_FILE, PICKLED, SAFETENSORS, WeightForm
from gptj_dist.checkpoint.index import expected_tensors
from gptj_dist.checkpoint.loader import TORCH_DTYPES
from gptj_dist.checkpoint.torch_file import read_torch_file
from gptj_dist.checkpoint.writer import (
    CODE_OF,
    Layout,
    encode_index,
    shard_names,
    tensor_bytes,
    write_safetensors,
)
from gptj_dist.config import DTypeName, LayerRange, ModelConfig

_TORCH_DTYPES = {**TORCH_DTYPES, "BOOL": torch.bool}


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
        files = shard_names(form.single, len(shards))
        (directory / form.index).write_bytes(encode_index(dict(zip(files, shards, strict=True))))
    generator = torch.Generator().manual_seed(seed)
    for file, shard in zip(files, shards, strict=True):
        tensors = _random_tensors(shard, generator, init_std, on_written)
        if form is PICKLED:
            _write_torch_file(directory / file, shard, tensors)
        else:
            with (directory / file).open("wb") as out:
                write_safetensors(out, shard, tensors)


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
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_ids[0] if len(config.eos_token_ids) == 1 else list(config.eos_token_ids),
        "tie_word_embeddings": config.has_tied_embeddings,
        "dtype": config.dtype,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


def _layout(config: ModelConfig, legacy_buffers: bool) -> Layout:
    code = CODE_OF[config.dtype]
    whole_model = LayerRange.whole(config.num_layers)
    layout: Layout = {name: (code, shape) for name, shape in expected_tensors(config, whole_model).items()}
    if legacy_buffers:
        mask_shape = (1, 1, config.context_length, config.context_length)
        for layer in range(config.num_layers):
            layout[f"transformer.h.{layer}.attn.bias"] = ("BOOL", mask_shape)
            layout[f"transformer.h.{layer}.attn.masked_bias"] = ("F32", ())
    return layout


def _cut(layout: Layout, max_shard_bytes: int | None) -> list[Layout]:
    """Cuts the tensors, in order, into runs of at most `max_shard_bytes`, or of one tensor that has more."""
    shards: list[Layout] = [{}]
    shard_bytes = 0
    for name, (code, shape) in layout.items():
        num_bytes = tensor_bytes(code, shape)
        if max_shard_bytes is not None and shards[-1] and shard_bytes + num_bytes > max_shard_bytes:
            shards.append({})
            shard_bytes = 0
        shards[-1][name] = (code, shape)
        shard_bytes += num_bytes
    return shards


def _write_torch_file(path: Path, shard: Layout, tensors: Iterable[torch.Tensor]) -> None:
    """Has torch lay the file out for tensors that are never touched, so that they take no memory, then fills it."""
    with skip_data():
        torch.save({name: torch.empty(shape, dtype=_TORCH_DTYPES[code]) for name, (code, shape) in shard.items()}, path)
    with path.open("r+b") as file:
        for header, tensor in zip(read_torch_file(path, file).values(), tensors, strict=True):
            file.seek(header.offset_bytes)
            file.write(tensor.view(-1).view(torch.uint8).numpy().data)


def _random_tensors(
    shard: Layout, generator: torch.Generator, init_std: float, on_written: Callable[[int], object]
) -> Iterator[torch.Tensor]:
    for name, (code, shape) in shard.items():
        yield _values(name, shape, generator, init_std).to(_TORCH_DTYPES[code])
        on_written(tensor_bytes(code, shape))


def _values(name: str, shape: tuple[int, ...], generator: torch.Generator, init_std: float) -> torch.Tensor:
    if name.endswith(".attn.bias"):
        return torch.ones(shape, dtype=torch.bool).tril()
    if name.endswith(".attn.masked_bias"):
        return torch.tensor(-1e9)
    values = torch.empty(shape).normal_(0.0, init_std, generator=generator)
    return values.add_(1.0) if name.endswith((".ln_1.weight", ".ln_f.weight")) else values
