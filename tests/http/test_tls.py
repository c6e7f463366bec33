"""`gptj-dist serve owner/name` with a certificate and a key: a model of the hub, from start to end."""

from __future__ import annotations

import ssl
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import trustme

from benchmarks.servers import free_port
from gptj_dist.checkpoint.hub import DEMO, resolve_model
from tests.http.command import Command, running, wait_until_gone
from tests.hub_server import Hub, running_hub

pytestmark = pytest.mark.ray

KEY = "s3cret-of-the-environment"
PROMPT = "The state of the Union is"


@dataclass(frozen=True)
class Guarded:
    """A server that speaks TLS and wants a key.

    Args:
        trust: what believes its certificate.
        hub: where its model is from.
    """

    command: Command
    base: str
    trust: ssl.SSLContext
    hub: Hub

    def client(self, **headers: str) -> httpx.Client:
        return httpx.Client(base_url=self.base, verify=self.trust, timeout=60, headers=headers)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    directory: Path = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost", "127.0.0.1")
    certificate.private_key_pem.write_to_path(directory / "key.pem")
    for pem in certificate.cert_chain_pems:
        pem.write_to_path(directory / "cert.pem", append=True)
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    files = ["--tls-cert", str(directory / "cert.pem"), "--tls-key", str(directory / "key.pem")]
    command = [
        sys.executable,
        "-m",
        "gptj_dist",
        "serve",
        "owner/name",
        "--revision",
        "float16",
        "--stages",
        "2",
        "--device",
        "cpu",
        "--port",
        str(free_port()),
        *files,
    ]
    with running_hub() as hub:
        hub.add("owner/name", directory).move("float16", resolve_model(DEMO))
        with running(command, {**hub.environment(directory), "GPTJ_API_KEY": KEY}) as started:
            base = started.wait_for(r"Ready after [\d.]+ s: owner/name at (https://127\.0\.0\.1:\d+)")
            yield Guarded(started, base, trust, hub)
            started.interrupt()
            wait_until_gone(started)
            assert started.process.returncode == 0


def test_its_model_was_fetched_once_before_ray_started_and_is_served_by_its_name(server: Guarded) -> None:
    output = server.command.output()
    assert output.index("Fetching model.safetensors") < output.index("Starting Ray")
    files = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(server.hub.downloads()) == files
    with server.client(authorization=f"Bearer {KEY}") as client:
        answer = client.post("/v1/completions", json={"prompt": "Call me", "max_tokens": 4, "temperature": 0}).json()
    assert (answer["model"], answer["usage"]["completion_tokens"]) == ("owner/name", 4)


def test_it_answers_over_tls_whole_and_streamed(server: Guarded) -> None:
    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    with server.client(authorization=f"Bearer {KEY}") as client:
        whole = client.post("/v1/completions", json=body)
        assert whole.status_code == 200
        with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
            assert list(response.iter_lines())[-2] == "data: [DONE]"


def test_a_client_that_does_not_trust_the_certificate_goes_away(server: Guarded) -> None:
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"{server.base}/health")


def test_nobody_gets_an_answer_without_tls(server: Guarded) -> None:
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http:{server.base.partition(':')[2]}/health", headers={"authorization": f"Bearer {KEY}"})


def test_nobody_gets_in_without_the_key_of_the_environment(server: Guarded) -> None:
    for headers in ({}, {"authorization": "Bearer another"}):
        with server.client(**headers) as client:
            refused = client.get("/health")
            assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
            assert refused.json()["error"]["code"] == "invalid_api_key"


def test_the_key_is_neither_printed_nor_among_the_arguments_of_a_process(server: Guarded) -> None:
    assert KEY not in server.command.output()
    assert "$GPTJ_API_KEY" in server.command.output()
    for pid in server.command.family():
        assert KEY not in Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace")


@pytest.mark.parametrize("given", ["two words", "x" * 129, "", "naïve"])
def test_a_request_id_that_will_not_do_is_replaced(server: Guarded, given: str) -> None:
    with server.client(authorization=f"Bearer {KEY}") as client:
        headers = {b"x-request-id": given.encode()}
        response = client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 1}, headers=headers)
    (told,) = response.headers.get_list("x-request-id")
    assert told.isalnum()
    assert response.json()["id"] == f"cmpl-{told}"
