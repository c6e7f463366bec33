"""Every field of every schema does what it promises, on a real Serve. A new field without a check fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gptj_dist.answers.schema.adapters import LoadAdapterRequest, UnloadAdapterRequest
from gptj_dist.answers.schema.base import Body
from gptj_dist.answers.schema.chat import ChatRequest, ChatTools, Conversation, Message
from gptj_dist.answers.schema.completions import CompletionRequest
from gptj_dist.answers.schema.content import Prediction, TextPart
from gptj_dist.answers.schema.embeddings import EmbeddingRequest
from gptj_dist.answers.schema.grammars import NamedSchema, ResponseFormat, StructuredOutputs, TextFormat
from gptj_dist.answers.schema.input_items import CallItem, CallOutputItem, InputPart, MessageItem
from gptj_dist.answers.schema.repartition import RepartitionRequest
from gptj_dist.answers.schema.responses import ResponsesRequest, TextOptions
from gptj_dist.answers.schema.sampling import AdapterField, ChoiceFields, SamplingFields, StreamOptions
from gptj_dist.answers.schema.tokens import DetokenizeRequest, TokenizeRequest
from gptj_dist.answers.schema.tools import (
    CalledFunction,
    Function,
    FunctionTool,
    NamedFunction,
    NamedFunctionTool,
    NamedTool,
    Tool,
    ToolCall,
)
from tests.adapters import model_config, write_lora
from tests.http import (
    field_checks_adapters,
    field_checks_grammars,
    field_checks_others,
    field_checks_text,
    field_checks_tools,
)
from tests.http.fields import BATCH_SIZE, Face, checks_of, choice, ids, text_of
from tests.http.keys import key_of, write_keys
from tests.http.server import Server, serving
from tests.http.test_completions import stream_events

pytestmark = pytest.mark.ray
CHECKS_REGISTERED_BY = (
    field_checks_adapters,
    field_checks_grammars,
    field_checks_text,
    field_checks_others,
    field_checks_tools,
)
TEMPLATE = (
    "{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    "{% for message in messages %}{{ prefix }}{{ message.name }}{{ message.tool_call_id }}"
    "{% if message.role == 'system' %}({{ message.content }}) {% else %}{{ message.content }}{% endif %}"
    "{% for call in message.tool_calls %}<tool_call>{{ call | tojson }}</tool_call>{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ suffix }}{% endif %}"
)
BODIES = (
    CompletionRequest,
    ChatRequest,
    ResponsesRequest,
    EmbeddingRequest,
    TokenizeRequest,
    DetokenizeRequest,
    Message,
    TextPart,
    Prediction,
    MessageItem,
    InputPart,
    TextOptions,
    StreamOptions,
    AdapterField,
    StructuredOutputs,
    ResponseFormat,
    NamedSchema,
    TextFormat,
    LoadAdapterRequest,
    UnloadAdapterRequest,
    RepartitionRequest,
    Tool,
    Function,
    NamedTool,
    NamedFunction,
    ToolCall,
    CalledFunction,
    FunctionTool,
    NamedFunctionTool,
    CallItem,
    CallOutputItem,
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    template: Path = tmp_path_factory.mktemp("chat") / "template.jinja"
    template.write_text(TEMPLATE)
    settings = {"model": "demo", "stages": 3, "device": "cpu", "dtype": "float32", "max_batch_size": BATCH_SIZE}
    settings["chat_template"] = str(template)
    settings["api_keys"] = write_keys(template.parent / "keys.yaml", admin={"admin": True}, guest={})
    poet = write_lora(tmp_path_factory.mktemp("adapters") / "poet", model_config("demo"), seed=1, size=0.5)
    settings["adapters"] = {"poet": str(poet)}
    settings["adapter_dir"] = str(poet.parent)
    write_lora(poet.parent / "lazy", model_config("demo"), seed=7, size=0.5)
    write_lora(poet.parent / "odd", replace(model_config("demo"), d_model=8), seed=7)
    with serving(settings, api_key=key_of("admin")) as server:
        yield server


@pytest.mark.parametrize(("body", "field"), [(body, field) for body in BODIES for field in body.model_fields])
def test_the_field_has_its_effect(server: Server, body: type[Body], field: str) -> None:
    checks_of(body)[field](Face(server, body))


def test_streams_keep_the_adapter_that_they_began_with(server: Server, tmp_path: Path) -> None:
    """Whether it is unloaded, replaced, or its files in the directory of adapters are."""
    face, config = Face(server, CompletionRequest), model_config("demo")
    new = {"lora_path": str(write_lora(tmp_path / "new", config, seed=21, size=0.5))}
    for name in ("unloaded", "replaced"):
        path = str(write_lora(tmp_path / name, config, seed=20, size=0.5))
        post(server, "/v1/load_lora_adapter", lora_name=name, lora_path=path)
    ids(face, model="lazy")
    lazy = Path(server.client.get("/v1/models/lazy").json()["root"])
    changes: dict[str, Callable[[], object]] = {
        "unloaded": lambda: post(server, "/v1/unload_lora_adapter", lora_name="unloaded"),
        "replaced": lambda: post(server, "/v1/load_lora_adapter", lora_name="replaced", load_inplace=True, **new),
        "lazy": lambda: write_lora(lazy, config, seed=22, size=0.5),
    }
    fields = {name: {"model": name, "max_tokens": 200} for name in changes}

    def alone(name: str) -> str:
        """Under another salt, so that the streams find no drafts in this text and take their time."""
        text: str = choice(face, cache_salt="alone", **fields[name])["text"]
        return text

    with ThreadPoolExecutor() as clients, ExitStack() as streams:
        usual = dict(zip(changes, clients.map(alone, changes), strict=True))
        lines = {
            name: streams.enter_context(
                server.client.stream("POST", face.path, json=face.fields({"stream": True, **fields[name]}))
            ).iter_lines()
            for name in changes
        }
        first = {name: next(lines[name]) for name in changes}
        for change in changes.values():
            change()
        after = {name: face.post(model=name) for name in changes}
        assert server.status().num_running == 3, "streams ended before the changes"
        told = {name: stream_events([first[name], *lines[name]]) for name in changes}
    assert {name: "".join(map(text_of, events)) for name, events in told.items()} == usual
    assert after.pop("unloaded").status_code == 404
    assert not any(usual[name].startswith(one.json()["choices"][0]["text"]) for name, one in after.items())


def post(server: Server, path: str, **fields: Any) -> None:
    response = server.client.post(path, json=fields)
    assert response.status_code == 200, response.text


def test_no_body_is_forgotten() -> None:
    not_sent_over_http = {SamplingFields, ChoiceFields, ChatTools, Conversation}
    assert set(BODIES) == set(subclasses(Body)) - not_sent_over_http


def subclasses(body: type[Body]) -> list[type[Body]]:
    return [each for direct in body.__subclasses__() for each in (direct, *subclasses(direct))]
