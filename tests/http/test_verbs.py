"""The verbs that ask a running server, against one: `complete`, `chat`, `status`, `batch`, `top` and `stop --address`.

And what they ask for: `GET /debug/pipeline` and `GET /debug/trace`.
"""

from __future__ import annotations

import json
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
import ray
from ray import serve

import gptj_dist
from gptj_dist.serving.debug import DebugDocument, PipelineDocument
from tests.http.server import APP_NAME, Server, serving
from tests.unit.test_trace import check
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
        command_line("complete", f"{uuid4()}, call me", "--max-tokens", "900", "--url", server.base),
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


@contextmanager
def load(server: Server) -> Iterator[None]:
    """Eight streams that flow while the context lasts."""
    has_flown = threading.Event()
    is_over = threading.Event()

    def read() -> None:
        body = {"prompt": "Call me", "max_tokens": 1000, "ignore_eos": True, "stream": True, "n": 8}
        with httpx.stream("POST", f"{server.base}/v1/completions", json=body, timeout=60) as response:
            for number, _ in enumerate(response.iter_lines()):
                if number == 200:
                    has_flown.set()
                if is_over.is_set():
                    return

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert has_flown.wait(timeout=60)
        yield
    finally:
        is_over.set()
        reader.join(timeout=60)
        server.wait_until_idle()


def look(server: Server) -> PipelineDocument:
    response = server.client.get("/debug/pipeline")
    assert response.status_code == 200, response.text
    document = DebugDocument.from_json(response.content)
    assert (document.model, document.num_silent) == ("demo", 0)
    (pipeline,) = document.pipelines
    return pipeline


def test_under_load_every_stage_says_how_busy_it_is_and_what_it_holds(server: Server) -> None:
    with load(server):
        pipeline = look(server)
        table = ask(server, "top", "--once")
        by_top = DebugDocument.from_json(ask(server, "top", "--json"))
    assert (pipeline.state, pipeline.num_running, pipeline.num_waiting) == ("up", 8, 0)
    assert pipeline.num_in_flight >= 1
    assert pipeline.plans_per_s > 0
    assert pipeline.output_tokens_per_s > pipeline.plans_per_s
    assert 0 < pipeline.num_used_blocks <= pipeline.num_blocks
    assert [stage.layers for stage in pipeline.stages] == [(0, 13), (14, 27)]
    for stage in pipeline.stages:
        assert stage.busy_share is not None
        assert stage.bubble_share is not None
        assert 0 < stage.busy_share <= stage.busy_share + stage.bubble_share <= 1
        assert stage.step_ms is not None
        assert stage.step_ms > 0
        assert stage.queue is not None
        assert stage.queue >= 0
        assert 0 < stage.kv_used_bytes < stage.kv_total_bytes
    assert f"{pipeline.name}  up  8 running" in table
    assert all(text in table for text in ("0-13", "14-27", "busy", "bubble"))
    assert by_top.pipelines[0].stages[0].pid == pipeline.stages[0].pid


def test_when_the_load_has_gone_nothing_is_in_use(server: Server) -> None:
    server.complete(prompt="Call me", max_tokens=2)
    wait_until(lambda: look(server).num_in_flight == 0, "nothing is in flight", timeout_s=20)
    pipeline = look(server)
    assert (pipeline.num_running, pipeline.num_used_blocks) == (0, 0)
    assert [stage.kv_used_bytes for stage in pipeline.stages] == [0, 0]


def test_the_last_plans_can_be_had_as_a_trace(server: Server) -> None:
    server.complete(prompt="Call me", max_tokens=5, ignore_eos=True)
    lanes = check(server.client.get("/debug/trace").json())
    assert {name for _, name in lanes} == {"coordinator", "stage 0 (layers 0-13)", "stage 1 (layers 14-27)"}
    assert all(len(slices) >= 5 for slices in lanes.values())


def stop(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_verb("stop", "--address", ray.get_runtime_context().gcs_address, *arguments)


def test_an_application_is_removed_by_its_name_and_the_cluster_stays(server: Server) -> None:
    """Comes last: it takes the server away. Its launcher is none, as if that were gone."""
    wrong = stop("--name", "another")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == f"gptj-dist: the cluster serves no application 'another'; it serves {APP_NAME}\n"
    assert server.is_ready()
    done = stop("--name", APP_NAME)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"Removed the application {APP_NAME!r} from the cluster at ")
    assert not server.is_ready()
    assert APP_NAME not in serve.status().applications
    assert any(node["Alive"] for node in ray.nodes())
    again = stop("--name", APP_NAME)
    assert (again.returncode, again.stderr) == (2, f"gptj-dist: the cluster serves no application {APP_NAME!r}\n")
