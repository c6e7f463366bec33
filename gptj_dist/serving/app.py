"""Builds the Serve application: an ingress, and pipelines behind it, each in a placement group of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import ray
from ray import serve
from ray.serve import Application

from gptj_dist.config import PipelineConfig
from gptj_dist.serving.ingress import Ingress
from gptj_dist.serving.pipeline import Pipeline
from gptj_dist.serving.settings import AppConfig, parse_settings
from gptj_dist.serving.sizing import COORDINATOR_CPUS, PipelineSize, size_stages
from gptj_dist.stages.blueprint import draw_blueprint

MAX_ONGOING_REQUESTS = 10_000
"""Serve must not hold requests back: the pipeline's scheduler queues them."""


def build(args: dict[str, Any]) -> Application:
    """The application of a Serve config: its `args` are the fields of `PipelineConfig` and `served_model_name`.

    Raises:
        ConfigurationError: the settings or the checkpoint will not do; nothing has been placed.
    """
    return make_application(parse_settings(args))


def make_application(
    config: AppConfig, scaling: Mapping[str, Any] | None = None, listen: tuple[str, int] | None = None
) -> Application:
    """The application, bound and ready to be run on the cluster that Ray is connected to.

    Args:
        scaling: Serve's `num_replicas` or `autoscaling_config` for the pipelines.
        listen: host and port at which the ingress itself takes HTTP; None leaves that to Serve's proxies.

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
    pipeline = pipelines.bind(config.pipeline, size.device, size.cpus_per_stage, size.gpus_per_stage)
    return ingress.bind(config, pipeline, listen)


def size_pipeline(config: PipelineConfig) -> PipelineSize:
    """What a pipeline will ask for. Looks at the connected cluster only for what the settings leave open.

    Raises:
        ConfigurationError: the settings or the checkpoint will not do.
    """
    return size_stages(config, len(draw_blueprint(config).layers), _num_in_cluster)


def _num_in_cluster(resource: str) -> float:
    return float(ray.cluster_resources().get(resource, 0.0))
