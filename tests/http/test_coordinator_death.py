"""A coordinator or an ingress that dies under streams of all kinds: each client gets exactly what it would have got."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray

from tests.http.server import APP_NAME, Server, serving
from tests.waiting import wait_until

pytestmark = pytest.mark.ray

CLIENT_TIMEOUT_S = 240
STAGES_END_S = 5
"""Orphaned stages end by themselves within this time."""

NUM_BEGUN = 10
"""Events of a stream that has begun: it was kept by then."""

NUM_LOOKS = 8
"""Each look is at any of the pipelines; so many find the one with the most requests."""

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
COMMON = {"max_tokens": 180, "ignore_eos": True, "stream": True}
PROMPT = {"prompt": "My fellow citizens", **COMMON}
MESSAGES = {"messages": [{"role": "user", "content": "What is the state of the Union?"}], **COMMON}
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": (COMPLETIONS, {**PROMPT, "temperature": 0, "stream_options": {"include_usage": True}}),
    "seeded": (COMPLETIONS, {**PROMPT, "seed": 1, "top_p": 0.9, "min_tokens": 170}),
    "three": (COMPLETIONS, {**PROMPT, "seed": 2, "n": 3, "logprobs": 2}),
    "penalties": (
        COMPLETIONS,
        {**PROMPT, "temperature": 0, "presence_penalty": 0.6, "frequency_penalty": 0.4, "repetition_penalty": 1.2},
    ),
    "echo": (COMPLETIONS, {**PROMPT, "seed": 3, "echo": True, "logprobs": 1}),
    "grammar": (COMPLETIONS, {**PROMPT, "seed": 6, "structured_outputs": {"regex": "(the [a-z ]+, )*"}}),
    "whole": (COMPLETIONS, {**PROMPT, "seed": 4, "stream": False}),
    "chat": (CHAT, {**MESSAGES, "seed": 5, "logprobs": True, "top_logprobs": 1}),
}


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    template = tmp_path_factory.mktemp("chat") / "template.jinja"
    template.write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    settings: dict[str, Any] = {"model": "demo", "device": "cpu", "dtype": "float32"}
    settings |= {"chat_template": str(template), "resumable": True}
    with serving(settings, {"num_replicas": request.param}) as server:
        wait_until(lambda: len(pipelines(server)) == request.param, "all pipelines are there")
        yield server


def pipelines(server: Server) -> list[str]:
    """The names of the pipelines that are up."""
    lines = server.client.get("/metrics").text.splitlines()
    return [line for line in lines if line.startswith("gptj_dist_pipeline_up{") and line.endswith(" 1.0")]


def ask(server: Server, path: str, body: dict[str, Any], has_begun: threading.Event) -> dict[str, Any]:
    """What a client gets that asks for the rest when its connection breaks: see `_read`."""
    events: list[str] = []
    with httpx.stream("POST", server.base + path, json=body, timeout=CLIENT_TIMEOUT_S) as response:
        assert response.status_code == 200, response.read()
        if not body["stream"]:
            return {"choices": json.loads(response.read())["choices"]}
        _receive(response, events, has_begun)
    url = f"{server.base}/v1/streams/{response.headers['x-request-id']}"
    while not events or not events[-1].endswith("[DONE]"):
        headers = {"last-event-id": events[-1].partition("\n")[0].removeprefix("id: ")} if events else {}
        try:
            with httpx.stream("GET", url, headers=headers, timeout=CLIENT_TIMEOUT_S) as response:
                assert response.status_code in (200, 503), response.read()
                _receive(response, events, has_begun)
        except httpx.ConnectError:
            time.sleep(0.1)
    return _read(path, [event.partition("data: ")[2] for event in events[:-1]])


def _receive(response: httpx.Response, events: list[str], has_begun: threading.Event) -> None:
    """Adds the events that arrive whole."""
    text = ""
    with suppress(httpx.TransportError):
        for piece in response.iter_text():
            *whole, text = (text + piece).split("\n\n")
            events += whole
            if len(events) >= NUM_BEGUN:
                has_begun.set()


def _read(path: str, events: Sequence[str]) -> dict[str, Any]:
    """Texts, log probabilities and reasons by choice, and the usage."""
    got: dict[str, Any] = {}
    for event in events:
        chunk = json.loads(event)
        assert "error" not in chunk, chunk
        got["usage"] = chunk.get("usage")
        for choice in chunk["choices"]:
            of_choice = got.setdefault(str(choice["index"]), {"text": "", "logprobs": []})
            of_choice["text"] += choice["text"] if path == COMPLETIONS else choice["delta"].get("content") or ""
            of_choice["logprobs"] += _flat(choice.get("logprobs"))
            of_choice["reason"] = choice["finish_reason"]
    return got


def _flat(logprobs: dict[str, Any] | None) -> list[Any]:
    """Log probabilities token by token, whatever their number in the chunk."""
    if logprobs is None:
        return []
    if "content" in logprobs:
        return list(logprobs["content"])
    return list(zip(*logprobs.values(), strict=True))


@pytest.mark.parametrize("server", [1, 2], indirect=True, ids=["one pipeline", "two pipelines"])
def test_every_client_gets_the_same_text_as_if_the_coordinator_had_not_died(server: Server) -> None:
    stop = ask(server, *REQUESTS["greedy"], threading.Event())["0"]["text"][-12:]
    requests = {**REQUESTS, "stop": (COMPLETIONS, {**PROMPT, "temperature": 0, "stop": [stop]})}
    with ThreadPoolExecutor(len(requests) + 1) as clients:

        def ask_all(salt: str) -> tuple[dict[str, Future[dict[str, Any]]], list[threading.Event]]:
            """With one salt the second run would find drafts in the texts of the first, and be over too early."""
            begun = {name: threading.Event() for name, (_, body) in requests.items() if body["stream"]}
            asked = {
                name: clients.submit(ask, server, path, body | {"cache_salt": salt}, begun.get(name, threading.Event()))
                for name, (path, body) in requests.items()
            }
            return asked, list(begun.values())

        undisturbed = {name: answer.result() for name, answer in ask_all("undisturbed")[0].items()}
        answers, begun = ask_all("disturbed")
        for event in begun:
            assert event.wait(CLIENT_TIMEOUT_S)
        before = max((server.status() for _ in range(NUM_LOOKS)), key=lambda status: status.num_running)
        os.kill(before.pid, signal.SIGKILL)
        is_over = {name: answer.done() for name, answer in answers.items()}
        told = clients.submit(wait_until, lambda: is_told(server, before.name), "the loss is told")
        pids = [stage.pid for stage in before.stages]
        wait_until(lambda: not any(map(is_alive, pids)), "orphaned stages are gone", timeout_s=STAGES_END_S)
        told.result()
        assert before.num_running > 0
        assert not any(is_over.values()), "streams ended before the coordinator died"
        for name, answer in answers.items():
            assert answer.result() == undisturbed[name], name
    moves = [line for line in server.client.get("/metrics").text.splitlines() if "request_moves_total{" in line]
    assert sum(float(line.rpartition(" ")[2]) for line in moves) > 0
    wait_until(lambda: server.status().pid != before.pid, "Serve has replaced the pipeline")
    server.wait_until_idle()


@pytest.mark.parametrize("server", [2], indirect=True, ids=["two pipelines"])
def test_every_client_gets_the_rest_of_its_stream_when_the_ingress_has_died(server: Server) -> None:
    requests = {name: (path, body) for name, (path, body) in REQUESTS.items() if body["stream"]}
    with ThreadPoolExecutor(len(requests)) as clients:

        def ask_all(salt: str) -> tuple[dict[str, Future[dict[str, Any]]], list[threading.Event]]:
            """With one salt the second run would find drafts in the texts of the first, and be over too early."""
            begun = {name: threading.Event() for name in requests}
            asked = {
                name: clients.submit(ask, server, path, body | {"cache_salt": salt}, begun[name])
                for name, (path, body) in requests.items()
            }
            return asked, list(begun.values())

        undisturbed = {name: answer.result() for name, answer in ask_all("undisturbed")[0].items()}
        answers, begun = ask_all("disturbed")
        for event in begun:
            assert event.wait(CLIENT_TIMEOUT_S)
        is_over = {name: answer.done() for name, answer in answers.items()}
        os.kill(ingress_pid(), signal.SIGKILL)
        assert not any(is_over.values()), "streams ended before the ingress died"
        for name, answer in answers.items():
            assert answer.result() == undisturbed[name], name
    server.wait_until_idle()


def is_told(server: Server, pipeline: str) -> bool:
    """Whether metrics, the state, and `/ready` if no other pipeline is up, say why the pipeline is down."""
    ready, metrics = server.client.get("/ready"), server.client.get("/metrics").text
    down = [one for one in server.client.get("/debug/pipeline").json()["down"] if one["name"] == pipeline]
    told = [one["problem"] for one in down if "SIGKILL" in one["problem"] and "log line: " in one["problem"]]
    assert server.client.get("/health").status_code == 200
    return bool(told and "SIGKILL" in metrics and (pipelines(server) or "SIGKILL" in ready.text))


def ingress_pid() -> int:
    """The process of the only ingress."""
    [name] = [
        actor["name"]
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if f"{APP_NAME}#Ingress#" in actor["name"]
    ]
    pid: int = ray.get(ray.get_actor(name, "serve").__ray_call__.remote(lambda _: os.getpid()), timeout=30)
    return pid


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
