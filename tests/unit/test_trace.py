"""A trace is what Perfetto and Chrome read: JSON at all times, named lanes, slices that do not overlap."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from gptj_dist import LLM, SamplingParams
from gptj_dist.config import LayerRange
from gptj_dist.engine.plan import StageTiming
from gptj_dist.engine.stats import PlanRecord
from gptj_dist.errors import ConfigurationError
from gptj_dist.stages.trace import TraceEvents, TraceFile, TracePart, work_text

LAYERS = (LayerRange(0, 2, 0, 14), LayerRange(1, 2, 14, 28))
START_NS = 1_753_000_000_123_456_789


def record(number: int, num_decodes: int = 1, num_prefill_tokens: int = 0) -> PlanRecord:
    """Plan `number` of a pipeline that takes 10 us a stage, with the next plan always close behind."""

    def timing(begin_us: float, end_us: float) -> StageTiming:
        begin_ns = START_NS + number * 12_000
        return StageTiming(begin_ns + round(begin_us * 1000), begin_ns + round(end_us * 1000))

    return PlanRecord(
        number,
        number,
        num_decodes,
        num_prefill_tokens,
        0,
        100,
        1,
        scheduling=timing(0, 1.5),
        landing=timing(26, 27.001),
        timings=(timing(2, 12), timing(13, 23)),
    )


def part(first: int, stop: int, pipeline: str = "a") -> TracePart:
    return TracePart(pipeline, LAYERS, tuple(record(number) for number in range(first, stop)))


def check(events: list[dict[str, Any]]) -> dict[tuple[int, str], list[dict[str, Any]]]:
    """Checks what the format asks for; the slices by pipeline and name of their lane, in order of time."""
    names: dict[tuple[int, int], str] = {}
    processes: dict[int, str] = {}
    lanes = defaultdict(list)
    for event in events:
        assert {"name", "ph", "pid", "tid", "args"} <= event.keys()
        assert event["ph"] in ("M", "X")
        if event["name"] == "thread_name":
            assert names.setdefault((event["pid"], event["tid"]), event["args"]["name"]) == event["args"]["name"]
        elif event["name"] == "process_name":
            assert event["pid"] not in processes, "a process is named twice"
            processes[event["pid"]] = event["args"]["name"]
        elif event["ph"] == "X":
            assert event["dur"] >= 0
            lanes[event["pid"], names[event["pid"], event["tid"]]].append(event)
    assert len(set(processes.values())) == len(processes)
    assert {pid for pid, _ in lanes} <= set(processes)
    for slices in lanes.values():
        slices.sort(key=lambda event: event["ts"])
        for one, other in pairwise(slices):
            assert one["ts"] + one["dur"] <= other["ts"] + 1e-3, "slices of a lane overlap"
    return lanes


def test_each_stage_and_the_coordinator_have_a_lane_whose_slices_do_not_overlap() -> None:
    lanes = check(TraceEvents().of([part(0, 5)]))
    assert {name: len(slices) for (_, name), slices in lanes.items()} == {
        "coordinator": 10,
        "stage 0 (layers 0-13)": 5,
        "stage 1 (layers 14-27)": 5,
    }
    first = lanes[1, "stage 0 (layers 0-13)"][0]
    assert (first["ts"], first["dur"], first["name"]) == (2.0, 10.0, "decode 1")
    assert lanes[1, "coordinator"][0]["ts"] == 0.0


def test_a_slice_is_named_by_what_the_step_computed() -> None:
    assert work_text(record(0, 16, 0)) == "decode 16"
    assert work_text(record(0, 0, 128)) == "prefill 128"
    assert work_text(record(0, 16, 128)) == "decode 16 + prefill 128"


def test_arrows_lead_a_plan_from_the_coordinator_through_the_stages_and_back() -> None:
    events = [event for event in TraceEvents().of([part(3, 4, "a"), part(3, 4, "b")]) if event["ph"] == "X"]
    for pid in (1, 2):
        slices = [event for event in events if event["pid"] == pid]
        assert len({event["bind_id"] for event in slices}) == 1
        assert [event.get("flow_in", False) for event in slices] == [False, True, True, True]
        assert [event.get("flow_out", False) for event in slices] == [True, True, True, False]
    assert len({event["bind_id"] for event in events}) == 2


def test_pipelines_are_processes_that_are_named_once_however_many_parts_come() -> None:
    events = TraceEvents()
    lanes = check(events.of([part(0, 2, "a")]) + events.of([part(0, 3, "b"), part(2, 3, "a")]))
    assert {(pid, len(slices)) for (pid, name), slices in lanes.items() if name.startswith("stage")} == {(1, 3), (2, 3)}


def test_a_file_is_whole_json_after_every_write(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with TraceFile(path) as file:
        assert json.loads(path.read_text()) == []
        file.append([])
        file.append([part(0, 0)])
        assert json.loads(path.read_text()) == []
        for first in (0, 2, 4):
            file.append([part(first, first + 2)])
            check(json.loads(path.read_text()))
    events = json.loads(path.read_text())
    assert sum(event["ph"] == "X" for event in events) == 6 * 4
    assert events == TraceEvents().of([part(0, 6)])


def test_a_path_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"cannot write the trace .*: No such file or directory"):
        TraceFile(tmp_path / "no" / "trace.json")


def test_a_pipeline_in_one_process_writes_what_it_did(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with LLM("demo", device="cpu", stages=2, max_chunk_tokens=4) as llm:
        llm.generate([[5] * 8, [6] * 3], SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))
        llm.write_trace(path)
    lanes = check(json.loads(path.read_text()))
    assert {name for _, name in lanes} == {"coordinator", "stage 0 (layers 0-13)", "stage 1 (layers 14-27)"}
    slices = lanes[1, "stage 1 (layers 14-27)"]
    assert len(slices) == len(lanes[1, "stage 0 (layers 0-13)"]) == len(lanes[1, "coordinator"]) / 2
    assert sum(event["args"]["new tokens"] for event in slices) == 8
    assert slices[0]["name"] == "prefill 4"
    assert all(event["dur"] > 0 for event in slices)
