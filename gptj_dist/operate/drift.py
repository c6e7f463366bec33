"""Measures what other bits or another type change: a model reads a text, and reads it again in float32.

Both read the same windows of tokens. One layer of one of them is in memory at a time, so this needs little more than
the hidden states of the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import exp
from pathlib import Path

import torch
from torch import Tensor

from gptj_dist.checkpoint.loader import StageTensors
from gptj_dist.config import BLOCK_SIZE_TOKENS, DTypeName, LayerRange, ModelConfig
from gptj_dist.model.gptj import StageModel
from gptj_dist.model.inputs import MicroBatch, Span
from gptj_dist.model.kv_cache import make_cache
from gptj_dist.sizes import ceil_div
from gptj_dist.stages.runner import TORCH_DTYPES

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Drift:
    """How far a model is from itself in float32, over the tokens that it predicts.

    Args:
        perplexity: of the text.
        reference_perplexity: of the text in float32.
        num_alike: tokens at which both find the same one the most likely.
        kl: mean divergence of the model's distribution from that in float32, in nats.
    """

    num_tokens: int
    perplexity: float
    reference_perplexity: float
    num_alike: int
    kl: float


class Reading:
    """A model that has read windows of a text.

    Args:
        directory: a complete checkpoint.
        config: the model's, with the bits that its weights should have.
        windows: token ids.
    """

    def __init__(
        self, directory: Path, config: ModelConfig, dtype: DTypeName, windows: Sequence[Sequence[int]]
    ) -> None:
        self._windows = windows
        hidden: list[Tensor] = []
        for layer in range(config.num_layers):
            layers = LayerRange(layer, config.num_layers, layer, layer + 1)
            with StageTensors(directory, config, layers) as tensors:
                self._last = StageModel(config, layers, tensors.read, TORCH_DTYPES[dtype], CPU)
            if layers.is_first:
                hidden = [self._last.embed(torch.tensor(window)) for window in windows]
            hidden = [_forward(self._last, config, rows) for rows in hidden]
        self._hidden = hidden

    def log_probabilities(self) -> Iterator[Tensor]:
        """Of the tokens after each token of a window but its last: float32 [tokens, vocab_size], for each window."""
        return (self._last.logits(rows[:-1]).log_softmax(-1) for rows in self._hidden)


@torch.inference_mode()
def measure(reference: Reading, other: Reading, windows: Sequence[Sequence[int]]) -> Drift:
    """Compares two readings of the same windows."""
    num_tokens = sum(len(window) - 1 for window in windows)
    losses, num_alike, kl = torch.zeros(2, dtype=torch.float64), 0, 0.0
    for window, right, found in zip(windows, reference.log_probabilities(), other.log_probabilities(), strict=True):
        targets = torch.tensor(window[1:]).unsqueeze(1)
        losses -= torch.stack([rows.gather(1, targets).double().sum() for rows in (right, found)])
        num_alike += int((right.argmax(1) == found.argmax(1)).sum())
        kl += float((right.exp() * (right - found)).double().sum())
    of_reference, of_other = (exp(loss / num_tokens) for loss in losses.tolist())
    return Drift(num_tokens, of_other, of_reference, num_alike, kl / num_tokens)


@torch.inference_mode()
def read(directory: Path, config: ModelConfig, dtype: DTypeName, windows: Sequence[Sequence[int]]) -> Reading:
    """Reads windows of a text.

    Raises:
        CheckpointError: weights are missing.
    """
    return Reading(directory, config, dtype, windows)


def _forward(model: StageModel, config: ModelConfig, rows: Tensor) -> Tensor:
    """The output of a stage of one layer for a whole window."""
    num_blocks = ceil_div(len(rows), BLOCK_SIZE_TOKENS)
    cache = make_cache(config, 1, num_blocks, 1, len(rows), model.dtype, CPU)
    cache.add(0)
    cache.extend(0, range(num_blocks))
    return model.forward(rows, MicroBatch((Span(0, 0, 0, len(rows)),), torch.arange(len(rows))), cache)
