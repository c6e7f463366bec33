"""Log lines: one an event, as text or as JSON, in a file of the process. Knows neither Ray nor what is logged.

Modules log by the standard library; the message is the event, and what belongs to it comes as values:

    logger.info("request queued", extra=values(request_id="req-1", prompt_tokens=12))
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, Literal

LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]

MAX_FILE_BYTES = 50_000_000
NUM_OLD_FILES = 3
"""A process keeps at most 200 MB of lines."""


@dataclass(frozen=True, slots=True)
class LogSettings:
    """How the processes of one replica log.

    Args:
        model: the name that clients see.
        replica: the name of the ingress or of the pipeline, unique in the application.
        level: the least severe events that are logged.
    """

    format: LogFormat
    model: str
    replica: str
    level: LogLevel = "info"


def values(**of_event: object) -> dict[str, Any]:
    """What belongs to an event, for `extra`. None is left out."""
    return {"values": {name: value for name, value in of_event.items() if value is not None}}


def open_log(directory: Path, settings: LogSettings, component: str) -> RotatingFileHandler:
    """Sends this process's events to `<component>-<replica>.log` from now on, and nowhere else.

    Args:
        directory: created if it does not exist.
        component: `ingress`, `coordinator` or a stage such as `stage-1`.
    """
    replica = "ingress" if component == "ingress" else "pipeline"
    labels = {"component": component, "model": settings.model, replica: settings.replica}
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{component}-{settings.replica}.log"
    handler = LogFile(path, maxBytes=MAX_FILE_BYTES, backupCount=NUM_OLD_FILES, encoding="utf-8")
    handler.setFormatter(LineFormatter(settings.format, labels))
    logger = logging.getLogger("gptj_dist")
    logger.addHandler(handler)
    logger.setLevel(settings.level.upper())
    logger.propagate = False
    return handler


class LogFile(RotatingFileHandler):
    """Begins a new file after the line that exceeds the limit.

    To begin it before, the standard library formats each line twice and looks at the file system: half of its time,
    which counts when a thousand requests end at once.
    """

    def shouldRollover(self, record: logging.LogRecord) -> bool:  # noqa: ARG002
        return self.stream is not None and self.stream.tell() >= self.maxBytes


class LineFormatter(logging.Formatter):
    """Writes an event as one line, whatever is in it.

    Args:
        labels: stand in every line; `component` is one of them.
    """

    def __init__(self, log_format: LogFormat, labels: Mapping[str, str]) -> None:
        super().__init__()
        self._format = log_format
        self._labels = labels

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        time = time_text(record.created)
        fields = {"time": time, "level": record.levelname, **self._labels}
        fields |= {"event": record.getMessage(), **vars(record).get("values", {})}
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        if self._format == "json":
            return json.dumps(fields, default=str)
        head = [fields.pop(name) for name in ("time", "level", "component")]
        event = fields.pop("event")
        head.append(event if event.isprintable() else json.dumps(event))
        return " ".join([*head, *(f"{name}={_text(value)}" for name, value in fields.items())])


def _text(value: object) -> str:
    """A value in a line of text: in quotes where it could be taken for anything else."""
    is_plain = isinstance(value, str) and value.isprintable() and value and not set(value) & set(' "=')
    return str(value) if is_plain else json.dumps(value, default=str)


def time_text(unix_s: float) -> str:
    """A time as in log lines: `2026-11-23T19:39:02.233Z`."""
    return datetime.fromtimestamp(unix_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
