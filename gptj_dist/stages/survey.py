"""Measures how fast this machine's CPU computes a model, in seconds: a few of its layers, with random weights.

The figures are for this model's width only, and hold for any number of its layers. What other programs do meanwhile,
and a CPU quota, slow the measurement as they will slow a stage.
"""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from gptj_dist.checkpoint.synthetic import write_checkpoint
from gptj_dist.config import DTypeName, LayerRange, ModelConfig
from gptj_dist.planning.cost import Chunks, Work, step_work, weight_bytes
from gptj_dist.quantization import Quantization
from gptj_dist.stages.blueprint import DeviceReport, StageSpec
from gptj_dist.stages.device import describe_device, free_bytes, open_device
from gptj_dist.stages.stopwatch import StageStopwatch
from gptj_dist.token_rules import TokenRules

MEASURED_BYTES = 200_000_000
"""Weights of the layers that are timed, at least: more than a cache holds, unless the whole model is smaller."""

MIN_LAYERS = 2
NUM_ROUNDS = 3
CONTEXT_TOKENS = 129

CASES = (
    Chunks(1, 1, CONTEXT_TOKENS),
    Chunks(1, 1, CONTEXT_TOKENS, has_samples=False),
    Chunks(8, 1, CONTEXT_TOKENS),
    Chunks(32, 1, CONTEXT_TOKENS),
    Chunks(32, 1, CONTEXT_TOKENS, has_samples=False),
    Chunks(1, 128, 128, has_samples=False),
    Chunks(4, 1, 513),
)
"""The steps that are timed, with and without `lm_head`."""


@dataclass(frozen=True, slots=True)
class CpuFacts:
    """The CPU of a node.

    Args:
        free_bytes: memory that could be allocated now.
    """

    report: DeviceReport
    free_bytes: int


def describe_cpu() -> CpuFacts:
    """What a CPU stage in this process would have."""
    cpu = open_device("cpu")
    return CpuFacts(describe_device(cpu), free_bytes(cpu))


def time_steps(model: ModelConfig, dtype: DTypeName, num_threads: int) -> list[tuple[Work, float]]:
    """The work of several steps of a few layers of the model, and the seconds that each took.

    Raises:
        CheckpointError: there is no room for the random weights on the disk.
    """
    shape = _few_layers(model, dtype)
    whole = LayerRange.whole(shape.num_layers)
    cases = [case for case in CASES if case.context_tokens <= shape.context_length]
    with tempfile.TemporaryDirectory(prefix="gptj-dist-survey-") as directory:
        write_checkpoint(Path(directory), replace(shape, quantization=None), dtype=dtype)
        spec = StageSpec(
            model=directory,
            revision=None,
            config=shape,
            layers=whole,
            device="cpu",
            max_model_len=shape.context_length,
            max_batch_size=max(case.num_requests for case in cases),
            rules=TokenRules(shape.vocab_size),
        )
        stopwatch = StageStopwatch(spec, dtype, num_threads)
        for case in cases:
            stopwatch.prepare(case)
        # In turns, so that what disturbs the machine for a moment disturbs no case more than others.
        rounds = [[stopwatch.time_held(case) for case in cases] for _ in range(NUM_ROUNDS)]
    works = [step_work(shape, whole, dtype, "cpu", [case]) for case in cases]
    return list(zip(works, map(statistics.median, zip(*rounds, strict=True)), strict=True))


def _few_layers(model: ModelConfig, dtype: DTypeName) -> ModelConfig:
    layer_bytes = weight_bytes(model, LayerRange(1, 3, 0, 1), dtype)
    num_layers = min(model.num_layers, max(MIN_LAYERS, -(-MEASURED_BYTES // layer_bytes)))
    shape = replace(model, num_layers=num_layers, has_tied_embeddings=False)
    if model.quantization is None:
        return shape
    return shape.quantized(Quantization.of_stages([num_layers], [model.quantization.layer_bits[0]]))
