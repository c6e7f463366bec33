"""The response of `GET /debug/pipeline`, built from the statuses of pipelines.

`gptj-dist top` uses the same classes, so this module imports neither ray nor torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from gptj_dist.config import BLOCK_SIZE_TOKENS

if TYPE_CHECKING:
    from gptj_dist.engine.stats import StageSnapshot
    from gptj_dist.serving.pipeline import PipelineStatus
    from gptj_dist.stages.blueprint import StageReport


class StageDocument(BaseModel):
    """A stage. Shares, times and the queue are those of `StageSnapshot`, and None before the first plan.

    Args:
        layers: first and last layer, both included.
        node: name of its machine.
    """

    model_config = ConfigDict(frozen=True)

    stage: int
    layers: tuple[int, int]
    device: str
    node: str
    dtype: str
    pid: int
    busy_share: float | None
    bubble_share: float | None
    step_ms: float | None
    queue: float | None
    wait_ms: float | None
    kv_used_bytes: int
    kv_total_bytes: int


class LossDocument(BaseModel):
    """A stage that died: the fields of `StageLoss`."""

    model_config = ConfigDict(frozen=True, from_attributes=True)

    stage: int
    cause: str
    node: str
    pid: int
    last_log_line: str | None
    back_after_s: float | None


class PipelineDocument(BaseModel):
    """A pipeline. Rates are over the last `window_s` seconds; other numbers are current values.

    Args:
        num_preemptions: since the last start of its stages.
        num_restarts: how often its stages were replaced.
        losses: the last stages that died, oldest first.
        num_dropped: see `PipelineStatus`.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    state: Literal["up", "restarting"]
    pid: int
    window_s: float
    plans_per_s: float
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    coordinator_share: float
    num_running: int
    num_waiting: int
    num_in_flight: int
    num_used_blocks: int
    num_blocks: int
    num_preemptions: int
    num_restarts: int
    stages: tuple[StageDocument, ...]
    losses: tuple[LossDocument, ...] = ()
    num_dropped: int = 0


class DebugDocument(BaseModel):
    """All pipelines of the application that answered.

    Args:
        num_silent: pipelines that Serve lists but that did not answer, such as those that have just died.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    num_silent: int
    pipelines: tuple[PipelineDocument, ...]


def debug_document(model: str, statuses: Sequence[PipelineStatus], num_silent: int) -> DebugDocument:
    """Builds the response from the replies of the pipelines, sorted by name."""
    pipelines = [_pipeline(status) for status in sorted(statuses, key=lambda status: status.name)]
    return DebugDocument(model=model, num_silent=num_silent, pipelines=tuple(pipelines))


def _pipeline(status: PipelineStatus) -> PipelineDocument:
    snapshot = status.snapshot
    measured = snapshot.stages or (None,) * len(status.stages)
    return PipelineDocument(
        name=status.name,
        state="up" if status.is_up else "restarting",
        pid=status.pid,
        window_s=snapshot.window_s,
        plans_per_s=snapshot.plans_per_s,
        prompt_tokens_per_s=snapshot.prompt_tokens_per_s,
        output_tokens_per_s=snapshot.output_tokens_per_s,
        coordinator_share=snapshot.coordinator_share,
        num_running=status.num_running,
        num_waiting=status.num_waiting,
        num_in_flight=status.num_in_flight,
        num_used_blocks=status.num_used_blocks,
        num_blocks=status.num_blocks,
        num_preemptions=status.num_preemptions,
        num_restarts=status.num_restarts,
        stages=tuple(_stage(status, *pair) for pair in zip(status.stages, measured, strict=True)),
        losses=tuple(map(LossDocument.model_validate, status.losses)),
        num_dropped=status.num_dropped,
    )


def _stage(status: PipelineStatus, report: StageReport, measured: StageSnapshot | None) -> StageDocument:
    block_bytes = report.kv_bytes_per_token * BLOCK_SIZE_TOKENS
    return StageDocument(
        stage=report.layers.stage,
        layers=(report.layers.start, report.layers.stop - 1),
        device=report.device.name,
        node=report.device.memory_pool.partition("/")[0],
        dtype=report.dtype,
        pid=report.pid,
        busy_share=measured.busy_share if measured else None,
        bubble_share=measured.bubble_share if measured else None,
        step_ms=measured.step_ms if measured else None,
        queue=measured.queue if measured else None,
        wait_ms=measured.wait_ms if measured else None,
        kv_used_bytes=block_bytes * status.num_used_blocks,
        kv_total_bytes=block_bytes * status.num_blocks,
    )
