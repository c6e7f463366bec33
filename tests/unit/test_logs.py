"""Log lines: one an event, whatever is in it, in the file of the process that wrote it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gptj_dist import logs
from gptj_dist.engine.plan import NewRequest, Plan
from gptj_dist.logs import LogFormat, LogLevel, LogSettings, open_log, values
from gptj_dist.params import SamplingParams
from gptj_dist.stages.request_log import RequestLog

logger = logging.getLogger("gptj_dist.test")


@contextmanager
def logging_to(
    directory: Path, log_format: LogFormat, component: str = "stage-1", level: LogLevel = "info"
) -> Iterator[None]:
    root = logging.getLogger("gptj_dist")
    before = root.level, root.propagate
    handler = open_log(directory, LogSettings(log_format, "demo", "k2", level), component)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()
        root.setLevel(before[0])
        root.propagate = before[1]


def lines_of(directory: Path) -> list[str]:
    (path,) = directory.iterdir()
    return path.read_text().splitlines()


def test_a_json_line_has_the_event_its_values_and_who_says_it(tmp_path: Path) -> None:
    with logging_to(tmp_path, "json"):
        logger.info("request received", extra=values(request_id="req-1", took_s=0.25, user=None))
    (line,) = lines_of(tmp_path)
    told: dict[str, Any] = json.loads(line)
    time = told.pop("time")
    assert time.endswith("Z")
    assert told == {
        "level": "INFO",
        "component": "stage-1",
        "model": "demo",
        "pipeline": "k2",
        "event": "request received",
        "request_id": "req-1",
        "took_s": 0.25,
    }


def test_a_text_line_begins_with_time_level_component_and_event(tmp_path: Path) -> None:
    with logging_to(tmp_path, "text", "ingress"):
        logger.warning("request received", extra=values(request_id="a b", number=3, path="/x", prompts=["p q"]))
    (line,) = lines_of(tmp_path)
    head, _, rest = line.partition(" request received ")
    assert head.split(" ")[1:] == ["WARNING", "ingress"]
    assert rest == 'model=demo ingress=k2 request_id="a b" number=3 path=/x prompts=["p q"]'


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_an_event_is_one_line_whatever_is_in_it(tmp_path: Path, log_format: LogFormat) -> None:
    nasty = "two\nlines\r\x85\u2028\x1b[31m end"
    with logging_to(tmp_path, log_format):
        logger.info("nothing")
        logger.info(nasty, extra=values(text=nasty, texts=[nasty], thing=object()))
        try:
            raise ValueError(nasty)
        except ValueError:
            logger.exception("failed")
    lines = lines_of(tmp_path)
    assert len(lines) == 3
    assert all("\x1b" not in line for line in lines)
    assert "Traceback" in lines[2]


def test_each_process_has_a_file_of_its_own_and_goes_on_with_it(tmp_path: Path) -> None:
    for component in ("stage-0", "stage-1", "stage-0"):
        with logging_to(tmp_path / "new" / "directory", "text", component):
            logger.info("up")
    found = {path.name: path.read_text().count("\n") for path in (tmp_path / "new" / "directory").iterdir()}
    assert found == {"stage-0-k2.log": 2, "stage-1-k2.log": 1}


def test_a_full_file_is_renamed_and_the_oldest_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "MAX_FILE_BYTES", 500)
    with logging_to(tmp_path, "text"):
        for number in range(100):
            logging.getLogger("gptj_dist.x").info("event", extra=values(number=number))
    files = sorted(tmp_path.iterdir())
    assert len(files) == 1 + logs.NUM_OLD_FILES
    numbers = [int(line.rpartition("number=")[2]) for path in (*files[:0:-1], files[0]) for line in lines_in(path)]
    assert numbers == list(range(numbers[0], 100))
    assert max(path.stat().st_size for path in files) < 500 + 200


def lines_in(path: Path) -> list[str]:
    return path.read_text("utf-8").splitlines()


def test_our_lines_go_nowhere_else(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with logging_to(tmp_path, "text"):
        logger.error("broken")
    assert capfd.readouterr() == ("", "")


def test_a_stage_logs_the_requests_that_it_meets_and_forgets_and_none_of_the_servers_own(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, logger="gptj_dist")
    log = RequestLog()
    log.note(Plan(0, (), (introduction(3, "req-1"), introduction(4, None)), ()))
    log.note(Plan(1, (4, 3), (introduction(3, "req-1"),), ()))
    told = [(record.getMessage(), vars(record)["values"]) for record in caplog.records]
    three = {"request_id": "req-1", "number": 3}
    assert told == [("request received", three), ("request released", three), ("request received", three)]
    assert {record.levelno for record in caplog.records} == {logging.DEBUG}


@pytest.mark.parametrize(("level", "num_lines"), [("debug", 3), ("info", 2), ("warning", 1), ("error", 0)])
def test_events_below_the_level_are_left_out(tmp_path: Path, level: LogLevel, num_lines: int) -> None:
    with logging_to(tmp_path, "text", level=level):
        logger.debug("request received")
        logger.info("pipeline up")
        logger.warning("no answer")
    assert len(lines_of(tmp_path)) == num_lines


def introduction(number: int, log_id: str | None) -> NewRequest:
    return NewRequest(number, SamplingParams(), 0, 1, log_id)
