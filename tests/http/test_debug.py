"""What a live server says of its stages: `GET /debug/pipeline`, `GET /debug/trace` and `gptj-dist top`."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from gptj_dist.serving.debug import DebugDocument, PipelineDocument
from tests.http.server import Server, serving
from tests.unit.test_trace import check
from tests.waiting import wait_until

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving({"model": "demo", "stages": 2, "device": "cpu"}) as server:
        yield server


@contextmanager
def load(server: Server) -> Iterator[None]:
    """Eight streams that flow while the context lasts."""
    has_flown = threading.Event()
    is_over = threading.Event()

    def read() -> None:
        body = {"prompt": "Call me", "max_tokens": 1000, "ignore_eos": True, "stream": True, "n": 8}
        with httpx.stream("POST", f"{server.base}/v1/completions", json=body, timeout=60) as response:
            for number, _ in enumerate(response.iter_lines()):
                if number == 200:
                    has_flown.set()
                if is_over.is_set():
                    return

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert has_flown.wait(timeout=60)
        yield
    finally:
        is_over.set()
        reader.join(timeout=60)
        server.wait_until_idle()


def look(server: Server) -> PipelineDocument:
    response = server.client.get("/debug/pipeline")
    assert response.status_code == 200, response.text
    document = DebugDocument.from_json(response.content)
    assert (document.model, document.num_silent) == ("demo", 0)
    (pipeline,) = document.pipelines
    return pipeline


def top(server: Server, *arguments: str) -> str:
    command = [sys.executable, "-m", "gptj_dist", "top", "--url", server.base, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def test_under_load_every_stage_says_how_busy_it_is_and_what_it_holds(server: Server) -> None:
    with load(server):
        pipeline = look(server)
        table = top(server, "--once")
        by_top = DebugDocument.from_json(top(server, "--json"))
    assert (pipeline.state, pipeline.num_running, pipeline.num_waiting) == ("up", 8, 0)
    assert pipeline.num_in_flight >= 1
    assert pipeline.plans_per_s > 0
    assert pipeline.output_tokens_per_s > pipeline.plans_per_s
    assert 0 < pipeline.num_used_blocks <= pipeline.num_blocks
    assert [stage.layers for stage in pipeline.stages] == [(0, 13), (14, 27)]
    for stage in pipeline.stages:
        assert stage.busy_share is not None
        assert stage.bubble_share is not None
        assert 0 < stage.busy_share <= stage.busy_share + stage.bubble_share <= 1
        assert stage.step_ms is not None
        assert stage.step_ms > 0
        assert stage.queue is not None
        assert stage.queue >= 0
        assert 0 < stage.kv_used_bytes < stage.kv_total_bytes
    assert f"{pipeline.name}  up  8 running" in table
    assert all(text in table for text in ("0-13", "14-27", "busy", "bubble"))
    assert by_top.pipelines[0].stages[0].pid == pipeline.stages[0].pid


def test_when_the_load_has_gone_nothing_is_in_use(server: Server) -> None:
    server.complete(prompt="Call me", max_tokens=2)
    wait_until(lambda: look(server).num_in_flight == 0, "nothing is in flight", timeout_s=20)
    pipeline = look(server)
    assert (pipeline.num_running, pipeline.num_used_blocks) == (0, 0)
    assert [stage.kv_used_bytes for stage in pipeline.stages] == [0, 0]


def test_the_last_plans_can_be_had_as_a_trace(server: Server) -> None:
    server.complete(prompt="Call me", max_tokens=5, ignore_eos=True)
    lanes = check(server.client.get("/debug/trace").json())
    assert {name for _, name in lanes} == {"coordinator", "stage 0 (layers 0-13)", "stage 1 (layers 14-27)"}
    assert all(len(slices) >= 5 for slices in lanes.values())
