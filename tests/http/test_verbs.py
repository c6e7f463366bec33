"""The verbs that ask a running server, against one: `complete`, `chat`, `status` and `batch`."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import gptj_dist
from tests.http.server import Server, serving
from tests.verbs import command_line, environment, run_verb
from tests.waiting import wait_until

pytestmark = pytest.mark.ray

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "chat.jinja"
    path.write_text(TEMPLATE)
    return path


@pytest.fixture(scope="module")
def server(template: Path) -> Iterator[Server]:
    with serving({"model": "demo", "stages": 2, "device": "cpu", "chat_template": str(template)}) as server:
        yield server


def ask(server: Server, *arguments: str | Path, typed: str = "") -> str:
    """What a verb that must succeed prints."""
    done = run_verb(*arguments, "--url", server.base, typed=typed)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_complete_prints_what_the_server_answers_streamed_or_not(server: Server) -> None:
    text = server.complete(prompt="Call me", max_tokens=12, seed=1)["choices"][0]["text"]
    asked = ("complete", "Call me", "--max-tokens", "12", "--seed", "1")
    assert ask(server, *asked) == ask(server, *asked, "--no-stream") == f"{text}\n"
    assert json.loads(ask(server, *asked, "--json"))["usage"]["completion_tokens"] == 12


def test_complete_that_is_interrupted_frees_its_memory(server: Server) -> None:
    process = subprocess.Popen(
        command_line("complete", "Call me", "--max-tokens", "1000", "--url", server.base),
        env=environment(),
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    server.wait_until_idle()


def test_a_conversation_goes_on_where_it_was(server: Server) -> None:
    message = {"role": "user", "content": "Hello"}
    fields = {"max_tokens": 5, "seed": 1}

    def answer(*messages: dict[str, str]) -> str:
        response = server.client.post("/v1/chat/completions", json={"messages": messages, **fields})
        return str(response.json()["choices"][0]["message"]["content"])

    first = answer(message)
    second = answer(message, {"role": "assistant", "content": first}, message)
    done = ask(server, "chat", "--max-tokens", "5", "--seed", "1", typed="Hello\nHello\n")
    assert done == f"{first}\n{second}\n"


def test_status_tells_what_is_served(server: Server) -> None:
    wait_until(lambda: "0-13" in ask(server, "status"), "the pipeline is shown")
    document = json.loads(ask(server, "status", "--json"))
    assert (document["is_ready"], document["models"]) == (True, ["demo"])
    assert document["version"] == gptj_dist.__version__
    assert [stage["layers"] for stage in document["pipelines"][0]["stages"]] == [[0, 13], [14, 27]]


def write_requests(path: Path) -> Path:
    """Of every kind, those that are refused included; all have seeds."""
    completions = [{"prompt": f"The number {i}", "max_tokens": 8, "seed": i, "logprobs": 1} for i in range(20)]
    bodies: list[tuple[str, dict[str, Any]]] = [("/v1/completions", body) for body in completions]
    bodies += [
        ("/v1/completions", {"prompt": "x", "temperatur": 1}),
        ("/v1/completions", {"prompt": "x", "max_tokens": 10_000}),
        ("/v1/completions", {"prompt": ["one", "two"], "n": 2, "best_of": 3, "seed": 1, "echo": True}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "seed": 1}),
        ("/v1/embeddings", {"input": ["one", "two"]}),
    ]
    lines = [{"custom_id": str(i), "method": "POST", "url": url, "body": body} for i, (url, body) in enumerate(bodies)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def answers_in(path: Path) -> dict[str, dict[str, Any]]:
    """Answers by what they answer, less what is another each time."""
    answers = {}
    for line in map(json.loads, path.read_text().splitlines()):
        body = line["response"]["body"]
        assert line["response"]["request_id"]
        assert line["custom_id"] not in answers
        answers[line["custom_id"]] = {
            "status": line["response"]["status_code"],
            **{name: value for name, value in body.items() if name not in ("id", "created")},
        }
    return answers


def test_a_batch_is_answered_in_process_exactly_as_by_a_server(server: Server, tmp_path: Path, template: Path) -> None:
    requests = write_requests(tmp_path / "in")
    by_server = run_verb("batch", requests, tmp_path / "served", "--url", server.base)
    here = run_verb(
        "batch", requests, tmp_path / "here", "--model", "demo", "--kv-cache-gb", "0.5", "--chat-template", template
    )
    assert (by_server.returncode, here.returncode) == (1, 1)
    assert "2 of 25 requests failed" in by_server.stderr
    assert [answers_in(tmp_path / "served")[name]["status"] for name in ("19", "20", "21", "22", "23")] == [
        200,
        400,
        400,
        200,
        200,
    ]
    assert answers_in(tmp_path / "served") == answers_in(tmp_path / "here")
    server.wait_until_idle()
