"""A real Ray Serve answers as OpenAI's API does, and as the same engine does without HTTP."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from gptj_dist import LLM, SamplingParams
from tests.http.server import Server, serving

pytestmark = pytest.mark.ray

PROMPT = "The state of the Union is"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving({"model": "demo", "stages": 2, "device": "cpu", "dtype": "float32"}) as server:
        yield server


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("demo", device="cpu", dtype="float32") as llm:
        yield llm


def stream_events(lines: list[str]) -> list[dict[str, Any]]:
    """The JSON of each event; checks that one `[DONE]` comes last."""
    data = [line.removeprefix("data: ") for line in lines if line]
    assert data[-1] == "[DONE]"
    assert data.count("[DONE]") == 1
    return [json.loads(item) for item in data[:-1]]


def test_greedy_text_is_that_of_the_engine_without_ray(server: Server, llm: LLM) -> None:
    params = SamplingParams(max_tokens=30, temperature=0)
    body = server.complete(prompt=PROMPT, max_tokens=30, temperature=0)
    assert body["choices"][0]["text"] == llm.generate(PROMPT, params)[0].text
    counts = {"prompt_tokens": 6, "completion_tokens": 30, "total_tokens": 36}
    assert body["usage"] == {**counts, "prompt_tokens_details": {"cached_tokens": 0}}
    assert body["choices"][0]["finish_reason"] == "length"


def test_seeded_choices_are_those_of_the_engine_without_ray(server: Server, llm: LLM) -> None:
    expected = llm.generate(PROMPT, SamplingParams(max_tokens=20, seed=7, n=3, top_p=0.9))[0].completions
    body = server.complete(prompt=PROMPT, max_tokens=20, seed=7, n=3, top_p=0.9)
    assert [choice["text"] for choice in body["choices"]] == [completion.text for completion in expected]
    assert len({choice["text"] for choice in body["choices"]}) == 3


def test_stream_and_non_stream_agree(server: Server) -> None:
    request = {"prompt": PROMPT, "max_tokens": 40, "seed": 3, "stop": ["\n", "world"]}
    whole = server.complete(**request)
    with server.client.stream(
        "POST", "/v1/completions", json={**request, "stream": True, "stream_options": {"include_usage": True}}
    ) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = stream_events(list(response.iter_lines()))
    text = "".join(choice["text"] for event in events for choice in event["choices"])
    assert text == whole["choices"][0]["text"]
    assert events[-1]["usage"] == whole["usage"]
    assert events[-2]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]


def test_every_form_of_prompt_is_taken(server: Server, llm: LLM) -> None:
    ids = llm.tokenizer.encode(PROMPT)
    expected = server.complete(prompt=PROMPT, max_tokens=5, temperature=0)["choices"][0]["text"]
    for prompt in (ids, [PROMPT], [ids]):
        assert server.complete(prompt=prompt, max_tokens=5, temperature=0)["choices"][0]["text"] == expected
    several = server.complete(prompt=[PROMPT, "Call me"], max_tokens=5, temperature=0)
    assert [choice["index"] for choice in several["choices"]] == [0, 1]
    assert several["choices"][0]["text"] == expected


def test_an_empty_prompt_stands_for_end_of_text(server: Server) -> None:
    assert server.complete(prompt="", max_tokens=4)["usage"]["prompt_tokens"] == 1


def test_thirty_two_concurrent_streams_finish_with_the_same_text_as_alone(server: Server) -> None:
    requests = [
        {"prompt": PROMPT[: 5 + i % 20], "max_tokens": 10 + i // 2, "seed": i, "temperature": 0 if i % 3 == 0 else 0.9}
        for i in range(32)
    ]
    alone = [server.complete(**request)["choices"][0]["text"] for request in requests]

    async def stream(client: httpx.AsyncClient, request: dict[str, Any]) -> str:
        async with client.stream("POST", "/v1/completions", json={**request, "stream": True}) as response:
            events = stream_events([line async for line in response.aiter_lines()])
        return "".join(event["choices"][0]["text"] for event in events)

    async def all_at_once() -> list[str]:
        async with httpx.AsyncClient(base_url=server.base, timeout=120) as client:
            return await asyncio.gather(*(stream(client, request) for request in requests))

    assert asyncio.run(all_at_once()) == alone


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [99_999]}, "prompt"),
        ({"prompt": ["fine", [1, 99_999]]}, "prompt"),
        ({"prompt": PROMPT, "max_tokens": 5000}, "max_tokens"),
        ({"prompt": PROMPT, "temperature": -0.1}, "temperature"),
        ({"prompt": PROMPT, "temperature": "hot"}, "temperature"),
        ({"prompt": PROMPT, "top_p": 1.5}, "top_p"),
        ({"prompt": PROMPT, "n": 0}, "n"),
        ({"prompt": PROMPT, "no_such_field": 1}, "no_such_field"),
        ({"prompt": PROMPT, "logit_bias": {"99999": 1}}, "logit_bias"),
    ],
)
def test_bad_input_is_a_400_that_names_the_field_and_queues_nothing(
    server: Server, fields: dict[str, Any], param: str
) -> None:
    response = server.client.post("/v1/completions", json=fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    status = server.status()
    assert (status.num_running, status.num_waiting, status.num_used_blocks) == (0, 0, 0)


def test_the_context_window_is_told_with_both_numbers(server: Server) -> None:
    error = server.client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 1024}).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "1024" in error["message"]
    assert "6 tokens" in error["message"]


def test_one_bad_prompt_of_several_refuses_all(server: Server) -> None:
    response = server.client.post("/v1/completions", json={"prompt": ["fine", "x " * 2000], "stream": True})
    assert response.status_code == 400
    assert server.status().num_running == 0


def test_a_body_over_the_limit_is_a_413(server: Server) -> None:
    response = server.client.post("/v1/completions", content=b'{"prompt": "' + b"x" * 5_000_000 + b'"}')
    assert response.status_code == 413
    chunked = server.client.post("/v1/completions", content=(b"x" * 1_000_000 for _ in range(6)))
    assert chunked.status_code == 413


def test_an_unknown_model_and_an_unknown_path_are_404s(server: Server) -> None:
    unknown = server.client.post("/v1/completions", json={"prompt": PROMPT, "model": "gpt-5"})
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
    assert server.client.get("/v1/nothing").status_code == 404
    assert server.client.get("/v1/completions").status_code == 405


def test_health_says_that_the_process_lives(server: Server) -> None:
    assert server.client.get("/health").status_code == 200


def test_nothing_listens_beyond_loopback(server: Server) -> None:
    lines = subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True, check=True).stdout.splitlines()
    ours = [line for line in lines if "ray" in line or "gcs" in line or "python" in line]
    assert any(server.base.rpartition(":")[2] in line for line in ours)
    assert [line for line in ours if not line.split()[3].startswith(("127.", "[::1]", "[::ffff:127."))] == []


def test_the_benchmark_measures_a_running_server_and_ends_in_one_json_document(server: Server) -> None:
    arguments = ["--concurrency", "1", "2", "--output-len", "4", "--requests-per-client", "1", "--base", server.base]
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.http", *arguments], capture_output=True, text=True, check=True
    )
    figures = json.loads(result.stdout.splitlines()[-1])
    assert [load["max_concurrency"] for load in figures["closed_loop"]] == [1, 2]
    assert all({"median_ttft_ms", "output_throughput"} <= load.keys() for load in figures["closed_loop"])
