"""Computes the Ray resources of one pipeline. The caller passes what the cluster has."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gptj_dist.config import DeviceKind, PipelineConfig
from gptj_dist.placement import StageResources

COORDINATOR_CPUS = 0.1
CLUSTER_SHARE = 0.8
"""Share of the cluster's CPUs that the stages of one pipeline take by default; the rest is for Serve."""


@dataclass(frozen=True, slots=True)
class PipelineSize:
    """The Ray resources of one pipeline, stage by stage."""

    stages: tuple[StageResources, ...]

    @property
    def bundles(self) -> list[dict[str, float]]:
        """Bundle 0 is the coordinator's; the others are those of the stages for which the planner chose no node."""
        return [{"CPU": COORDINATOR_CPUS}, *(stage.bundle for stage in self._in_bundles)]

    @property
    def labels(self) -> list[dict[str, str]]:
        """Of each bundle, the labels that its node must have."""
        return [{}, *(stage.labels for stage in self._in_bundles)]

    @property
    def total(self) -> dict[str, float]:
        """The resources of coordinator and stages together."""
        cpus = COORDINATOR_CPUS + sum(stage.cpus for stage in self.stages)
        gpus = sum(stage.gpus for stage in self.stages)
        return {"CPU": cpus} | ({"GPU": gpus} if gpus else {})

    @property
    def _in_bundles(self) -> list[StageResources]:
        return [stage for stage in self.stages if stage.node_id is None]


def size_stages(config: PipelineConfig, num_stages: int, num_in_cluster: Callable[[str], float]) -> PipelineSize:
    """The Ray resources of a pipeline of `num_stages` stages.

    Args:
        num_in_cluster: returns the number of `CPU` or `GPU` in the whole cluster; called only for settings left open.
    """
    cpus, gpus = config.cpus_per_stage, config.gpus_per_stage
    kinds: Sequence[DeviceKind] = [
        choice if choice != "auto" else ("cuda" if gpus or num_in_cluster("GPU") else "cpu")
        for choice in config.devices
    ]
    if cpus is None:  # at most one, less if the whole cluster has fewer CPUs
        share = CLUSTER_SHARE * num_in_cluster("CPU") / num_stages
        cpus = min(1.0, max(math.floor(share * 100) / 100, 0.01))
    if gpus is None:  # one each; stages share GPUs if there are fewer GPUs than stages on them
        num_on_gpus = kinds.count("cuda")
        gpus = 1.0 / math.ceil(num_on_gpus / max(num_in_cluster("GPU"), 1)) if num_on_gpus else 0.0
    return PipelineSize(
        tuple(
            StageResources(kind, cpus, gpus if kind == "cuda" else 0.0, node)
            for kind, node in zip(kinds, config.nodes, strict=True)
        )
    )
