"""The benchmarks that start servers of ours end in documents."""

from __future__ import annotations

import pytest

from tests.unit.test_benchmarks import run

pytestmark = pytest.mark.ray


def test_the_cost_of_the_front_is_told_by_process() -> None:
    options = ["--ways", "engine", "ingress", "--streams", "2", "--rounds", "1", "--output-len", "16"]
    ways = run("front", *options)["ways"]
    assert all(load["output_throughput"] > 0 for way in ways.values() for load in way["loads"])
    (load,) = ways["ingress"]["loads"]
    assert load["ingress_us_per_request"] > 0
    assert load["coordinator_us_per_request"] > 0
    assert "proxy_us_per_request" not in load
    assert ways["ingress"]["open_to_others"] == []


def test_moves_of_layers_are_told_with_their_pauses() -> None:
    options = ["--streams", "2", "--tokens", "40", "--rounds", "1", "--seconds", "1", "--settle", "0", "--content", "1"]
    document = run("rebalance", *options)
    assert set(document["tokens_per_s"]) == {"even", "planned", "rebalance"}
    assert document["moves"]["num_layers"] > 0
    assert document["moves"]["longest_pause_ms"] > 0
    assert document["streams_that_differ"] == 0


def test_the_simulation_is_compared_with_a_server_whose_stages_sleep() -> None:
    sizes = ("--stages", "2", "--streams", "2", "--rates", "--input-len", "8", "--output-len", "16")
    document = run("simulation_check", *sizes, "--step-ms", "30")
    [case] = document["stages"]["2"]["cases"]
    assert case["measured"].keys() == case["predicted"].keys() == case["ratios"].keys()
    assert case["measured"]["token_ms"] > 2 * 30  # no stage was faster than it sleeps
    assert case["measured"]["tokens_per_s"] < 2 * 1000 / (2 * 30)


def test_a_server_that_sleeps_is_woken_and_the_parts_of_that_are_told() -> None:
    document = run("wake", "demo", "--rounds", "1", "--pipelines", "1")
    [figures] = document["rounds"]
    parts = ("decide_s", "process_s", "stages_s", "load_s", "prove_s", "answer_s")
    assert all(figures[part] > 0 for part in parts)
    assert sum(figures[part] for part in parts) == pytest.approx(figures["first_token_s"], rel=0.01)
    assert figures["cpu_s"] > 0
