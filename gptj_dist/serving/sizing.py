"""Computes the Ray resources of one pipeline. The caller passes what the cluster has."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from gptj_dist.config import DeviceKind, PipelineConfig

COORDINATOR_CPUS = 0.1
CLUSTER_SHARE = 0.8
"""Share of the cluster's CPUs that the stages of one pipeline take by default; the rest is for Serve."""


@dataclass(frozen=True, slots=True)
class PipelineSize:
    """The Ray resources of one pipeline."""

    num_stages: int
    device: DeviceKind
    cpus_per_stage: float
    gpus_per_stage: float

    @property
    def bundles(self) -> list[dict[str, float]]:
        """Bundle 0 is the coordinator's, bundle i + 1 is stage i's."""
        stage = {"CPU": self.cpus_per_stage} | ({"GPU": self.gpus_per_stage} if self.gpus_per_stage else {})
        return [{"CPU": COORDINATOR_CPUS}, *[stage] * self.num_stages]

    @property
    def total(self) -> dict[str, float]:
        """The resources of all bundles together."""
        return {name: sum(bundle.get(name, 0.0) for bundle in self.bundles) for name in self.bundles[-1]}


def size_stages(config: PipelineConfig, num_stages: int, num_in_cluster: Callable[[str], float]) -> PipelineSize:
    """The Ray resources of a pipeline of `num_stages` stages.

    Args:
        num_in_cluster: returns the number of `CPU` or `GPU` in the whole cluster; called only for settings left open.
    """
    device = config.device
    if device == "auto":
        device = "cuda" if num_in_cluster("GPU") else "cpu"
    cpus, gpus = config.cpus_per_stage, config.gpus_per_stage
    if cpus is None:  # at most one, less if the whole cluster has fewer CPUs
        share = CLUSTER_SHARE * num_in_cluster("CPU") / num_stages
        cpus = min(1.0, max(math.floor(share * 100) / 100, 0.01))
    if gpus is None:  # one each; stages share GPUs if there are fewer GPUs than stages
        gpus = 1.0 / math.ceil(num_stages / max(num_in_cluster("GPU"), 1)) if device == "cuda" else 0.0
    return PipelineSize(num_stages, device, cpus, gpus)
