"""The answers of a batch: a file in OpenAI's form that answers are appended to, one JSON object a line.

The file is the only record of how far a batch has got. Whole lines count; a line that was cut by a kill is removed.
Knows neither HTTP nor models.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
import uuid
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from gptj_dist.cli.text.batch_requests import BatchRequest, parse_json_object
from gptj_dist.errors import ConfigurationError, GPTJDistError
from gptj_dist.json_types import JsonObject

_LINE_BEGIN = b'{"id": "batch_req_'


@dataclass(frozen=True, slots=True)
class BatchAnswer:
    """The answer to a request.

    Args:
        response: `status_code`, `request_id` and `body`; None if there was none.
        error: `code` and `message` if there is no response; None otherwise.
    """

    custom_id: str
    response: JsonObject | None
    error: JsonObject | None = None

    @property
    def is_failure(self) -> bool:
        return self.response is None or self.response.get("status_code") != 200

    @property
    def num_output_tokens(self) -> int:
        """As the server counts them; 0 where it does not."""
        match self.response:
            case {"body": {"usage": {"completion_tokens": int(number)} | {"output_tokens": int(number)}}}:
                return number
        return 0


def respond(request: BatchRequest, status: int, body: JsonObject, request_id: str | None) -> BatchAnswer:
    """A request answered over HTTP, or as it would be."""
    response = {"status_code": status, "request_id": request_id or body.get("id"), "body": body}
    return BatchAnswer(request.custom_id, response)


class AnswerFile:
    """The file that answers are appended to; this process is the only one that does.

    Args:
        expected: ids of all requests of the batch.

    Attributes:
        answered: ids of requests that have an answer.
        num_failed: how many of the answers say that a request failed.

    Raises:
        ConfigurationError: it cannot be written, another process writes to it, or it holds something else than answers
            to this batch. It is as it was then.
    """

    def __init__(self, path: Path, expected: Collection[str]) -> None:
        self._path = path
        self.expected = expected
        self.answered: set[str] = set()
        self.num_failed = 0
        if str(path) == "-":
            raise self._not_regular()
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise ConfigurationError(f"{path} cannot be written: {error.strerror}") from None
        try:
            if not stat.S_ISREG(os.fstat(self._file).st_mode):
                raise self._not_regular()
            self._lock()
            self._take_over()
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def append(self, answer: BatchAnswer) -> None:
        """Writes a line.

        Raises:
            GPTJDistError: it could not be written as a whole.
        """
        fields = {
            "id": f"batch_req_{uuid.uuid4().hex}",
            "custom_id": answer.custom_id,
            "response": answer.response,
            "error": answer.error,
        }
        line = memoryview(json.dumps(fields).encode("ascii") + b"\n")
        try:
            while line:
                line = line[os.write(self._file, line) :]
        except OSError as error:
            raise GPTJDistError(f"{self._path} cannot be written: {error.strerror}") from None
        self._count(answer)

    def _not_regular(self) -> ConfigurationError:
        return ConfigurationError(f"{self._path} must be a regular file: a batch resumes from the answers in it")

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigurationError(f"another process writes to {self._path}") from None

    def _take_over(self) -> None:
        """Counts the existing answers, and removes an incomplete last line."""
        num_whole_bytes, torn = 0, b""
        with self._path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    torn = line
                    break
                num_whole_bytes += len(line)
                self._count(self._parse_answer(line, number))
        if not _LINE_BEGIN.startswith(torn[: len(_LINE_BEGIN)]):
            raise self._foreign("its last line is none of a batch")
        if torn:
            os.ftruncate(self._file, num_whole_bytes)

    def _parse_answer(self, line: bytes, number: int) -> BatchAnswer:
        try:
            fields = parse_json_object(line)
        except ConfigurationError:
            fields = {}
        if not {"custom_id", "response", "error"} <= fields.keys():
            raise self._foreign(f"line {number} is no answer of a batch")
        if not isinstance(fields["response"], dict | None):
            raise self._foreign(f"line {number} has a response that is no object")
        custom_id = fields["custom_id"]
        if not isinstance(custom_id, str) or custom_id not in self.expected:
            raise self._foreign(f"line {number} answers {custom_id!r}, which is not asked")
        return BatchAnswer(custom_id, fields["response"], fields["error"])

    def _foreign(self, reason: str) -> ConfigurationError:
        return ConfigurationError(f"{self._path} holds something else than answers to this batch: {reason}")

    def _count(self, answer: BatchAnswer) -> None:
        self.answered.add(answer.custom_id)
        self.num_failed += answer.is_failure
