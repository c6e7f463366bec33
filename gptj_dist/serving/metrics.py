"""The Prometheus families of `GET /metrics`, made of the counters of pipelines and ingresses. Knows no Ray.

The names are vLLM's where it has one, under the prefix `gptj_dist_`. `docs/metrics.md` lists them for people.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from gptj_dist.engine.histogram import BOUNDS_NS
from gptj_dist.engine.routing import Route
from gptj_dist.quantization import weights_text
from gptj_dist.serving.layer_moves import MOVE_REASONS
from gptj_dist.stages.transport.edge import edge_names
from gptj_dist.stages.transport.frames import FrameFault

if TYPE_CHECKING:
    from gptj_dist.engine.stats import StageWork
    from gptj_dist.serving.counters import IngressMetrics
    from gptj_dist.serving.debug import DownPipeline
    from gptj_dist.serving.pipeline import PipelineStatus

_BOUNDS = (*(f"{bound / 1e9:g}" for bound in BOUNDS_NS), "+Inf")

_Kind = type[CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily]
_Rows = Iterable[tuple[tuple[str, ...], Any]]
"""Values of the labels, and what they label: a `Histogram` for a histogram, else a number."""


@dataclass(frozen=True, slots=True)
class Exposition(Collector):
    """The metrics of one scrape.

    Args:
        model: the name that clients see.
        pipelines, ingresses: of the replicas that answered.
        down: pipelines whose coordinators do not.
    """

    model: str
    pipelines: Sequence[PipelineStatus]
    ingresses: Sequence[IngressMetrics]
    down: Sequence[DownPipeline] = ()

    def encoded(self, accept: str) -> tuple[bytes, str]:
        """The text and its content type, in the format that the scraper's `accept` header asks for."""
        encode, content_type = choose_encoder(accept)
        return encode(self), content_type

    def collect(self) -> Iterator[Metric]:
        """The families, each of them even where it has no samples."""
        return (family.of(self) for family in FAMILIES)


@dataclass(frozen=True, slots=True)
class Family:
    """A metric, and how to find its values.

    Args:
        name: without the prefix, and a counter's without `_total`.
        labels: in addition to `model_name`, which all families have.
    """

    kind: _Kind
    name: str
    labels: tuple[str, ...]
    meaning: str
    rows: Callable[[Exposition], _Rows]

    def of(self, exposition: Exposition) -> Metric:
        """The family with its samples."""
        metric = self.kind(f"gptj_dist_{self.name}", self.meaning, labels=("model_name", *self.labels))
        for row, value in self.rows(exposition):
            if isinstance(metric, HistogramMetricFamily):
                buckets = list(zip(_BOUNDS, accumulate(value.counts), strict=True))
                metric.add_metric((exposition.model, *row), buckets, value.sum_ns / 1e9)
            else:
                metric.add_metric((exposition.model, *row), value)
        return metric


def _pipeline(kind: _Kind, name: str, meaning: str, value: Callable[[PipelineStatus], Any]) -> Family:
    """A family with a value for each pipeline."""
    return Family(
        kind, name, ("pipeline",), meaning, lambda exposition: (((p.name,), value(p)) for p in exposition.pipelines)
    )


def _stage(kind: _Kind, name: str, meaning: str, value: Callable[[StageWork], Any]) -> Family:
    """A family with a value for each stage."""

    def rows(exposition: Exposition) -> _Rows:
        for pipeline in exposition.pipelines:
            for number, work in enumerate(pipeline.work):
                yield (pipeline.name, str(number)), value(work)

    return Family(kind, name, ("pipeline", "stage"), meaning, rows)


def _moved(exposition: Exposition) -> _Rows:
    return (((p.name, reason), p.moves.num_moved[reason]) for p in exposition.pipelines for reason in MOVE_REASONS)


def _responses(exposition: Exposition) -> _Rows:
    for ingress in exposition.ingresses:
        for (method, path, status), number in ingress.num_responses.items():
            yield (ingress.name, method, path, str(status)), number


def _in_flight(exposition: Exposition) -> _Rows:
    return (((ingress.name,), ingress.num_in_flight) for ingress in exposition.ingresses)


def _finished(exposition: Exposition) -> _Rows:
    for ingress in exposition.ingresses:
        for reason, number in ingress.num_finished.items():
            yield (ingress.name, reason), number


def _moves(exposition: Exposition) -> _Rows:
    return (((ingress.name,), ingress.num_moves) for ingress in exposition.ingresses)


def _ingress_lag(exposition: Exposition) -> _Rows:
    return (((ingress.name,), ingress.loop_lag) for ingress in exposition.ingresses)


def _up(exposition: Exposition) -> _Rows:
    yield from (((pipeline.name,), pipeline.is_up) for pipeline in exposition.pipelines)
    yield from (((pipeline.name,), 0) for pipeline in exposition.down)


def _down(exposition: Exposition) -> _Rows:
    for pipeline in exposition.pipelines:
        if pipeline.problem is not None:
            yield (pipeline.name, pipeline.problem), pipeline.down_s or 0
    yield from (((pipeline.name, pipeline.problem), pipeline.down_s) for pipeline in exposition.down)


def _adapter_requests(exposition: Exposition) -> _Rows:
    for pipeline in exposition.pipelines:
        for name, number in pipeline.adapter_requests.items():
            yield (pipeline.name, name), number


def _routed(exposition: Exposition) -> _Rows:
    for pipeline in exposition.pipelines:
        for route in Route:
            yield (pipeline.name, route), pipeline.num_routed.get(route, 0)


def _weights(exposition: Exposition) -> _Rows:
    for pipeline in exposition.pipelines:
        for report in pipeline.stages:
            dtype = weights_text(report.quantized, report.dtype)
            yield (pipeline.name, str(report.layers.stage), dtype), report.weight_bytes


def _edges(exposition: Exposition) -> _Rows:
    for pipeline in exposition.pipelines:
        for name, number in zip(edge_names(len(pipeline.edge_bytes) - 1), pipeline.edge_bytes, strict=True):
            yield (pipeline.name, name), number


def _frame_faults(exposition: Exposition) -> _Rows:
    for pipeline in exposition.pipelines:
        for edge, name in enumerate(edge_names(len(pipeline.edge_bytes) - 1)):
            for fault in FrameFault:
                yield (pipeline.name, name, fault), pipeline.frame_faults.get((edge, fault), 0)


def _dropped(exposition: Exposition) -> _Rows:
    """By port: `stage-0`, `stage-1`, ..., `coordinator` and `feed`."""
    for pipeline in exposition.pipelines:
        ports = [*(f"stage-{index}" for index in range(len(pipeline.port_dropped) - 2)), "coordinator", "feed"]
        for port, number in zip(ports, pipeline.port_dropped, strict=True):
            yield (pipeline.name, port), number


def _feed_dropped(exposition: Exposition) -> _Rows:
    return (((ingress.name,), ingress.feed_dropped.total) for ingress in exposition.ingresses)


def _feed_faults(exposition: Exposition) -> _Rows:
    for ingress in exposition.ingresses:
        for fault in (FrameFault.MISSING, FrameFault.REPEATED):
            yield (ingress.name, fault), ingress.feed_faults[fault]


_COUNTER, _GAUGE, _HISTOGRAM = CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

FAMILIES: Sequence[Family] = (
    Family(
        _COUNTER,
        "http_requests",
        ("ingress", "method", "path", "status"),
        "HTTP requests that were answered; status 499 if the client went first.",
        _responses,
    ),
    Family(_GAUGE, "http_requests_in_flight", ("ingress",), "HTTP requests that are being answered.", _in_flight),
    Family(
        _COUNTER,
        "request_success",
        ("ingress", "finished_reason"),
        "Completions, by how they ended: stop, length, content_filter, abort (not wanted any more) or error.",
        _finished,
    ),
    Family(
        _COUNTER,
        "request_moves",
        ("ingress",),
        "How often a completion moved to another pipeline because its own was lost.",
        _moves,
    ),
    _pipeline(_GAUGE, "num_requests_running", "Requests that are being computed.", lambda p: p.num_running),
    _pipeline(_GAUGE, "num_requests_waiting", "Requests that wait to be computed.", lambda p: p.num_waiting),
    _pipeline(_GAUGE, "num_adapters", "Adapters that requests can name.", lambda p: p.num_adapters),
    Family(
        _GAUGE,
        "num_adapter_requests",
        ("pipeline", "adapter"),
        "Requests with the adapter that are being computed, or wait to be.",
        _adapter_requests,
    ),
    _pipeline(
        _GAUGE,
        "kv_cache_usage_perc",
        "Share of the KV cache that is in use, from 0 to 1.",
        lambda p: p.num_used_blocks / p.num_blocks,
    ),
    _pipeline(
        _COUNTER, "prompt_tokens", "Tokens of prompts that were computed.", lambda p: p.requests.num_prompt_tokens
    ),
    _pipeline(
        _COUNTER,
        "prefix_cache_hits",
        "Tokens of prompts that were not computed, because the KV cache still held them.",
        lambda p: p.requests.num_cached_tokens,
    ),
    Family(
        _COUNTER,
        "routed_prompts",
        ("pipeline", "reason"),
        "Prompts that came to this one of several pipelines: for their prefix, for the load, or new ones.",
        _routed,
    ),
    _pipeline(
        _GAUGE,
        "prefix_cache_blocks",
        "Free KV blocks that later requests may begin with.",
        lambda p: p.num_cached_blocks,
    ),
    _pipeline(
        _COUNTER,
        "prefix_cache_evictions",
        "KV blocks that were needed while later requests might have begun with them.",
        lambda p: p.num_evicted_blocks,
    ),
    _pipeline(_COUNTER, "generation_tokens", "Tokens that were sampled.", lambda p: p.requests.num_generation_tokens),
    _pipeline(_COUNTER, "spec_decode_num_draft_tokens", "Next tokens that were guessed.", lambda p: p.num_drafts),
    _pipeline(
        _COUNTER,
        "spec_decode_num_accepted_tokens",
        "Guessed tokens that are what was sampled.",
        lambda p: p.num_accepted,
    ),
    _pipeline(
        _COUNTER,
        "num_preemptions",
        "How often a request lost its KV blocks to an older one.",
        lambda p: p.num_preemptions,
    ),
    _pipeline(
        _HISTOGRAM,
        "request_queue_time_seconds",
        "From a request's arrival at the coordinator until the first plan with it left.",
        lambda p: p.requests.queue_time,
    ),
    _pipeline(
        _HISTOGRAM,
        "time_to_first_token_seconds",
        "From a request's arrival at the coordinator to its first token.",
        lambda p: p.requests.time_to_first_token,
    ),
    _pipeline(
        _HISTOGRAM,
        "inter_token_latency_seconds",
        "Between two tokens of a request.",
        lambda p: p.requests.inter_token_latency,
    ),
    _pipeline(
        _HISTOGRAM,
        "e2e_request_latency_seconds",
        "From a request's arrival at the coordinator until its last token or until it was closed.",
        lambda p: p.requests.e2e_latency,
    ),
    _pipeline(
        _GAUGE, "num_plans_in_flight", "Micro-batches on their way through the stages.", lambda p: p.num_in_flight
    ),
    Family(_GAUGE, "pipeline_up", ("pipeline",), "1 if the pipeline computes, 0 while a process of it is down.", _up),
    Family(_GAUGE, "pipeline_down_seconds", ("pipeline", "problem"), "For how long it has been down, and why.", _down),
    _pipeline(
        _COUNTER, "pipeline_restarts", "How often the pipeline's stages were replaced.", lambda p: p.num_restarts
    ),
    _pipeline(
        _HISTOGRAM,
        "recovery_seconds",
        "From the loss of a stage or a frame until the pipeline computed again.",
        lambda p: p.recovery_time,
    ),
    _pipeline(
        _COUNTER,
        "recomputed_tokens",
        "Tokens of prompts and of texts that were computed again after a loss.",
        lambda p: p.requests.num_recomputed_tokens,
    ),
    Family(_COUNTER, "moved_layers", ("pipeline", "reason"), "Layers that moved between stages.", _moved),
    _pipeline(
        _HISTOGRAM,
        "layer_move_pause_seconds",
        "Time in which neither stage of a moved layer could compute.",
        lambda p: p.moves.pause,
    ),
    _pipeline(
        _COUNTER,
        "coordinator_busy_seconds",
        "Time in which the coordinator made plans or handed out tokens.",
        lambda p: p.coordinator_ns / 1e9,
    ),
    _pipeline(
        _HISTOGRAM,
        "coordinator_loop_lag_seconds",
        "How late the coordinator's event loop did what was due, sampled 20 times a second.",
        lambda p: p.loop_lag,
    ),
    Family(
        _HISTOGRAM,
        "ingress_loop_lag_seconds",
        ("ingress",),
        "How late the ingress's event loop did what was due, sampled 20 times a second.",
        _ingress_lag,
    ),
    _stage(_COUNTER, "stage_busy_seconds", "Time in which the stage computed.", lambda s: s.step_time.sum_ns / 1e9),
    _stage(
        _COUNTER,
        "stage_bubble_seconds",
        "Time in which the stage did not compute, though plans were in flight.",
        lambda s: s.bubble_ns / 1e9,
    ),
    _stage(_HISTOGRAM, "stage_step_seconds", "What a step, one plan, took the stage.", lambda s: s.step_time),
    Family(
        _GAUGE,
        "stage_weight_bytes",
        ("pipeline", "stage", "dtype"),
        "Bytes of the stage's weights, by their bits and the type that they are multiplied in.",
        _weights,
    ),
    Family(
        _COUNTER,
        "edge_bytes",
        ("pipeline", "edge"),
        "Bytes that came over an edge of the ring of coordinator and stages.",
        _edges,
    ),
    Family(
        _COUNTER,
        "frame_faults",
        ("pipeline", "edge", "fault"),
        "Frames between stages that did not arrive as they were sent: missing, repeated or corrupted.",
        _frame_faults,
    ),
    Family(
        _COUNTER,
        "dropped_messages",
        ("pipeline", "port"),
        "Connections without the port's key, and malformed messages to the outbox, that a port has dropped.",
        _dropped,
    ),
    Family(
        _COUNTER,
        "feed_dropped_messages",
        ("ingress",),
        "Connections without the port's key, and malformed messages, that the port for tokens has dropped.",
        _feed_dropped,
    ),
    Family(
        _COUNTER,
        "feed_faults",
        ("ingress", "fault"),
        "Parts of streams that did not arrive in order at the port for tokens: missing or repeated.",
        _feed_faults,
    ),
)
