"""Clients that vanish and stages that die, against a real Ray Serve."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import pytest

from gptj_dist.engine.plan import Result
from gptj_dist.serving.debug import DebugDocument
from gptj_dist.stages.transport.frames import FrameWriter, ResultFrame
from tests.adapters import model_config, write_lora
from tests.http.server import APP_NAME, Server, serving
from tests.strangers import ATTACKS, stranger, zeromq_endpoints
from tests.waiting import wait_until

pytestmark = pytest.mark.ray

NAMES = ("poet", "pirate")
"""Of adapters."""

CLIENT = """
import sys, httpx
with httpx.stream("POST", sys.argv[1] + "/v1/completions", content=sys.argv[2], timeout=120) as response:
    for line in response.iter_lines():
        print(line, flush=True)
"""


LISTENERS = ("own listener", "Serve's proxy")
whoever_listens = pytest.mark.parametrize("server", LISTENERS, indirect=True)
"""For what depends on who holds the client's connection."""

beside_own_listener = pytest.mark.parametrize("server", LISTENERS[:1], indirect=True)
"""For what happens behind the ingress."""


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    has_proxy = request.param == "Serve's proxy"
    directory, config = tmp_path_factory.mktemp("adapters"), model_config("demo")
    adapters = {name: str(write_lora(directory / name, config, seed=seed, size=0.5)) for seed, name in enumerate(NAMES)}
    settings = {"model": "demo", "stages": 2, "device": "cpu", "dtype": "float32", "adapters": adapters}
    with serving(settings, has_proxy=has_proxy) as server:
        yield server


def start_client(server: Server, **fields: Any) -> subprocess.Popen[str]:
    """A client in a process of its own, on a completion that takes a while."""
    body = {"prompt": "My fellow citizens", "max_tokens": 900, "ignore_eos": True, "n": 4, **fields}
    return subprocess.Popen(
        [sys.executable, "-c", CLIENT, server.base, json.dumps(body)], stdout=subprocess.PIPE, text=True
    )


@whoever_listens
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_killed_leaves_zero_blocks_in_use(server: Server, stream: bool) -> None:
    client = start_client(server, stream=stream)
    wait_until(lambda: server.status().num_running == 4, "the request runs")
    client.kill()
    client.wait()
    server.wait_until_idle()
    status = server.status()
    assert (status.num_running, status.num_waiting, status.num_used_blocks) == (0, 0, 0)


@whoever_listens
def test_a_killed_client_does_not_disturb_another(server: Server) -> None:
    request = {"prompt": "Call me Ishmael.", "max_tokens": 200, "temperature": 0, "ignore_eos": True}
    alone = server.complete(**request)["choices"][0]["text"]
    client = start_client(server, stream=True)
    wait_until(lambda: server.status().num_running == 4, "the request runs")
    texts: list[str] = []
    other = threading.Thread(target=lambda: texts.append(server.complete(**request)["choices"][0]["text"]))
    other.start()
    client.kill()
    client.wait()
    other.join(timeout=60)
    assert texts == [alone]
    server.wait_until_idle()


Told = tuple[str, list[float]]
"""A text, and the log probabilities of its tokens."""


@beside_own_listener
def test_when_a_stage_dies_its_streams_go_on_to_the_same_texts(server: Server) -> None:
    """Also with adapters, which the new stage reads again, and with a grammar, which it follows anew."""
    request = {"prompt": "My fellow citizens", "max_tokens": 300, "ignore_eos": True, "temperature": 0.8}
    request |= {"seed": 7, "n": 3, "logprobs": 1, "presence_penalty": 0.5}
    with ThreadPoolExecutor() as clients:

        def ask_others(**salt: str) -> list[Future[list[Told]]]:
            grammar = {"json": {"type": "array", "items": {}, "minItems": 300}}
            each = [{"model": name} for name in NAMES] + [{"structured_outputs": grammar}]
            return [clients.submit(whole, server, request | {"n": 1} | fields | salt) for fields in each]

        asked = ask_others(cache_salt="undisturbed")  # the others find no drafts in these texts and take their time
        undisturbed = whole(server, request | {"cache_salt": "undisturbed"})
        others = [one.result() for one in asked]
        assert len({text for text, _ in (undisturbed[0], *chain(*others))}) == 4
        num_restarts = server.status().num_restarts
        client = start_client(server, stream=True, **request)
        assert client.stdout is not None
        first_line = client.stdout.readline()
        asked = ask_others()
        wait_until(lambda: server.status().num_running == 6, "all run")
        pid = server.status().stages[1].pid
        os.kill(pid, signal.SIGKILL)
        events = [line for line in (first_line + client.stdout.read()).splitlines() if line]
        client.wait(timeout=30)
        assert events.pop() == "data: [DONE]"
        chunks = [json.loads(event.removeprefix("data: ")) for event in events]
        assert [completion(chunks, index) for index in range(3)] == undisturbed
        assert [one.result() for one in asked] == others
    status = server.status()
    assert status.num_restarts == num_restarts + 1
    assert pid not in [stage.pid for stage in status.stages]
    server.wait_until_idle()


def whole(server: Server, request: dict[str, Any]) -> list[Told]:
    """The choices of a request that is not streamed."""
    answer = httpx.post(f"{server.base}/v1/completions", json=request, timeout=120).json()
    return [(one["text"], one["logprobs"]["token_logprobs"]) for one in answer["choices"]]


def completion(chunks: Sequence[dict[str, Any]], index: int) -> Told:
    """The text and the log probabilities of one of a stream's choices."""
    entries = [entry for chunk in chunks for entry in chunk["choices"] if entry["index"] == index]
    logprobs = [logprob for entry in entries for logprob in (entry["logprobs"] or {}).get("token_logprobs", ())]
    return "".join(entry["text"] for entry in entries), logprobs


@beside_own_listener
def test_while_a_stage_is_replaced_the_pipeline_is_not_ready_and_new_requests_wait(server: Server) -> None:
    os.kill(server.status().stages[0].pid, signal.SIGKILL)

    def not_ready() -> httpx.Response | None:
        response = server.client.get("/ready")
        return response if response.status_code == 503 and "SIGKILL" in response.text else None

    response = wait_until(not_ready, "the server says that it is not ready, and why")
    assert int(response.headers["retry-after"]) > 0
    message = response.json()["error"]["message"]
    assert all(part in message for part in ("lost a stage", "down for", "stage 0 (pid ", "its last log line"))
    assert server.client.get("/health").status_code == 200
    (pipeline,) = DebugDocument.from_json(server.client.get("/debug/pipeline").content).pipelines
    assert pipeline.problem is not None
    assert "SIGKILL" in pipeline.problem
    assert server.complete(prompt="Call me", max_tokens=3)["usage"]["completion_tokens"] == 3
    assert server.is_ready()


@whoever_listens
def test_an_ingress_that_dies_ends_its_requests_and_another_one_takes_over(server: Server) -> None:
    client = start_client(server, stream=True)
    wait_until(lambda: server.status().num_running == 4, "the request runs")
    (ingress,) = processes_of("Ingress")
    os.kill(ingress, signal.SIGKILL)
    client.wait(timeout=30)
    server.wait_until_idle()
    wait_until(server.is_ready, "a new ingress is there")
    assert ingress not in processes_of("Ingress")
    assert server.complete(prompt="Call me", max_tokens=3)["usage"]["completion_tokens"] == 3


@beside_own_listener
def test_strangers_at_the_ports_of_all_processes_change_no_stream_and_are_counted(server: Server) -> None:
    request = {"prompt": "Call me Ishmael.", "max_tokens": 300, "temperature": 0, "ignore_eos": True}
    alone = server.complete(**request)["choices"][0]["text"]
    before = server.status()
    (ingress,) = processes_of("Ingress")
    pids = [*(stage.pid for stage in before.stages), before.pid, ingress]
    endpoints = {pid: zeromq_endpoints(pid) for pid in pids}
    assert [len(found) for found in endpoints.values()] == [1, 1, 2, 1]
    texts: list[str] = []
    client = threading.Thread(target=lambda: texts.append(server.complete(**request)["choices"][0]["text"]))
    client.start()
    forged = [bytes(part) for part in FrameWriter(before.num_restarts).write(ResultFrame(Result(0, (6,))))]
    for endpoint in chain(*endpoints.values()):
        for attack in ATTACKS:
            with stranger(attack, endpoint, forged):
                pass
    client.join(timeout=120)
    assert texts == [alone]

    def counts() -> dict[str, float] | None:
        server.complete(prompt="x", max_tokens=1)  # stages report with the next plan
        lines = server.client.get("/metrics").text.splitlines()
        dropped = [line.rpartition(" ") for line in lines if "dropped_messages_total{" in line]
        ports = {name: float(value) for name, _, value in dropped if 'port="feed"' not in name}
        return ports if len(ports) == 4 and all(ports.values()) else None

    wait_until(counts, "strangers are counted at every port")
    after = server.status()
    assert (after.num_restarts, after.pid, after.num_dropped > 0) == (before.num_restarts, before.pid, True)
    assert [stage.pid for stage in after.stages] == [stage.pid for stage in before.stages]
    assert processes_of("Ingress") == [ingress]


def processes_of(deployment: str) -> list[int]:
    """Process ids of a deployment's replicas in the Ray of this process. Other test runs use the same names."""
    title = f"ray::ServeReplica:{APP_NAME}:{deployment}"
    named = [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/cmdline") if title in read_if_there(path)]
    return [pid for pid in named if os.getpid() in ancestors(pid)]


def ancestors(pid: int) -> list[int]:
    """The parent of a process, its parent, and so on."""
    found = []
    while pid > 1 and (stat := read_if_there(Path(f"/proc/{pid}/stat"))):
        pid = int(stat.rpartition(")")[2].split()[1])
        found.append(pid)
    return found


def read_if_there(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # the process has just ended
        return ""
