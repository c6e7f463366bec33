"""Whole pipelines as Serve replicas: several answer, and their number follows the load."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray

from gptj_dist import LLM, SamplingParams
from gptj_dist.config import SERVER_SETTINGS
from gptj_dist.operate.launch.cluster import stop_limit_s
from gptj_dist.serving.debug import DebugDocument, PipelineDocument
from tests.adapters import model_config, write_lora
from tests.http.server import APP_NAME, Server, deploy, serving
from tests.http.test_coordinator_death import COMPLETIONS, ask, is_alive
from tests.unit.test_trace import check
from tests.waiting import wait_until

pytestmark = pytest.mark.ray

NUM_CLIENTS = 8
MOST_PIPELINES = 3
ANSWER_S = 20.0
SETTINGS: dict[str, Any] = {"model": "demo", "device": "cpu", "cpus_per_stage": 0.5}


def actor_names() -> list[str]:
    """Named actors that are alive: Serve's, and the stages."""
    return sorted(actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True))


def pipeline_actors() -> list[str]:
    """Those that are coordinators or stages."""
    return [name for name in actor_names() if "#Pipeline#" in name]


def num_pipelines() -> int:
    from ray import serve

    deployment = serve.status().applications[APP_NAME].deployments["Pipeline"]
    return int(deployment.replica_states.get("RUNNING", 0))


def test_with_two_replicas_both_answer() -> None:
    settings = SETTINGS | {"stages": 2, "dtype": "float32", "quantize": "int4"}
    greedy: dict[str, Any] = {"max_tokens": 40, "temperature": 0, "ignore_eos": True}
    with LLM(**{name: value for name, value in settings.items() if name not in SERVER_SETTINGS}) as llm:
        [here] = llm.generate("Call me", SamplingParams(**greedy), use_tqdm=False)
    with serving(settings, {"num_replicas": 2}) as server:
        wait_until(lambda: num_pipelines() == 2, "both pipelines run")
        names = wait_until(lambda: _seen_names(server), "both have been asked")
        assert len(names) == 2
        texts = {server.complete(prompt="Call me", **greedy)["choices"][0]["text"] for _ in range(8)}
        assert texts == {here.text}
        stages = [name for name in actor_names() if "stage-" in name]
        assert Counter(name.rpartition("/")[2] for name in stages) == {"stage-0": 2, "stage-1": 2}
        assert stop_limit_s(APP_NAME) == 5.0  # of `deploy`; ingresses have more
        _talk_about_several_things(server)
        _look_at_both_and_at_one_that_dies(server, names)


def _talk_about_several_things(server: Server) -> None:
    """The next turn of a conversation always goes where the last one was computed, also the turns of one request."""

    def answer(prompts: list[str]) -> tuple[list[str], int]:
        body = server.complete(prompt=prompts, max_tokens=20, ignore_eos=True)
        texts = [prompt + choice["text"] for prompt, choice in zip(prompts, body["choices"], strict=True)]
        return texts, body["usage"]["prompt_tokens_details"]["cached_tokens"]

    talks = [f"{number} things are to be said, and none of them was said here before. " * 3 for number in range(6)]
    for pair in (talks[:1], talks[1:2], talks[2:4], talks[4:]):
        texts, num_cached = answer(pair)
        assert num_cached == 0
        for _ in range(2):
            texts, num_cached = answer([f"{text} And then?" for text in texts])
            assert num_cached >= 16 * len(pair)
    metrics = server.client.get("/metrics").text
    routed = re.findall(r'routed_prompts_total\{.*reason="(\w+)"\} (\d+)', metrics)
    assert len(routed) == 2 * 4  # of two pipelines, by the reason
    assert sum(int(number) for reason, number in routed if reason == "prefix") >= 10


def _look_at_both_and_at_one_that_dies(server: Server, names: set[str]) -> None:
    document = DebugDocument.from_json(server.client.get("/debug/pipeline").content)
    assert {pipeline.name for pipeline in document.pipelines} == names
    assert document.num_silent == 0
    assert {stage.dtype for pipeline in document.pipelines for stage in pipeline.stages} == {"int4 in float32"}
    lanes = check(server.client.get("/debug/trace").json())
    assert {pid for pid, _ in lanes} == {1, 2}
    victim, other = document.pipelines
    os.kill(victim.pid, signal.SIGKILL)
    response = server.client.get("/debug/pipeline")
    assert response.status_code == 200
    document = DebugDocument.from_json(response.content)
    assert other.name in {pipeline.name for pipeline in document.pipelines}


def _seen_names(server: Server) -> set[str] | None:
    names = {server.status().name for _ in range(10)}
    return names if len(names) == 2 else None


def test_pipelines_go_from_none_to_three_and_back_to_none_under_a_burst_and_no_request_fails(tmp_path: Path) -> None:
    policy = {"policy_function": "gptj_dist.serving.scaling:Scale", "policy_kwargs": {"kept_s": 5.0}}
    bounds = {"min_replicas": 0, "max_replicas": MOST_PIPELINES, "downscale_to_zero_delay_s": 8.0, "policy": policy}
    write_lora(tmp_path / "poet", model_config("demo"), seed=1, size=0.5)
    settings = SETTINGS | {"max_batch_size": 2, "dtype": "float32", "adapter_dir": str(tmp_path)}
    with serving(settings, {"autoscaling_config": bounds}) as server:
        _wait_until_asleep(server)
        wait_until(lambda: not pipeline_actors(), "its actors are gone")
        for _ in range(3):  # a look does not wake it, whatever asks
            assert server.client.get("/ready").json() == {"status": "asleep"}
            assert server.client.get("/metrics").status_code == 200
            assert DebugDocument.from_json(server.client.get("/debug/pipeline").content).pipelines == ()
        assert num_pipelines() == 0
        texts = asyncio.run(_load_until_most(server))
        assert [len(set(of_client)) for of_client in texts.values()] == [1] * NUM_CLIENTS
        assert len({of_client[0] for of_client in texts.values()}) == NUM_CLIENTS
        wait_until(lambda: num_pipelines() == 1, "one pipeline is left", timeout_s=60)
        assert server.complete(prompt="Call me", max_tokens=2)["usage"]["completion_tokens"] == 2
        assert len(pipeline_actors()) >= 2
        _wait_until_asleep(server)
        wait_until(lambda: not pipeline_actors(), "its actors are gone")


def _wait_until_asleep(server: Server) -> None:
    def is_asleep() -> bool:
        response = server.client.get("/ready")
        assert response.status_code == 200, response.text
        assert server.client.get("/health").status_code == 200
        return bool(response.json()["status"] == "asleep")

    wait_until(is_asleep, "no pipeline is left", timeout_s=90)


async def _load_until_most(server: Server) -> dict[int, list[str]]:
    """Clients that go on until all pipelines run and have computed for them; the texts of each.

    Every other one wants an adapter, which no pipeline has loaded before. The first requests wait for a pipeline, and
    meanwhile the server answers others.
    """
    texts: dict[int, list[str]] = {number: [] for number in range(NUM_CLIENTS)}
    is_over = asyncio.Event()

    async def client(http: httpx.AsyncClient, number: int) -> None:
        while not is_over.is_set():
            model = ("demo", "poet")[number % 2]
            seeded = {"model": model, "seed": number // 2}
            body = {"prompt": "My fellow citizens", "max_tokens": 60, "ignore_eos": True, **seeded}
            response = await http.post("/v1/completions", json=body)
            assert response.status_code == 200, response.text
            texts[number].append(response.json()["choices"][0]["text"])

    async with httpx.AsyncClient(base_url=server.base, timeout=120) as http, asyncio.TaskGroup() as group:
        for number in texts:
            group.create_task(client(http, number))
        num_answers = 0
        while not any(texts.values()):
            async with asyncio.timeout(ANSWER_S):
                assert (await http.get("/health")).status_code == 200
            num_answers += 1
        assert num_answers > 1
        everywhere = lambda: _num_computing_poet(server) == MOST_PIPELINES  # noqa: E731
        await asyncio.to_thread(wait_until, everywhere, "all pipelines compute for the adapter", 150)
        is_over.set()
    return texts


def _num_computing_poet(server: Server) -> int:
    """The number of pipelines that compute requests with the adapter, and list it."""
    pipelines = DebugDocument.from_json(server.client.get("/debug/pipeline").content).pipelines
    return sum(pipeline.num_adapters == 1 and pipeline.adapter_requests.get("poet", 0) > 0 for pipeline in pipelines)


@pytest.mark.parametrize(
    "scaling",
    [{"num_replicas": 1, "max_surge_percent": 100}, {"num_replicas": 2}],
    ids=["one and its successor", "two"],
)
def test_a_rolling_update_under_load_loses_nothing(scaling: dict[str, Any]) -> None:
    """Streams take longer than the pipelines which they begin at may take to stop: these hand them on."""
    settings = SETTINGS | {"dtype": "float32", "drain_s": 3.0, "resumable": True}
    body = {"prompt": "My fellow citizens", "max_tokens": 300, "ignore_eos": True, "stream": True, "seed": 1}
    number = scaling["num_replicas"]
    with serving(settings, scaling, has_proxy=True) as server, ThreadPoolExecutor(NUM_CLIENTS) as clients:
        wait_until(lambda: num_pipelines() == number, "all pipelines run", 120)
        is_over = threading.Event()
        usual = ask(server, COMPLETIONS, body, threading.Event())

        def go_on() -> None:
            while not is_over.is_set():
                assert ask(server, COMPLETIONS, body, threading.Event()) == usual

        streams = [clients.submit(go_on) for _ in range(NUM_CLIENTS)]
        pids = {pipeline.pid for pipeline in _documents(server)}
        assert len(pids) == number
        wait_until(lambda: all(pipeline.num_running for pipeline in _documents(server)), "streams run everywhere")
        deploy(settings | {"log_level": "debug"}, scaling)
        wait_until(lambda: not any(map(is_alive, pids)), "the first pipelines are gone", 240)
        wait_until(lambda: num_pipelines() == number, "all others run", 120)
        is_over.set()
        for stream in streams:
            stream.result()


def _documents(server: Server) -> tuple[PipelineDocument, ...]:
    return DebugDocument.from_json(server.client.get("/debug/pipeline").content).pipelines
