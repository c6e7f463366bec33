"""Builds the Serve application: an ingress, and pipelines behind it, each in a placement group of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
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
    blueprint = draw_blueprint(config.pipeline)
    device = _device(config.pipeline)
    gpus = config.pipeline.gpus_per_stage
    if gpus is None:
        gpus = 1.0 if device == "cuda" else 0.0
    cpus = config.pipeline.cpus_per_stage or _default_cpus(len(blueprint.layers))
    stage_bundle = {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}
    pipelines = serve.deployment(Pipeline, name="Pipeline").options(
        ray_actor_options={"num_cpus": COORDINATOR_CPUS},
        placement_group_bundles=[{"CPU": COORDINATOR_CPUS}, *[stage_bundle] * len(blueprint.layers)],
        placement_group_strategy="PACK",
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        **(scaling or {"num_replicas": 1}),
    )
    ingress = serve.deployment(Ingress, name="Ingress").options(
        ray_actor_options={"num_cpus": 0}, max_ongoing_requests=MAX_ONGOING_REQUESTS
    )
    return ingress.bind(config, pipelines.bind(config.pipeline, device, cpus, gpus))


def _device(config: PipelineConfig) -> DeviceKind:
    if config.device != "auto":
        return config.device
    return "cuda" if ray.cluster_resources().get("GPU", 0) > 0 else "cpu"


def _default_cpus(num_stages: int) -> float:
    """At most one CPU a stage, and less where the whole cluster has fewer."""
    share = CLUSTER_SHARE * ray.cluster_resources().get("CPU", 1.0) / num_stages
    return min(1.0, math.floor(share * 100) / 100) or 0.01
