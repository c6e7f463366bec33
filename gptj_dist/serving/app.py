"""Builds the Serve application: an ingress and its pipelines. Each pipeline has its own placement group."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from gptj_dist.config import DEFAULT_IDLE_S, PipelineConfig
from gptj_dist.errors import ConfigurationError
from gptj_dist.logs import values
from gptj_dist.serving.allowances import Accounts
from gptj_dist.serving.auto_plan import plan_on_cluster
from gptj_dist.serving.http.listener import Address
from gptj_dist.serving.ingress import Ingress
from gptj_dist.serving.kept_streams import Streams
from gptj_dist.serving.pipeline import Pipeline
from gptj_dist.serving.request_router import PrefixRouter
from gptj_dist.serving.scaling import SETTINGS as SCALING
from gptj_dist.serving.settings import AppConfig, parse_settings
from gptj_dist.serving.sizing import COORDINATOR_CPUS, PipelineSize, size_stages
from gptj_dist.serving.weights import weights_of
from gptj_dist.stages.blueprint import draw_blueprint
from gptj_dist.stages.peer_files import share_files

logger = logging.getLogger(__name__)

MAX_ONGOING_REQUESTS = 10_000
"""Serve must not hold requests back: the pipeline's scheduler queues them."""

STOP_MARGIN_S = 5.0
"""What a replica may take to stop beyond the time of its last requests."""

LAST_ANSWERS_S = 900.0
"""How long an ingress behind Serve's proxies may take to stop. When an update replaces it, or its node will end, it
first answers the requests that it has; new ones go to another ingress. A full context of GPT-J on a slow machine takes
ten minutes. It stops earlier if its node ends or the application is deleted (`serving/ingress.py`).
"""

HEALTH_CHECK_PERIOD_S = 2.0
"""How often Serve looks whether a replica is still there. It replaces one that has died after this time at most."""

HEALTH_CHECK_TIMEOUT_S = 4.0
"""How long a replica may take to answer that. Serve replaces one that has not answered three times in a row. No replica
computes on its event loop, so that a busy one answers within milliseconds, and on a crowded machine when it gets CPU.
"""

ROUTING_PERIOD_S = 1.0
"""How often a pipeline publishes what the choice among pipelines needs to know of it."""

STOP_POLL_S = 0.2
"""How often a replica that stops looks whether its last requests are answered."""


def build(args: dict[str, Any]) -> Application:
    """Builds the application of a Serve config, whose `args` are those of `parse_settings`.

    Raises:
        ConfigurationError: the settings or the checkpoint are invalid. Nothing has been placed.
    """
    return make_application(parse_settings(args))


def make_application(
    config: AppConfig, scaling: Mapping[str, Any] | None = None, listen: Address | None = None
) -> Application:
    """Builds the application, ready to run on the cluster that Ray is connected to.

    Args:
        scaling: Serve's `num_replicas` or `autoscaling_config` for the pipelines, or other settings of the deployment.
            Our policy scales (`scaling.Scale`), unless `target_ongoing_requests` asks for Serve's or `policy` names
            another.
        listen: address at which the ingress itself serves HTTP; None leaves HTTP to Serve's proxies.

    Raises:
        ConfigurationError: see `build`; also if several ingresses would listen at one address.
    """
    if listen is not None and config.ingress_replicas > 1:
        raise ConfigurationError("several ingresses need Serve's proxies in front of them: they are for a cluster")
    config = replace(config, pipeline=_settled(config.pipeline))
    source = share_files(config.pipeline) if listen is None else None  # else this is the only node
    if source is not None:  # a node may have the model elsewhere
        config = replace(config, served_model_names=config.model_names)
    size = size_pipeline(config.pipeline)
    common = {
        "max_ongoing_requests": MAX_ONGOING_REQUESTS,
        "graceful_shutdown_timeout_s": config.drain_s + STOP_MARGIN_S,
        "graceful_shutdown_wait_loop_s": STOP_POLL_S,
        "health_check_period_s": HEALTH_CHECK_PERIOD_S,
        "health_check_timeout_s": HEALTH_CHECK_TIMEOUT_S,
    }
    of_pipelines = {
        **common,
        "ray_actor_options": {"num_cpus": COORDINATOR_CPUS},
        "placement_group_bundles": size.bundles,
        **({"placement_group_bundle_label_selector": size.labels} if any(size.labels) else {}),
        "placement_group_strategy": "PACK",
        "request_router_config": RequestRouterConfig(
            request_router_class=PrefixRouter, request_routing_stats_period_s=ROUTING_PERIOD_S
        ),
        **_scaling(scaling or {"num_replicas": 1}),
    }
    pipelines = serve.deployment(Pipeline, name="Pipeline").options(**of_pipelines)
    # In a rolling update the next replica is there before this one goes.
    light = {**common, "ray_actor_options": {"num_cpus": 0}, "max_surge_percent": 100}
    if listen is None:
        stop = {"graceful_shutdown_timeout_s": max(config.drain_s, LAST_ANSWERS_S) + STOP_MARGIN_S}
    else:
        stop = {"max_surge_percent": 0}  # its port must be free before
    ingress = serve.deployment(Ingress, name="Ingress").options(
        **{**light, "num_replicas": config.ingress_replicas, **stop}
    )
    pipeline = pipelines.bind(
        config.pipeline,
        size.stages,
        config.model_names[0],
        config.log_format,
        config.log_level,
        config.adapters,
        source,
        weights_of(config.pipeline),
    )
    limited_keys = [key for key in config.api_keys if key.is_limited]
    accounts = serve.deployment(Accounts, name="Accounts").options(**light).bind(limited_keys) if limited_keys else None
    streams = serve.deployment(Streams, name="Streams").options(**light).bind() if config.resumable else None
    return ingress.bind(config, pipeline, accounts, listen, streams, source)


def _settled(config: PipelineConfig) -> PipelineConfig:
    """The settings with their commit, so that replicas that start later serve the same one, and with their plan."""
    config = draw_blueprint(config).config
    if config.plan != "auto":
        return config
    plan = plan_on_cluster(config)
    logger.info("planned", extra=values(plan="; ".join(plan.lines)))
    return plan.config


def size_pipeline(config: PipelineConfig) -> PipelineSize:
    """The resources of a pipeline. Asks the connected cluster only for values that the settings leave open.

    Raises:
        ConfigurationError: the settings or the checkpoint are invalid.
    """
    return size_stages(config, len(draw_blueprint(config).layers), _num_in_cluster)


def _num_in_cluster(resource: str) -> float:
    return float(ray.cluster_resources().get(resource, 0.0))


def _scaling(settings: Mapping[str, Any]) -> dict[str, Any]:
    given = settings.get("autoscaling_config")
    if given is None or "target_ongoing_requests" in given:
        return dict(settings)
    first = {} if given.get("min_replicas") else {"initial_replicas": 1}  # so that a model that does not fit is noticed
    return {
        **settings,
        "autoscaling_config": {**SCALING, "downscale_to_zero_delay_s": DEFAULT_IDLE_S, **first, **given},
    }
