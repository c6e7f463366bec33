"""Pages of others at our server: mikupad, KoboldAI Lite, and a page of Gradio's. Their requests, from another origin.

The bodies are those that these pages send with the settings that they come with.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from gptj_dist.serving.keys import ApiKey, hash_key
from tests.browser.desk import WAIT_MS
from tests.browser.pretend import PretendServer, pretend_server, said
from tests.fake_server import Call, Reply, fake_server

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

BEGIN = "The old man sat in the boat."
MIKUPAD = {
    "model": "demo",
    "prompt": BEGIN,
    "temperature": 0.7,
    "repetition_penalty": 1.1,
    "repetition_penalty_range": 256,
    "penalize_nl": False,
    "ban_eos_token": False,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "top_p": 0.95,
    "top_k": 40,
    "min_p": 0,
    "max_tokens": 6,
    "logprobs": 10,
    "stream": True,
}
MIKUPAD_WITH_ALL_SAMPLERS = MIKUPAD | {
    "dynatemp_range": 0,
    "dynatemp_exponent": 1,
    "mirostat_mode": 0,
    "mirostat_tau": 5,
    "mirostat_eta": 0.1,
    "typical_p": 1,
    "tfs": 1,
    "xtc_threshold": 0.1,
    "xtc_probability": 0,
    "dry_multiplier": 0,
    "dry_base": 1.75,
    "dry_allowed_length": 2,
    "dry_penalty_last_n": 1024,
    "dry_sequence_breakers": '["\\n", ":", "\\"", "*"]',
    "banned_tokens": [],
}
KOBOLD_LITE = {
    "prompt": BEGIN,
    "max_tokens": 6,
    "model": "demo",
    "temperature": 0.75,
    "top_p": 0.92,
    "stream": True,
    "presence_penalty": 0.07,
    "stop": ["\nUser:", "\nAI:"],
}
GRADIO = {"model": "demo", "messages": [{"role": "user", "content": BEGIN}], "stream": True, "max_tokens": 6}
"""What `gr.load_chat` sends, by OpenAI's client."""

ASK = """async ([url, body, key]) => {
  const headers = {'Content-Type': 'application/json', 'Authorization': `Bearer ${key}`};
  const response = await fetch(url, {method: body ? 'POST' : 'GET', headers, body: body && JSON.stringify(body),
                                     referrerPolicy: 'no-referrer'});
  return [response.status, await response.text(), response.headers.get('x-request-id')];
}"""


@pytest.fixture(scope="module", params=["open", "with keys"])
def running(browser: Browser, request: pytest.FixtureRequest) -> Iterator[PretendServer]:
    assert browser.is_connected()
    keys = (ApiKey("ann", hash_key("secret")),) if request.param == "with keys" else ()
    with pretend_server(keys=keys, cors_origins=("*",)) as server:
        yield server


@pytest.fixture
def elsewhere(browser: Browser) -> Iterator[Page]:
    """A page of another origin."""

    def answer(_: Call) -> Reply:
        return Reply(200, b"<!doctype html><title>elsewhere</title>", {"content-type": "text/html"})

    with fake_server(answer) as host:
        context = browser.new_context()
        page = context.new_page()
        page.set_default_timeout(WAIT_MS)
        page.goto(host.base)
        yield page
        context.close()


def texts(events: str, path: tuple[str | int, ...]) -> str:
    """What a page reads of a stream."""
    import json

    text = ""
    for line in events.split("\n"):
        if line.startswith("data: {"):
            value: Any = json.loads(line[6:])["choices"]
            for name in path:
                value = value[name] if isinstance(name, int) else value.get(name)
            text += value or ""
    return text


@pytest.mark.parametrize(
    ("path", "body", "place"),
    [
        ("/v1/completions", MIKUPAD, (0, "text")),
        ("/v1/completions", MIKUPAD_WITH_ALL_SAMPLERS, (0, "text")),
        ("/v1/completions", KOBOLD_LITE, (0, "text")),
        ("/v1/chat/completions", GRADIO, (0, "delta", "content")),
    ],
    ids=["mikupad", "mikupad with all samplers", "KoboldAI Lite", "Gradio"],
)
def test_its_request_is_answered(
    elsewhere: Page, server: PretendServer, path: str, body: dict[str, Any], place: tuple[str | int, ...]
) -> None:
    status, events, request_id = elsewhere.evaluate(ASK, [server.base + path, body, "secret"])
    assert status == 200, events
    assert texts(events, place) == said(6)
    assert events.rstrip().endswith("data: [DONE]")
    assert request_id


def test_models_are_listed_for_it(elsewhere: Page, server: PretendServer) -> None:
    status, body, _ = elsewhere.evaluate(ASK, [f"{server.base}/v1/models", None, "secret"])
    assert status == 200
    assert '"id":"demo"' in body.replace(" ", "")


def test_mikupads_probabilities_are_there(elsewhere: Page, server: PretendServer) -> None:
    _, events, _ = elsewhere.evaluate(ASK, [f"{server.base}/v1/completions", MIKUPAD, "secret"])
    assert events.count('"top_logprobs":[{') >= 6


def test_a_sampler_that_is_not_here_is_named(elsewhere: Page, server: PretendServer) -> None:
    body = MIKUPAD_WITH_ALL_SAMPLERS | {"dry_multiplier": 0.8}
    status, answer, _ = elsewhere.evaluate(ASK, [f"{server.base}/v1/completions", body, "secret"])
    assert status == 400
    assert "dry_multiplier is not supported" in answer
