"""The files of a batch: what is refused before anything is sent, and how the file of answers is taken over."""

from __future__ import annotations

import gzip
import json
import resource
from pathlib import Path
from typing import Any

import pytest

from gptj_dist.cli.text.batch_answers import AnswerFile, BatchAnswer, respond
from gptj_dist.cli.text.batch_requests import BatchRequest, RequestFile
from gptj_dist.errors import ConfigurationError, GPTJDistError


def request_line(custom_id: object = "a", **changes: object) -> str:
    fields = {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}
    return json.dumps(fields | changes)


def check_requests(path: Path) -> frozenset[str]:
    with RequestFile(path) as file:
        return file.check()


def written(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_requests_are_read_in_order_without_those_that_are_answered(tmp_path: Path) -> None:
    path = written(tmp_path / "in", request_line("a"), "", request_line("b", url="/v1/embeddings"), request_line("c"))
    assert check_requests(path) == {"a", "b", "c"}
    with RequestFile(path) as file:
        assert list(file.requests(without={"a", "c"})) == [BatchRequest("b", "/v1/embeddings", {"prompt": "x"})]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("nonsense", "not a JSON object: expected ident at character 2"),
        ("[1]", "not a JSON object, but a list: write one request a line, without brackets"),
        ('{"custom_id": NaN}', "not a JSON object"),
        ("[" * 100_000, "not a JSON object"),
        (request_line("b") + ",", "not a JSON object: trailing characters at character 88, a comma after the object"),
        (request_line("b")[:-1] + ",}", "not a JSON object: trailing comma at character 88"),
        ("{'custom_id': 'b'}", "not a JSON object: key must be a string at character 2"),
        ("[", "not a JSON object: it begins a list: write one request a line"),
        ('{"custom_id": "b"', "not a JSON object: EOF while parsing an object"),
        (request_line(bodi={}), "unknown setting 'bodi': did you mean 'body'?"),
        ('{"custom_id": "b"}', "method is missing"),
        (request_line(7), "custom_id must be a string that is not empty, got 7"),
        (request_line(""), "custom_id must be a string that is not empty"),
        (request_line("b", method="GET"), "method must be 'POST', got 'GET'"),
        (request_line("b", url="/v1/images"), "url must be one of /v1/completions, "),
        (request_line("b", body="x"), "body must be a JSON object"),
        (request_line("b", body={"stream": True}), "body asks for a stream"),
        (request_line("a"), "custom_id 'a' is that of line 1 too"),
    ],
)
def test_a_line_that_is_no_request_is_named_by_its_number(tmp_path: Path, line: str, problem: str) -> None:
    path = written(tmp_path / "in", request_line("a"), "", line)
    with pytest.raises(ConfigurationError) as refused:
        check_requests(path)
    assert f"line 3: {problem}" in str(refused.value)


def test_a_line_in_another_encoding_is_named_as_that(tmp_path: Path) -> None:
    path = tmp_path / "in"
    for line, problem in (
        (request_line("b", body={"prompt": "_"}).replace("_", "é").encode("latin-1"), "is not UTF-8: save the file as"),
        (request_line("b").encode("utf-16-le"), "it has NUL bytes, as text in UTF-16 does"),
    ):
        path.write_bytes(request_line("a").encode() + b"\n" + line + b"\n")
        with pytest.raises(ConfigurationError, match=f"line 2: not a JSON object: .*{problem}"):
            check_requests(path)


@pytest.mark.parametrize(
    ("data", "form"),
    [
        (request_line("a").encode("utf-16"), "UTF-16"),
        (gzip.compress(request_line("a").encode(), mtime=0), "gzip"),
        (b"PK\x03\x04...", "a zip archive"),
    ],
)
def test_a_file_of_another_form_is_named_once(tmp_path: Path, data: bytes, form: str) -> None:
    path = tmp_path / "in"
    path.write_bytes(data)
    with pytest.raises(ConfigurationError) as refused:
        check_requests(path)
    assert str(refused.value) == f"{path} is {form}, not JSON in UTF-8: convert it first"


def test_a_byte_order_mark_before_a_line_is_dropped(tmp_path: Path) -> None:
    path = written(tmp_path / "in", "\ufeff" + request_line("a"), "\ufeff" + request_line("b"))
    assert check_requests(path) == {"a", "b"}


def test_all_wrong_lines_are_named_up_to_ten(tmp_path: Path) -> None:
    path = written(tmp_path / "in", *["nonsense"] * 12)
    with pytest.raises(ConfigurationError) as refused:
        check_requests(path)
    assert [f"line {number}:" in str(refused.value) for number in (1, 10, 11)] == [True, True, False]
    assert "and 2 more" in str(refused.value)


def test_a_file_that_cannot_be_read_or_is_empty_is_refused(tmp_path: Path) -> None:
    for path, problem in (
        (tmp_path / "none", "cannot be read: No such file"),
        (tmp_path, "cannot be read: Is a directory"),
        (written(tmp_path / "in", ""), "holds no requests"),
    ):
        with pytest.raises(ConfigurationError, match=problem):
            check_requests(path)


def answer(custom_id: str, status: int = 200, **body: Any) -> BatchAnswer:
    return respond(BatchRequest(custom_id, "/v1/completions", {}), status, body, "r1")


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_have_openais_form(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with AnswerFile(path, {"a", "b"}) as file:
        file.append(answer("a", text="é\u2028"))
        file.append(BatchAnswer("b", None, {"code": "timeout", "message": "late"}))
    first, second = lines_of(path)
    assert first.pop("id").startswith("batch_req_")
    assert first == {
        "custom_id": "a",
        "response": {"status_code": 200, "request_id": "r1", "body": {"text": "é\u2028"}},
        "error": None,
    }
    assert (second["custom_id"], second["response"]) == ("b", None)
    assert second["error"] == {"code": "timeout", "message": "late"}


def test_answers_that_are_there_are_counted_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with AnswerFile(path, {"a", "b", "c"}) as file:
        file.append(answer("a"))
        file.append(answer("b", 400))
    before = path.read_text()
    with AnswerFile(path, {"a", "b", "c"}) as file:
        assert (file.answered, file.num_failed) == ({"a", "b"}, 1)
        file.append(BatchAnswer("c", None, {"code": "timeout"}))
        assert (file.answered, file.num_failed) == ({"a", "b", "c"}, 2)
    assert path.read_text().startswith(before)


def test_wherever_a_kill_tore_the_last_line_it_is_cut_off_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with AnswerFile(path, {"a", "b"}) as file:
        file.append(answer("a"))
        num_whole_bytes = path.stat().st_size
        file.append(answer("b", text="x" * 50))
    whole = path.read_bytes()
    for num_bytes in range(num_whole_bytes, len(whole)):
        path.write_bytes(whole[:num_bytes])
        with AnswerFile(path, {"a", "b"}) as file:
            assert file.answered == {"a"}
        assert path.read_bytes() == whole[:num_whole_bytes]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (request_line("a") + "\n", "line 1 is no answer of a batch"),
        ('{"custom_id": "x", "response": {}, "error": null}\n', "line 1 answers 'x', which is not asked"),
        ('{"custom_id": ["a"], "response": {}, "error": null}\n', r"line 1 answers \['a'\], which is not asked"),
        ('{"custom_id": "a", "response": 7, "error": null}\n', "a response that is no object"),
        ("my notes", "its last line is none of a batch"),
        ("my notes\n", "line 1 is no answer of a batch"),
    ],
)
def test_a_file_of_something_else_is_left_as_it_is(tmp_path: Path, content: str, problem: str) -> None:
    path = tmp_path / "out"
    path.write_text(content)
    with pytest.raises(ConfigurationError, match=problem):
        AnswerFile(path, {"a"})
    assert path.read_text() == content


def test_two_batches_do_not_write_to_one_file(tmp_path: Path) -> None:
    with AnswerFile(tmp_path / "out", {"a"}), pytest.raises(ConfigurationError, match="another process writes"):
        AnswerFile(tmp_path / "out", {"a"})
    AnswerFile(tmp_path / "out", {"a"})


def test_what_is_no_file_cannot_hold_answers() -> None:
    with pytest.raises(ConfigurationError, match="must be a regular file"):
        AnswerFile(Path("/dev/null"), {"a"})


def test_a_disk_that_fills_up_ends_the_batch_and_costs_the_torn_line_alone(tmp_path: Path) -> None:
    path = tmp_path / "out"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with AnswerFile(path, {"a", "b"}) as file:
        file.append(answer("a"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 30, before[1]))
        try:
            with pytest.raises(GPTJDistError, match="cannot be written: File too large"):
                file.append(answer("b"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not path.read_bytes().endswith(b"\n")
    with AnswerFile(path, {"a", "b"}) as file:
        assert file.answered == {"a"}
