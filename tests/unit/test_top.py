"""`gptj-dist top`: what it draws, and what it says when there is nothing to draw."""

from __future__ import annotations

import asyncio
import io
import json
import subprocess
import sys
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from gptj_dist.cli.server.top_view import render
from gptj_dist.config import LayerRange
from gptj_dist.engine.stats import Snapshot, StageSnapshot
from gptj_dist.errors import NotReadyError
from gptj_dist.serving.debug import (
    DebugDocument,
    DownPipeline,
    PipelineDocument,
    PipelineFacts,
    StageDocument,
    pipeline_document,
)
from gptj_dist.stages.blueprint import DeviceReport, StageReport
from gptj_dist.stages.loss import StageLoss
from tests.fake_server import FakeServer, Reply, fake_server
from tests.verbs import run_verb

NO_WORK = StageDocument(
    stage=1,
    layers=(15, 27),
    device="cpu",
    node="head",
    dtype="float32",
    weight_bytes=0,
    pid=11,
    kv_used_bytes=0,
    kv_total_bytes=10**9,
)
WORK = replace(
    NO_WORK,
    stage=0,
    layers=(0, 14),
    device="NVIDIA A100-SXM4-80GB",
    busy_share=0.6,
    bubble_share=0.3,
    step_ms=132.4,
    queue=0.25,
    wait_ms=12.34,
    weight_bytes=8_200_000_000,
    kv_used_bytes=123_456_789,
)
PIPELINE = PipelineDocument(
    name="ab12cd34",
    state="up",
    pid=10,
    window_s=10.0,
    plans_per_s=123.4,
    prompt_tokens_per_s=11_000,
    output_tokens_per_s=1234,
    coordinator_share=0.05,
    num_running=32,
    num_waiting=400,
    num_in_flight=5,
    num_used_blocks=1024,
    num_blocks=4096,
    num_preemptions=0,
    num_restarts=0,
    stages=(WORK, NO_WORK),
)
DOCUMENT = DebugDocument(model="demo", num_silent=0, pipelines=(PIPELINE,))


def drawn(document: DebugDocument, width: int) -> list[str]:
    """The lines, without colours."""
    console = Console(width=width, file=io.StringIO(), highlight=False)
    console.print(render(document, width))
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


@pytest.mark.parametrize("width", [80, 110, 120, 200])
def test_a_stage_is_one_row_that_fits_and_nothing_is_cut_but_the_name_of_a_device(width: int) -> None:
    lines = drawn(DOCUMENT, width)
    assert max(map(len, lines)) <= width
    (header,) = [line for line in lines if "stage" in line]
    for column in ("layers", "device", "busy", "bubbles", "ms/step", "queue", "KV in use"):
        assert column in header
    (row,) = [line for line in lines if "0-14" in line]
    for cell in ("60%", "30%", "132", "0.25", "123 MB"):
        assert cell in row
    (idle,) = [line for line in lines if "15-27" in line]
    assert "%" not in idle
    assert {line for line in lines if "…" in line} <= {row}
    assert ("on head" in idle, "wait ms" in header, "12.3" in row) == (width >= 110,) * 3
    assert ("weights" in header, "8.2 GB, float32" in row) == (width >= 140,) * 2


@pytest.mark.parametrize("width", [40, 50, 59, 60, 79])
def test_a_narrow_terminal_drops_columns_and_breaks_no_row(width: int) -> None:
    """The widest values that are usual: a stage that is always busy, three-digit layers, a restarting pipeline."""
    busy = replace(WORK, layers=(100, 127), busy_share=1.0, bubble_share=0.0, step_ms=12_345.0)
    troubled = replace(PIPELINE, state="restarting", num_restarts=12, stages=(busy, NO_WORK))
    lines = drawn(replace(DOCUMENT, pipelines=(PIPELINE, troubled)), width)
    assert max(map(len, lines)) <= width
    header = next(line for line in lines if "stage" in line)
    dropped = {"bubbles", "queue", "wait ms"}
    dropped |= {"device"} if width < 60 else set()
    dropped |= {"KV in use"} if width < 50 else set()
    for column in ("layers", "device", "busy", "bubbles", "ms/step", "queue", "wait ms", "KV in use"):
        assert (column in header) == (column not in dropped), column
    (row,) = [line for line in lines if "0-14" in line]
    assert all(cell in row for cell in ("━━━━╌·  60%", "132", *(["123 MB"] if width >= 50 else [])))
    (row,) = [line for line in lines if "100-127" in line]
    assert all(cell in row for cell in ("━━━━━━ 100%", "12,345"))
    assert all("NVIDIA" in line for line in lines if "…" in line)


def test_a_server_that_makes_no_sense_is_shown_all_the_same() -> None:
    odd = replace(PIPELINE, num_blocks=0, stages=(replace(WORK, busy_share=1e300, bubble_share=-1e300),))
    assert any("━" * 10 in line for line in drawn(replace(DOCUMENT, pipelines=(odd,)), 80))


def test_a_bar_shows_busy_bubbles_and_rest_by_shape() -> None:
    (row,) = [line for line in drawn(DOCUMENT, 80) if "0-14" in line]
    assert "━━━━━━╌╌╌·  60%" in row


def test_the_head_says_what_goes_on_and_mentions_trouble_only_when_there_is_some() -> None:
    text = "\n".join(drawn(DOCUMENT, 80))
    assert "ab12cd34  up  32 running, 400 waiting, 5 in flight\n" in text
    assert "1,234 tokens/s out, 11,000 in, 123 steps/s, KV 25.0% in use, coordinator 5%\n" in text
    assert "no answer" not in text
    assert "down for" not in text
    troubled = replace(
        PIPELINE, state="restarting", num_preemptions=3, num_restarts=1, problem="stage 1 died", down_s=1.25
    )
    down = DownPipeline("ef56", "its coordinator (pid 12 on alpha) ended", 2.5, "2026-11-29T17:00:00.000Z")
    document = replace(DOCUMENT, num_silent=1, pipelines=(PIPELINE, troubled), down=(down,))
    text = "\n".join(drawn(document, 120))
    assert "demo  2 pipelines  1 gave no answer" in text
    assert "restarting  32 running, 400 waiting, 5 in flight, 3 preempted, 1 restarted" in text
    assert "down for 1.2 s: stage 1 died" in text
    assert f"pipeline ef56 is down since {down.since} (2.5 s): {down.problem}" in text


def answering(status: int, body: bytes) -> AbstractContextManager[FakeServer]:
    """A server that says the same to everyone."""
    return fake_server(lambda _: Reply(status, body))


def test_the_document_of_a_pipeline_has_its_facts_its_last_seconds_and_its_stages() -> None:
    device = DeviceReport("cpu", "head/cpu", 2, 10**9, ("float32",))
    reports = [StageReport(LayerRange(i, 2, 4 * i, 4 * i + 4), device, "cpu", "float32", 1, 1, 10, 7) for i in (0, 1)]
    facts = PipelineFacts(
        name="p",
        state="lost",
        pid=3,
        num_running=1,
        num_waiting=2,
        num_in_flight=3,
        num_used_blocks=4,
        num_blocks=5,
        num_preemptions=6,
        num_restarts=7,
        losses=(StageLoss(1, "died", "head", 7, None),),
        num_dropped=8,
    )
    fresh = pipeline_document(facts, Snapshot(10.0, 0.0, 0.0, 0.0, 0.0, ()), reports)
    assert [(stage.layers, stage.node, stage.busy_share) for stage in fresh.stages] == [
        ((0, 3), "head", None),
        ((4, 7), "head", None),
    ]
    measured = (StageSnapshot(0.5, 0.25, 2.0, 1.0, 3.0),) * 2
    document = pipeline_document(facts, Snapshot(10.0, 1.0, 2.0, 3.0, 0.5, measured), reports)
    known = asdict(document)
    assert {name: known[name] for name in asdict(facts)} == asdict(facts)
    assert (known["window_s"], known["plans_per_s"], known["output_tokens_per_s"]) == (10.0, 1.0, 3.0)
    assert known["stages"][1] == {
        "busy_share": 0.5,
        "bubble_share": 0.25,
        "step_ms": 2.0,
        "queue": 1.0,
        "wait_ms": 3.0,
        "stage": 1,
        "layers": (4, 7),
        "device": "cpu",
        "node": "head",
        "dtype": "float32",
        "pid": 7,
        "weight_bytes": 1,
        "kv_used_bytes": 4 * 16 * 10,
        "kv_total_bytes": 5 * 16 * 10,
    }
    whole = DebugDocument("demo", 0, (document,))
    assert DebugDocument.from_json(json.dumps(asdict(whole))) == whole


def test_without_a_terminal_the_table_is_printed_once() -> None:
    with answering(200, json.dumps(asdict(DOCUMENT)).encode()) as server:
        for arguments in (["--url", server.base], ["--url", f"{server.base}/v1", "--once"]):
            result = run_verb("top", *arguments)
            assert (result.returncode, result.stderr) == (0, "")
            assert "0-14" in result.stdout


def test_json_is_the_document() -> None:
    with answering(200, json.dumps(asdict(DOCUMENT)).encode()) as server:
        done = run_verb("top", "--json", GPTJ_URL=server.base)
    assert DebugDocument.from_json(done.stdout) == DOCUMENT


def test_json_at_a_terminal_that_knows_only_ascii_is_still_the_document() -> None:
    document = replace(DOCUMENT, model="café 中 \N{GRINNING FACE}")
    with answering(200, json.dumps(asdict(document)).encode()) as server:
        done = run_verb("top", "--json", GPTJ_URL=server.base, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr, done.stdout.isascii()) == (0, "", True)
    assert DebugDocument.from_json(done.stdout) == document


@pytest.mark.parametrize(
    ("status", "body", "exit_code", "message"),
    [
        (503, b"{}", 1, "is still loading; try again shortly"),
        (404, b"not here", 2, "is not gptj-dist"),
        (200, b"<html>", 2, "is not gptj-dist"),
        (200, b'{"model": "x"}', 2, "is not gptj-dist"),
    ],
    ids=["loading", "no such path", "no JSON", "another JSON"],
)
def test_what_is_no_running_server_is_one_line(status: int, body: bytes, exit_code: int, message: str) -> None:
    with answering(status, body) as server:
        result = run_verb("top", "--url", server.base)
    assert (result.returncode, result.stdout) == (exit_code, "")
    assert len(result.stderr.splitlines()) == 1
    assert message in result.stderr
    assert server.base in result.stderr


def test_where_nobody_listens_and_what_is_no_address_are_one_line_each() -> None:
    result = run_verb("top", "--url", "127.0.0.1:1")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("gptj-dist: no server answers at http://127.0.0.1:1: Connection refused; ")
    assert len(result.stderr.splitlines()) == 1
    for wrong in ("ftp://somewhere", "127.0.0.1:port", "http://", ""):
        result = run_verb("top", "--url", wrong)
        assert (result.returncode, result.stdout) == (2, "")
        assert "is no address of a server" in result.stderr


def test_top_loads_neither_torch_nor_ray() -> None:
    code = (
        "import sys, gptj_dist.cli.server.top_view, gptj_dist.serving.debug; "
        "sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


HANGS = "hangs"


class FakeHandle:
    """A handle to pipelines that answer, fail or hang as told; an exception as the whole is raised."""

    def __init__(self, results: list[Any] | Exception) -> None:
        self._results = results

    def broadcast(self, method: str, *arguments: object) -> FakeHandle:
        del method, arguments
        return self

    async def _fetch_replica_results_async(self) -> list[Any]:
        if isinstance(self._results, Exception):
            raise self._results
        return [SimpleNamespace(get_async=partial(self._answer, result)) for result in self._results]

    async def _answer(self, result: Any) -> Any:
        if isinstance(result, Exception):
            raise result
        return await asyncio.Event().wait() if result is HANGS else result


def test_pipelines_that_died_or_hang_are_counted_and_none_at_all_is_no_error() -> None:
    from ray.serve._private.common import DeploymentID
    from ray.serve.exceptions import DeploymentUnavailableError

    from gptj_dist.serving.broadcast import ask_all
    from gptj_dist.stages.trace import TracePart

    part = TracePart("a", (), ())
    handle: Any = FakeHandle([part, ConnectionError("gone"), HANGS, part])
    answers = asyncio.run(ask_all(handle, TracePart, "trace_part", {}, timeout_s=0.05))
    assert (answers.given, answers.num_silent) == ((part, part), 2)
    handle = FakeHandle(DeploymentUnavailableError(DeploymentID("Pipeline")))
    assert asyncio.run(ask_all(handle, TracePart, "trace_part", {})).given == ()
    handle = FakeHandle(TimeoutError())
    with pytest.raises(NotReadyError, match="not answered"):
        asyncio.run(ask_all(handle, TracePart, "trace_part", {}))
