"""Who may call, how often and from where: two ingresses behind Serve's proxies, and a second model beside them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from gptj_dist.checkpoint.hub import resolve_model
from gptj_dist.text.tokenizer import Tokenizer
from tests.http.command import STOP_LIMIT_S, running
from tests.http.keys import bearer, key_of, write_keys
from tests.http.server import APP_NAME, Server, serving
from tests.http.test_completions import stream_events
from tests.waiting import wait_until

pytestmark = pytest.mark.ray

SERVE = [sys.executable, "-m", "gptj_dist", "serve"]
PROMPT = "The state of the Union is"
NUM_PROMPT_TOKENS = 6
ORIGIN = "https://example.org"
END = Tokenizer.load(resolve_model("demo")).encode("<|endoftext|>")
END_AT_ONCE = {"prompt": PROMPT, "allowed_token_ids": END}
THREE_A_MINUTE = [f"three-{number}" for number in range(6)]
"""Were each ingress to count for itself, hardly all of these keys would meet one ingress only."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    limits: dict[str, dict[str, int]] = {
        "free": {},
        "race": {"requests_per_minute": 3},
        "tokens": {"tokens_per_minute": 120},
        "streams": {"tokens_per_minute": 1000},
        **{name: {"requests_per_minute": 3} for name in THREE_A_MINUTE},
    }
    settings = {
        "model": "demo",
        "device": "cpu",
        "dtype": "float32",
        "ingress_replicas": 2,
        "cors_origins": [ORIGIN],
        "api_keys": write_keys(tmp_path_factory.mktemp("keys") / "keys.yaml", **limits),
    }
    with serving(settings, has_proxy=True, api_key=key_of("free")) as server:
        yield server


def ask(server: Server, name: str, **fields: Any) -> httpx.Response:
    """A completion for the key's holder, on a connection of its own."""
    body = {"prompt": PROMPT, "max_tokens": 1} | fields
    return httpx.post(f"{server.base}/v1/completions", json=body, headers=bearer(name), timeout=60)


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error, which must be in OpenAI's shape."""
    error: dict[str, Any] = response.json()["error"]
    assert response.json().keys() == {"error"}
    assert error.keys() == {"message", "type", "param", "code"}
    return error


# Limits


@pytest.mark.parametrize("name", THREE_A_MINUTE)
def test_two_ingresses_count_a_keys_requests_together(server: Server, name: str) -> None:
    assert ask(server, name, temperature=-1).status_code == 400  # what is not served is not counted
    assert [ask(server, name).status_code for _ in range(3)] == [200] * 3
    refused = ask(server, name)
    assert refused.status_code == 429
    assert 0 < int(refused.headers["retry-after"]) <= 20
    error = error_of(refused)
    assert (error["code"], error["type"]) == ("rate_limit_exceeded", "rate_limit_error")
    assert name in error["message"]
    assert ask(server, "free").status_code == 200


def test_of_many_requests_at_once_no_more_pass_than_may(server: Server) -> None:
    with ThreadPoolExecutor(12) as threads:
        codes = list(threads.map(lambda _: ask(server, "race").status_code, range(12)))
    assert sorted(codes) == [200] * 3 + [429] * 9


def test_tokens_that_were_not_used_are_given_back(server: Server) -> None:
    """A request is charged with 96 of 120, and uses 7: two would not pass within seconds."""
    for _ in range(3):
        answer = wait_until(lambda: _if_passed(ask(server, "tokens", **END_AT_ONCE, max_tokens=90)), "it passes", 20)
        assert answer["usage"]["total_tokens"] == NUM_PROMPT_TOKENS + 1


def test_a_request_that_can_never_pass_is_not_to_be_tried_again(server: Server) -> None:
    refused = ask(server, "tokens", max_tokens=115)
    assert refused.status_code == 429
    assert "retry-after" not in refused.headers
    assert refused.headers["x-should-retry"] == "false"
    assert "121 tokens" in error_of(refused)["message"]


def test_a_stream_that_is_cut_gives_back_what_it_did_not_use(server: Server) -> None:
    """906 of 1,000 are charged; what is missing for the second would take 37 s to come back by itself."""
    body = {"prompt": PROMPT, "max_tokens": 900, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{server.base}/v1/completions", json=body, headers=bearer("streams")) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        assert ask(server, "streams", **END_AT_ONCE, max_tokens=700).status_code == 429
    wait_until(lambda: _if_passed(ask(server, "streams", **END_AT_ONCE, max_tokens=700)), "it passes", 20)


def _if_passed(response: httpx.Response) -> dict[str, Any] | None:
    assert response.status_code in (200, 429)
    return response.json() if response.status_code == 200 else None


# Browsers


def test_a_page_of_an_allowed_origin_may_call(server: Server) -> None:
    asks = {
        "Origin": ORIGIN,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    preflight = httpx.options(f"{server.base}/v1/completions", headers=asks)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == ORIGIN
    assert "POST" in preflight.headers["access-control-allow-methods"]
    assert "authorization" in preflight.headers["access-control-allow-headers"]
    for headers in (bearer("free"), bearer("nobody")):  # a page may read why it is refused
        answer = httpx.get(f"{server.base}/v1/models", headers=headers | {"Origin": ORIGIN})
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        assert "x-request-id" in answer.headers["access-control-expose-headers"]


def test_a_page_of_another_origin_may_not(server: Server) -> None:
    asks = {"Origin": "https://example.com", "Access-Control-Request-Method": "POST"}
    preflight = httpx.options(f"{server.base}/v1/completions", headers=asks)
    assert preflight.status_code == 400
    assert "access-control-allow-origin" not in preflight.headers
    answer = server.client.get("/v1/models", headers={"Origin": "https://example.com"})
    assert "access-control-allow-origin" not in answer.headers


# Request ids, and what is not served


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("given", ["job-7", None])
def test_the_request_id_comes_once_and_is_the_bodys(server: Server, stream: bool, given: str | None) -> None:
    headers = bearer("free") | ({} if given is None else {"x-request-id": given})
    body = {"prompt": PROMPT, "max_tokens": 2, "stream": stream}
    response = httpx.post(f"{server.base}/v1/completions", json=body, headers=headers)
    (told,) = response.headers.get_list("x-request-id")
    assert told == (given or told)
    answers = stream_events(response.text.splitlines()) if stream else [response.json()]
    assert {answer["id"] for answer in answers} == {f"cmpl-{told}"}


@pytest.mark.parametrize("given", ["two words", "x" * 129])
def test_a_request_id_that_will_not_do_is_taken_by_serves_proxy_alone(server: Server, given: str) -> None:
    body = {"prompt": PROMPT, "max_tokens": 1}
    response = server.client.post("/v1/completions", json=body, headers={"x-request-id": given})
    assert response.headers.get_list("x-request-id") == [given]
    assert response.json()["id"].removeprefix("cmpl-").isalnum()


def test_refusals_have_a_request_id_too(server: Server) -> None:
    for path, headers in (("/v1/completions", bearer("free")), ("/v1/models", {}), ("/no/such/path", bearer("free"))):
        response = httpx.get(server.base + path, headers=headers | {"x-request-id": "job-8"})
        assert response.status_code >= 400
        assert response.headers.get_list("x-request-id") == ["job-8"]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1", 404, "not_found"),
        ("POST", "/", 405, "method_not_allowed"),
        ("POST", "/v1/messages", 404, "not_found"),
        ("PUT", "/%2e%2e/etc/passwd", 404, "not_found"),
    ],
)
def test_what_is_not_served_is_an_error_in_openais_shape(
    server: Server, method: str, path: str, status: int, code: str
) -> None:
    response = server.client.request(method, path)
    assert response.status_code == status
    error = error_of(response)
    assert (error["code"], error["type"], error["param"]) == (code, "invalid_request_error", None)
    assert (status == 405) == ("allow" in response.headers)


@pytest.mark.parametrize("path", ["/", "/page/main.js", "/docs", "/openapi.json"])
def test_pages_without_secrets_open_in_a_browser_that_has_no_key(server: Server, path: str) -> None:
    response = httpx.get(server.base + path)
    assert response.status_code == 200
    assert response.text == server.client.get(path).text


# Several models on one cluster


def test_a_second_model_answers_under_its_prefix_and_leaves_without_touching_the_first(server: Server) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    joining = [*SERVE, "demo", "--address", address, "--device", "cpu", "--dtype", "float32"]
    asked = {"prompt": PROMPT, "max_tokens": 10, "temperature": 0}
    text = server.complete(**asked)["choices"][0]["text"]
    with running([*joining, "--name", "b", "--route-prefix", "/b", "--served-model-name", "second"]) as command:
        base = command.wait_for(r"Ready after [\d.]+ s: second at (\S+)")
        assert base == f"{server.base}/b"
        for where, client, model, prefix in (
            (base, httpx.Client(), "second", "/b"),
            (server.base, server.client, "demo", "/"),
        ):
            assert [one["id"] for one in client.get(f"{where}/v1/models").json()["data"]] == [model]
            answer = client.post(f"{where}/v1/completions", json=asked).json()
            assert (answer["model"], answer["choices"][0]["text"]) == (model, text)
            assert f'<base href="{prefix.rstrip("/")}/">' in client.get(f"{where}/").text
            assert client.get(f"{where}/openapi.json").json()["servers"] == [{"url": prefix}]
            assert client.get(f"{where}/debug/pipeline").json()["model"] == model
        _refused([*joining, "--name", "b", "--route-prefix", "/c"], "already serves an application 'b'")
        _refused([*joining, "--name", "c", "--route-prefix", "/b"], "Serve refuses the application")
        body = asked | {"stream": True, "max_tokens": 900, "ignore_eos": True}
        with server.client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            events = [next(lines)]
            command.interrupt()
            assert command.process.wait(timeout=30) == 0, command.output()
            events += lines
        wait_until(lambda: command.family() == [], "nothing is left of it", STOP_LIMIT_S)
    assert stream_events(events)[-1]["choices"][0]["finish_reason"] == "length"
    assert server.complete(**asked)["choices"][0]["text"] == text
    assert wait_until(lambda: server.client.get("/b/v1/models").status_code == 404, "its route is gone", 10)
    assert list(_applications()) == [APP_NAME]


def _refused(command: list[str], message: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2, result.stdout + result.stderr
    assert message in result.stdout + result.stderr


def _applications() -> dict[str, Any]:
    from ray import serve

    return dict(serve.status().applications)
