"""The benchmark beside a load and the GPU report end in a document, and count as they say."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from benchmarks import gpu_report
from benchmarks.beside_load import fair_share
from benchmarks.gpu_report import Budget, markdown
from gptj_dist.stages.cores import available_cores
from tests.unit.test_benchmarks import ROOT, run

CPU = torch.device("cpu")


def test_the_benchmark_beside_load_compares_each_load_with_quiet() -> None:
    options = ["--dtype", "float32", "--case", "1x8/4", "--loads", "1", "twin", "--rounds", "1", "--turn-s", "0"]
    figures = run("beside_load", "demo", *options)["contenders"]["ours"]
    assert list(figures) == ["quiet", "1", "twin"]
    for load, of_load in figures.items():
        assert of_load["share_of_quiet"] == pytest.approx(
            of_load["decode_tokens_per_s"] / figures["quiet"]["decode_tokens_per_s"], rel=1e-3
        )
        assert of_load["fair_share"] == pytest.approx(fair_share(load, available_cores()), rel=1e-4)


def test_a_load_leaves_each_thread_as_much_as_each_of_its_processes() -> None:
    assert [fair_share(load, 2) for load in ("quiet", "1", "2", "twin")] == [1, 2 / 3, 1 / 2, 1 / 2]


def test_the_gpu_report_ends_in_a_table_and_a_document() -> None:
    small = ["--device", "cpu", "--shape", "tiny", "--batches", "1", "2", "--context", "24"]
    document = run("gpu_report", *small, "--no-tests", "--case-s", "0.05")
    assert document["cases"].keys() == {"prefill 24 tokens", "decode B=1", "decode B=2"}
    for figures in document["cases"].values():
        assert figures["share_of_limit"] == pytest.approx(
            figures["tokens_per_s"] / figures["limit_tokens_per_s"], rel=1e-3
        )
    assert document["skipped"] == {}
    assert document["products"].keys() == {"float32", "int8", "int4"}
    assert all(times.keys() == {"B=1", "B=2"} for times in document["products"].values())
    assert document["bytes_per_s"] > 0 < document["flop_per_s"]


def test_the_gpu_report_needs_neither_ray_nor_zeromq() -> None:
    code = "import sys, benchmarks.gpu_report; print(sorted({'ray', 'zmq', 'yaml', 'pydantic'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_gpu_report_begins_no_case_at_the_end_of_its_budget() -> None:
    now_s = [0.0]
    budget = Budget(480, clock=lambda: now_s[0])
    assert budget.allows_a_case()
    now_s[0] = 470.0
    assert not budget.allows_a_case()
    assert budget.tests_s < 480


def test_the_gpu_report_drops_batches_that_the_memory_is_too_small_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class SmallDevice:
        def __init__(self, _config: Any, _dtype: Any, _device: Any, num_requests: int, _context: int) -> None:
            if num_requests > 8:
                raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(gpu_report, "RandomModel", SmallDevice)
    for batches, expected in (([1, 8, 64], 8), ([64], 0)):
        model, num_requests = gpu_report.largest_model(gpu_report.SHAPES["tiny"], "float32", CPU, batches, 16)
        assert (num_requests, model is None) == (expected, expected == 0)


def test_what_the_gpu_report_left_out_is_in_its_table() -> None:
    report: dict[str, Any] = {"dtype": "bfloat16", "context": 512, "bytes_per_s": 4.3e12, "flop_per_s": 8e14}
    case = {"step_ms": 4.0, "tokens_per_s": 250.0, "limit_tokens_per_s": 361.0, "share_of_limit": 0.6925}
    report["products"] = {"int4": {"B=1": 0.03456}}
    table = markdown({**report, "cases": {"decode B=1": case}, "skipped": {"decode B=8": "no time"}})
    rows = table.splitlines()
    assert rows[2:4] == ["| decode B=1 | 250 | 361 | 0.69 |", "| decode B=8 | no time | | |"]
    assert rows[-1] == "| B=1 | int4 | 0.0346 |"
