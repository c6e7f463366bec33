"""What a pipeline says of itself, and the response of `GET /debug/pipeline`.

`gptj-dist top` reads the response into the same classes, so this module imports neither ray nor torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Literal, Self

import msgspec

from gptj_dist.config import BLOCK_SIZE_TOKENS
from gptj_dist.engine.stats import Snapshot, StageSnapshot
from gptj_dist.quantization import weights_text
from gptj_dist.stages.loss import StageLoss

if TYPE_CHECKING:
    from gptj_dist.stages.blueprint import StageReport


@dataclass(frozen=True, kw_only=True)
class PipelineFacts:
    """A pipeline now. `PipelineStatus` and `PipelineDocument` add to it.

    Args:
        name: the replica's.
        state: `up` if it computes, `restarting` while requests wait for new stages, `lost` if there are none; Serve
            replaces a lost pipeline.
        pid: the coordinator's process.
        num_used_blocks: KV blocks in use, of `num_blocks`.
        num_cached_blocks: free KV blocks that later requests may begin with.
        num_preemptions, num_evicted_blocks: since the last start of its stages; blocks that were needed while later
            requests might have begun with them.
        num_restarts: how often its stages were replaced.
        losses: the last stages that died, oldest first.
        problem: what is down and why; None while the pipeline computes.
        down_s: how long it has been down; None while it computes.
        num_recomputed_tokens: see `RequestTotals`.
        num_dropped: connections without the key and malformed messages that all its ports have dropped.
        num_frame_faults: frames between stages that did not arrive as they were sent.
        num_adapters: those that requests can name.
        adapter_requests: running and waiting requests by the adapters that they have.
        num_drafts, num_accepted: see `PipelineStats`.
    """

    name: str
    state: Literal["up", "restarting", "lost"]
    pid: int
    num_running: int
    num_waiting: int
    num_in_flight: int
    num_used_blocks: int
    num_blocks: int
    num_preemptions: int
    num_restarts: int
    losses: tuple[StageLoss, ...] = ()
    num_dropped: int = 0
    num_frame_faults: int = 0
    problem: str | None = None
    down_s: float | None = None
    num_recomputed_tokens: int = 0
    num_adapters: int = 0
    adapter_requests: Mapping[str, int] = field(default_factory=dict)
    num_cached_blocks: int = 0
    num_evicted_blocks: int = 0
    num_drafts: int = 0
    num_accepted: int = 0

    @property
    def is_up(self) -> bool:
        """Whether it computes."""
        return self.state == "up"


@dataclass(frozen=True, slots=True, kw_only=True)
class StageDocument(StageSnapshot):
    """A stage.

    Args:
        layers: first and last layer, both included.
        node: name of its machine.
        dtype: the type that it computes in, with the bits of its weights if they have fewer: `int4 in bfloat16`.
    """

    stage: int
    layers: tuple[int, int]
    device: str
    node: str
    dtype: str
    pid: int
    weight_bytes: int
    kv_used_bytes: int
    kv_total_bytes: int


@dataclass(frozen=True, kw_only=True)
class PipelineDocument(Snapshot, PipelineFacts):
    """A pipeline and its last seconds."""

    stages: tuple[StageDocument, ...]


@dataclass(frozen=True, slots=True)
class DownPipeline:
    """A pipeline whose coordinator has died or does not answer.

    Args:
        problem: which process, its cause of death and its last log line, as far as they are known.
        down_s: for how long it has been down.
        since: the time in UTC, as in logs.
    """

    name: str
    problem: str
    down_s: float
    since: str

    def __str__(self) -> str:
        return f"pipeline {self.name} is down since {self.since} ({self.down_s:.1f} s): {self.problem}"


@dataclass(frozen=True, slots=True)
class DebugDocument:
    """All pipelines of the application that answered, sorted by name.

    Args:
        num_silent: pipelines that Serve lists but that did not answer, such as those that have just died.
        down: what is known of pipelines that do not answer, until others take their place.
    """

    model: str
    num_silent: int
    pipelines: tuple[PipelineDocument, ...]
    down: tuple[DownPipeline, ...] = ()

    @classmethod
    def from_json(cls, content: bytes | str) -> Self:
        """Reads the response.

        Raises:
            msgspec.DecodeError: it is none.
        """
        try:
            return msgspec.json.decode(content, type=cls)
        except (RecursionError, UnicodeDecodeError) as error:
            raise msgspec.DecodeError(str(error)) from None


def pipeline_document(facts: PipelineFacts, snapshot: Snapshot, reports: Sequence[StageReport]) -> PipelineDocument:
    """A pipeline's part of the response.

    Args:
        reports: of its stages, first to last.
    """
    measured = snapshot.stages or (StageSnapshot(),) * len(reports)
    stages = tuple(_stage(facts, *pair) for pair in zip(reports, measured, strict=True))
    return PipelineDocument(**vars(facts) | asdict(snapshot) | {"stages": stages})


def _stage(facts: PipelineFacts, report: StageReport, measured: StageSnapshot) -> StageDocument:
    block_bytes = report.kv_bytes_per_token * BLOCK_SIZE_TOKENS
    return StageDocument(
        **asdict(measured),
        stage=report.layers.stage,
        layers=(report.layers.start, report.layers.stop - 1),
        device=report.device.name,
        node=report.device.host,
        dtype=weights_text(report.quantized, report.dtype),
        weight_bytes=report.weight_bytes,
        pid=report.pid,
        kv_used_bytes=block_bytes * facts.num_used_blocks,
        kv_total_bytes=block_bytes * facts.num_blocks,
    )
