"""The numbers are GPT-J's: those of transformers' GPTJForCausalLM, an implementation that shares no line with ours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from transformers import GPTJForCausalLM

from gptj_dist.checkpoint.hub import DEMO, resolve_model
from gptj_dist.checkpoint.index import read_model_config
from gptj_dist.checkpoint.loader import StageTensors
from gptj_dist.checkpoint.synthetic import write_checkpoint
from gptj_dist.config import BLOCK_SIZE_TOKENS, LayerRange, ModelConfig
from gptj_dist.model.attention import EXACT_TILE_ROWS, GatheredAttention
from gptj_dist.model.gptj import StageModel
from gptj_dist.model.inputs import MicroBatch, Span
from gptj_dist.model.kv_cache import BlockCache, KVCache, RegionCache
from gptj_dist.text.tokenizer import Tokenizer

MAX_FLOAT32_ERROR = 1e-4
MAX_ERROR_RATIO = 1.2
"""Our error against float32 logits, over that of transformers in the same 16-bit type."""

CPU = torch.device("cpu")
HELDOUT = Path(__file__).parents[1] / "data" / "heldout.txt"

Memory = Literal["regions", "blocks"]
"""The CPU's cache and attention, or the GPU's."""

CONFIGS = {
    "plain": ModelConfig(300, 4, 64, 4, 8, 256, 64, 0),
    "one head, rotary on all of it": ModelConfig(257, 3, 32, 1, 32, 128, 64, 0),
    "many heads, rotary on two dimensions": ModelConfig(300, 5, 96, 12, 2, 384, 64, 0),
    "odd heads of 12, rotary on all of them": ModelConfig(211, 3, 60, 5, 12, 240, 61, 0),
    "heads of 15, odd inner row": ModelConfig(97, 7, 75, 5, 6, 173, 50, 0),
    "an inner row narrower than the model": ModelConfig(128, 2, 48, 3, 4, 20, 40, 0),
    "GPT-J's heads": ModelConfig(200, 2, 512, 2, 64, 2048, 64, 0),
    "a single layer, another epsilon": ModelConfig(128, 1, 32, 2, 4, 128, 64, 0, layer_norm_eps=0.1),
    "vocabulary of 50257": ModelConfig(50257, 1, 32, 2, 8, 128, 64, 50256),
    "vocabulary of 50400": ModelConfig(50400, 2, 24, 2, 4, 96, 64, 50256),
    "tied embeddings": ModelConfig(300, 3, 64, 4, 8, 256, 64, 0, has_tied_embeddings=True),
}


class Chunked:
    """One of our models, and sequences that it has read so far, each as far as the others."""

    def __init__(self, directory: Path, dtype: torch.dtype, memory: Memory, num_sequences: int) -> None:
        self.config = config = read_model_config(directory)
        layers = LayerRange(0, 1, 0, config.num_layers)
        with StageTensors(directory, config, layers) as tensors:
            self._model = StageModel(config, layers, tensors.get, dtype, CPU)
        self._cache: KVCache
        if memory == "blocks":
            self._model._attention = GatheredAttention()
            num_blocks = num_sequences * self._num_blocks()
            self._cache = BlockCache(
                config.num_layers, num_blocks, BLOCK_SIZE_TOKENS, config.num_heads, config.head_dim, dtype, CPU
            )
        else:
            whole_tiles = -(-config.context_length // EXACT_TILE_ROWS) * EXACT_TILE_ROWS
            self._cache = RegionCache(
                config.num_layers, num_sequences, whole_tiles, config.num_heads, config.head_dim
            )
        for sequence in range(num_sequences):
            self._cache.add(sequence)
            # The sequences' blocks take turns, and come in no order.
            self._cache.extend(sequence, [i * num_sequences + sequence for i in reversed(range(self._num_blocks()))])
        self._num_read = 0

    @torch.inference_mode()
    def read(self, token_ids: Tensor) -> Tensor:
        """Logits of the next tokens: [sequences, tokens] -> float32 [sequences, tokens, vocab_size]."""
        num_tokens = token_ids.shape[1]
        spans = tuple(
            Span(sequence, sequence * num_tokens, self._num_read, num_tokens) for sequence in range(len(token_ids))
        )
        positions = torch.cat([torch.arange(span.start, span.stop) for span in spans])
        hidden = self._model.embed(token_ids.flatten())
        hidden = self._model.forward(hidden, MicroBatch(spans, positions), self._cache)
        self._num_read += num_tokens
        return self._model.logits(hidden).view(*token_ids.shape, -1)

    def _num_blocks(self) -> int:
        return -(-self.config.context_length // BLOCK_SIZE_TOKENS)


def _ours(
    directory: Path, token_ids: Tensor, memory: Memory, dtype: torch.dtype = torch.float32, chunk: int | None = None
) -> Tensor:
    """Logits of all positions, the sequences read `chunk` tokens at a time."""
    model = Chunked(directory, dtype, memory, len(token_ids))
    return torch.cat([model.read(part) for part in token_ids.split(chunk or token_ids.shape[1], dim=1)], dim=1)


@torch.inference_mode()
def _theirs(directory: Path, token_ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    model: Any = GPTJForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    logits: Tensor = model(token_ids).logits.float()
    return logits


def _random_tokens(config: ModelConfig, num_sequences: int, num_tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(config.vocab_size, (num_sequences, num_tokens), generator=generator)


def _heldout(num_sequences: int, num_tokens: int) -> Tensor:
    tokens = Tokenizer.load(resolve_model(DEMO)).encode(HELDOUT.read_text()[: 10 * num_sequences * num_tokens])
    return torch.tensor(tokens[: num_sequences * num_tokens]).view(num_sequences, num_tokens)


@dataclass(frozen=True)
class Case:
    """A checkpoint, and tokens to read."""

    directory: Path
    token_ids: Tensor


@pytest.fixture(scope="module")
def demo() -> Case:
    return Case(resolve_model(DEMO), _heldout(4, 200))


def _write(directory: Path, config: ModelConfig) -> Case:
    """A random model whose logits spread over several units, and two sequences as long as its context."""
    write_checkpoint(directory, config, seed=3, init_std=1.5 / math.sqrt(config.d_model))
    return Case(directory, _random_tokens(config, 2, config.context_length))
