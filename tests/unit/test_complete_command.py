"""`gptj-dist complete`, a process of its own against a server that answers as told."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator

import pytest

from tests.fake_server import Call, Reply, events, fake_server, refused
from tests.verbs import command_line, environment, run_verb
from tests.waiting import wait_until


def text_chunk(text: str, index: int = 0) -> dict[str, object]:
    return {"choices": [{"index": index, "text": text, "finish_reason": None}]}


STREAM = events(text_chunk(" one"), text_chunk(" two\u2028é"), {"choices": [], "usage": {"total_tokens": 9}})


def test_text_is_printed_as_it_is_and_only_what_was_given_is_sent() -> None:
    with fake_server(lambda _: STREAM) as server:
        done = run_verb("complete", "a prompt", "--stop", "x", "--stop", "y", "--top-k", "5", "--url", server.base)
    assert (done.returncode, done.stdout, done.stderr) == (0, " one two\u2028é\n", "")
    assert server.calls[0].path == "/v1/completions"
    assert server.calls[0].json() == {
        "prompt": "a prompt",
        "max_tokens": 64,
        "top_k": 5,
        "stop": ["x", "y"],
        "stream": True,
    }


def test_an_answer_that_is_no_text_is_one_line() -> None:
    odd = events({"choices": [{"index": 0, "text": [1], "delta": {"content": 5}}]})
    with fake_server(lambda _: odd) as server:
        for arguments in (("complete", "a"), ("chat", "-m", "a")):
            done = run_verb(*arguments, "--url", server.base)
            assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1), done.stderr
            assert "is it a gptj-dist server?" in done.stderr


@pytest.mark.parametrize("arguments", [["-"], []])
def test_a_pipe_is_the_prompt_less_its_last_line_break(arguments: list[str]) -> None:
    with fake_server(lambda _: STREAM) as server:
        run_verb("complete", *arguments, typed="two\nlines\n\n", GPTJ_URL=server.base)
    assert server.calls[0].json()["prompt"] == "two\nlines\n"


def test_the_key_of_the_environment_is_shown_to_the_server() -> None:
    with fake_server(lambda _: STREAM) as server:
        run_verb("complete", "x", GPTJ_URL=server.base, GPTJ_API_KEY="secret")
    assert server.calls[0].headers["Authorization"] == "Bearer secret"


def test_several_completions_come_under_their_numbers_and_json_is_the_servers_document() -> None:
    document = {"id": "cmpl-é", "choices": [{"text": "a"}, {"text": "b"}]}
    with fake_server(lambda _: Reply(body=document)) as server:
        several = run_verb("complete", "x", "-n", "2", "--url", server.base)
        as_json = run_verb("complete", "x", "--json", "--logprobs", "2", "--echo", "--url", server.base)
    assert several.stdout == "--- 1\na\n--- 2\nb\n"
    assert json.loads(as_json.stdout) == document
    assert "stream" not in server.calls[0].json()
    assert server.calls[0].json()["n"] == 2
    assert (server.calls[1].json()["logprobs"], server.calls[1].json()["echo"]) == (2, True)


def test_without_streaming_the_text_is_the_same() -> None:
    with fake_server(lambda _: Reply(body=text_chunk(" one"))) as server:
        assert run_verb("complete", "x", "--no-stream", "--url", server.base).stdout == " one\n"


@pytest.mark.parametrize(
    ("reply", "printed", "told"),
    [
        (refused(400, "seed must be whole", "seed"), "", "seed must be whole (400, param seed); change --seed"),
        (events(text_chunk("one"), {"error": {"message": "a stage died"}}, is_whole=False), "one\n", "a stage died"),
        (events(text_chunk("one"), is_whole=False), "one\n", "broke off"),
        (events({"choices": [{"delta": {}}]}), "", "is no completion"),
    ],
)
def test_a_failure_is_one_line_behind_what_came(reply: Reply, printed: str, told: str) -> None:
    with fake_server(lambda _: reply) as server:
        done = run_verb("complete", "x", "--url", server.base)
    assert (done.returncode, done.stdout) == (1, printed)
    assert len(done.stderr.splitlines()) == 1
    assert told in done.stderr


def test_where_no_server_is_it_says_how_to_start_one() -> None:
    done = run_verb("complete", "x", "--url", "127.0.0.1:1")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "gptj-dist: no server answers at http://127.0.0.1:1: Connection refused; "
        "`gptj-dist serve demo` starts one, --url names another\n"
    )


def test_options_that_cannot_work_are_refused_before_anything_is_sent() -> None:
    with fake_server(lambda _: STREAM) as server:
        done = run_verb("complete", "x", "--logprobs", "1", "--url", server.base)
    assert (done.returncode, server.calls) == (2, [])
    assert "--logprobs needs --json" in done.stderr


def test_ctrl_c_ends_the_stream_at_the_server_and_the_line() -> None:
    def endless(_: Call) -> Reply:
        def parts() -> Iterator[bytes]:
            while True:
                yield f"data: {json.dumps(text_chunk('word '))}\n\n".encode()

        return Reply(parts=parts())

    with fake_server(endless) as server:
        process = subprocess.Popen(
            command_line("complete", "x", "--url", server.base),
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdout is not None
        assert process.stdout.read(5) == b"word "
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=30)
        wait_until(lambda: server.num_broken_off == 1, "the server notices", timeout_s=30)
    assert (process.returncode, errors) == (130, b"")
    assert output.endswith(b"\n")
