"""Tools for the checks of body fields: a uniform view of endpoints that continue a text, and a registry of checks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import httpx

from gptj_dist.answers.schema.base import Body
from gptj_dist.answers.schema.chat import ChatRequest
from gptj_dist.answers.schema.responses import ResponsesRequest
from gptj_dist.text.tokenizer import Tokenizer
from tests.http.server import Server
from tests.http.test_completions import stream_events

PROMPT = "The state of the Union is"
GREEDY = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}


@dataclass(frozen=True)
class Face:
    """An endpoint that continues texts. With this test's chat template all of them give the same text."""

    server: Server
    body: type[Body]

    @property
    def path(self) -> str:
        paths = {ChatRequest: "/v1/chat/completions", ResponsesRequest: "/v1/responses"}
        return paths.get(self.body, "/v1/completions")

    def fields(self, fields: dict[str, Any]) -> dict[str, Any]:
        fields = GREEDY | {"prompt": PROMPT} | fields
        if self.body is ChatRequest:
            prompt = fields.pop("prompt")
            return {"messages": [{"role": "user", "content": prompt}]} | fields
        if self.body is ResponsesRequest:
            if fields.pop("return_token_ids", False):
                fields["include"] = ["message.output_text.logprobs"]
            names = {"prompt": "input", "max_tokens": "max_output_tokens"}
            return {names.get(name, name): value for name, value in fields.items()}
        return fields

    def post(self, **fields: Any) -> httpx.Response:
        return self.server.client.post(self.path, json=self.fields(fields))


Check = Callable[[Face], None]
CHECKS: dict[tuple[type[Body], str], Check] = {}
BATCH_SIZE = 8
"""Requests that run at once: few, so that few requests make a queue."""


def check(body: type[Body]) -> Callable[[Check], Check]:
    """Registers a function as the check of the body's field of the same name."""

    def register(function: Check) -> Check:
        CHECKS[body, function.__name__.removeprefix("of_").rstrip("_")] = function
        return function

    return register


def checks_of(body: type[Body]) -> dict[str, Check]:
    """The checks of a body's own fields and of inherited ones."""
    return {field: check for base in reversed(body.__mro__) for (of, field), check in CHECKS.items() if of is base}


def complete(face: Face, **fields: Any) -> dict[str, Any]:
    """The response to a greedy request, in the form of a completion."""
    response = face.post(**fields)
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    if face.body is ResponsesRequest:
        return as_completion(body)
    for entry in body["choices"]:
        if "message" in entry:
            entry["text"] = entry.pop("message")["content"]
    return body


def as_completion(response: dict[str, Any]) -> dict[str, Any]:
    """A response of `/v1/responses` in the form of a completion."""
    [part] = response["output"][0]["content"]
    reason = "length" if response["incomplete_details"] else "stop"
    token_ids = [id_of_bytes()[bytes(token["bytes"])] for token in part["logprobs"]]
    entry = {"text": part["text"], "finish_reason": reason, "token_ids": token_ids}
    usage = {"completion_tokens": response["usage"]["output_tokens"]}
    return {"model": response["model"], "choices": [entry], "usage": usage}


@cache
def id_of_bytes() -> dict[bytes, int]:
    """The demo's tokens by their bytes."""
    return {tokenizer().token_or_special_bytes(id): id for id in range(tokenizer().num_entries)}


def text_of(event: dict[str, Any]) -> str:
    """The new text of an event."""
    if "choices" not in event:
        return str(event["delta"]) if event["type"] == "response.output_text.delta" else ""
    [entry] = event["choices"]
    return str(entry["text"] if "text" in entry else entry["delta"]["content"])


def choice(face: Face, **fields: Any) -> dict[str, Any]:
    """The first choice of a greedy completion."""
    first: dict[str, Any] = complete(face, **fields)["choices"][0]
    return first


def ids(face: Face, **fields: Any) -> list[int]:
    return list(choice(face, return_token_ids=True, **fields)["token_ids"])


@cache
def tokenizer() -> Tokenizer:
    from gptj_dist.checkpoint.hub import resolve_model

    return Tokenizer.load(resolve_model("demo"))


def events(face: Face, **fields: Any) -> list[dict[str, Any]]:
    body = face.fields({"stream": True} | fields)
    with face.server.client.stream("POST", face.path, json=body) as response:
        lines = list(response.iter_lines())
    if face.body is ResponsesRequest:
        return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    return stream_events(lines)


def prompt_of(face: Face, message: dict[str, Any]) -> str:
    """The prompt that the chat template renders from a message."""
    answer = face.server.client.post("/tokenize", json={"messages": [message]})
    assert answer.status_code == 200, answer.text
    return tokenizer().decode(answer.json()["tokens"])


def post(face: Face, path: str, **fields: Any) -> dict[str, Any]:
    answer = face.server.client.post(path, json=fields)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def refuses_another_model(face: Face, path: str, **fields: Any) -> None:
    assert face.server.client.post(path, json=fields | {"model": "demo"}).status_code == 200
    assert face.server.client.post(path, json=fields | {"model": "another"}).status_code == 404
