"""The layers of one stage. The first stage also has the embedding, the last one the head."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from gptj_dist.config import LayerRange, ModelConfig
from gptj_dist.model.adapters import Changes, LayerChanges, unchanged
from gptj_dist.model.attention import Attention, KVCache
from gptj_dist.model.inputs import MicroBatch, to_device
from gptj_dist.model.layers import Layer, PartLoader, ReadTensor
from gptj_dist.model.rotary import RotaryTable

OnHidden = Callable[[int, Tensor], None]
"""Called with the number of layers that hidden states have passed, and the hidden states [rows, d_model]."""


def _ignore(_depth: int, _hidden: Tensor) -> None:
    """Default hook: ignores hidden states."""


class StageModel:
    """The layers of one stage on one device.

    Args:
        read: reads a tensor of the checkpoint; called once for each tensor, layer by layer, so that none is held twice.
        on_layer: called after each layer is loaded, with the number of loaded layers.

    Attributes:
        dtype: the type of weights and hidden states.
        rotary: cosines and sines, which attention needs.
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: LayerRange,
        read: ReadTensor,
        dtype: torch.dtype,
        device: torch.device,
        on_layer: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._config = config
        self._first_layer = layers.start
        self.dtype = dtype
        self._device = device
        self.rotary = RotaryTable(config.context_length, config.rotary_dim, device)
        load = PartLoader(read, config, dtype, device)
        self._embedding = load.embedding() if layers.is_first else None
        self._layers = []
        for index in range(layers.start, layers.stop):
            self._layers.append(load.layer(index))
            on_layer(len(self._layers))
        self._head = load.head() if layers.is_last else None

    def read_layer(self, read: ReadTensor, index: int) -> Layer:
        """Reads a layer that may become one of the stage's. Any thread may call it.

        Args:
            index: its number in the model.
        """
        return PartLoader(read, self._config, self.dtype, self._device).layer(index)

    def insert_layer(self, index: int, layer: Layer) -> None:
        """Adds a layer right before the stage's first one or right after its last one.

        Args:
            index: its number in the model.
        """
        if index == self._first_layer - 1:
            self._layers.insert(0, layer)
            self._first_layer = index
        elif index == self._first_layer + len(self._layers):
            self._layers.append(layer)
        else:
            raise ValueError(f"layer {index} is no neighbour of {self._first_layer} and {len(self._layers) - 1} more")

    def remove_layer(self, index: int) -> Layer:
        """Removes the first or the last layer, given by its number in the model."""
        if index == self._first_layer:
            self._first_layer += 1
            return self._layers.pop(0)
        if index == self._first_layer + len(self._layers) - 1:
            return self._layers.pop()
        raise ValueError(f"layer {index} is neither the first nor the last one")

    def embed(self, token_ids: Tensor, changes: Changes | None = None) -> Tensor:
        """The first stage's input: int64 [rows] -> [rows, d_model]."""
        if self._embedding is None:
            raise ValueError("only the first stage embeds")
        token_ids = to_device(token_ids, self._device)
        hidden = self._embedding(token_ids)
        if changes is not None:
            changes.add(("wte",), None, token_ids, hidden, self._embedding)
        return hidden

    def forward(
        self,
        hidden: Tensor,
        batch: MicroBatch,
        cache: KVCache,
        on_hidden: OnHidden = _ignore,
        changes: Changes | None = None,
    ) -> Tensor:
        """Runs the stage's layers over [rows, d_model], writing keys and values to the cache.

        Args:
            on_hidden: called with the input of the stage's first layer and with the output of every layer.
            changes: of the rows that have adapters; None if none has.
        """
        return self.run_layers(hidden, cache.attention(batch, self.rotary), on_hidden, changes)

    def run_layers(
        self, hidden: Tensor, attend: Attention, on_hidden: OnHidden = _ignore, changes: Changes | None = None
    ) -> Tensor:
        """As `forward`, with the attention of the micro-batch."""
        on_hidden(self._first_layer, hidden)
        for index, layer in enumerate(self._layers):
            if changes is None:
                hidden = layer(hidden, partial(attend, index))
            else:
                changes_here = LayerChanges(changes, self._first_layer + index)
                hidden = layer.changed(hidden, partial(attend, index), changes_here)
            on_hidden(self._first_layer + index + 1, hidden)
        return hidden

    def normed(self, hidden: Tensor, changes: Changes | None = None) -> Tensor:
        """Applies the final LayerNorm, on the last stage: [rows, d_model] -> the same."""
        if self._head is None:
            raise ValueError("only the last stage has the final LayerNorm")
        normed = self._head[0](hidden)
        if changes is not None:
            changes.add(("final",), None, normed, normed, unchanged)
        return normed

    def blank_inputs(self, num_rows: int) -> Tensor:
        """Inputs for `compute` whose values do not matter, in memory that real ones can be copied to."""
        if self._embedding is not None:
            return torch.zeros(num_rows, dtype=torch.int64, device=self._device)
        return torch.zeros(num_rows, self._config.d_model, dtype=self.dtype, device=self._device)

    def compute(self, inputs: Tensor, attend: Attention) -> Tensor:
        """Computes the whole step of the stage.

        Args:
            inputs: on the device; token ids int64 [rows] for the first stage, hidden states [rows, d_model] for others.

        Returns:
            Logits float32 [rows, vocab_size] on the last stage, hidden states [rows, d_model] on the others.
        """
        hidden = self.run_layers(inputs if self._embedding is None else self.embed(inputs), attend)
        return hidden if self._head is None else self.logits(hidden)

    def logits(self, hidden: Tensor, changes: Changes | None = None) -> Tensor:
        """The last stage's output: [rows, d_model] -> float32 [rows, vocab_size]."""
        if self._head is None:
            raise ValueError("only the last stage has logits")
        normed = self.normed(hidden, changes)
        logits = self._head[1](normed)
        if changes is not None:
            changes.add(("lm_head",), None, normed, logits, self._head[1])
        return logits.float()
