"""`gptj-dist status`: what it says of servers that are ready, loading, of an older kind, or none of ours."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, replace

import pytest
from rich.console import Console

from gptj_dist.cli.server.server_state import ServerState
from gptj_dist.cli.server.status_view import render
from gptj_dist.serving.debug import DebugDocument, DownPipeline
from gptj_dist.stages.loss import StageLoss
from tests.fake_server import Call, Reply, fake_server, refused
from tests.unit.test_top import DOCUMENT, PIPELINE
from tests.verbs import run_verb

READY: dict[str, Reply] = {
    "/ready": Reply(body={"status": "ready"}),
    "/version": Reply(body={"version": "1.2.3"}),
    "/v1/models": Reply(body={"object": "list", "data": [{"id": "demo"}, {"id": "alias"}]}),
    "/debug/pipeline": Reply(body=asdict(DOCUMENT)),
}
LOADING = READY | {
    path: refused(503, "the model is still loading; try again shortly") for path in ("/ready", "/debug/pipeline")
}


def status(replies: dict[str, Reply], *arguments: str) -> tuple[int, str, str]:
    """Exit code and output against a server with these answers, and 404 to all else."""

    def answer(call: Call) -> Reply:
        return replies.get(call.path, refused(404, "not served here"))

    with fake_server(answer) as server:
        done = run_verb("status", "--url", server.base, *arguments, COLUMNS="80")
        return done.returncode, done.stdout.replace(server.base, "URL"), done.stderr.replace(server.base, "URL")


def test_a_server_that_is_ready_tells_all_in_eighty_columns() -> None:
    code, text, errors = status(READY)
    assert (code, errors) == (0, "")
    lines = [line.rstrip() for line in text.splitlines()]
    assert lines[:4] == [
        "server   URL  ready",
        "version  1.2.3",
        "models   demo, alias",
        "load     32 running, 400 waiting, 1,234 tokens/s out, 11,000 in, KV 25.0% in use",
    ]
    first, second = lines[-2:]
    assert first.split()[:4] == ["ab12cd34", "up", "0", "0-14"]
    assert all(cell in first for cell in ("NVIDIA A100", "float32", "123 MB of 1.0 GB"))
    assert second.split() == ["1", "15-27", "cpu", "float32", "0", "B", "of", "1.0", "GB"]
    assert max(map(len, lines)) <= 80


def test_as_json_it_is_one_document() -> None:
    code, text, _ = status(READY, "--json")
    document = json.loads(text)
    assert code == 0
    assert (document["is_ready"], document["problem"], document["version"]) == (True, None, "1.2.3")
    assert document["models"] == ["demo", "alias"]
    assert document["pipelines"] == json.loads(json.dumps(asdict(DOCUMENT)))["pipelines"]


def test_a_server_that_loads_says_so_and_the_exit_code_too() -> None:
    code, text, errors = status(LOADING)
    assert (code, errors) == (1, "")
    assert "not ready: the model is still loading; try again shortly" in " ".join(text.split())
    assert "stage" not in text
    code, text, _ = status(LOADING, "--json")
    assert (code, json.loads(text)["is_ready"], json.loads(text)["pipelines"]) == (1, False, [])


def test_a_server_that_does_not_tell_its_version_is_shown_all_the_same() -> None:
    code, text, _ = status({path: reply for path, reply in READY.items() if path != "/version"})
    assert (code, "version  not reported" in text, "ab12cd34" in text) == (0, True, True)


@pytest.mark.parametrize(
    ("replies", "code", "told"),
    [
        ({}, 2, "gptj-dist: the server at URL is not gptj-dist, or an older one\n"),
        (READY | {"/v1/models": Reply(body=b"<html>")}, 1, "does not answer in JSON"),
        (READY | {"/debug/pipeline": Reply(body={"x": 1})}, 2, "is not gptj-dist, or of another version"),
        (READY | {"/debug/pipeline": Reply(body=b"[" * 100_000)}, 2, "is not gptj-dist, or of another version"),
        (READY | {"/debug/pipeline": Reply(body=b'{"model":"\xff"}')}, 2, "is not gptj-dist, or of another version"),
        (READY | {"/v1/models": Reply(body={"data": 7})}, 2, "is not gptj-dist, or of another version"),
        (READY | {"/ready": refused(401, "no\n\x1b[2Jkey")}, 1, "gptj-dist: no [2Jkey (401)"),
        (READY | {"/ready": refused(401, "no key")}, 1, "no key (401); give the server's key with --api-key"),
    ],
)
def test_what_is_no_server_of_ours_is_one_line(replies: dict[str, Reply], code: int, told: str) -> None:
    found, text, errors = status(replies)
    assert (found, text, len(errors.splitlines())) == (code, "", 1)
    assert told in errors


def drawn(debug: DebugDocument, width: int) -> list[str]:
    """The lines that are printed, without colours."""
    console = Console(width=width, file=io.StringIO(), highlight=False)
    console.print(render(ServerState("http://host", None, "1", ("demo",), debug), width))
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def loss(stage: int, pid: int, back_after_s: float | None) -> StageLoss:
    return StageLoss(stage, "exited with code 3", "head", pid, "step 12 begins", back_after_s)


def test_the_last_loss_of_each_stage_is_shown_with_cause_place_and_return() -> None:
    losses = (loss(1, 101, 2.5), loss(0, 102, 4.25), loss(1, 103, None))
    debug = replace(DOCUMENT, pipelines=(replace(PIPELINE, losses=losses),))
    *_, first, second = drawn(debug, 200)
    words = "exited with code 3; its last log line: step 12 begins"
    assert first == f"lost: ab12cd34, back after 4.2 s: stage 0 (pid 102 on head) {words}"
    assert second == f"lost: ab12cd34, not back yet: stage 1 (pid 103 on head) {words}"
    assert "lost" not in "\n".join(drawn(DOCUMENT, 200))


@pytest.mark.parametrize("width", [50, 60, 79, 80, 110])
def test_no_line_is_wider_than_the_terminal_and_no_row_is_broken(width: int) -> None:
    restarting = replace(PIPELINE, state="restarting", losses=(loss(1, 101, 2.5),))
    lines = drawn(replace(DOCUMENT, pipelines=(restarting,)), width)
    assert max(map(len, lines)) <= width
    header = next(line for line in lines if "stage" in line)
    assert ("device" in header, "dtype" in header, "node" in header) == (width >= 60, width >= 80, width >= 110)
    (row,) = [line for line in lines if "0-14" in line]
    assert row.split()[:3] == ["ab12cd34", "restarting", "0"]
    assert row.endswith("123 MB of 1.0 GB" if width >= 80 else "123 MB")


def test_pipelines_are_added_up_and_those_that_are_silent_counted() -> None:
    restarting = replace(PIPELINE, name="ef56", state="restarting")
    down = DownPipeline("cd34", "its coordinator (pid 12 on alpha) ended", 2.5, "2026-11-29T17:00:00.000Z")
    debug = replace(DOCUMENT, pipelines=(PIPELINE, restarting), num_silent=1, down=(down,))
    text = " ".join(" ".join(drawn(debug, 120)).split())
    assert "64 running, 800 waiting, 2,468 tokens/s out, 22,000 in, KV 25.0% in use" in text
    assert "1 more pipeline gave no answer" in text
    assert f"pipeline cd34 is down since {down.since} (2.5 s): {down.problem}" in text
    assert "ef56 restarting 0 0-14 NVIDIA A100-SXM4-80GB float32 8.2 GB head 123 MB of 1.0 GB" in text


def test_adapters_are_counted_once_for_all_pipelines() -> None:
    requests = ({"a": 2}, {"a": 1, "b": 1})
    adapted = tuple(replace(PIPELINE, num_adapters=3, adapter_requests=each) for each in requests)
    assert "in use, 2 of 3 adapters in use" in " ".join(drawn(replace(DOCUMENT, pipelines=adapted), 120))
    assert "adapters" not in " ".join(drawn(DOCUMENT, 120))
