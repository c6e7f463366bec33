"""What `/metrics` says of known data; and that the page and the dashboard about it say nothing else."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from gptj_dist.config import LayerRange
from gptj_dist.engine.histogram import Histogram
from gptj_dist.engine.journal import RequestTotals
from gptj_dist.engine.limits import EngineLimits
from gptj_dist.engine.routing import Route
from gptj_dist.engine.stats import StageWork
from gptj_dist.serving.counters import IngressMetrics
from gptj_dist.serving.debug import DownPipeline
from gptj_dist.serving.layer_moves import MoveTotals
from gptj_dist.serving.metrics import FAMILIES, Exposition
from gptj_dist.serving.pipeline import PipelineStatus
from gptj_dist.stages.blueprint import DeviceReport, StageReport
from gptj_dist.stages.loss import StageProcess
from gptj_dist.stages.transport.frames import FrameFault
from gptj_dist.token_rules import TokenRules

ROOT = Path(__file__).parents[2]
MS = 1_000_000


def histogram(*durations_ms: float) -> Histogram:
    made = Histogram()
    for duration_ms in durations_ms:
        made.observe(round(duration_ms * MS))
    return made


def stage(number: int, weight_bytes: int, quantized: str | None) -> StageReport:
    """A stage of two."""
    layers, cpu = LayerRange(number, 2, number, number + 1), DeviceReport("cpu", "alpha/cpu", 4, 10**9, ("float32",))
    return StageReport(layers, cpu, "cpu", "float32", weight_bytes, 10**9, 64, 9, quantized=quantized)


def pipeline(name: str, num_prompt_tokens: int = 0) -> PipelineStatus:
    """A pipeline of two stages that has worked."""
    requests = RequestTotals(
        num_prompt_tokens, 8, 11, 0, 9, histogram(3), histogram(12, 40), histogram(5, 5), histogram(60)
    )
    return PipelineStatus(
        name=name,
        state="up",
        pid=7,
        num_running=3,
        num_waiting=2,
        num_in_flight=1,
        num_used_blocks=10,
        num_blocks=40,
        num_preemptions=4,
        num_restarts=5,
        actor=f"actor of {name}",
        process=StageProcess("alpha", 7, None, None, None),
        node_id="node",
        limits=EngineLimits(TokenRules(50), 100, 640, 4),
        stages=(stage(0, 3_000, "int4"), stage(1, 9_000, None)),
        requests=requests,
        work=(StageWork(histogram(4), 250 * MS), StageWork(histogram(6, 8), 125 * MS)),
        coordinator_ns=2000 * MS,
        num_drafts=12,
        moves=MoveTotals(Counter({"asked": 2, "balance": 3}), histogram(20, 30)),
        num_accepted=9,
        edge_bytes=(100, 2000, 30),
        port_dropped=(0, 4, 2, 1),
        loop_lag=histogram(1, 60),
        frame_faults={(1, FrameFault.MISSING): 3},
        back_in_s=0.0,
        recovery_time=histogram(1500, 500),
        start_s=4.0,
        adapter_digest="",
        num_routed={Route.PREFIX: 6},
        num_adapters=3,
        adapter_requests={"poet": 2},
    )


def ingress(name: str) -> IngressMetrics:
    made = IngressMetrics(name, num_in_flight=6)
    made.num_responses["POST", "/v1/completions", 200] = 7
    for reason in ("stop", "stop", "abort"):
        made.note_end(reason)
    made.note_move()
    made.feed_faults[FrameFault.MISSING] += 1
    return made


@pytest.fixture(scope="module")
def exposition() -> Exposition:
    q = replace(pipeline("q", 1), state="restarting", problem="stage 1 died", down_s=1.5)
    down = DownPipeline("r", "its coordinator ended", 2.5, "2026-11-29T17:00:00.000Z")
    return Exposition("demo", [pipeline("p", 21), q], [ingress("i"), ingress("j")], [down])


@pytest.fixture(scope="module")
def samples(exposition: Exposition) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Values by name and labels but `model_name`, which all must have."""
    found = {}
    for family in parse(exposition.encoded("")[0].decode()):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model_name") == "demo"
            found[sample.name.removeprefix("gptj_dist_"), frozenset(labels.items())] = sample.value
    return found


def labels(**of_sample: str) -> frozenset[tuple[str, str]]:
    return frozenset(of_sample.items())


def test_the_numbers_are_those_of_each_replica(
    samples: dict[tuple[str, frozenset[tuple[str, str]]], float],
) -> None:
    responses = labels(ingress="i", method="POST", path="/v1/completions", status="200")
    expected = {
        ("http_requests_total", responses): 7,
        ("http_requests_in_flight", labels(ingress="j")): 6,
        ("request_success_total", labels(ingress="i", finished_reason="stop")): 2,
        ("request_success_total", labels(ingress="i", finished_reason="abort")): 1,
        ("request_success_total", labels(ingress="i", finished_reason="error")): 0,
        ("request_moves_total", labels(ingress="j")): 1,
        ("num_requests_running", labels(pipeline="p")): 3,
        ("num_requests_waiting", labels(pipeline="p")): 2,
        ("kv_cache_usage_perc", labels(pipeline="p")): 0.25,
        ("prompt_tokens_total", labels(pipeline="p")): 21,
        ("prompt_tokens_total", labels(pipeline="q")): 1,
        ("generation_tokens_total", labels(pipeline="p")): 11,
        ("num_preemptions_total", labels(pipeline="p")): 4,
        ("num_plans_in_flight", labels(pipeline="p")): 1,
        ("num_adapters", labels(pipeline="p")): 3,
        ("num_adapter_requests", labels(pipeline="q", adapter="poet")): 2,
        ("routed_prompts_total", labels(pipeline="q", reason="prefix")): 6,
        ("routed_prompts_total", labels(pipeline="q", reason="load")): 0,
        ("stage_weight_bytes", labels(pipeline="p", stage="0", dtype="int4 in float32")): 3_000,
        ("stage_weight_bytes", labels(pipeline="q", stage="1", dtype="float32")): 9_000,
        ("pipeline_up", labels(pipeline="p")): 1,
        ("pipeline_up", labels(pipeline="q")): 0,
        ("pipeline_up", labels(pipeline="r")): 0,
        ("pipeline_down_seconds", labels(pipeline="q", problem="stage 1 died")): 1.5,
        ("pipeline_down_seconds", labels(pipeline="r", problem="its coordinator ended")): 2.5,
        ("pipeline_restarts_total", labels(pipeline="p")): 5,
        ("coordinator_busy_seconds_total", labels(pipeline="p")): 2,
        ("stage_busy_seconds_total", labels(pipeline="p", stage="1")): 0.014,
        ("stage_bubble_seconds_total", labels(pipeline="p", stage="0")): 0.25,
        ("stage_step_seconds_count", labels(pipeline="p", stage="1")): 2,
        ("stage_step_seconds_sum", labels(pipeline="p", stage="1")): 0.014,
        ("edge_bytes_total", labels(pipeline="p", edge="coordinator->0")): 100,
        ("edge_bytes_total", labels(pipeline="p", edge="0->1")): 2000,
        ("edge_bytes_total", labels(pipeline="q", edge="1->coordinator")): 30,
        ("dropped_messages_total", labels(pipeline="p", port="stage-0")): 0,
        ("dropped_messages_total", labels(pipeline="p", port="stage-1")): 4,
        ("dropped_messages_total", labels(pipeline="p", port="coordinator")): 2,
        ("dropped_messages_total", labels(pipeline="q", port="feed")): 1,
        ("feed_dropped_messages_total", labels(ingress="i")): 0,
        ("coordinator_loop_lag_seconds_bucket", labels(pipeline="p", le="0.05")): 1,
        ("ingress_loop_lag_seconds_count", labels(ingress="j")): 0,
        ("frame_faults_total", labels(pipeline="p", edge="0->1", fault="missing")): 3,
        ("recovery_seconds_count", labels(pipeline="p")): 2,
        ("recovery_seconds_sum", labels(pipeline="p")): 2,
        ("recomputed_tokens_total", labels(pipeline="p")): 9,
        ("frame_faults_total", labels(pipeline="p", edge="1->coordinator", fault="corrupted")): 0,
        ("feed_faults_total", labels(ingress="j", fault="missing")): 1,
        ("feed_faults_total", labels(ingress="j", fault="repeated")): 0,
    }
    assert {key: samples[key] for key in expected} == expected


def test_buckets_are_cumulative_and_in_seconds(
    samples: dict[tuple[str, frozenset[tuple[str, str]]], float],
) -> None:
    name = "time_to_first_token_seconds"
    bounds = {"0.01": 0, "0.015": 1, "0.03": 1, "0.05": 2, "1000": 2, "+Inf": 2}
    found = {bound: samples[f"{name}_bucket", labels(pipeline="p", le=bound)] for bound in bounds}
    assert found == bounds
    assert samples[f"{name}_count", labels(pipeline="p")] == 2
    assert samples[f"{name}_sum", labels(pipeline="p")] == 0.052


def test_a_scraper_gets_the_format_that_it_accepts(exposition: Exposition) -> None:
    text, content_type = exposition.encoded("text/html")
    assert content_type.startswith("text/plain; version=0.0.4")
    openmetrics, open_type = exposition.encoded("application/openmetrics-text; version=1.0.0")
    assert open_type.startswith("application/openmetrics-text")
    open_families = list(parse_openmetrics(openmetrics.decode()))  # type: ignore[no-untyped-call]
    assert len(open_families) == len(list(parse(text.decode())))


def test_without_replicas_every_family_is_there_and_has_no_samples() -> None:
    families = list(Exposition("demo", [], []).collect())
    assert len(families) == len(FAMILIES)
    assert [family.samples for family in families] == [[]] * len(FAMILIES)


def test_a_pipeline_that_has_not_worked_yet_has_no_stages() -> None:
    fresh = replace(pipeline("p"), work=())
    names = {family.name for family in Exposition("demo", [fresh], []).collect() if family.samples}
    assert "gptj_dist_stage_step_seconds" not in names
    assert "gptj_dist_prompt_tokens" in names


def full_name(family: Metric) -> str:
    return family.name + "_total" if family.type == "counter" else family.name


def test_the_page_about_metrics_lists_all_of_them_and_no_others_with_type_and_labels() -> None:
    rows = re.findall(
        r"^\| `(gptj_dist_\w+)` \| (\w+) \| (.*?) \| (.+) \|$", (ROOT / "docs/metrics.md").read_text(), re.M
    )
    documented = {name: (kind, re.findall(r"`(\w+)`", labels)) for name, kind, labels, _ in rows}
    families = zip(FAMILIES, Exposition("demo", [], []).collect(), strict=True)
    assert documented == {full_name(metric): (metric.type, list(family.labels)) for family, metric in families}
    assert len(rows) == len(FAMILIES)


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    document: dict[str, Any] = json.loads((ROOT / "cluster/dashboards/gptj-dist.json").read_text())
    return document


def panels(dashboard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    return (panel for panel in dashboard["panels"] if panel["type"] != "row")


def test_every_panel_has_a_title_a_unit_a_meaning_and_something_to_show(dashboard: dict[str, Any]) -> None:
    for panel in panels(dashboard):
        assert panel["title"]
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["targets"]
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids)) > 20


def test_panels_do_not_overlap(dashboard: dict[str, Any]) -> None:
    taken = [
        (x, y)
        for place in (panel["gridPos"] for panel in dashboard["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(taken) == len(set(taken))
    assert max(x for x, _ in taken) < 24


def queries(dashboard: dict[str, Any]) -> list[str]:
    """All that is asked of Prometheus, by panels and by variables."""
    of_panels = [target["expr"] for panel in panels(dashboard) for target in panel["targets"]]
    variables = [variable["definition"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"]
    return of_panels + variables


def test_every_query_asks_for_metrics_that_there_are_by_labels_that_they_have(
    dashboard: dict[str, Any], exposition: Exposition
) -> None:
    labels_of: dict[str, set[str]] = {}
    for family in parse(exposition.encoded("")[0].decode()):
        for sample in family.samples:
            labels_of.setdefault(sample.name, set()).update(sample.labels)
    for query in queries(dashboard):
        names = re.findall(r"gptj_dist_\w+", query)
        assert names, query
        assert set(names) <= set(labels_of), query
        known = set.intersection(*(labels_of[name] for name in names))
        matched = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", query)
        grouped = [label.strip() for group in re.findall(r"by \(([^)]*)\)", query) for label in group.split(",")]
        assert {*matched, *grouped} <= known, query
        assert (query.count("("), query.count("{")) == (query.count(")"), query.count("}")), query


def test_every_metric_has_a_place_on_the_dashboard(dashboard: dict[str, Any]) -> None:
    asked = " ".join(queries(dashboard))
    assert [family.name for family in FAMILIES if f"gptj_dist_{family.name}" not in asked] == []


def test_every_variable_of_a_query_is_defined(dashboard: dict[str, Any]) -> None:
    defined = {variable["name"] for variable in dashboard["templating"]["list"]} | {"__rate_interval"}
    used = {name for query in queries(dashboard) for name in re.findall(r"\$(\w+)", query)}
    assert used <= defined
    assert {"datasource", "model", "pipeline"} <= defined
