"""`gptj-dist serve`: a pipeline behind HTTP, on a Ray of its own or on a cluster, until Ctrl-C."""

from __future__ import annotations

from typing import Annotated

import typer

from gptj_dist.cli.options import (
    DEFAULT_HOST,
    DEFAULT_PORT,
    CPUsPerStage,
    Device,
    DType,
    GPUsPerStage,
    Host,
    KVCacheGB,
    Layers,
    MaxBatchSize,
    MaxModelLen,
    Model,
    Port,
    Revision,
    Stages,
    ThreadsPerStage,
    Trace,
    parse_kv_cache_gb,
    parse_layers,
)
from gptj_dist.config import DEFAULT_MAX_BATCH_SIZE, PipelineConfig
from gptj_dist.errors import ConfigurationError


def serve(
    model: Model,
    stages: Stages = None,
    layers: Layers = None,
    replicas: Annotated[int | None, typer.Option(help="Number of pipelines.")] = None,
    min_replicas: Annotated[int | None, typer.Option(help="Fewest pipelines, when scaling by load.")] = None,
    max_replicas: Annotated[int | None, typer.Option(help="Most pipelines, when scaling by load.")] = None,
    device: Device = "auto",
    dtype: DType = "auto",
    served_model_name: Annotated[str | None, typer.Option(help="What clients call the model.")] = None,
    host: Host = DEFAULT_HOST,
    port: Port = DEFAULT_PORT,
    threads_per_stage: ThreadsPerStage = None,
    cpus_per_stage: CPUsPerStage = None,
    gpus_per_stage: GPUsPerStage = None,
    max_model_len: MaxModelLen = None,
    kv_cache_gb: KVCacheGB = "auto",
    max_batch_size: MaxBatchSize = DEFAULT_MAX_BATCH_SIZE,
    revision: Revision = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to join; without it a local one is started.", envvar="RAY_ADDRESS")
    ] = None,
    trace: Trace = None,
) -> None:
    """Serve a model over HTTP as a pipeline of stages, until Ctrl-C."""
    config = PipelineConfig(
        model,
        revision=revision,
        stages=stages,
        layers=parse_layers(layers),
        device=device,
        dtype=dtype,
        threads_per_stage=threads_per_stage,
        cpus_per_stage=cpus_per_stage,
        gpus_per_stage=gpus_per_stage,
        max_model_len=max_model_len,
        kv_cache_gb=parse_kv_cache_gb(kv_cache_gb),
        max_batch_size=max_batch_size,
    )
    scaling = _scaling(replicas, min_replicas, max_replicas)
    from gptj_dist.stages.blueprint import draw_blueprint
    from gptj_dist.stages.trace import check_trace_path

    check_trace_path(trace)
    config = draw_blueprint(config).config  # whatever is wrong with the model is said before Ray starts
    from gptj_dist.serving.launcher import Launch, run_until_interrupted
    from gptj_dist.serving.settings import AppConfig

    run_until_interrupted(Launch(AppConfig(config, served_model_name), scaling, host, port, address, trace))


def _scaling(replicas: int | None, min_replicas: int | None, max_replicas: int | None) -> dict[str, object]:
    """Serve's settings for the number of pipelines.

    Raises:
        ConfigurationError: numbers that contradict each other.
    """
    if min_replicas is None and max_replicas is None:
        if replicas is not None and replicas < 1:
            raise ConfigurationError(f"--replicas must be at least 1, got {replicas}")
        return {"num_replicas": replicas or 1}
    if replicas is not None:
        raise ConfigurationError("--replicas fixes the number of pipelines, --min-replicas and --max-replicas scale it")
    least = 1 if min_replicas is None else min_replicas
    most = max(least, 1) if max_replicas is None else max_replicas
    if not 0 <= least <= most or most < 1:
        raise ConfigurationError(f"--min-replicas {least} and --max-replicas {most} contradict each other")
    return {"autoscaling_config": {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": 16}}
