"""`gptj-dist batch` against a server: resumed after kills, and what a person sees."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections import Counter
from pathlib import Path

import pytest

from tests.fake_server import Call, Reply, fake_server, refused
from tests.verbs import command_line, environment, run_verb
from tests.waiting import wait_until


def write_requests(path: Path, number: int) -> Path:
    """Requests whose prompts are numbers."""
    lines = [
        {"custom_id": f"id-{i}", "method": "POST", "url": "/v1/completions", "body": {"prompt": str(i)}}
        for i in range(number)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def answers_in(path: Path) -> dict[str, str]:
    """Texts by the ids that they answer, each of which there is once."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert max(Counter(line["custom_id"] for line in lines).values()) == 1
    return {line["custom_id"]: line["response"]["body"]["text"] for line in lines}


def double(call: Call) -> Reply:
    prompt = call.json()["prompt"]
    return Reply(body={"text": prompt * 2, "usage": {"completion_tokens": 3}})


def test_a_batch_that_is_killed_again_and_again_ends_up_complete_without_an_answer_twice(tmp_path: Path) -> None:
    requests, answers = write_requests(tmp_path / "in", 40), tmp_path / "out"
    allowed = threading.Semaphore(0)

    def answer(call: Call) -> Reply:
        assert allowed.acquire(timeout=60)
        return double(call)

    def kill_behind(num_answered: int) -> None:
        process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)

        def has_come_far() -> bool:
            allowed.release()
            return answers.exists() and answers.read_bytes().count(b"\n") >= num_answered

        wait_until(has_come_far, f"{num_answered} are answered", timeout_s=60)
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=30)
        with answers.open("ab") as file:
            file.write(b'{"id": "batch_req_00')  # a line that the kill has torn

    with fake_server(answer) as server:
        command = command_line("batch", requests, answers, "--concurrency", "4", "--url", server.base)
        kill_behind(10)
        kill_behind(25)
        num_calls = len(server.calls)
        allowed.release(1000)
        last = run_verb(*command[3:])
    assert last.returncode == 0
    assert answers_in(answers) == {f"id-{i}": f"{i}{i}" for i in range(40)}
    assert len(server.calls) - num_calls <= 15


def test_the_end_says_how_much_was_done_and_a_second_run_asks_nothing(tmp_path: Path) -> None:
    requests, answers = write_requests(tmp_path / "in", 20), tmp_path / "out"
    with fake_server(double) as server:
        first = run_verb("batch", requests, answers, "--url", server.base)
        second = run_verb("batch", requests, answers, "--url", server.base)
    assert (first.returncode, second.returncode, len(server.calls)) == (0, 0, 20)
    assert first.stdout.startswith("20 requests answered in ")
    assert " 60 tokens, " in first.stdout
    assert [line for line in first.stderr.splitlines() if "of 20 requests" in line][-1] == "20 of 20 requests"
    assert second.stdout == f"{answers}: all 20 requests have been answered\n"


def test_refused_requests_have_their_errors_in_the_file_and_in_the_exit_code_of_every_run(tmp_path: Path) -> None:
    requests, answers = write_requests(tmp_path / "in", 3), tmp_path / "out"

    def answer(call: Call) -> Reply:
        return refused(400, "not 1", "prompt") if call.json()["prompt"] == "1" else double(call)

    with fake_server(answer) as server:
        runs = [run_verb("batch", requests, answers, "--url", server.base) for _ in range(2)]
    assert len(server.calls) == 3
    for run in runs:
        assert run.returncode == 1
        assert run.stderr.splitlines()[-1] == f"gptj-dist: 1 of 3 requests failed; {answers} says why"
    lines = {line["custom_id"]: line for line in map(json.loads, answers.read_text().splitlines())}
    assert lines["id-1"]["response"]["status_code"] == 400
    assert lines["id-1"]["response"]["body"]["error"]["param"] == "prompt"
    assert lines["id-1"]["error"] is None


def test_ctrl_c_says_how_far_it_got_and_how_to_go_on(tmp_path: Path) -> None:
    requests, answers = write_requests(tmp_path / "in", 5), tmp_path / "out"
    held = threading.Event()

    def answer(call: Call) -> Reply:
        if call.json()["prompt"] != "0":
            held.wait(timeout=60)
        return double(call)

    with fake_server(answer) as server:
        process = subprocess.Popen(
            command_line("batch", requests, answers, "--url", server.base),
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_until(lambda: answers.exists() and answers.read_text().endswith("\n"), "one is answered", timeout_s=30)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        held.set()
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "gptj-dist: 1 of 5 requests are answered; run it again to resume"
    assert list(answers_in(answers)) == ["id-0"]


def test_requests_come_from_a_pipe_and_a_second_run_resumes(tmp_path: Path) -> None:
    lines, answers = write_requests(tmp_path / "in", 5).read_text(), tmp_path / "out"
    with fake_server(double) as server:
        first = run_verb("batch", "-", answers, "--url", server.base, typed="".join(lines.splitlines(True)[:3]))
        second = run_verb("batch", "/dev/stdin", answers, "--url", server.base, typed=lines)
    assert (first.returncode, second.returncode, len(server.calls)) == (0, 0, 5)
    assert first.stdout.startswith("3 requests answered")
    assert answers_in(answers) == {f"id-{i}": f"{i}{i}" for i in range(5)}


def test_requests_come_from_a_fifo(tmp_path: Path) -> None:
    lines, fifo = write_requests(tmp_path / "in", 3).read_text(), tmp_path / "fifo"
    os.mkfifo(fifo)
    writer = threading.Thread(target=fifo.write_text, args=[lines], daemon=True)
    writer.start()
    with fake_server(double) as server:
        done = run_verb("batch", fifo, tmp_path / "out", "--url", server.base)
    assert (done.returncode, len(server.calls)) == (0, 3)
    assert len(answers_in(tmp_path / "out")) == 3


@pytest.mark.parametrize("typed", ["", "\n"])
def test_an_empty_pipe_is_refused(tmp_path: Path, typed: str) -> None:
    done = run_verb("batch", "-", tmp_path / "out", typed=typed)
    assert (done.returncode, done.stderr) == (2, "gptj-dist: standard input holds no requests\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("answers", ["-", "/dev/stdout", "/dev/full"])
def test_answers_go_to_a_regular_file_only(tmp_path: Path, answers: str) -> None:
    done = run_verb("batch", write_requests(tmp_path / "in", 1), answers, cwd=tmp_path)
    assert done.returncode == 2
    assert "must be a regular file" in done.stderr
    assert not (tmp_path / "-").exists()


def test_a_server_that_stays_away_ends_the_batch_with_the_reason(tmp_path: Path) -> None:
    requests, answers = write_requests(tmp_path / "in", 2), tmp_path / "out"
    done = run_verb("batch", requests, answers, "--wait", "0", "--url", "127.0.0.1:1")
    assert (done.returncode, answers.read_text()) == (1, "")
    assert "0 of 2 requests are answered" in done.stderr
    assert "no server answers at http://127.0.0.1:1: Connection refused" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--stages", "2"], "--stages needs --model"),
        (["--chat-template", "x"], "--chat-template needs --model"),
        (["--model", "demo", "--url", "x"], "--url is for a server"),
        (["--model", "demo", "--wait", "1"], "--wait is for a server"),
        (["--model", "demo", "--stages", "0"], "stages must be at least 1"),
    ],
)
def test_options_that_would_do_nothing_are_refused(tmp_path: Path, arguments: list[str], told: str) -> None:
    done = run_verb("batch", write_requests(tmp_path / "in", 1), tmp_path / "out", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert told in done.stderr
    assert not (tmp_path / "out").exists()


def test_files_that_will_not_do_are_refused_before_anything_is_sent(tmp_path: Path) -> None:
    requests = write_requests(tmp_path / "in", 2)
    requests.write_text(requests.read_text() * 2)
    with fake_server(double) as server:
        twice = run_verb("batch", requests, tmp_path / "out", "--url", server.base)
        swapped = run_verb(
            "batch", write_requests(tmp_path / "in", 2), write_requests(tmp_path / "out", 2), "--url", server.base
        )
    assert (twice.returncode, swapped.returncode, server.calls) == (2, 2, [])
    assert twice.stderr.splitlines() == [
        f"gptj-dist: {requests} is not sent:",
        "  line 3: custom_id 'id-0' is that of line 1 too",
        "  line 4: custom_id 'id-1' is that of line 2 too",
    ]
    assert "line 1 is no answer of a batch" in swapped.stderr
