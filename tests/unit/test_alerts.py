"""Each alert of `cluster/monitoring/alerts.yml` fires when its trouble is there, and not beside it; by promtool."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from gptj_dist.serving.metrics import FAMILIES, Exposition

ROOT = Path(__file__).resolve().parents[2]
MONITORING = ROOT / "cluster" / "monitoring"
RULES = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"][0]["rules"]
ALERTS = {rule["alert"]: rule for rule in RULES}

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool comes with Prometheus")

P = 'model_name="m",pipeline="p"'
I = 'model_name="m",ingress="i"'  # noqa: E741
COMPLETIONS = f'http_requests_total{{{I},method="POST",path="/v1/completions",status="%s"}}'
UNREADY = f'http_requests_total{{{I},method="GET",path="%s",status="503"}}'
BUSY = f'stage_busy_seconds_total{{{P},stage="%d"}}'


@dataclass(frozen=True)
class Case:
    """What Prometheus has scraped each minute, and whether the alert fires after so many minutes.

    Args:
        series: promtool's short form of values, by series without `gptj_dist_`.
    """

    alert: str
    series: dict[str, str]
    at_min: int
    is_firing: bool

    def __str__(self) -> str:
        return f"{self.alert}-{'fires' if self.is_firing else 'quiet'}-{self.at_min}"


def histogram(name: str, labels: str, fast_a_minute: int, slow_a_minute: int, minutes: int) -> dict[str, str]:
    """Observations of at most 0.1 s and of 11 to 20 s each minute."""
    counts = {"0.1": fast_a_minute, "11": fast_a_minute, "20": fast_a_minute + slow_a_minute}
    counts["+Inf"] = counts["20"]
    return {f'{name}{{{labels},le="{bound}"}}': f"0+{count}x{minutes}" for bound, count in counts.items()}


CASES = [
    Case("GptjUnreachable", {'up{job="gptj-dist",instance="i"}': "1 1 0 0 0"}, 3, True),
    Case("GptjUnreachable", {'up{job="gptj-dist",instance="i"}': "1 0 1 1 1"}, 3, False),
    Case("GptjNoPipeline", {f"pipeline_up{{{P}}}": "1 0 0 0"}, 2, True),
    Case("GptjNoPipeline", {f"http_requests_in_flight{{{I}}}": "0x5"}, 2, True),  # none has come up yet
    Case("GptjNoPipeline", {f"pipeline_up{{{P}}}": "0x5", 'pipeline_up{model_name="m",pipeline="q"}': "1x5"}, 4, False),
    Case("GptjPipelineDown", {f'pipeline_down_seconds{{{P},problem="stage 1 died"}}': "1 61"}, 1, True),
    Case("GptjPipelineDown", {f'pipeline_down_seconds{{{P},problem="stage 1 died"}}': "1 3 _"}, 1, False),
    Case("GptjStageLost", {f"pipeline_restarts_total{{{P}}}": "0 0 1 1"}, 3, True),
    Case("GptjStageLost", {f"pipeline_restarts_total{{{P}}}": "0 0 1 1x40"}, 30, False),
    Case("GptjStagesKeepDying", {f"pipeline_restarts_total{{{P}}}": "0 1 2 3 4 5 5"}, 6, True),
    Case("GptjStagesKeepDying", {f"pipeline_restarts_total{{{P}}}": "0 1 1 1 1 1 1"}, 6, False),
    *(
        Case(
            "GptjCompletionsFail",
            {
                f'request_success_total{{{I},finished_reason="stop"}}': "0+100x10",
                f'request_success_total{{{I},finished_reason="error"}}': f"0+{errors}x10",
            },
            9,
            errors > 0,
        )
        for errors in (0, 2)
    ),
    Case("GptjUnavailable", {COMPLETIONS % 200: "0+100x10", COMPLETIONS % 503: "0+3x10"}, 9, True),
    *(
        Case("GptjUnavailable", {COMPLETIONS % 200: "0+100x10", UNREADY % path: "0+10x10"}, 9, False)
        for path in ("/ready", "/debug/pipeline")  # what asks while the model loads
    ),
    Case("GptjRequestsRefused", {COMPLETIONS % 200: "0+100x15", COMPLETIONS % 429: "0+10x15"}, 12, True),
    Case("GptjRequestsRefused", {COMPLETIONS % 200: "0+100x15", COMPLETIONS % 429: "0+1x15"}, 12, False),
    Case("GptjFirstTokenSlow", histogram("time_to_first_token_seconds_bucket", P, 90, 10, 15), 12, True),
    Case("GptjFirstTokenSlow", histogram("time_to_first_token_seconds_bucket", P, 99, 1, 15), 12, False),
    Case("GptjQueueDoesNotEmpty", {f"num_requests_waiting{{{P}}}": "3x20"}, 18, True),
    Case("GptjQueueDoesNotEmpty", {f"num_requests_waiting{{{P}}}": "9 9 9 0 9 9 9 0 9 9 9 0 9 9 9 0 9 9 9"}, 18, False),
    Case("GptjPreemptions", {f"num_preemptions_total{{{P}}}": "0+12x20"}, 18, True),
    Case("GptjPreemptions", {f"num_preemptions_total{{{P}}}": "0+1x20"}, 18, False),
    Case("GptjStageBottleneck", {BUSY % 0: "0+30x40", BUSY % 1: "0+58x40"}, 30, True),
    Case("GptjStageBottleneck", {BUSY % 0: "0+55x40", BUSY % 1: "0+58x40"}, 30, False),  # both are busy
    Case("GptjStageBottleneck", {BUSY % 0: "0+5x40", BUSY % 1: "0+20x40"}, 30, False),  # neither is
    *(
        Case(
            "GptjThroughputFell",
            {f"generation_tokens_total{{{P}}}": "0+6000x60 360000+1000x30", f"num_requests_waiting{{{P}}}": waiting},
            85,
            waiting != "0x90",
        )
        for waiting in ("4x90", "0x90")  # fewer tokens because fewer are asked for are no trouble
    ),
    Case("GptjEventLoopLate", histogram("coordinator_loop_lag_seconds_bucket", P, 100, 5, 15), 12, True),
    Case("GptjEventLoopLate", histogram("ingress_loop_lag_seconds_bucket", I, 100, 5, 15), 12, True),
    Case("GptjEventLoopLate", histogram("ingress_loop_lag_seconds_bucket", I, 1000, 1, 15), 12, False),
    Case("GptjFramesFaulty", {f'frame_faults_total{{{P},edge="0->1",fault="missing"}}': "0 0 1"}, 2, True),
    Case("GptjFramesFaulty", {f'frame_faults_total{{{P},edge="0->1",fault="missing"}}': "3 3 3"}, 2, False),
    Case("GptjStrangers", {f'dropped_messages_total{{{P},port="stage-0"}}': "0 2 2"}, 2, True),
    Case("GptjStrangers", {f'dropped_messages_total{{{P},port="stage-0"}}': "2 2 2"}, 2, False),
]


def as_promtool_test(case: Case) -> dict[str, Any]:
    series = [
        {"series": name if name.startswith("up{") else f"gptj_dist_{name}", "values": values}
        for name, values in case.series.items()
    ]
    firing = [{"labels": "{}", "value": 1}] if case.is_firing else []
    expression = f'count(ALERTS{{alertname="{case.alert}", alertstate="firing"}})'
    asked = {"expr": expression, "eval_time": f"{case.at_min}m", "exp_samples": firing}
    return {"name": str(case), "interval": "1m", "input_series": series, "promql_expr_test": [asked]}


def promtool(*arguments: str) -> str:
    """Its output; raises if it complains."""
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_promtool
def test_each_alert_fires_when_its_trouble_is_there_and_not_beside_it(tmp_path: Path) -> None:
    tests = {"rule_files": [str(MONITORING / "alerts.yml")], "evaluation_interval": "1m"}
    path = tmp_path / "test.yml"
    path.write_text(yaml.safe_dump(tests | {"tests": [as_promtool_test(case) for case in CASES]}))
    promtool("test", "rules", str(path))


@needs_promtool
def test_promtool_takes_the_rules_and_the_configuration() -> None:
    promtool("check", "rules", "--lint-fatal", str(MONITORING / "alerts.yml"))
    promtool("check", "config", str(MONITORING / "prometheus.yml"))


@pytest.mark.parametrize("is_firing", [True, False])
def test_every_alert_has_both_cases(is_firing: bool) -> None:
    assert {case.alert for case in CASES if case.is_firing == is_firing} == set(ALERTS)


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_asks_for_metrics_that_there_are_and_names_a_page(name: str) -> None:
    families = Exposition("demo", [], []).collect()
    known = {f"{metric.name}{suffix}" for metric in families for suffix in ("", "_total", "_bucket")}
    asked = set(re.findall(r"gptj_dist_\w+", ALERTS[name]["expr"]))
    assert asked <= known
    assert asked or ALERTS[name]["expr"].startswith("up{")
    assert ALERTS[name]["labels"]["severity"] in ("page", "ticket")
    runbook = ROOT / ALERTS[name]["annotations"]["runbook"]
    assert runbook.exists()
    assert name in runbook.read_text(), f"{runbook} does not say what {name} means"


def test_labels_of_the_alerts_are_those_of_their_metrics() -> None:
    labels = {f"gptj_dist_{family.name}": {*family.labels, "le", "model_name"} for family in FAMILIES}
    for name, rule in ALERTS.items():
        metrics = {re.sub(r"_(total|bucket)$", "", metric) for metric in re.findall(r"gptj_dist_\w+", rule["expr"])}
        used = [label.strip() for group in re.findall(r"by \(([^)]*)\)", rule["expr"]) for label in group.split(",")]
        matched = re.findall(r"(\w+)(?:=~|!~|!=|=)\"", rule["expr"])
        known = set().union(*(labels.get(metric) or labels[f"{metric}_total"] for metric in metrics))
        assert {*used, *matched} <= known | {"job"}, name


def test_the_data_source_asks_as_often_as_prometheus_scrapes_and_the_dashboards_are_where_grafana_looks() -> None:
    grafana = MONITORING / "grafana"
    (source,) = yaml.safe_load((grafana / "datasources" / "prometheus.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((grafana / "dashboards" / "gptj-dist.yml").read_text())["providers"]
    prometheus = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    assert source["jsonData"]["timeInterval"] == prometheus["global"]["scrape_interval"]
    compose = (ROOT / "cluster" / "docker" / "compose.yaml").read_text()
    assert f"../dashboards:{provider['options']['path']}:ro" in compose
    assert prometheus["rule_files"] == ["alerts.yml"]
