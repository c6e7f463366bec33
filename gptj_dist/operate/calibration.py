"""Checks the planner's formula on this machine: times other models, predicts this model's steps, then times those.

All models run as stages do: one process per stage, each with its share of the cores, all at the same time, because they
share the memory's bandwidth. A machine's speed drifts from minute to minute, so calibration, prediction and measurement
take turns in several rounds. Each prediction is made before its measurement and compared with it at once. CPUs only.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gptj_dist.checkpoint.synthetic import write_checkpoint
from gptj_dist.config import DTypeName, LayerRange, ModelConfig
from gptj_dist.errors import ConfigurationError
from gptj_dist.planning.cost import Chunks, Work, kv_bytes_per_token, step_s, step_work, weight_bytes
from gptj_dist.planning.devices import DeviceSpec, known_device
from gptj_dist.planning.fit import fit_device
from gptj_dist.planning.partition import layer_ranges, plan_partition
from gptj_dist.stages.blueprint import StageSpec
from gptj_dist.stages.cores import available_cores
from gptj_dist.stages.device import free_bytes
from gptj_dist.stages.stopwatch import Team, busy_cpu_s, open_team
from gptj_dist.token_rules import TokenRules

NUM_ROUNDS = 5
NUM_QUIET_ROUNDS = 3
"""Of all rounds, those count in which other processes used least of the machine."""

MAX_REQUESTS = 64

CASES = (
    Chunks(1, 128, 128),
    Chunks(1, 512, 512),
    Chunks(1, 1, 129),
    Chunks(8, 1, 129),
    Chunks(32, 1, 129),
    Chunks(4, 1, 513),
)
"""The steps that are timed: chunks of one prompt, then one token for each of several requests."""


def _shape(num_layers: int, d_model: int, num_heads: int, vocab_size: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab_size,
        num_layers=num_layers,
        d_model=d_model,
        num_heads=num_heads,
        rotary_dim=16,
        d_ff=4 * d_model,
        context_length=1024,
        eos_token_ids=(0,),
    )


CALIBRATION_SHAPES = (
    _shape(16, 64, 2, 2048),
    _shape(2, 320, 5, 4096),
    _shape(6, 768, 12, 16384),
    _shape(4, 1536, 12, 24576),
    _shape(2, 2560, 10, 8192),
)
"""From nothing but overhead to weights that no cache holds, so that most models lie between two of them; heads of 32,
64, 128 and 256 dimensions."""


@dataclass(frozen=True, slots=True)
class CheckedModel:
    """The model to check.

    Args:
        name, revision: see `PipelineConfig`.
    """

    name: str
    revision: str | None
    config: ModelConfig
    dtype: DTypeName


@dataclass(frozen=True, slots=True)
class StepCheck:
    """Predicted and measured seconds of one kind of step of one stage, in one round."""

    layers: LayerRange
    case: Chunks
    predicted_s: float
    measured_s: float

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted_s / self.measured_s


@dataclass(frozen=True, slots=True)
class PipelineCheck:
    """The result of one round, or of `check_pipeline`.

    Args:
        devices: the figures of each stage's share of the machine; of several rounds, those of the quietest.
        steps: always in the same order; of several rounds, each from the one in which its ratio was the middle one of
            the quiet rounds.
        others_cores: CPU cores that other processes used; of several rounds, at most in the quiet ones.
    """

    devices: tuple[DeviceSpec, ...]
    steps: tuple[StepCheck, ...]
    others_cores: float


def check_pipeline(
    model: CheckedModel,
    num_stages: int,
    shapes: Sequence[ModelConfig] = CALIBRATION_SHAPES,
    num_rounds: int = NUM_ROUNDS,
    note: Callable[[str], None] = lambda _: None,
) -> PipelineCheck:
    """Predicts and measures the steps of a model cut into stages on this machine.

    Args:
        shapes: what is timed for the prediction. Those as wide as the model are left out.
        num_rounds: rounds of calibration, prediction and measurement.
        note: called with a line for the user about the current activity.

    Raises:
        ConfigurationError: more stages than layers or cores, or the model does not fit this machine's memory.
        StageFailedError: a stage's process died.
    """
    num_threads = available_cores() // num_stages
    if num_threads < 1:
        raise ConfigurationError(f"checking {num_stages} stages needs at least {num_stages} CPU cores")
    cases = _cases_that_fit(model)
    others = [shape for shape in shapes if shape.d_model != model.config.d_model]
    ranges = layer_ranges(plan_partition(model.config, num_stages))
    with tempfile.TemporaryDirectory(prefix="gptj-dist-check-") as directory:
        note("writing models of other shapes")
        specs = [_write(Path(directory) / str(i), shape, model.dtype) for i, shape in enumerate(others)]
        note("loading them and the model")
        lists = [[*specs, _spec(model.name, model.revision, model.config, layers)] for layers in ranges]
        with open_team(lists, model.dtype, num_threads) as team:
            rounds = []
            for number in range(1, num_rounds + 1):
                note(f"timing, round {number} of {num_rounds}")
                rounds.append(_round(team, model, others, ranges, cases))
    return _summary(rounds)


def _round(
    team: Team,
    model: CheckedModel,
    others: Sequence[ModelConfig],
    ranges: Sequence[LayerRange],
    cases: Sequence[Chunks],
) -> PipelineCheck:
    """Calibrates, predicts, and only then measures."""
    begin, begin_cpu_s = time.perf_counter(), busy_cpu_s() - team.cpu_s
    works: list[Work] = []
    times: list[list[float]] = []
    for index, shape in enumerate(others):
        whole = LayerRange.whole(shape.num_layers)
        for case in cases:
            works.append(step_work(shape, whole, model.dtype, "cpu", [case]))
            times.append(team.time(index, case))
    devices = tuple(
        fit_device(known_device("cpu"), list(zip(works, stage_times, strict=True)))
        for stage_times in zip(*times, strict=True)
    )
    predicted = {
        (layers, case): step_s(device, model.dtype, step_work(model.config, layers, model.dtype, "cpu", [case]))
        for device, layers in zip(devices, ranges, strict=True)
        for case in cases
    }
    steps = [
        StepCheck(layers, case, predicted[layers, case], measured)
        for case in cases
        for layers, measured in zip(ranges, team.time(len(others), case), strict=True)
    ]
    others_cpu_s = busy_cpu_s() - team.cpu_s - begin_cpu_s
    return PipelineCheck(devices, tuple(steps), others_cpu_s / (time.perf_counter() - begin))


def _summary(rounds: Sequence[PipelineCheck]) -> PipelineCheck:
    quiet = sorted(rounds, key=lambda round_: round_.others_cores)[:NUM_QUIET_ROUNDS]
    steps = [
        sorted(checks, key=lambda check: check.ratio)[len(checks) // 2]
        for checks in zip(*(round_.steps for round_ in quiet), strict=True)
    ]
    return PipelineCheck(quiet[0].devices, tuple(steps), quiet[-1].others_cores)


def _cases_that_fit(model: CheckedModel) -> tuple[Chunks, ...]:
    """The cases within the model's context, less the largest if memory is short.

    Raises:
        ConfigurationError: there is no memory for the weights.
    """
    config = model.config
    whole = LayerRange.whole(config.num_layers)
    free = free_bytes(torch.device("cpu")) - weight_bytes(config, whole, model.dtype)
    per_token = kv_bytes_per_token(config, config.num_layers, model.dtype, "cpu")
    cases = [case for case in CASES if case.context_tokens <= config.context_length]
    while cases and sum(case.num_requests * case.context_tokens for case in cases) * per_token > free:
        cases.remove(max(cases, key=lambda case: case.num_requests * case.context_tokens))
    if not cases:
        raise ConfigurationError("there is not enough memory for the model's weights and a few requests")
    return tuple(cases)


def _write(directory: Path, shape: ModelConfig, dtype: DTypeName) -> StageSpec:
    """A random model of a shape, as one stage."""
    write_checkpoint(directory, shape, dtype=dtype)
    return _spec(str(directory), None, shape, LayerRange.whole(shape.num_layers))


def _spec(name: str, revision: str | None, config: ModelConfig, layers: LayerRange) -> StageSpec:
    return StageSpec(
        model=name,
        revision=revision,
        config=config,
        layers=layers,
        device="cpu",
        max_model_len=config.context_length,
        max_batch_size=MAX_REQUESTS,
        rules=TokenRules(config.vocab_size),
    )
