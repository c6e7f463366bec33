"""What a live server counts and logs, with two ingresses behind Serve's proxy and two pipelines."""

from __future__ import annotations

import json
import os
import re
import signal
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from gptj_dist.serving.debug import DebugDocument
from gptj_dist.serving.metrics import FAMILIES
from gptj_dist.stages.actor import log_directory
from tests.http.server import SHARED, Server, serving
from tests.waiting import wait_until

pytestmark = pytest.mark.ray

SETTINGS = {
    "model": "demo",
    "stages": 2,
    "device": "cpu",
    "cpus_per_stage": 0.5,
    "ingress_replicas": 2,
    "log_format": "json",
    "log_level": "debug",
}

Counts = dict[str, float]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    SHARED.stop()  # so that the logs hold nothing of other modules
    with serving(SETTINGS, {"num_replicas": 2}, has_proxy=True) as server:
        wait_until(lambda: len(names(server, "pipeline_up", "pipeline")) == 2, "both pipelines are counted")
        wait_until(lambda: len(names(server, "http_requests_in_flight", "ingress")) == 2, "both ingresses are counted")
        yield server


def scrape(server: Server) -> list[tuple[str, dict[str, str], float]]:
    """Name, labels and value of every sample, by a connection of its own: it reaches whichever ingress it does."""
    response = httpx.get(f"{server.base}/metrics", timeout=60)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/plain; version=")
    families = text_string_to_metric_families(response.text)
    samples = [sample for family in families for sample in family.samples]
    return [(sample.name.removeprefix("gptj_dist_"), sample.labels, sample.value) for sample in samples]


def names(server: Server, metric: str, label: str) -> set[str]:
    return {labels[label] for name, labels, _ in scrape(server) if name == metric}


def sums(server: Server) -> Counts:
    """Values summed over all replicas; reasons and statuses stand behind the name."""
    counts: Counts = defaultdict(float)
    for name, labels, value in scrape(server):
        if labels.get("path") in (None, "/v1/completions"):
            counts[" ".join([name, *(labels[key] for key in ("finished_reason", "status") if key in labels)])] += value
    return counts


def grown(server: Server, before: Counts, expected: Counts) -> bool:
    now = sums(server)
    return {name: now[name] - before[name] for name in expected} == expected


def abandon(server: Server) -> None:
    """A client that goes in mid-stream."""
    body = {"prompt": "Call me", "max_tokens": 900, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{server.base}/v1/completions", json=body, timeout=60) as response:
        for number, _ in enumerate(response.iter_lines()):
            if number == 3:
                return


def test_the_sums_over_all_replicas_are_what_was_sent(server: Server) -> None:
    before = sums(server)
    to_length = [{"prompt": "Call me" * number, "max_tokens": 5, "ignore_eos": True} for number in range(1, 15)]
    to_stop = [{"prompt": "The whale", "allowed_token_ids": [100], "stop_token_ids": [100]}] * 3
    with ThreadPoolExecutor(6) as threads:
        usages = [body["usage"] for body in threads.map(lambda body: server.complete(**body), to_length + to_stop)]
    num_tokens = sum(usage["completion_tokens"] for usage in usages)
    num_requests = len(usages)
    expected = {
        "prompt_tokens_total": sum(usage["prompt_tokens"] for usage in usages),
        "generation_tokens_total": num_tokens,
        "request_success_total length": 14,
        "request_success_total stop": 3,
        "request_success_total abort": 0,
        "request_success_total error": 0,
        "http_requests_total 200": num_requests,
        "request_queue_time_seconds_count": num_requests,
        "time_to_first_token_seconds_count": num_requests,
        "inter_token_latency_seconds_count": num_tokens - num_requests,
        "e2e_request_latency_seconds_count": num_requests,
    }
    assert num_tokens == 14 * 5 + 3
    wait_until(lambda: grown(server, before, expected), f"all has grown by {expected}", timeout_s=20)


def test_several_prompts_of_one_request_are_all_routed(server: Server) -> None:
    """Behind Serve's proxy their calls share an id."""
    before = sums(server)["routed_prompts_total"]
    prompts = [f"{number} things are to be said" for number in range(6)]
    assert len(server.complete(prompt=prompts, max_tokens=2)["choices"]) == len(prompts)
    wait_until(lambda: sums(server)["routed_prompts_total"] == before + 6, "all are counted", timeout_s=20)


def test_a_stop_string_is_a_stop_and_a_client_that_goes_is_an_abort(server: Server) -> None:
    before = sums(server)
    word = server.client.post("/tokenize", json={"prompt": " the"}).json()["tokens"]
    body = server.complete(prompt="The whale", allowed_token_ids=word, stop=["the the"], max_tokens=50, n=2)
    assert [choice["finish_reason"] for choice in body["choices"]] == ["stop", "stop"]
    abandon(server)
    assert server.client.post("/v1/completions", json={"prompt": "x", "n": 0}).status_code == 400
    expected = {
        "request_success_total stop": 2.0,
        "request_success_total abort": 1.0,
        "request_success_total error": 0.0,
    }
    wait_until(lambda: grown(server, before, expected), f"all has grown by {expected}", timeout_s=20)
    wait_until(lambda: sums(server)["num_requests_running"] == 0, "nothing runs", timeout_s=20)
    assert sums(server)["http_requests_total 400"] > before["http_requests_total 400"]


def test_whichever_ingress_is_asked_every_metric_has_samples_of_every_replica(server: Server) -> None:
    wait_until(lambda: have_both_worked(server), "both pipelines have worked")
    for _ in range(4):
        samples = scrape(server)
        of_replicas = defaultdict(set)
        for name, labels, _ in samples:
            of_replicas[re.sub("_(total|bucket|sum|count)$", "", name)].add(labels.get("pipeline") or labels["ingress"])
        num_replicas = {family.name: len(of_replicas[family.name]) for family in FAMILIES}
        assert num_replicas == dict.fromkeys(num_replicas, 2) | dict.fromkeys(
            ("pipeline_down_seconds", "num_adapter_requests"), 0
        )
        stages = {(labels["pipeline"], labels["stage"]) for _, labels, _ in samples if "stage" in labels}
        assert Counter(stage for _, stage in stages) == {"0": 2, "1": 2}
        edges = [labels["edge"] for name, labels, value in samples if name == "edge_bytes_total" and value > 0]
        assert Counter(edges) == {"coordinator->0": 2, "0->1": 2, "1->coordinator": 2}


def have_both_worked(server: Server) -> bool:
    server.complete(prompt="Call me", max_tokens=2)
    return [value > 0 for name, _, value in scrape(server) if name == "generation_tokens_total"] == [True, True]


def test_json_logs_carry_the_request_id_from_the_ingress_to_every_stage_and_no_prompt(server: Server) -> None:
    secret, request_id = "A very secret whale", "night-operator-7"
    body = {"prompt": secret, "max_tokens": 3, "ignore_eos": True}
    response = server.client.post("/v1/completions", json=body, headers={"x-request-id": request_id})
    assert response.headers["x-request-id"] == request_id
    lines = wait_until(lambda: lines_of(request_id), "the last line is written", timeout_s=20)
    events = defaultdict(list)
    for line in lines:
        events[line["component"]].append(line["event"])
    assert events == {
        "ingress": ["request accepted", "http request"],
        "coordinator": ["request queued", "request ended"],
        "stage-0": ["request received"],
        "stage-1": ["request received"],
    }
    assert {line["model"] for line in lines} == {"demo"}
    assert len({line["pipeline"] for line in lines if line["component"] != "ingress"}) == 1
    everything = [path for path in log_directory().parent.rglob("*") if path.is_file()]
    assert [str(path) for path in everything if secret.encode() in path.read_bytes()] == []
    assert any(request_id.encode() in path.read_bytes() for path in everything)


def lines_of(request_id: str) -> list[dict[str, Any]] | None:
    """All lines that have the request's id, but those of stages that forget it, which depends on what comes next."""
    lines = [json.loads(line) for path in log_directory().iterdir() for line in path.read_text().splitlines()]
    found = [line for line in lines if line.get("request_id") == request_id and line["event"] != "request released"]
    return sorted(found, key=lambda line: str(line["time"])) if len(found) >= 6 else None


def test_a_stage_that_dies_is_a_restart_and_a_line_in_the_log_and_no_error(server: Server) -> None:
    document = DebugDocument.from_json(server.client.get("/debug/pipeline").content)
    before = sums(server)
    body = {"prompt": "Call me", "max_tokens": 300, "ignore_eos": True, "stream": True, "n": 6}
    with httpx.stream("POST", f"{server.base}/v1/completions", json=body, timeout=60) as response:
        told = ""
        for number, line in enumerate(response.iter_lines()):
            told += line
            if number == 3:
                for pipeline in document.pipelines:
                    os.kill(pipeline.stages[1].pid, signal.SIGKILL)
    assert told.endswith("data: [DONE]")
    expected = {
        "pipeline_restarts_total": 2.0,
        "recovery_seconds_count": 2.0,
        "request_success_total length": 6.0,
        "request_success_total error": 0.0,
    }
    wait_until(lambda: grown(server, before, expected), f"all has grown by {expected}")
    wait_until(lambda: sums(server)["pipeline_up"] == 2, "both pipelines are back")
    lines = [line for path in log_directory().glob("coordinator-*") for line in path.read_text().splitlines()]
    events = Counter(json.loads(line)["event"] for line in lines)
    assert events["stage lost, pipeline replaces it"] == events["stage died"] == events["pipeline back"] == 2
    died = [json.loads(line) for line in lines if '"stage died"' in line]
    assert {line["pid"] for line in died} == {pipeline.stages[1].pid for pipeline in document.pipelines}
    assert all("SIGKILL" in line["cause"] and line["node"] and line["last_log_line"] for line in died)
    after = DebugDocument.from_json(server.client.get("/debug/pipeline").content)
    for pipeline in after.pipelines:
        (loss,) = pipeline.losses
        assert (loss.stage, "SIGKILL" in loss.cause) == (1, True)
        assert loss.back_after_s is not None
    assert events["request failed"] == 0
