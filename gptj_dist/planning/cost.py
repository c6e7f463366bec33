"""What a stage holds and how long it takes for a micro-batch: counting, and one formula. Stdlib only; measures nothing.

The time of a step is

    CPU   step_overhead + overheads + reading + arithmetic + elements
    GPU   step_overhead + max(overheads, reading, arithmetic) + elements

    overheads  = layers * layer_overhead
    reading    = weight bytes / bandwidth + KV bytes / KV bandwidth
    arithmetic = matrix FLOP / flops + attention FLOP / attention_flops
    elements   = rows * layers * d_model / row_elements_s

A GPU reads, multiplies and is given the next kernels all at the same time: it is the roofline (Williams et al. 2009)
with a third term for launches. A few CPU cores do one after the other, and the sum fits packed products from 1 to 512
rows (28672 x 4096 in bfloat16 on two cores: 73 GB/s at 1 row, 943 GFLOP/s at 512, within 10 % of the sum at 8 and 32).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from gptj_dist.config import DTYPE_BYTES, DeviceKind, DTypeName, LayerRange, ModelConfig, WireDType
from gptj_dist.planning.devices import DeviceSpec
from gptj_dist.quantization import INT4_GROUP, MAX_LOW_BIT_ROWS, Bits

TILE_ROWS = 8
"""Rows of a chunk that a CPU attends for at a time (see `model.native`). A single row is computed by itself."""

PROCESS_BYTES: Mapping[DeviceKind, int] = MappingProxyType({"cpu": 500_000_000, "cuda": 1_000_000_000})
"""A stage's process without weights and KV cache: Python, torch, activations, CUDA's context. Measured on a CPU: 0.2 GB
before the first request."""

QUANTIZED_BYTES: Mapping[Bits, float] = MappingProxyType({8: 1.0, 4: 0.5 + 4 / INT4_GROUP})
"""Bytes of a number of few bits, with its share of the scales; those of whole rows count as nothing."""


@dataclass(frozen=True, slots=True)
class Chunks:
    """Equal pieces of a micro-batch, one a request.

    Args:
        num_requests: how many pieces.
        num_tokens: rows of each.
        context_tokens: keys that a piece's last row attends to, its own included.
        has_samples: whether each piece's last row goes through `lm_head`.
    """

    num_requests: int
    num_tokens: int
    context_tokens: int
    has_samples: bool = True

    @property
    def num_rows(self) -> int:
        return self.num_requests * self.num_tokens


Step = Sequence[Chunks]
"""All of a micro-batch."""


@dataclass(frozen=True, slots=True)
class Counts:
    """What a step asks of every layer, whatever stage has it.

    Args:
        num_rows: tokens that are computed.
        num_samples: rows that go through `lm_head`.
        keys: keys that attention reads from memory, in one layer.
        scores: that attention computes, in one layer.
    """

    num_rows: int
    num_samples: int
    keys: int
    scores: int


@dataclass(frozen=True, slots=True)
class Work:
    """What one step asks of one stage; the terms of the formula, before a device divides them."""

    num_layers: int
    weight_bytes: float
    kv_bytes: float
    matrix_flop: float
    attention_flop: float
    row_elements: float


def num_parameters(model: ModelConfig, layers: LayerRange) -> int:
    """Parameters that a stage holds. Of tied embeddings a lone stage, too, holds two copies: one is packed."""
    return (
        layers.num_layers * model.layer_parameters
        + layers.is_first * model.embedding_parameters
        + layers.is_last * model.head_parameters
    )


def weight_bytes(model: ModelConfig, layers: LayerRange, dtype: DTypeName) -> int:
    """Bytes of a stage's weights.

    Args:
        dtype: of those that are not quantised.
    """
    return round(num_parameters(model, layers) * DTYPE_BYTES[dtype] - _saved_bytes(model, layers, dtype))


def _saved_bytes(model: ModelConfig, layers: LayerRange, dtype: DTypeName) -> float:
    """What a stage's matrices of few bits take less than in the type."""
    matrices = _quantized(model, layers)
    return sum(count * (DTYPE_BYTES[dtype] - number_bytes(model, bits)) for count, bits in matrices)


def number_bytes(model: ModelConfig, bits: Bits | None) -> float:
    """Bytes of a number of a matrix, with its share of scales and offsets; None stands for the checkpoint's type."""
    quantization = model.quantization
    if bits is None:
        return DTYPE_BYTES[model.dtype]
    if quantization is None or quantization.group is None:
        return QUANTIZED_BYTES[bits]
    return bits / 8 + (4 + 4 * quantization.has_offsets) / quantization.group_of(model.d_model, bits)


def _quantized(model: ModelConfig, layers: LayerRange) -> list[tuple[int, Bits]]:
    """Numbers and bits of a stage's matrices of few bits."""
    quantization = model.quantization
    if quantization is None:
        return []
    matrices = [(model.layer_matrix_parameters, bits) for bits in quantization.layer_bits[layers.start : layers.stop]]
    matrices += [(model.embedding_parameters, quantization.embedding_bits)] * layers.is_first
    matrices += [(model.embedding_parameters, quantization.head_bits)] * layers.is_last
    return [(count, bits) for count, bits in matrices if bits is not None]


def working_bytes(model: ModelConfig, dtype: DTypeName, kind: DeviceKind) -> int:
    """Bytes that a stage needs beside its weights and its KV cache.

    On a CPU, weights are packed: of one matrix at a time there are two copies. A layer's size stands for the largest. A
    quantised matrix is read as it is stored first, on any device.
    """
    has_copy = kind == "cpu" or model.quantization is not None
    read_as = dtype if model.quantization is None else model.dtype
    return PROCESS_BYTES[kind] + has_copy * model.layer_parameters * DTYPE_BYTES[read_as]


def kv_bytes_per_token(model: ModelConfig, num_layers: int, dtype: DTypeName, kind: DeviceKind) -> int:
    """Bytes that one token takes in a stage's KV cache. A CPU keeps float16 in float32 (see `model.kv_cache`)."""
    kept: DTypeName = "float32" if kind == "cpu" and dtype != "bfloat16" else dtype
    return 2 * num_layers * model.d_model * DTYPE_BYTES[kept]


def step_work(model: ModelConfig, layers: LayerRange, dtype: DTypeName, kind: DeviceKind, step: Step) -> Work:
    """What a step asks of a stage: `work_of` its `counts`."""
    return work_of(model, layers, dtype, kind, counts(step, kind))


def counts(step: Step, kind: DeviceKind) -> Counts:
    """Counts a step's rows, samples, keys and scores for stages on this kind of device."""
    keys, scores = (sum(of_chunks) for of_chunks in zip(*(_attention(c, kind) for c in step), strict=True))
    num_samples = sum(chunks.num_requests for chunks in step if chunks.has_samples)
    return Counts(sum(chunks.num_rows for chunks in step), num_samples, keys, scores)


def work_of(model: ModelConfig, layers: LayerRange, dtype: DTypeName, kind: DeviceKind, counted: Counts) -> Work:
    """What a counted step asks of a stage. The embedding is a gather and counts as nothing.

    But for the bytes of weights each term is linear in the counts.
    """
    num_samples = layers.is_last * counted.num_samples
    layer_matrices = layers.num_layers * model.layer_matrix_parameters
    # Without the embedding, and without the head if nothing is sampled.
    streamed_range = replace(layers, stage=1, num_stages=2 if num_samples else 3)
    streamed = layer_matrices + model.embedding_parameters * (num_samples > 0)
    # For many rows a GPU makes numbers of the bits in its memory, and reads those.
    makes_numbers = kind == "cuda" and counted.num_rows > MAX_LOW_BIT_ROWS
    num_made = sum(count for count, _ in _quantized(model, streamed_range)) * makes_numbers
    return Work(
        num_layers=layers.num_layers,
        weight_bytes=(streamed + 2 * num_made) * DTYPE_BYTES[dtype] - _saved_bytes(model, streamed_range, dtype),
        kv_bytes=counted.keys * kv_bytes_per_token(model, layers.num_layers, dtype, kind),
        matrix_flop=2.0 * (layer_matrices * counted.num_rows + model.embedding_parameters * num_samples),
        attention_flop=4.0 * layers.num_layers * model.d_model * counted.scores,
        row_elements=layers.num_layers * counted.num_rows * model.d_model,
    )


def step_s(device: DeviceSpec, dtype: DTypeName, work: Work) -> float:
    """Seconds that a device takes for a step's work, by the module's formula."""
    flops = device.float32_flops if dtype == "float32" else device.flops
    reading = work.weight_bytes / device.bandwidth_bytes_s + work.kv_bytes / device.kv_bandwidth_bytes_s
    arithmetic = work.matrix_flop / flops + work.attention_flop / device.attention_flops
    overheads = work.num_layers * device.layer_overhead_s
    terms = (overheads, reading, arithmetic)
    core = sum(terms) if device.kind == "cpu" else max(terms)
    return device.step_overhead_s + core + work.row_elements / device.row_elements_s


def hop_s(device: DeviceSpec, model: ModelConfig, wire: WireDType, step: Step) -> float:
    """Seconds to send a step's hidden states to the next stage, or to receive them from the previous one.

    Args:
        wire: their type on the way.
    """
    num_rows = sum(chunks.num_rows for chunks in step)
    number_bytes = 1 if wire == "int8" else DTYPE_BYTES[wire]
    return device.link_latency_s + num_rows * model.d_model * number_bytes / device.link_bytes_s


def _attention(chunks: Chunks, kind: DeviceKind) -> tuple[int, int]:
    """Attention of all pieces in one layer: keys read from memory, and scores computed."""
    scores = num_scores(chunks.num_tokens, chunks.context_tokens, kind)
    return chunks.num_requests * chunks.context_tokens, chunks.num_requests * scores


def num_scores(num_tokens: int, context_tokens: int, kind: DeviceKind) -> int:
    """Scores that a piece of `num_tokens` rows has computed in one layer.

    A piece's later tiles find the keys of the earlier ones in a cache.
    """
    tile = TILE_ROWS if kind == "cpu" and num_tokens > 1 else num_tokens
    num_tiles = math.ceil(num_tokens / tile)
    return tile * (num_tiles * (context_tokens - num_tokens) + tile * num_tiles * (num_tiles + 1) // 2)
