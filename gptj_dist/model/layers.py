"""The parts of a GPT-J: its layers and its head, and how they are loaded.

GPT-J's layer feeds one LayerNorm to attention and MLP and adds both to its input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gptj_dist.config import DTypeName, ModelConfig
from gptj_dist.model.adapters import LayerChanges, unchanged
from gptj_dist.model.linear import Linear, can_pack, make_linear
from gptj_dist.model.quantized import (
    QuantizedEmbedding,
    QuantizedWeight,
    empty_weight,
    make_quantized_linear,
    quantize,
)
from gptj_dist.quantization import Bits, offset_name, scale_name

ReadTensor = Callable[[str, Tensor], None]
"""Fills a tensor with the checkpoint's tensor of that name."""

Embed = Callable[[Tensor], Tensor]
"""The rows of the embedding: int64 [rows] -> [rows, d_model]."""

Attend = Callable[[Tensor], None]
"""An `Attention` for one layer; takes the heads [rows, 3, num_heads, head_dim]."""

_STORED_AS: Mapping[DTypeName, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """Normalises each row; Ba et al. 2016."""

    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return torch.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


@dataclass(frozen=True, slots=True)
class FusedLayer:
    """Four products with GELU and both sums inside them, for packed and quantised weights.

    Args:
        qkv: [3 * d_model, d_model].
    """

    norm: LayerNorm
    qkv: Linear
    fc_in: Linear
    out_proj: Linear
    fc_out: Linear
    num_heads: int

    def __call__(self, hidden: Tensor, attend: Attend) -> Tensor:
        rows, d_model = hidden.shape
        normed = self.norm(hidden)
        qkv = self.qkv(normed)
        attend(qkv.view(rows, 3, self.num_heads, -1))
        # Attention has written its result over the values.
        hidden = self.out_proj.add(qkv[:, 2 * d_model :], hidden)
        return self.fc_out.add(self.fc_in.gelu(normed), hidden)

    def changed(self, hidden: Tensor, attend: Attend, changes: LayerChanges) -> Tensor:
        """The same, where some rows have adapters."""
        rows, d_model = hidden.shape
        normed = self.norm(hidden)
        changes.add(("norm",), hidden, normed, unchanged)
        qkv = self.qkv(normed)
        changes.add(("q", "k", "v"), normed, qkv, self.qkv)
        attend(qkv.view(rows, 3, self.num_heads, -1))
        attended = qkv[:, 2 * d_model :]
        hidden = self.out_proj.add(attended, hidden)
        changes.add(("out",), attended, hidden, self.out_proj)
        inner = changes.inner(normed, self.fc_in)
        hidden = self.fc_out.add(inner, hidden)
        changes.add(("fc_out",), inner, hidden, self.fc_out)
        changes.add(("hidden",), hidden, hidden, unchanged)
        return hidden


@dataclass(frozen=True, slots=True)
class JoinedLayer:
    """Two large products, for devices on which a kernel's launch costs more than an addition.

    Args:
        fan_in: [3 * d_model + d_ff, d_model]: q, k, v and fc_in.
        fan_out: [d_model, d_model + d_ff]: out_proj and fc_out.
    """

    norm: LayerNorm
    fan_in: Linear
    fan_out: Linear
    num_heads: int

    def __call__(self, hidden: Tensor, attend: Attend) -> Tensor:
        rows, d_model = hidden.shape
        fanned = self.fan_in(self.norm(hidden))
        # Attention writes its result over the values, whose columns lie right before the MLP's.
        attend(fanned[:, : 3 * d_model].view(rows, 3, self.num_heads, -1))
        inner = fanned[:, 3 * d_model :]
        torch.ops.aten.gelu.out(inner, approximate="tanh", out=inner)
        return hidden + self.fan_out(fanned[:, 2 * d_model :])

    def changed(self, hidden: Tensor, attend: Attend, changes: LayerChanges) -> Tensor:
        """The same, where some rows have adapters."""
        rows, d_model = hidden.shape
        normed = self.norm(hidden)
        changes.add(("norm",), hidden, normed, unchanged)
        fanned = self.fan_in(normed)
        inner = fanned[:, 3 * d_model :]
        heads = fanned[:, : 3 * d_model]
        changes.add(("q", "k", "v"), normed, heads, lambda x: self.fan_in(x)[:, : 3 * d_model])
        changes.add(("fc_in",), normed, inner, lambda x: self.fan_in(x)[:, 3 * d_model :])
        attend(heads.view(rows, 3, self.num_heads, -1))
        torch.ops.aten.gelu.out(inner, approximate="tanh", out=inner)
        hidden = hidden + self.fan_out(fanned[:, 2 * d_model :])
        d_ff = inner.shape[1]
        attended = fanned[:, 2 * d_model : 3 * d_model]
        changes.add(("out",), attended, hidden, lambda x: self.fan_out(F.pad(x, (0, d_ff))))
        changes.add(("fc_out",), inner, hidden, lambda x: self.fan_out(F.pad(x, (d_model, 0))))
        changes.add(("hidden",), hidden, hidden, unchanged)
        return hidden


Layer = FusedLayer | JoinedLayer


class PartLoader:
    """Makes the parts of a stage. Reads each tensor directly into its place in a joined one.

    If weights are packed or quantised, which copies them, each matrix is read into the memory of the one before it: new
    memory would cost as much time as the reading. Matrices that the checkpoint holds quantised are read as they are.
    """

    def __init__(self, read: ReadTensor, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._read = read
        self._config = config
        self._quantization = config.quantization
        self._dtype = dtype
        self._device = device
        self._packs = can_pack(device, dtype)
        self._scratch = torch.empty(0, dtype=torch.uint8, device=device)

    def embedding(self) -> Embed:
        """Of `vocab_size` tokens."""
        name, rows, columns = "transformer.wte.weight", self._config.vocab_size, self._config.d_model
        bits = None if self._quantization is None else self._quantization.embedding_bits
        if bits is None:
            return self._tensor(name, rows, columns).__getitem__
        return QuantizedEmbedding(self._quantized({name: rows}, columns, bits), self._dtype)

    def layer(self, index: int) -> Layer:
        """The layer with that number in the model."""
        name = f"transformer.h.{index}"
        bits = None if self._quantization is None else self._quantization.layer_bits[index]
        return self._joined_layer(name) if bits is None and not self._packs else self._fused_layer(name, bits)

    def head(self) -> tuple[LayerNorm, Linear]:
        """The last LayerNorm, and the product with [vocab_size, d_model]."""
        vocab_size, d_model = self._config.vocab_size, self._config.d_model
        name = "transformer.wte.weight" if self._config.has_tied_embeddings else "lm_head.weight"
        bits = None if self._quantization is None else self._quantization.head_bits
        projection = self._linear({name: vocab_size}, d_model, self._tensor("lm_head.bias", vocab_size), bits)
        return self._norm("transformer.ln_f"), projection

    def _fused_layer(self, name: str, bits: Bits | None) -> FusedLayer:
        d_model, d_ff = self._config.d_model, self._config.d_ff
        fc_in_bias, fc_out_bias = (
            self._tensor(f"{name}.mlp.fc_{i}.bias", n) for i, n in (("in", d_ff), ("out", d_model))
        )
        return FusedLayer(
            self._norm(f"{name}.ln_1"),
            self._linear({f"{name}.attn.{part}_proj.weight": d_model for part in "qkv"}, d_model, None, bits),
            self._linear({f"{name}.mlp.fc_in.weight": d_ff}, d_model, fc_in_bias, bits),
            self._linear({f"{name}.attn.out_proj.weight": d_model}, d_model, None, bits),
            self._linear({f"{name}.mlp.fc_out.weight": d_model}, d_ff, fc_out_bias, bits),
            self._config.num_heads,
        )

    def _joined_layer(self, name: str) -> JoinedLayer:
        d_model, d_ff = self._config.d_model, self._config.d_ff
        fan_in_bias = torch.zeros(3 * d_model + d_ff, dtype=self._dtype, device=self._device)
        self._read(f"{name}.mlp.fc_in.bias", fan_in_bias[3 * d_model :])
        rows_of = {f"{name}.attn.{part}_proj.weight": d_model for part in "qkv"} | {f"{name}.mlp.fc_in.weight": d_ff}
        fan_out = self._matrix(d_model, d_model + d_ff)
        self._read(f"{name}.attn.out_proj.weight", fan_out[:, :d_model])
        self._read(f"{name}.mlp.fc_out.weight", fan_out[:, d_model:])
        return JoinedLayer(
            self._norm(f"{name}.ln_1"),
            self._linear(rows_of, d_model, fan_in_bias, None),
            make_linear(fan_out, self._tensor(f"{name}.mlp.fc_out.bias", d_model)),
            self._config.num_heads,
        )

    def _linear(self, rows_of: dict[str, int], columns: int, bias: Tensor | None, bits: Bits | None) -> Linear:
        """A product with matrices of the checkpoint, given by name and number of rows, one below the other."""
        if bits is not None:
            return make_quantized_linear(self._quantized(rows_of, columns, bits), bias, self._dtype)
        weight = self._matrix(sum(rows_of.values()), columns)
        self._read_rows(rows_of, weight)
        return make_linear(weight, bias)

    def _quantized(self, rows_of: dict[str, int], columns: int, bits: Bits) -> QuantizedWeight:
        """Matrices of the checkpoint in few bits, one below the other."""
        assert self._quantization is not None
        num_rows = sum(rows_of.values())
        if not self._quantization.is_stored:
            weight = self._scratch_matrix(num_rows, columns, _STORED_AS[self._config.dtype])
            self._read_rows(rows_of, weight)
            return quantize(weight, bits)
        group, has_offsets = self._quantization.group_of(columns, bits), self._quantization.has_offsets
        made = empty_weight(num_rows, columns, bits, group, self._device, has_offsets)
        self._read_rows(rows_of, made.values)
        self._read_rows({scale_name(name): rows for name, rows in rows_of.items()}, made.scales)
        if made.offsets is not None:
            self._read_rows({offset_name(name): rows for name, rows in rows_of.items()}, made.offsets)
        return made

    def _read_rows(self, rows_of: dict[str, int], out: Tensor) -> None:
        """Reads tensors, given by name and number of rows, one below the other."""
        for name, part in zip(rows_of, torch.split(out, list(rows_of.values())), strict=True):
            self._read(name, part)

    def _norm(self, name: str) -> LayerNorm:
        weight, bias = (self._tensor(f"{name}.{part}", self._config.d_model) for part in ("weight", "bias"))
        return LayerNorm(weight, bias, self._config.layer_norm_eps)

    def _tensor(self, name: str, *shape: int) -> Tensor:
        tensor = torch.empty(shape, dtype=self._dtype, device=self._device)
        self._read(name, tensor)
        return tensor

    def _matrix(self, rows: int, columns: int) -> Tensor:
        """Memory for the weight of a `Linear`. If weights are packed, the next call reuses it."""
        if not self._packs:
            return torch.empty(rows, columns, dtype=self._dtype, device=self._device)
        return self._scratch_matrix(rows, columns, self._dtype)

    def _scratch_matrix(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Memory that the next call reuses."""
        num_bytes = rows * columns * dtype.itemsize
        if self._scratch.numel() < num_bytes:
            self._scratch = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        return self._scratch[:num_bytes].view(dtype).view(rows, columns)
