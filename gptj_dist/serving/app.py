"""Builds the Serve application: an ingress, and pipelines behind it, each in a placement group of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray import serve
from ray.serve import Application

from gptj_dist.config import DeviceKind, PipelineConfig
from gptj_dist.serving.ingress import Ingress
from gptj_dist.serving.pipeline import Pipeline
from gptj_dist.serving.settings import AppConfig, parse_settings
from gptj_dist.stages.blueprint import draw_blueprint

COORDINATOR_CPUS = 0.1
CLUSTER_SHARE = 0.8
"""What the stages of one pipeline ask for of the cluster's CPUs unless told otherwise; Serve fits beside them."""

MAX_ONGOING_REQUESTS = 10_000
"""Serve must not hold requests back: the pipeline's scheduler queues them."""


def build(args: dict[str, Any]) -> Application:
    """The application of a Serve config: its `args` are the fields of `PipelineConfig` and `served_model_name`.

    Raises:
        ConfigurationError: the settings or the checkpoint will not do; nothing has been placed.
    """
    return make_application(parse_settings(args))


def make_application(config: AppConfig, scaling: Mapping[str, Any] | None = None) -> Application:
    """The application, bound and ready to be run on the cluster that Ray is connected to.

    Args:
        scaling: Serve's `num_replicas` or `autoscaling_config` for the pipelines.

    Raises:
        ConfigurationError: as `build`.
    """
    # A replica that starts next week shall serve the commit that the first one does.
    config = replace(config, pipeline=draw_blueprint(config.pipeline).config)
    size = size_pipeline(config.pipeline)
    pipelines = serve.deployment(Pipeline, name="Pipeline").options(
        ray_actor_options={"num_cpus": COORDINATOR_CPUS},
        placement_group_bundles=size.bundles,
        placement_group_strategy="PACK",
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        **(scaling or {"num_replicas": 1}),
    )
    ingress = serve.deployment(Ingress, name="Ingress").options(
        ray_actor_options={"num_cpus": 0}, max_ongoing_requests=MAX_ONGOING_REQUESTS
    )
    return ingress.bind(config, pipelines.bind(config.pipeline, size.device, size.cpus_per_stage, size.gpus_per_stage))


@dataclass(frozen=True, slots=True)
class PipelineSize:
    """What one pipeline asks of Ray."""

    num_stages: int
    device: DeviceKind
    cpus_per_stage: float
    gpus_per_stage: float

    @property
    def bundles(self) -> list[dict[str, float]]:
        """Bundle 0 is the coordinator's, bundle i + 1 is stage i's."""
        stage = {"CPU": self.cpus_per_stage} | ({"GPU": self.gpus_per_stage} if self.gpus_per_stage else {})
        return [{"CPU": COORDINATOR_CPUS}, *[stage] * self.num_stages]


def size_pipeline(config: PipelineConfig) -> PipelineSize:
    """What a pipeline will ask for. Looks at the connected cluster only for what the settings leave open.

    Raises:
        ConfigurationError: the settings or the checkpoint will not do.
    """
    num_stages = len(draw_blueprint(config).layers)
    device = config.device
    if device == "auto":
        device = "cuda" if _num_in_cluster("GPU") else "cpu"
    cpus, gpus = config.cpus_per_stage, config.gpus_per_stage
    if cpus is None:  # at most one, and less where the whole cluster has fewer
        share = CLUSTER_SHARE * _num_in_cluster("CPU") / num_stages
        cpus = min(1.0, max(math.floor(share * 100) / 100, 0.01))
    if gpus is None:  # one each, or as many stages to a GPU as it takes
        gpus = 1.0 / math.ceil(num_stages / max(_num_in_cluster("GPU"), 1)) if device == "cuda" else 0.0
    return PipelineSize(num_stages, device, cpus, gpus)


def _num_in_cluster(resource: str) -> float:
    return float(ray.cluster_resources().get(resource, 0.0))
