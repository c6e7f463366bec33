"""The benchmarks count and compute rightly, and each ends in one JSON document. How fast anything is, is not tested."""

from __future__ import annotations

import asyncio
import importlib
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cases import NUM_TOKEN_IDS, Case, case_of, parse_case
from benchmarks.compare import compared
from benchmarks.contenders import parse_spec
from benchmarks.faults import Stream, differences, joined, num_tokens
from benchmarks.figures import medians, percentile, rounded, summarise, times_as_good
from benchmarks.load import (
    Measured,
    Target,
    closed_loop,
    failures,
    open_loop,
    poisson_arrivals,
    serving_figures,
)
from benchmarks.overload import Sent, load_figures, made_before, offered
from benchmarks.processes import Family
from benchmarks.servers import serve_command, vllm_serve_command
from benchmarks.sse_client import ChunkedBody, FrameSplitter, StreamRecord
from benchmarks.update import Findings
from benchmarks.update import figures as update_figures
from benchmarks.vllm_settings import share_cores
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SCRIPTS = (
    *(
        "adapters",
        "alerts",
        "beams",
        "beside_load",
        "cluster",
        "compare",
        "faults",
        "front",
        "gpu_report",
        "hostile",
        "http",
        "mlperf",
        "offline",
        "overload",
        "nodes",
        "parts",
        "prefix_cache",
        "rebalance",
        "router",
        "scaling",
        "simulation",
        "simulation_check",
        "soak",
        "plots",
    ),
    *("same_logits", "scheduler", "speculation", "startup", "step", "structured_output", "transport", "unlike"),
    *("update", "wake", "wire"),
)
TIME_LIMIT_S = 240
CASE = Case(2, 5, 3)


def run(script: str, *arguments: str) -> dict[str, Any]:
    """The document that a benchmark ends with."""
    command = [sys.executable, "-m", f"benchmarks.{script}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIME_LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return document


# Figures


def test_percentiles_lie_between_the_nearest_values_in_proportion() -> None:
    values = [40.0, 10.0, 30.0, 20.0]
    assert [percentile(values, percent) for percent in (0, 50, 90, 100)] == pytest.approx([10, 25, 37, 40])
    assert percentile([7.0], 99) == 7.0


def test_summaries_are_in_ms_and_there_is_none_of_nothing() -> None:
    assert summarise("ttft", [0.001, 0.002, 0.006]) == pytest.approx(
        {"mean_ttft_ms": 3.0, "median_ttft_ms": 2.0, "p99_ttft_ms": 5.92}
    )
    assert summarise("itl", []) == {}


def test_medians_are_of_the_figures_that_every_run_has() -> None:
    assert medians([{"x": 1.0, "y": 9.0}, {"x": 3.0}, {"x": 2.0, "y": 5.0}]) == {"x": 2.0}


def test_a_better_figure_is_above_one_whether_it_is_a_rate_or_a_time() -> None:
    assert times_as_good("decode_tokens_per_s", 30.0, 20.0) == 1.5
    assert times_as_good("median_ttft_ms", 20.0, 30.0) == 1.5


def test_documents_are_rounded_all_the_way_down() -> None:
    assert rounded({"a": [1.2345678, {"b": 123456.7}], "c": 1234567}) == {"a": [1.2346, {"b": 123460.0}], "c": 1234567}


def test_a_comparison_takes_the_median_of_the_rounds_own_ratios() -> None:
    rounds = [
        ({"rate": 10.0, "t_ms": 1.0}, {"rate": 5.0}),
        ({"rate": 4.0}, {"rate": 4.0}),
        ({"rate": 9.0}, {"rate": 3.0}),
    ]
    assert compared(rounds) == {"rate": {"a": 9.0, "b": 4.0, "ratio": 2.0, "ratio_min": 1.0, "ratio_max": 3.0}}


# Cases and contenders


def test_cases_are_read_as_they_are_written() -> None:
    assert parse_case("8x128/64") == Case(8, 128, 64)
    assert str(Case(8, 128, 64)) == "8x128/64"
    assert case_of({**CASE.as_json(), "seed": 1}) == CASE


@pytest.mark.parametrize("text", ["8x128", "0x128/64", "x128/64", "8x128/64/1", "8 x 128/64"])
def test_what_is_no_case_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_case(text)


def test_prompts_have_the_length_and_depend_on_the_seed_alone() -> None:
    prompts = CASE.prompts(seed=3)
    assert [len(prompt) for prompt in prompts] == [5, 5]
    assert max(map(max, prompts)) < NUM_TOKEN_IDS
    assert prompts == CASE.prompts(seed=3) != CASE.prompts(seed=4)


def test_contenders_are_a_kind_and_typed_settings() -> None:
    spec = parse_spec("vllm stages=2 bind=0|1 kv_cache_gb=2.5")
    assert (spec.kind, spec.settings) == ("vllm", {"stages": 2, "bind": "0|1", "kv_cache_gb": 2.5})
    for text in ("other", "ours stages"):
        with pytest.raises(ValueError):
            parse_spec(text)


def test_the_stages_of_a_peer_share_the_cores_evenly() -> None:
    assert [share_cores(n, [0, 1, 2, 3]) for n in (1, 2, 4)] == ["0,1,2,3", "0,1|2,3", "0|1|2|3"]


def test_settings_become_options_of_servers() -> None:
    assert serve_command("demo", {"max_model_len": 64}, 80)[-4:] == ["--port", "80", "--max-model-len", "64"]
    command, environment = vllm_serve_command("python", "m", {"stages": 2, "bind": "0|1"}, 80)
    assert "--no-enable-prefix-caching" in command
    assert command[command.index("--pipeline-parallel-size") + 1] == "2"
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "0|1"


def test_a_family_counts_processes_that_dropped_their_mark_and_ends_them() -> None:
    family = Family()
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'], env={})"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, env=family.environment) as process:
        wait_until(lambda: len(family.members()) == 2, "both are seen")
        assert family.memory_bytes() > 0
        with family.frozen():
            wait_until(lambda: all(b") T " in (p / "stat").read_bytes() for p in family.members()), "both are stopped")
        family.kill()
        process.wait(TIME_LIMIT_S)
        wait_until(lambda: not family.members(), "none is left")


# Loads


def record(begin_s: float, *frame_s: float, num_tokens: int) -> StreamRecord:
    return StreamRecord(begin_s, 10, list(frame_s), num_tokens)


def test_serving_figures_have_vllms_names_and_are_of_completed_requests() -> None:
    good = record(1.0, 1.1, 1.2, 1.5, num_tokens=5)
    slow = record(2.0, 2.4, 2.8, num_tokens=5)
    failed = StreamRecord(3.0, 10, error="refused")
    figures = serving_figures(Measured([good, slow, failed], 4.0), {"ttft": 200.0, "tpot": 101.0})
    assert figures == pytest.approx(
        {
            "completed": 2,
            "failed": 1,
            "duration": 4.0,
            "total_input_tokens": 20,
            "total_output_tokens": 10,
            "request_throughput": 0.5,
            "output_throughput": 2.5,
            "total_token_throughput": 7.5,
            "request_goodput": 0.25,
            **summarise("ttft", [0.1, 0.4]),
            **summarise("tpot", [0.1, 0.1]),
            **summarise("e2el", [0.5, 0.8]),
            **summarise("itl", [0.1, 0.3, 0.4]),
        }
    )
    assert failures(Measured([good, failed, failed], 4.0)) == {"refused": 2}


def test_goodput_is_of_whole_requests_that_ended_in_time_and_in_the_window() -> None:
    def sent(begin_s: float, end_s: float, num_tokens: int = 8, error: str | None = None) -> Sent:
        return Sent(StreamRecord(begin_s, 4, num_tokens=num_tokens, error=error), 8, end_s)

    refused = sent(12, 12.5, error="StreamError: http/1.1 429 too many requests: b''")
    broken = sent(12, 13, error="StreamError: the stream ended without [DONE]")
    early, after = sent(1, 9), sent(15, 20)
    figures = load_figures([early, sent(8, 12), sent(1, 13), refused, broken, sent(12, 14, 7), after], 10, 20, 10)
    assert figures == {
        "goodput": 0.8,
        "throughput": 1.6,
        "whole": 2,
        "late": 1,
        "refused": 1,
        "failed": 2,
        "errors": {broken.record.error: 1, "too few tokens": 1},
        "median_s": 8.0,
        "p99_s": pytest.approx(11.92),
        "refusal_s": 0.5,
    }


@pytest.mark.parametrize("status", ["200 OK", "429 Too Many Requests"])
def test_an_offered_load_is_sent_whatever_becomes_of_it_and_refusals_are_told_apart(status: str) -> None:
    server = FakeServer(num_tokens=32, status=status)

    async def load() -> list[Sent]:
        async with server.listening() as target, asyncio.timeout(TIME_LIMIT_S):
            requests = made_before(target, 1000, 0.05, seed=2)
            return await offered(target, 1000, 0.05, 1, requests)

    sent = asyncio.run(load())
    assert len(sent) == len(server.bodies) > 1
    assert all(one.is_refused == (status != "200 OK") for one in sent)
    assert {one.is_whole for one in sent if one.num_wanted == 32} == {status == "200 OK"}


def test_arrivals_are_those_of_the_seed_and_as_many_a_second_as_asked_for() -> None:
    arrivals = poisson_arrivals(rate=5.0, num_requests=2000, seed=1)
    assert arrivals == poisson_arrivals(rate=5.0, num_requests=2000, seed=1) != poisson_arrivals(5.0, 2000, seed=2)
    assert arrivals == sorted(arrivals)
    assert arrivals[-1] == pytest.approx(2000 / 5.0, rel=0.1)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_frames_are_found_however_the_bytes_arrive(size: int) -> None:
    body = [b'data: {"text": "a\\n\\nb"}\n', b'\ndata: {"b": 1}\n\n: comment\n\ndata:', b" [DONE]\n\n"]
    encoded = b"".join(b"%x;x=y\r\n%b\r\n" % (len(chunk), chunk) for chunk in body) + b"0\r\n\r\n"
    chunked, splitter = ChunkedBody(), FrameSplitter()
    parts = [encoded[i : i + size] for i in range(0, len(encoded), size)]
    frames = [frame for part in parts for frame in splitter.feed(chunked.feed(part))]
    assert frames == [b'{"text": "a\\n\\nb"}', b'{"b": 1}', b"[DONE]"]


class FakeServer:
    """Answers completions with fixed frames, of which the last carries the usage.

    Attributes:
        most_at_once: connections that were open at the same time.
    """

    def __init__(self, num_tokens: int, status: str = "200 OK", is_cut: bool = False, is_chunked: bool = True) -> None:
        self._num_tokens = num_tokens
        self._status = status
        self._is_cut = is_cut
        self._is_chunked = is_chunked
        self._num_open = 0
        self.most_at_once = 0
        self.bodies: list[dict[str, Any]] = []

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[Target]:
        server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            yield Target(f"http://127.0.0.1:{port}", "fake")

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._num_open += 1
        self.most_at_once = max(self.most_at_once, self._num_open)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.partition(b"content-length:")[2].split()[0])
        self.bodies.append(json.loads(await reader.readexactly(length)))
        encoding = "Transfer-Encoding: chunked\r\n" if self._is_chunked else ""
        writer.write(f"HTTP/1.1 {self._status}\r\n{encoding}\r\n".encode())
        for event in self._events():
            frame = f"data: {event}\n\n".encode()
            writer.write(b"%x\r\n%b\r\n" % (len(frame), frame) if self._is_chunked else frame)
            await writer.drain()
            await asyncio.sleep(0)
        self._num_open -= 1
        writer.close()

    def _events(self) -> Sequence[str]:
        tokens = [json.dumps({"choices": [{"text": "ab"}], "usage": None})] * 2  # two frames, however many tokens
        usage = json.dumps({"choices": [], "usage": {"completion_tokens": self._num_tokens}})
        return tokens if self._is_cut else [*tokens, usage, "[DONE]"]


async def load_of(server: FakeServer, num_requests: int, rate: float | None = None) -> Measured:
    async with server.listening() as target, asyncio.timeout(TIME_LIMIT_S):
        if rate is None:
            return await closed_loop(target, CASE, num_requests, seed=1)
        return await open_loop(target, CASE, num_requests, rate, seed=1)


@pytest.mark.parametrize("is_chunked", [True, False])
def test_tokens_are_counted_by_the_server_and_frames_by_the_client(is_chunked: bool) -> None:
    server = FakeServer(num_tokens=9, is_chunked=is_chunked)
    measured = asyncio.run(load_of(server, num_requests=5))
    assert failures(measured) == {}
    assert [(r.num_tokens, len(r.frame_s), r.num_input_tokens) for r in measured.records] == [(9, 2, 5)] * 5
    assert all(record.begin_s <= record.frame_s[0] <= record.frame_s[1] for record in measured.records)


def test_clients_of_a_closed_loop_send_every_prompt_once_and_wait_for_the_answer() -> None:
    server = FakeServer(num_tokens=3)
    asyncio.run(load_of(server, num_requests=6))
    sent = sorted(body["prompt"] for body in server.bodies)
    assert sent == sorted(Case(6, 5, 3).prompts(seed=1))
    assert server.most_at_once == CASE.batch
    assert all(body["max_tokens"] == 3 and body["ignore_eos"] and body["stream"] for body in server.bodies)


def test_an_open_loop_does_not_wait_for_answers() -> None:
    server = FakeServer(num_tokens=3)
    measured = asyncio.run(load_of(server, num_requests=20, rate=1e6))
    assert len(measured.records) == 20
    assert server.most_at_once > CASE.batch


@pytest.mark.parametrize(
    ("server", "message"),
    [(FakeServer(3, status="429 Too Many Requests"), "429"), (FakeServer(3, is_cut=True), "without [DONE]")],
)
def test_refused_and_broken_streams_are_failures_that_say_why(server: FakeServer, message: str) -> None:
    measured = asyncio.run(load_of(server, num_requests=2))
    ((error, count),) = failures(measured).items()
    assert (message in error, count) == (True, 2)


def test_a_server_that_is_not_there_is_a_failure() -> None:
    begin = time.monotonic()
    measured = asyncio.run(closed_loop(Target("http://127.0.0.1:1", "none"), CASE, 2, seed=1))
    assert serving_figures(measured, {})["failed"] == 2
    assert time.monotonic() - begin < TIME_LIMIT_S


# Scripts


def test_an_answer_is_joined_from_its_frames_and_differs_if_any_part_is_missing_or_comes_twice() -> None:
    frames: list[dict[str, Any]] = [
        {"0": {"index": 0, "text": "It", "token_ids": [1], "logprobs": {"tokens": ["It"]}, "finish_reason": None}},
        {
            "0": {
                "index": 0,
                "text": " was",
                "token_ids": [2],
                "logprobs": {"tokens": [" was"]},
                "finish_reason": "stop",
            }
        },
        {"usage": {"completion_tokens": 2}},
    ]
    whole = reduce(joined, frames)
    choice = {"text": "It was", "token_ids": [1, 2], "logprobs": {"tokens": ["It", " was"]}, "finish_reason": "stop"}
    assert whole == {"0": {"index": 0, **choice}, "usage": {"completion_tokens": 2}}
    assert num_tokens(whole) == 2
    assert differences(whole, whole) == []
    assert differences(reduce(joined, [*frames, frames[0]]), whole) == ["0.text", "0.token_ids", "0.logprobs"]
    assert differences(reduce(joined, frames[:2]), whole) == ["usage.completion_tokens"]
    assert differences({**whole, "error": {"code": "stage_failed"}}, whole) == ["error.code"]


def test_streams_during_updates_are_told_apart_from_calm_ones() -> None:
    findings = Findings(updates=[(10.0, 14.0)])

    def judge(begin_s: float, frame_s: list[float], text: str = "It was", error: str | None = None) -> None:
        record = StreamRecord(begin_s, 3, frame_s, num_tokens=4 * len(frame_s), error=error)
        findings.judge(Stream("greedy", 0, content={"0": {"text": text}}, record=record), {"0": {"text": "It was"}})

    judge(0.0, [1.0, 2.0])
    judge(9.0, [9.5, 11.0, 12.0, 13.0])
    judge(14.5, [15.0, 20.0], text="It is")
    judge(12.0, [], error="reset")
    told = update_figures(findings)
    assert (told["num_requests"], told["num_failed"], told["num_different"]) == (4, 1, 1)
    assert told["problems"] == ["greedy 0: 0.text differ", "greedy: reset"]
    assert told["num_streams"] == {"during": 1, "calm": 2}
    assert told["pause_ms"]["during"]["max"] == pytest.approx(1500)
    assert told["pause_ms"]["calm"]["max"] == pytest.approx(5000)
    assert told["tokens_per_s"] == pytest.approx({"during": 12 / 4, "calm": 20 / 16})


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_script_explains_itself(script: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    module = importlib.import_module(f"benchmarks.{script}")
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 0
    assert f"python -m benchmarks.{script}" in capsys.readouterr().out


def test_every_script_is_tested() -> None:
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if 'name__ == "__main__"' in path.read_text()}
    assert scripts == set(SCRIPTS)


@pytest.mark.parametrize("stages", ["1", "2"])
def test_the_scheduler_benchmark_ends_in_a_document(stages: str) -> None:
    document = run("scheduler", "--requests", "100", "--running", "8", "--stages", stages)
    assert document["requests_per_plan"] == pytest.approx(8 / int(stages), rel=0.3)
    assert document["plans_per_s"] > 0
    assert {"num_plans", "median_step_us", "p99_step_us", "add_s"} <= document.keys()


def test_conversations_find_what_an_oracle_finds_and_pipelines_have_equal_loads() -> None:
    document = run("router", "--sessions", "90", "--ingresses", "2")
    assert document["router"]["of_oracle"] > 0.9 > document["fewest"]["of_oracle"]
    assert document["router"]["load"] < 1.1
    assert document["sessions"]["same"] > document["router"]["same"] > document["fewest"]["same"]


def test_simulations_end_in_a_document_and_plots(tmp_path: Path) -> None:
    document = run("simulation", "--small", "--to", str(tmp_path))
    assert {(row["stages"], row["streams"]) for row in document["stages"]} == {(1, 1), (1, 8), (4, 1), (4, 8)}
    rate = {(row["latency_ms"], row["streams"]): row["tokens_per_s"] for row in document["links"]}
    assert rate[0.1, 8] > 1.3 * rate[10, 8]
    fine = {row["pipelines"]: row for row in document["pipelines"] if row["model"] == "fine"}
    coarse = {row["pipelines"]: row for row in document["pipelines"] if row["model"] == "coarse"}
    for number, row in fine.items():
        assert coarse[number]["tokens_per_s"] == pytest.approx(row["tokens_per_s"], rel=0.05)
        assert coarse[number]["token_s"][0] == pytest.approx(row["token_s"][0], rel=0.1)
    assert len(document["files"]) == 5
    assert all("<svg" in Path(file).read_text() for file in document["files"])


def test_our_policy_serves_bursts_better_than_serves_at_the_same_cost() -> None:
    ours, *theirs = run("scaling", "--kinds", "burst", "--hours", "0.2")["rows"]
    assert (ours["policy"], len(theirs)) == ("ours", 2)
    assert ours["good"] > max(outcome["good"] for outcome in theirs) + 0.1
    assert ours["hours"] <= min(outcome["hours"] for outcome in theirs)


def test_the_step_benchmark_tells_operators_apart() -> None:
    options = ("--dtype", "float32", "--threads", "1", "--quantize", "int8", "--cases", "1x16/16", "4x16/1")
    document = run("step", "demo", *options)
    for steps in (document["steps"], document["quantized"]["int8"]):
        assert steps.keys() == {"1x16/16", "4x16/1"}
        for figures in steps.values():
            assert figures.pop("step_ms") > 0
            assert figures.pop("speed") > 0
            assert figures.keys() == {"products", "attention", "other operators", "overhead"}
            assert all(0 < share < 1 for share in figures.values())
            assert sum(figures.values()) == pytest.approx(1, abs=1e-3)


def test_the_transport_benchmark_ends_in_a_document() -> None:
    document = run("transport", "--stages", "2", "--frames", "5", "--rounds", "1", "--in-flight", "2")
    figures = ("round_trip_us", "step_us")
    assert all(document[ring][figure] > 0 for ring in ("ours", "zeromq", "shared") for figure in figures)


def test_the_offline_benchmark_and_its_plots_end_in_documents(tmp_path: Path) -> None:
    cases = ["--cases", "1x8/2", "2x8/2", "1x24/2", "--rounds", "1"]
    document = run("offline", "demo", "--dtype", "float32", "--limits", *cases)
    (variant,) = document["variants"]
    assert [case_of(case) for case in variant["cases"]] == [Case(1, 8, 2), Case(2, 8, 2), Case(1, 24, 2)]
    figures = {"prefill_tokens_per_s", "decode_tokens_per_s", "output_throughput", "decode_share_of_limit"}
    assert all(figures <= case["figures"].keys() for case in variant["cases"])
    assert variant["limits_by_rows"].keys() == {"1", "512"}

    (tmp_path / "growth.log").write_text(f"a table\n{json.dumps(document)}\n")
    drawn = run("plots", f"demo={tmp_path / 'growth.log'}", "--to", str(tmp_path))
    assert [Path(file).name for file in drawn["files"]] == ["growth-requests.svg", "growth-context.svg"]
    assert all("<svg" in Path(file).read_text() for file in drawn["files"])


def test_plots_of_a_server_and_of_stages(tmp_path: Path) -> None:
    loads = {"closed_loop": [{"max_concurrency": n, "output_throughput": 10.0 * n} for n in (1, 2)]}
    loads["open_loop"] = [{"request_rate": n, "median_ttft_ms": 5.0, "p99_ttft_ms": 9.0} for n in (1.0, 2.0)]
    figures = {"output_throughput": 9.0, "stage_0_cores": 0.5, "stage_1_cores": 0.9}
    variant = {
        "settings": {"stages": 2, "dtype": "float32"},
        "cases": [{"batch": 1, "input_len": 8, "figures": figures}],
    }
    for name, document in {"http": loads, "stages": {"variants": [variant]}}.items():
        (tmp_path / name).write_text(json.dumps(document))
    drawn = run("plots", str(tmp_path / "http"), str(tmp_path / "stages"), "--to", str(tmp_path))
    assert [Path(file).stem for file in drawn["files"]] == ["throughput", "first-token", "occupancy"]


@pytest.mark.parametrize("loaded", ["--turn-s=0", "--apart"])
def test_a_comparison_of_our_engine_with_itself_ends_in_a_document(loaded: str) -> None:
    contenders = ["--a", "ours max_chunk_tokens=4", "--b", f"ours package={ROOT}"]
    document = run("compare", "demo", *contenders, "--cases", "1x8/2", "--rounds", "2", loaded)
    (case,) = document["cases"]
    assert case["figures"]["decode_tokens_per_s"].keys() == {"a", "b", "ratio", "ratio_min", "ratio_max"}
    assert [len(case["rounds"][side]) for side in "ab"] == [2, 2]
    assert document["b"]["package"] == str(ROOT / "gptj_dist")
    assert ("idle_cores" in document["a"]) == (loaded != "--apart")
