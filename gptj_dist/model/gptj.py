"""The layers of one stage, with embedding and head where the stage has them. Knows no requests but through the cache.

GPT-J's layer feeds one LayerNorm to attention and MLP and adds both to its input. So a layer is two matrix products:
one makes queries, keys, values and the MLP's inner row together, one more takes the attended values and the inner row
back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gptj_dist.config import LayerRange, ModelConfig
from gptj_dist.model.attention import Attention, MakeAttention, choose_attention
from gptj_dist.model.inputs import MicroBatch, to_device
from gptj_dist.model.kv_cache import KVCache
from gptj_dist.model.linear import Linear, can_pack
from gptj_dist.model.rotary import RotaryTable

ReadTensor = Callable[[str, Tensor], None]
"""Fills a tensor with that of a checkpoint, by its name there."""


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """Normalises each row; Ba et al. 2016."""

    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


@dataclass(frozen=True, slots=True)
class Layer:
    """One of GPT-J's layers.

    Args:
        fan_in: [3 * d_model + d_ff, d_model]: q, k, v and fc_in.
        fan_out: [d_model, d_model + d_ff]: out_proj and fc_out.
    """

    norm: LayerNorm
    fan_in: Linear
    fan_out: Linear


class StageModel:
    """The layers of one stage on one device.

    Args:
        read: reads a tensor of the checkpoint; called once a tensor, layer by layer, so that nothing is held twice.
        on_layer: called as each layer is ready, with the number that are.
        make_attention: to be used with a matching cache; None takes the device's.
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: LayerRange,
        read: ReadTensor,
        dtype: torch.dtype,
        device: torch.device,
        on_layer: Callable[[int], None] = lambda _: None,
        make_attention: MakeAttention | None = None,
    ) -> None:
        self._config = config
        self._dtype = dtype
        self._device = device
        self._is_exact = dtype == torch.float32
        self._rotary = RotaryTable(config.context_length, config.rotary_dim, device)
        self._make_attention = make_attention or choose_attention(device, self._is_exact)
        load = _Loader(read, config, dtype, device)
        self._embedding = load.embedding() if layers.is_first else None
        self._layers = []
        for index in range(layers.start, layers.stop):
            self._layers.append(load.layer(f"transformer.h.{index}"))
            on_layer(len(self._layers))
        self._head = load.head() if layers.is_last else None

    @property
    def rotary(self) -> RotaryTable:
        """For whoever makes an attention."""
        return self._rotary

    def embed(self, token_ids: Tensor) -> Tensor:
        """The first stage's input: int64 [rows] -> [rows, d_model]."""
        if self._embedding is None:
            raise ValueError("only the first stage embeds")
        return self._embedding[to_device(token_ids, self._device)]

    def forward(self, hidden: Tensor, batch: MicroBatch, cache: KVCache) -> Tensor:
        """Runs the stage's layers over [rows, d_model], writing keys and values to the cache."""
        return self.run_layers(hidden, self._make_attention(cache, batch, self._rotary))

    def run_layers(self, hidden: Tensor, attend: Attention) -> Tensor:
        """As `forward`, with an attention made for the rows."""
        for index, layer in enumerate(self._layers):
            fanned = layer.fan_in(layer.norm(hidden))
            # Attention writes its result over the values, whose columns stand right before the MLP's.
            attend(index, fanned[:, : 3 * self._config.d_model].view(len(hidden), 3, self._config.num_heads, -1))
            fanned[:, 3 * self._config.d_model :] = self._gelu(fanned[:, 3 * self._config.d_model :])
            hidden = hidden + layer.fan_out(fanned[:, 2 * self._config.d_model :])
        return hidden

    def blank_inputs(self, num_rows: int) -> Tensor:
        """Room for what `compute` takes, filled with something that it can take."""
        if self._embedding is not None:
            return torch.zeros(num_rows, dtype=torch.int64, device=self._device)
        return torch.zeros(num_rows, self._config.d_model, dtype=self._dtype, device=self._device)

    def compute(self, inputs: Tensor, attend: Attention) -> Tensor:
        """All that the stage does.

        Args:
            inputs: on the device; token ids int64 [rows] for the first stage, hidden states [rows, d_model] for others.

        Returns:
            The logits float32 [rows, vocab_size] of the last stage, the hidden states of others.
        """
        hidden = self.run_layers(inputs if self._embedding is None else self.embed(inputs), attend)
        return hidden if self._head is None else self.logits(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """The last stage's output: [rows, d_model] -> float32 [rows, vocab_size]."""
        if self._head is None:
            raise ValueError("only the last stage has logits")
        norm, projection = self._head
        return projection(norm(hidden)).float()

    def _gelu(self, x: Tensor) -> Tensor:
        """GELU in its tanh form, Hendrycks & Gimpel 2016.

        torch's fused one rounds the last elements of a run differently, which the exact mode cannot have.
        """
        if not self._is_exact:
            return F.gelu(x, approximate="tanh")
        inner = (x * x * x * 0.044715).add_(x).mul_(math.sqrt(2 / math.pi))
        return inner.tanh_().add_(1).mul_(x).mul_(0.5)


class _Loader:
    """Makes the parts of a stage, reading each tensor right into its place in a joined one.

    Where weights are packed, which copies them, one matrix is read into the memory of the one before: getting fresh
    memory for each costs as much time as reading it.
    """

    def __init__(self, read: ReadTensor, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._read = read
        self._config = config
        self._dtype = dtype
        self._device = device
        self._scratch = torch.empty(0, dtype=dtype, device=device)

    def embedding(self) -> Tensor:
        return self._tensor("transformer.wte.weight", self._config.vocab_size, self._config.d_model)

    def layer(self, name: str) -> Layer:
        return Layer(self._norm(f"{name}.ln_1"), self._fan_in(name), self._fan_out(name))

    def head(self) -> tuple[LayerNorm, Linear]:
        vocab_size, d_model = self._config.vocab_size, self._config.d_model
        name = "transformer.wte.weight" if self._config.has_tied_embeddings else "lm_head.weight"
        weight = self._matrix(vocab_size, d_model)
        self._read(name, weight)
        return self._norm("transformer.ln_f"), Linear(weight, self._tensor("lm_head.bias", vocab_size))

    def _fan_in(self, name: str) -> Linear:
        d_model, d_ff = self._config.d_model, self._config.d_ff
        weight, bias = self._matrix(3 * d_model + d_ff, d_model), self._empty(3 * d_model + d_ff)
        for index, projection in enumerate("qkv"):
            self._read(f"{name}.attn.{projection}_proj.weight", weight[index * d_model :][:d_model])
        self._read(f"{name}.mlp.fc_in.weight", weight[3 * d_model :])
        self._read(f"{name}.mlp.fc_in.bias", bias[3 * d_model :])
        bias[: 3 * d_model].zero_()
        return Linear(weight, bias)

    def _fan_out(self, name: str) -> Linear:
        d_model, d_ff = self._config.d_model, self._config.d_ff
        weight = self._matrix(d_model, d_model + d_ff)
        self._read(f"{name}.attn.out_proj.weight", weight[:, :d_model])
        self._read(f"{name}.mlp.fc_out.weight", weight[:, d_model:])
        return Linear(weight, self._tensor(f"{name}.mlp.fc_out.bias", d_model))

    def _norm(self, name: str) -> LayerNorm:
        weight, bias = (self._tensor(f"{name}.{part}", self._config.d_model) for part in ("weight", "bias"))
        return LayerNorm(weight, bias, self._config.layer_norm_eps)

    def _tensor(self, name: str, *shape: int) -> Tensor:
        tensor = self._empty(*shape)
        self._read(name, tensor)
        return tensor

    def _matrix(self, rows: int, columns: int) -> Tensor:
        """Room for the weight of a `Linear`; valid until the next is asked for if the `Linear` packs it."""
        if not can_pack(self._device, self._dtype):
            return self._empty(rows, columns)
        if self._scratch.numel() < rows * columns:
            self._scratch = self._empty(rows * columns)
        return self._scratch[: rows * columns].view(rows, columns)

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self._dtype, device=self._device)
