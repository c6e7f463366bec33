"""How long each stage and each edge takes for a plan: by the planner's formula, or by a line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Protocol

from gptj_dist.config import DTYPE_BYTES, DeviceKind
from gptj_dist.engine.plan import Plan
from gptj_dist.planning.cost import Counts, Work, num_scores, step_s, work_of
from gptj_dist.planning.devices import DeviceSpec
from gptj_dist.planning.forecast import PlannedStage, Workload


class StepTimes(Protocol):
    """Seconds that the stages take for a plan."""

    @property
    def num_stages(self) -> int: ...

    def seconds(self, plan: Plan) -> Sequence[float]:
        """Of each stage, first to last."""


@dataclass(frozen=True, slots=True)
class Edge:
    """The way of a frame to the next stage. It is on its way for the latency; the link is taken for the bytes' time.

    Args:
        row_bytes: of a row's hidden state; 0 on the edges from and to the coordinator.
        bytes_s: rate of the link.
    """

    latency_s: float
    row_bytes: float = 0.0
    bytes_s: float = float("inf")


@dataclass(frozen=True, slots=True)
class LineTimes:
    """A stage takes `overhead_s[i] + row_s[i] * rows`, as `StepCost` has it. Measured stages that sleep do so, too.

    Args:
        overhead_s, row_s: of each stage.
    """

    overhead_s: tuple[float, ...]
    row_s: tuple[float, ...]

    @property
    def num_stages(self) -> int:
        return len(self.overhead_s)

    def seconds(self, plan: Plan) -> Sequence[float]:
        rows = plan.num_tokens
        return [overhead + rows * row for overhead, row in zip(self.overhead_s, self.row_s, strict=True)]


class FormulaTimes:
    """The planner's formula (`planning.cost`) for the chunks of a plan."""

    def __init__(self, workload: Workload, stages: Sequence[PlannedStage]) -> None:
        self.num_stages = len(stages)
        self._kinds: set[DeviceKind] = {stage.device.kind for stage in stages}
        alike = {_class_of(stage): stage for stage in stages}
        self._classes = {name: _StageTime(workload, stage) for name, stage in alike.items()}
        self._class_of = [_class_of(stage) for stage in stages]

    def seconds(self, plan: Plan) -> Sequence[float]:
        counted = {kind: count_plan(plan, kind) for kind in self._kinds}
        taken = {name: time.seconds(counted[time.kind]) for name, time in self._classes.items()}
        return [taken[name] for name in self._class_of]


def count_plan(plan: Plan, kind: DeviceKind) -> Counts:
    """What a plan asks of every layer."""
    num_rows = num_samples = keys = scores = 0
    for chunk in plan.chunks:
        num_tokens = len(chunk.token_ids)
        context = chunk.start + num_tokens
        num_rows += num_tokens
        num_samples += chunk.samples
        keys += context
        scores += context if num_tokens == 1 else num_scores(num_tokens, context, kind)
    return Counts(num_rows, num_samples, keys, scores)


def edges(workload: Workload, stages: Sequence[PlannedStage]) -> list[Edge]:
    """The edges of a ring: from the coordinator to stage 0, from stage to stage, and back to the coordinator.

    A link is as fast as the slower of its ends. A single stage is beside its coordinator.
    """
    row_bytes = workload.model.d_model * DTYPE_BYTES[workload.dtype]
    devices = [stage.device for stage in stages]
    if len(stages) == 1:
        return [Edge(0.0), Edge(0.0)]
    inner = [
        Edge(max(a.link_latency_s, b.link_latency_s), row_bytes, min(a.link_bytes_s, b.link_bytes_s))
        for a, b in pairwise(devices)
    ]
    return [Edge(devices[0].link_latency_s), *inner, Edge(devices[-1].link_latency_s)]


StageClass = tuple[DeviceSpec, int, bool, bool]


def _class_of(stage: PlannedStage) -> StageClass:
    """Stages of one class take equal times. Those of quantised models may differ by where their layers begin."""
    return stage.device, stage.layers.num_layers, stage.layers.is_first, stage.layers.is_last


class _StageTime:
    """The time of one stage. Its work is linear in the counts, but for the bytes of weights."""

    def __init__(self, workload: Workload, stage: PlannedStage) -> None:
        self.kind = stage.device.kind
        self._device = stage.device
        self._dtype = workload.dtype

        def work(counted: Counts) -> Work:
            return work_of(workload.model, stage.layers, workload.dtype, self.kind, counted)

        self._weight_bytes = lru_cache(lambda rows, samples: work(Counts(rows, samples, 0, 0)).weight_bytes)
        self._num_layers = stage.layers.num_layers
        self._of_row, self._of_sample = work(Counts(1, 0, 0, 0)), work(Counts(0, 1, 0, 0))
        self._of_key, self._of_score = work(Counts(0, 0, 1, 0)), work(Counts(0, 0, 0, 1))

    def seconds(self, counted: Counts) -> float:
        rows, samples = counted.num_rows, counted.num_samples
        return step_s(
            self._device,
            self._dtype,
            Work(
                num_layers=self._num_layers,
                weight_bytes=self._weight_bytes(rows, min(samples, 1)),
                kv_bytes=counted.keys * self._of_key.kv_bytes,
                matrix_flop=rows * self._of_row.matrix_flop + samples * self._of_sample.matrix_flop,
                attention_flop=counted.scores * self._of_score.attention_flop,
                row_elements=rows * self._of_row.row_elements,
            ),
        )
