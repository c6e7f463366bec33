"""The requests of a batch: a file in OpenAI's form, one JSON object a line. Knows neither HTTP nor models."""

from __future__ import annotations

import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, Self, get_args

import pydantic_core

from gptj_dist.cli.request_options import STANDARD_INPUT
from gptj_dist.config import refuse_unknown_keys
from gptj_dist.errors import ConfigurationError
from gptj_dist.file_kinds import known_form
from gptj_dist.json_types import JsonObject

Url = Literal["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/embeddings"]
URLS: tuple[Url, ...] = get_args(Url)
FIELDS = ("custom_id", "method", "url", "body")
MAX_SHOWN_PROBLEMS = 10

_BOM = "\N{BYTE ORDER MARK}".encode()


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """A line of the file of requests.

    Args:
        custom_id: the caller's name for it, unique in the batch.
        url: path of the endpoint that answers it.
    """

    custom_id: str
    url: Url
    body: JsonObject


class RequestFile:
    """The requests of a batch. They are read twice: to check every line, and to answer them.

    What can be read only once, such as a pipe, is copied to a temporary file.

    Args:
        path: a file, a FIFO, or `-` for standard input.

    Raises:
        ConfigurationError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.name = "standard input" if str(path) == STANDARD_INPUT else str(path)
        try:
            self._file = _rewindable(sys.stdin.buffer if str(path) == STANDARD_INPUT else path.open("rb"))
        except OSError as error:
            raise self._unreadable(error) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def check(self) -> frozenset[str]:
        """Reads all lines. Returns the ids of the requests.

        Raises:
            ConfigurationError: the file cannot be read, or has lines that are not valid; names the first of them.
        """
        line_of: dict[str, int] = {}
        problems = []
        for number, line in self._lines():
            try:
                custom_id = _parse_request(line).custom_id
            except ConfigurationError as error:
                problems.append(f"line {number}: {error}")
                continue
            first = line_of.setdefault(custom_id, number)
            if first != number:
                problems.append(f"line {number}: custom_id {custom_id!r:.80} is that of line {first} too")
        if problems:
            shown = problems[:MAX_SHOWN_PROBLEMS]
            more = [f"and {len(problems) - len(shown)} more"] if len(problems) > len(shown) else []
            raise ConfigurationError(f"{self.name} is not sent:\n  " + "\n  ".join([*shown, *more]))
        if not line_of:
            raise ConfigurationError(f"{self.name} holds no requests")
        return frozenset(line_of)

    def requests(self, without: Collection[str]) -> Iterator[BatchRequest]:
        """The requests of a file that was checked, except those with the given ids."""
        for _, line in self._lines():
            request = _parse_request(line)
            if request.custom_id not in without:
                yield request

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """Lines that are not empty, with their numbers from 1. A byte order mark before a line is dropped."""
        try:
            self._file.seek(0)
            for number, line in enumerate(self._file, start=1):
                if number == 1 and (form := known_form(line)) is not None:
                    raise ConfigurationError(f"{self.name} is {form}, not JSON in UTF-8: convert it first")
                if line := line.removeprefix(_BOM).strip():
                    yield number, line
        except OSError as error:
            raise self._unreadable(error) from None

    def _unreadable(self, error: OSError) -> ConfigurationError:
        return ConfigurationError(f"{self.name} cannot be read: {error.strerror or error}")


def _rewindable(file: BinaryIO) -> BinaryIO:
    """The file, or a temporary copy of one that can be read only once."""
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    copy = tempfile.TemporaryFile()  # noqa: SIM115  # its reader closes it
    with file:
        shutil.copyfileobj(file, copy)
    return copy


def parse_json_object(line: bytes) -> JsonObject:
    """The JSON object in a line.

    Raises:
        ConfigurationError: says what else the line is, or where its JSON breaks.
    """
    try:
        value: object = pydantic_core.from_json(line, allow_inf_nan=False)
    except ValueError as error:
        raise ConfigurationError(f"not a JSON object: {_why_no_json(line, str(error))}") from None
    if not isinstance(value, dict):
        hint = ": write one request a line, without brackets around them" if isinstance(value, list) else ""
        raise ConfigurationError(f"not a JSON object, but a {type(value).__name__}{hint}")
    return value


def _why_no_json(line: bytes, reason: str) -> str:
    """What a person who wrote the line should know."""
    if b"\0" in line:
        return "it has NUL bytes, as text in UTF-16 does: save the file as UTF-8"
    try:
        line.decode()
    except UnicodeDecodeError as error:
        return f"byte {error.start + 1} is not UTF-8: save the file as UTF-8"
    if line.startswith(b"["):
        return "it begins a list: write one request a line, without brackets around them"
    reason = reason.replace(" at line 1 column", " at character")
    if reason.startswith("trailing characters") and line.endswith(b","):
        return f"{reason}, a comma after the object"
    return reason


def _parse_request(line: bytes) -> BatchRequest:
    fields = parse_json_object(line)
    refuse_unknown_keys(fields, FIELDS)
    for name in FIELDS:
        if name not in fields:
            raise ConfigurationError(f"{name} is missing")
    custom_id, method, url, body = (fields[name] for name in FIELDS)
    if not isinstance(custom_id, str) or not custom_id:
        raise ConfigurationError(f"custom_id must be a string that is not empty, got {custom_id!r:.80}")
    if method != "POST":
        raise ConfigurationError(f"method must be 'POST', got {method!r:.80}")
    if url not in URLS:
        raise ConfigurationError(f"url must be one of {', '.join(URLS)}, got {url!r:.80}")
    if not isinstance(body, dict):
        raise ConfigurationError("body must be a JSON object")
    if body.get("stream"):
        raise ConfigurationError("body asks for a stream, which a batch cannot write: leave it out")
    return BatchRequest(custom_id, url, body)
