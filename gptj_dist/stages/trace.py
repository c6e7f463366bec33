"""Writes plans as a Chrome trace for https://ui.perfetto.dev: one process per pipeline, one lane per stage.

The format is the JSON array of "Trace Event Format" (Google, 2016): complete events (`X`), and metadata (`M`) that
names processes and lanes. `bind_id` draws arrows from a plan's slice on one lane to that on the next.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptj_dist.config import LayerRange
from gptj_dist.engine.plan import StageTiming
from gptj_dist.engine.stats import PlanRecord
from gptj_dist.errors import ConfigurationError

Event = dict[str, Any]
"""A trace event as a JSON object."""

COORDINATOR_LANE = 0
"""Stage i has lane i + 1."""

_MAX_PLANS = 1 << 32
_END = b"\n]\n"


@dataclass(frozen=True, slots=True)
class TracePart:
    """Completed plans of one pipeline.

    Args:
        pipeline: the pipeline's unique name.
        layers: layers of each stage, first to last.
        records: completed plans, oldest first.
    """

    pipeline: str
    layers: tuple[LayerRange, ...]
    records: tuple[PlanRecord, ...]


class TraceEvents:
    """Converts trace parts to events. Times are microseconds since the first plan."""

    def __init__(self) -> None:
        self._pids: dict[str, int] = {}
        self._zero_ns: int | None = None

    def of(self, parts: Sequence[TracePart]) -> list[Event]:
        """The events of further parts. A plan must not occur in more than one part."""
        parts = [part for part in parts if part.records]
        if self._zero_ns is None:
            self._zero_ns = min((part.records[0].scheduling.begin_ns for part in parts), default=None)
        return [event for part in parts for event in self._of_part(part)]

    def _of_part(self, part: TracePart) -> Iterator[Event]:
        if part.pipeline not in self._pids:
            self._pids[part.pipeline] = len(self._pids) + 1
            yield from _names(self._pids[part.pipeline], part)
        pid = self._pids[part.pipeline]
        for record in part.records:
            flow, plan = pid * _MAX_PLANS + record.number, {"plan": record.number}
            work = plan | _work(record)
            yield self._slice(pid, COORDINATOR_LANE, "schedule", record.scheduling, flow, args=plan, flow_out=True)
            for lane, timing in enumerate(record.timings, start=1):
                name = work_text(record)
                yield self._slice(pid, lane, name, timing, flow, args=work, flow_in=True, flow_out=True)
            yield self._slice(pid, COORDINATOR_LANE, "hand out", record.landing, flow, args=plan, flow_in=True)

    def _slice(self, pid: int, lane: int, name: str, timing: StageTiming, flow: int, **others: object) -> Event:
        assert self._zero_ns is not None, "a part with records sets it"
        begin_us, duration_us = (timing.begin_ns - self._zero_ns) / 1000, (timing.end_ns - timing.begin_ns) / 1000
        event = {"name": name, "ph": "X", "pid": pid, "tid": lane, "ts": begin_us, "dur": duration_us}
        return event | {"bind_id": flow, **others}


class TraceFile(AbstractContextManager["TraceFile"]):
    """A trace file that is complete JSON after every write, even one that fails: a kill loses only unwritten events.

    Raises:
        ConfigurationError: the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = path.open("wb", buffering=0)
            try:
                self._file.write(b"[" + _END)
                self._file.seek(-len(_END), os.SEEK_END)  # which a pipe cannot do
            except OSError:
                self._file.close()
                raise
        except OSError as error:
            raise self._explained(error) from None
        self._events = TraceEvents()
        self._is_empty = True

    def append(self, parts: Sequence[TracePart]) -> None:
        """Appends the plans that have completed since the last call.

        Raises:
            ConfigurationError: they cannot be written. The file holds what it held before.
        """
        lines = [json.dumps(event, separators=(",", ":")) for event in self._events.of(parts)]
        if lines:
            text = ("\n" if self._is_empty else ",\n") + ",\n".join(lines)
            self._replace_end(text.encode() + _END)
            self._is_empty = False

    def close(self) -> None:
        self._file.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _replace_end(self, data: bytes) -> None:
        begin = self._file.seek(-len(_END), os.SEEK_END)
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            with suppress(OSError):  # there is room: these bytes were there before
                self._file.seek(begin)
                self._file.write(_END)
                self._file.truncate()
            raise self._explained(error) from None

    def _explained(self, error: OSError) -> ConfigurationError:
        return ConfigurationError(f"cannot write the trace {self._path}: {error.strerror or error}")


def check_trace_path(path: Path | None) -> None:
    """Checks, before the model loads, that the trace can be written. None is valid.

    Raises:
        ConfigurationError: the file cannot be written.
    """
    if path is not None:
        TraceFile(path).close()


def work_text(record: PlanRecord) -> str:
    """`decode 16 + drafts 5 + prefill 128`: the number of decoding requests, of their drafts, and of prompt tokens."""
    parts = [f"decode {record.num_decodes}"] if record.num_decodes else []
    parts += [f"drafts {record.num_drafts}"] if record.num_drafts else []
    parts += [f"prefill {record.num_prefill_tokens}"] if record.num_prefill_tokens else []
    return " + ".join(parts)


def _work(record: PlanRecord) -> dict[str, int]:
    return {
        "decodes": record.num_decodes,
        "drafts": record.num_drafts,
        "prefill tokens": record.num_prefill_tokens,
        "context tokens": record.num_context_tokens,
        "new tokens": record.num_sampled_tokens,
    }


def _names(pid: int, part: TracePart) -> Iterator[Event]:
    """Names the pipeline's process and lanes, and puts the lanes in order."""
    lanes = ["coordinator", *(f"stage {r.stage} (layers {r.start}-{r.stop - 1})" for r in part.layers)]
    yield _name(pid, 0, "process_name", {"name": f"pipeline {part.pipeline}"})
    for lane, name in enumerate(lanes):
        yield _name(pid, lane, "thread_name", {"name": name})
        yield _name(pid, lane, "thread_sort_index", {"sort_index": lane})


def _name(pid: int, lane: int, kind: str, args: dict[str, Any]) -> Event:
    return {"name": kind, "ph": "M", "pid": pid, "tid": lane, "args": args}
