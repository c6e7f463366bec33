"""`serve --trace`: how it ends where the disk is full, and that it goes on where a pipeline does not answer."""

from __future__ import annotations

import json
import resource
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gptj_dist.errors import ConfigurationError
from gptj_dist.operate import tracing
from gptj_dist.stages.trace import TraceFile, TracePart, check_trace_path
from tests.unit.test_trace import check, part
from tests.waiting import wait_until

PLANS_A_VISIT = 20
ROOM_BYTES = 20_000


@dataclass(frozen=True, slots=True)
class Answer:
    """One replica's."""

    given: TracePart

    async def get_async(self) -> TracePart:
        return self.given


class Pipelines:
    """A handle to a pipeline that has completed more plans at each visit.

    Args:
        silent_visits: numbers of the visits that it does not answer.
    """

    def __init__(self, silent_visits: frozenset[int] = frozenset()) -> None:
        self._silent_visits = silent_visits
        self._since: Mapping[str, int] = {}
        self.num_visits = 0

    def broadcast(self, _: str, since: Mapping[str, int]) -> Pipelines:
        self._since = dict(since)
        return self

    async def _fetch_replica_results_async(self) -> list[Answer]:
        self.num_visits += 1
        if self.num_visits in self._silent_visits:
            raise TimeoutError
        first = self._since.get("a", 0)
        return [Answer(part(first, first + PLANS_A_VISIT))]


@contextmanager
def room_for(num_bytes: int) -> Iterator[None]:
    """No file of this process can grow beyond this size meanwhile."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def num_plans(trace: Path) -> int:
    """Of a trace that must be whole."""
    return len(check(json.loads(trace.read_text()))[1, "stage 0 (layers 0-13)"])


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with TraceFile(path) as file:
        file.append([part(0, 2)])
        before = path.read_bytes()
        with (
            room_for(len(before) + 100),
            pytest.raises(ConfigurationError, match=r"cannot write .* too large"),
        ):
            file.append([part(2, 50)])
        assert path.read_bytes() == before


@pytest.mark.parametrize("path", ["/dev/full", "/dev/stdin/x"])
def test_a_file_without_room_is_refused_beforehand(path: str) -> None:
    with pytest.raises(ConfigurationError, match=f"cannot write the trace {path}"):
        check_trace_path(Path(path))


def test_a_full_disk_ends_the_trace_with_one_line_and_a_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "PERIOD_S", 0.0)
    path, said, pipelines = tmp_path / "trace.json", list[str](), Pipelines()
    handle: Any = pipelines
    with room_for(ROOM_BYTES), tracing.tracing(handle, path, said.append):
        wait_until(lambda: said, "the end is said")
        wait_until(lambda: "trace" not in {thread.name for thread in threading.enumerate()}, "the thread has ended")
        num_visits = pipelines.num_visits
    assert said == [f"Tracing has ended: cannot write the trace {path}: File too large"]
    assert pipelines.num_visits == num_visits
    assert num_plans(path) == PLANS_A_VISIT * (num_visits - 1)


def test_a_pipeline_that_does_not_answer_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "PERIOD_S", 0.0)
    path, said, pipelines = tmp_path / "trace.json", list[str](), Pipelines(frozenset({2, 3}))
    handle: Any = pipelines
    with tracing.tracing(handle, path, said.append):
        wait_until(lambda: pipelines.num_visits > 4, "it has been asked again")
    assert said == []
    assert num_plans(path) == PLANS_A_VISIT * (pipelines.num_visits - 2)
