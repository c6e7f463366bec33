"""A coordinator that dies under streams of all kinds: each client gets exactly what it would have got."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.http.server import Server, serving
from tests.waiting import wait_until

pytestmark = pytest.mark.ray

CLIENT_TIMEOUT_S = 240
STAGES_END_S = 5
"""Orphaned stages end by themselves within this time."""

NUM_LOOKS = 8
"""Each look is at any of the pipelines; so many find the one with the most requests."""

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
COMMON = {"max_tokens": 250, "ignore_eos": True, "stream": True}
PROMPT = {"prompt": "My fellow citizens", **COMMON}
MESSAGES = {"messages": [{"role": "user", "content": "What is the state of the Union?"}], **COMMON}
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": (COMPLETIONS, {**PROMPT, "temperature": 0, "stream_options": {"include_usage": True}}),
    "seeded": (COMPLETIONS, {**PROMPT, "seed": 1, "top_p": 0.9, "min_tokens": 240}),
    "three": (COMPLETIONS, {**PROMPT, "seed": 2, "n": 3, "logprobs": 2}),
    "penalties": (
        COMPLETIONS,
        {**PROMPT, "temperature": 0, "presence_penalty": 0.6, "frequency_penalty": 0.4, "repetition_penalty": 1.2},
    ),
    "echo": (COMPLETIONS, {**PROMPT, "seed": 3, "echo": True, "logprobs": 1}),
    "whole": (COMPLETIONS, {**PROMPT, "seed": 4, "stream": False}),
    "chat": (CHAT, {**MESSAGES, "seed": 5, "logprobs": True, "top_logprobs": 1}),
}


@pytest.fixture(params=[1, 2], ids=["one pipeline", "two pipelines"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    template = tmp_path / "template.jinja"
    template.write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    settings = {"model": "demo", "stages": 2, "device": "cpu", "dtype": "float32", "chat_template": str(template)}
    with serving(settings, {"num_replicas": request.param}) as server:
        wait_until(lambda: len(pipelines(server)) == request.param, "all pipelines are there")
        yield server


def pipelines(server: Server) -> list[str]:
    """The names of the pipelines that are up."""
    lines = server.client.get("/metrics").text.splitlines()
    return [line for line in lines if line.startswith("gptj_dist_pipeline_up{") and line.endswith(" 1.0")]


def ask(server: Server, path: str, body: dict[str, Any], has_begun: threading.Event) -> dict[str, Any]:
    """What a client gets: texts, log probabilities and reasons by choice, and the usage."""
    got: dict[str, Any] = {}
    with httpx.stream("POST", server.base + path, json=body, timeout=CLIENT_TIMEOUT_S) as response:
        assert response.status_code == 200, response.read()
        if not body["stream"]:
            return {"choices": json.loads(response.read())["choices"]}
        events = [line for line in _noting(response.iter_lines(), has_begun) if line]
    assert events.pop() == "data: [DONE]"
    for event in events:
        chunk = json.loads(event.removeprefix("data: "))
        assert "error" not in chunk, chunk
        got["usage"] = chunk.get("usage")
        for choice in chunk["choices"]:
            of_choice = got.setdefault(str(choice["index"]), {"text": "", "logprobs": []})
            of_choice["text"] += choice["text"] if path == COMPLETIONS else choice["delta"].get("content") or ""
            of_choice["logprobs"] += _flat(choice.get("logprobs"))
            of_choice["reason"] = choice["finish_reason"]
    return got


def _noting(lines: Iterator[str], has_begun: threading.Event) -> Iterator[str]:
    for line in lines:
        has_begun.set()
        yield line


def _flat(logprobs: dict[str, Any] | None) -> list[Any]:
    """Log probabilities token by token, whatever their number in the chunk."""
    if logprobs is None:
        return []
    if "content" in logprobs:
        return list(logprobs["content"])
    return list(zip(*logprobs.values(), strict=True))


def test_every_client_gets_the_same_text_as_if_the_coordinator_had_not_died(server: Server) -> None:
    stop = ask(server, *REQUESTS["greedy"], threading.Event())["0"]["text"][-12:]
    requests = {**REQUESTS, "stop": (COMPLETIONS, {**PROMPT, "temperature": 0, "stop": [stop]})}
    with ThreadPoolExecutor(len(requests)) as clients:

        def ask_all() -> tuple[dict[str, Future[dict[str, Any]]], list[threading.Event]]:
            begun = {name: threading.Event() for name, (_, body) in requests.items() if body["stream"]}
            asked = {
                name: clients.submit(ask, server, path, body, begun.get(name, threading.Event()))
                for name, (path, body) in requests.items()
            }
            return asked, list(begun.values())

        undisturbed = {name: answer.result() for name, answer in ask_all()[0].items()}
        answers, begun = ask_all()
        for event in begun:
            assert event.wait(CLIENT_TIMEOUT_S)
        before = max((server.status() for _ in range(NUM_LOOKS)), key=lambda status: status.num_running)
        os.kill(before.pid, signal.SIGKILL)
        is_over = {name: answer.done() for name, answer in answers.items()}
        pids = [stage.pid for stage in before.stages]
        wait_until(lambda: not any(map(is_alive, pids)), "orphaned stages are gone", timeout_s=STAGES_END_S)
        assert before.num_running > 0
        assert not any(is_over.values()), "streams ended before the coordinator died"
        for name, answer in answers.items():
            assert answer.result() == undisturbed[name], name
    moves = [line for line in server.client.get("/metrics").text.splitlines() if "request_moves_total{" in line]
    assert sum(float(line.rpartition(" ")[2]) for line in moves) >= before.num_running
    wait_until(lambda: server.status().pid != before.pid, "Serve has replaced the pipeline")
    server.wait_until_idle()


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
