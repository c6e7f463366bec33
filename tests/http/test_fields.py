"""Every field of every schema does what it promises, on a real Serve. A new field without a check fails."""

from __future__ import annotations

import array
import base64
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from gptj_dist.serving.schema.base import Body
from gptj_dist.serving.schema.chat import ChatRequest, Message, TextPart
from gptj_dist.serving.schema.completions import CompletionRequest
from gptj_dist.serving.schema.sampling import SamplingFields, StreamOptions
from gptj_dist.serving.schema.tokens import DetokenizeRequest, EmbeddingRequest, TokenizeRequest
from gptj_dist.text.tokenizer import Tokenizer
from tests.http.server import Server, serving
from tests.http.test_completions import stream_events
from tests.waiting import wait_until

pytestmark = pytest.mark.ray

PROMPT = "The state of the Union is"
GREEDY = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
TEMPLATE = (
    "{% for message in messages %}{{ prefix }}{{ message.name }}"
    "{% if message.role == 'system' %}({{ message.content }}) {% else %}{{ message.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ suffix }}{% endif %}"
)
BODIES = (
    CompletionRequest,
    ChatRequest,
    EmbeddingRequest,
    TokenizeRequest,
    DetokenizeRequest,
    Message,
    TextPart,
    StreamOptions,
)


@dataclass(frozen=True)
class Face:
    """An endpoint that continues texts; with the template of this test, chat and completions give the same."""

    server: Server
    body: type[Body]

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.body is ChatRequest else "/v1/completions"

    def fields(self, fields: dict[str, Any]) -> dict[str, Any]:
        fields = GREEDY | {"prompt": PROMPT} | fields
        if self.body is not ChatRequest:
            return fields
        prompt = fields.pop("prompt")
        return {"messages": [{"role": "user", "content": prompt}]} | fields

    def post(self, **fields: Any) -> httpx.Response:
        return self.server.client.post(self.path, json=self.fields(fields))


Check = Callable[[Face], None]
CHECKS: dict[tuple[type[Body], str], Check] = {}
BATCH_SIZE = 8
"""Requests that run at once: few, so that a queue is made with few."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    template: Path = tmp_path_factory.mktemp("chat") / "template.jinja"
    template.write_text(TEMPLATE)
    settings = {"model": "demo", "stages": 3, "device": "cpu", "dtype": "float32", "max_batch_size": BATCH_SIZE}
    settings["chat_template"] = str(template)
    with serving(settings) as server:
        yield server


def check(body: type[Body]) -> Callable[[Check], Check]:
    """Registers the check of the body's field that the function is named after."""

    def register(function: Check) -> Check:
        CHECKS[body, function.__name__.removeprefix("of_").rstrip("_")] = function
        return function

    return register


def checks_of(body: type[Body]) -> dict[str, Check]:
    """The checks of a body's own fields and of those that it shares."""
    return {field: check for base in reversed(body.__mro__) for (of, field), check in CHECKS.items() if of is base}


@pytest.mark.parametrize(("body", "field"), [(body, field) for body in BODIES for field in body.model_fields])
def test_the_field_has_its_effect(server: Server, body: type[Body], field: str) -> None:
    checks_of(body)[field](Face(server, body))


def test_no_body_is_forgotten() -> None:
    assert set(BODIES) == set(subclasses(Body)) - {SamplingFields}


def subclasses(body: type[Body]) -> list[type[Body]]:
    return [each for direct in body.__subclasses__() for each in (direct, *subclasses(direct))]


def complete(face: Face, **fields: Any) -> dict[str, Any]:
    """The body of a greedy completion."""
    response = face.post(**fields)
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    for entry in body["choices"]:
        if "message" in entry:
            entry["text"] = entry.pop("message")["content"]
    return body


def choice(face: Face, **fields: Any) -> dict[str, Any]:
    """The first choice of a greedy completion."""
    first: dict[str, Any] = complete(face, **fields)["choices"][0]
    return first


def ids(face: Face, **fields: Any) -> list[int]:
    return list(choice(face, return_token_ids=True, **fields)["token_ids"])


def tokenizer() -> Tokenizer:
    from gptj_dist.checkpoint.hub import resolve_model

    return Tokenizer.load(resolve_model("demo"))


def events(face: Face, **fields: Any) -> list[dict[str, Any]]:
    body = face.fields({"stream": True} | fields)
    with face.server.client.stream("POST", face.path, json=body) as response:
        return stream_events(list(response.iter_lines()))


@check(SamplingFields)
def of_model(face: Face) -> None:
    assert complete(face, model="demo")["model"] == "demo"
    assert face.post(model="another").status_code == 404


@check(CompletionRequest)
def of_prompt(face: Face) -> None:
    assert choice(face, prompt="Call me")["text"] != choice(face)["text"]


@check(CompletionRequest)
def of_max_tokens(face: Face) -> None:
    assert complete(face, **{"max_tokens": 5})["usage"]["completion_tokens"] == 5
    assert complete(face, **{"max_tokens": 0, "echo": True})["usage"]["completion_tokens"] == 0


@check(SamplingFields)
def of_temperature(face: Face) -> None:
    assert ids(face) == ids(face)
    assert ids(face, temperature=2.0, seed=1) != ids(face, temperature=0.9, seed=1)


@check(SamplingFields)
def of_seed(face: Face) -> None:
    one, again, other = (ids(face, temperature=1.5, seed=seed) for seed in (1, 1, 2))
    assert one == again != other


@check(SamplingFields)
def of_top_p(face: Face) -> None:
    assert ids(face, temperature=3.0, top_p=1e-6) == ids(face) != ids(face, temperature=3.0, seed=1)


@check(SamplingFields)
def of_top_k(face: Face) -> None:
    assert ids(face, temperature=3.0, top_k=1) == ids(face)


@check(SamplingFields)
def of_min_p(face: Face) -> None:
    assert ids(face, temperature=3.0, min_p=1.0) == ids(face)


@check(SamplingFields)
def of_n(face: Face) -> None:
    choices = complete(face, **{"temperature": 1.5, "n": 3})["choices"]
    assert [entry["index"] for entry in choices] == [0, 1, 2]
    assert len({entry["text"] for entry in choices}) == 3


@check(CompletionRequest)
def of_best_of(face: Face) -> None:
    asked = {"temperature": 1.5, "seed": 4, "max_tokens": 6, "logprobs": 0}
    every = complete(face, **asked | {"n": 6})["choices"]
    means = {entry["text"]: sum(entry["logprobs"]["token_logprobs"]) / 6 for entry in every}
    body = complete(face, **asked | {"n": 2, "best_of": 6})
    assert [entry["text"] for entry in body["choices"]] == sorted(means, key=lambda text: -means[text])[:2]
    assert [entry["index"] for entry in body["choices"]] == [0, 1]
    assert body["usage"]["completion_tokens"] == 36
    plain = complete(face, **asked | {"n": 2, "best_of": 6, "logprobs": None})["choices"]
    assert [(entry["text"], entry["logprobs"]) for entry in plain] == [(e["text"], None) for e in body["choices"]]


@check(SamplingFields)
def of_stop(face: Face) -> None:
    text = choice(face)["text"]
    ended = choice(face, stop=text[6:9])
    assert (ended["text"], ended["finish_reason"]) == (text[: text.index(text[6:9])], "stop")


@check(SamplingFields)
def of_include_stop_str_in_output(face: Face) -> None:
    text = choice(face)["text"]
    end = text.index(text[6:9]) + 3
    assert choice(face, stop=text[6:9], include_stop_str_in_output=True)["text"] == text[:end]


@check(SamplingFields)
def of_stop_token_ids(face: Face) -> None:
    whole = ids(face)
    ended = choice(face, stop_token_ids=[whole[5]], return_token_ids=True)
    assert (ended["token_ids"], ended["finish_reason"]) == (whole[: whole.index(whole[5]) + 1], "stop")


@check(SamplingFields)
def of_min_tokens(face: Face) -> None:
    whole = ids(face)
    assert whole[2] not in ids(face, stop_token_ids=[whole[2]], min_tokens=8)[:8]


@check(SamplingFields)
def of_ignore_eos(face: Face) -> None:
    only_eos = {"allowed_token_ids": [tokenizer().encode("<|endoftext|>")[0]]}
    assert len(ids(face, **only_eos)) == 12
    assert len(ids(face, **only_eos, ignore_eos=False)) == 1


@check(SamplingFields)
def of_skip_special_tokens(face: Face) -> None:
    only_eos = {"allowed_token_ids": [tokenizer().encode("<|endoftext|>")[0]], "max_tokens": 2}
    assert choice(face, **only_eos)["text"] == ""
    assert choice(face, **only_eos, skip_special_tokens=False)["text"] == "<|endoftext|>" * 2


@check(SamplingFields)
def of_allowed_token_ids(face: Face) -> None:
    assert set(ids(face, allowed_token_ids=[300, 400])) <= {300, 400}


@check(SamplingFields)
def of_bad_words(face: Face) -> None:
    word = choice(face)["text"].split()[1]
    assert word in choice(face)["text"]
    runs = [tokenizer().encode(text) for text in (word, f" {word}")]
    without = ids(face, bad_words=[word])
    assert all(run != without[i : i + len(run)] for run in runs for i in range(len(without)))


@check(SamplingFields)
def of_logit_bias(face: Face) -> None:
    assert ids(face, logit_bias={"300": 100}) == [300] * 12


@check(SamplingFields)
def of_presence_penalty(face: Face) -> None:
    only_two = {"allowed_token_ids": [300, 400], "logit_bias": {"300": 1.0}, "max_tokens": 4}
    assert len(set(ids(face, **only_two, presence_penalty=2.0))) == 2 or ids(face, **only_two)[0] == 300
    assert ids(face, presence_penalty=2.0) != ids(face, presence_penalty=-2.0)


@check(SamplingFields)
def of_frequency_penalty(face: Face) -> None:
    assert ids(face, frequency_penalty=2.0) != ids(face, frequency_penalty=-2.0)


@check(SamplingFields)
def of_repetition_penalty(face: Face) -> None:
    generated = ids(face, repetition_penalty=10.0)
    assert len(set(generated)) == len(generated)


@check(CompletionRequest)
def of_logprobs(face: Face) -> None:
    told = choice(face, logprobs=3, return_token_ids=True)
    logprobs = told["logprobs"]
    assert logprobs["tokens"] == [tokenizer().token_text(token_id) for token_id in told["token_ids"]]
    for top, logprob in zip(logprobs["top_logprobs"], logprobs["token_logprobs"], strict=True):
        assert max(top.values()) == logprob
    assert all(len(top) in (2, 3) for top in logprobs["top_logprobs"])  # two tokens may have the same text
    assert [told["text"][at : at + 3] for at in logprobs["text_offset"][:3]] == [
        "".join(logprobs["tokens"][i:])[:3] for i in range(3)
    ]
    parts = [event["choices"][0]["logprobs"] for event in events(face, logprobs=3)]
    for name, values in logprobs.items():
        assert [value for part in parts for value in part[name]] == values
    assert choice(face)["logprobs"] is None


@check(CompletionRequest)
def of_prompt_logprobs(face: Face) -> None:
    told = choice(face, prompt_logprobs=2, return_token_ids=True)
    assert told["prompt_logprobs"][0] is None
    for token_id, entries in zip(told["prompt_token_ids"][1:], told["prompt_logprobs"][1:], strict=True):
        assert {entry["rank"] for entry in entries.values()} >= {1, 2}
        assert entries[str(token_id)]["decoded_token"] == tokenizer().token_text(token_id)


@check(CompletionRequest)
def of_echo(face: Face) -> None:
    alone = choice(face, logprobs=1)
    echoed = choice(face, logprobs=1, echo=True, return_token_ids=True)
    assert echoed["text"] == PROMPT + alone["text"]
    num_prompt = len(echoed["prompt_token_ids"])
    assert echoed["logprobs"]["token_logprobs"][0] is None
    assert "".join(echoed["logprobs"]["tokens"][:num_prompt]) == PROMPT
    assert echoed["logprobs"]["token_logprobs"][num_prompt:] == alone["logprobs"]["token_logprobs"]
    scored = choice(face, logprobs=1, echo=True, max_tokens=0)
    assert scored["text"] == PROMPT
    assert scored["logprobs"]["token_logprobs"] == echoed["logprobs"]["token_logprobs"][:num_prompt]
    cut = choice(face, echo=True, truncate_prompt_tokens=2)
    assert cut["text"].startswith(tokenizer().decode(tokenizer().encode(PROMPT)[-2:]))
    streamed = events(face, echo=True)
    assert "".join(event["choices"][0]["text"] for event in streamed) == echoed["text"]


@check(SamplingFields)
def of_return_token_ids(face: Face) -> None:
    told = choice(face, return_token_ids=True)
    assert told["prompt_token_ids"] == tokenizer().encode(PROMPT)
    assert tokenizer().decode(told["token_ids"]) == told["text"]
    assert "token_ids" not in choice(face)


@check(SamplingFields)
def of_truncate_prompt_tokens(face: Face) -> None:
    last = tokenizer().encode(PROMPT)[-2:]
    cut = choice(face, truncate_prompt_tokens=2, return_token_ids=True)
    assert cut["prompt_token_ids"] == last
    long = choice(face, prompt="a" * 5000, truncate_prompt_tokens=-1, return_token_ids=True)
    assert len(long["prompt_token_ids"]) == 1024 - 12


@check(SamplingFields)
def of_stream(face: Face) -> None:
    pieces = [event["choices"][0] for event in events(face)]
    texts = [piece["text"] if "text" in piece else piece["delta"]["content"] for piece in pieces]
    assert "".join(texts) == choice(face)["text"]


@check(SamplingFields)
def of_stream_options(face: Face) -> None:
    *_, last = events(face, stream_options={"include_usage": True})
    assert last["usage"]["completion_tokens"] == 12


@check(SamplingFields)
def of_priority(face: Face) -> None:
    def ended_s(priority: int) -> float:
        choice(face, max_tokens=1, priority=priority)
        return time.monotonic()

    def num_waiting() -> int:
        [pipeline] = face.server.client.get("/debug/pipeline").json()["pipelines"]
        return int(pipeline["num_waiting"])

    with ThreadPoolExecutor(3) as threads:
        working = threads.submit(lambda: complete(face, n=3 * BATCH_SIZE, max_tokens=100, temperature=1, priority=5))
        wait_until(lambda: num_waiting() == 2 * BATCH_SIZE, "there is a queue")
        last = threads.submit(ended_s, 6)
        wait_until(lambda: num_waiting() == 2 * BATCH_SIZE + 1, "the last one waits")
        first = threads.submit(ended_s, -1)
        assert first.result() < last.result()
        assert len(working.result()["choices"]) == 3 * BATCH_SIZE


@check(SamplingFields)
def of_user(face: Face) -> None:
    assert choice(face, user="somebody") == choice(face)  # it goes to the log only


@check(SamplingFields)
def of_timeout_s(face: Face) -> None:
    late = face.post(max_tokens=800, timeout_s=0.05)
    assert (late.status_code, late.json()["error"]["param"]) == (408, "timeout_s")
    assert late.headers["x-should-retry"] == "false"
    assert choice(face, timeout_s=60) == choice(face)


@check(ChatRequest)
def of_messages(face: Face) -> None:
    said = [{"role": "user", "content": "The state of"}, {"role": "assistant", "content": " the Union is"}]
    assert choice(face, messages=said)["text"] == choice(face)["text"]


@check(ChatRequest)
def of_max_tokens_(face: Face) -> None:
    assert complete(face, max_tokens=5)["usage"]["completion_tokens"] == 5


@check(ChatRequest)
def of_max_completion_tokens(face: Face) -> None:
    assert complete(face, max_tokens=None, max_completion_tokens=5)["usage"]["completion_tokens"] == 5


@check(ChatRequest)
def of_logprobs_(face: Face) -> None:
    told = choice(face, logprobs=True, return_token_ids=True)["logprobs"]["content"]
    as_text = choice(Face(face.server, CompletionRequest), logprobs=0)["logprobs"]
    assert [token["logprob"] for token in told] == as_text["token_logprobs"]
    assert [token["token"] for token in told] == as_text["tokens"]
    assert all(token["top_logprobs"] == [] for token in told)
    assert choice(face)["logprobs"] is None


@check(ChatRequest)
def of_top_logprobs(face: Face) -> None:
    for token in choice(face, logprobs=True, top_logprobs=3)["logprobs"]["content"]:
        assert len(token["top_logprobs"]) == 3
        assert token["top_logprobs"][0]["logprob"] == token["logprob"]  # it is greedy
        assert bytes(token["bytes"]).decode("utf-8", "replace") == token["token"]


@check(ChatRequest)
def of_chat_template_kwargs(face: Face) -> None:
    prefixed = choice(face, prompt="state", chat_template_kwargs={"prefix": "The "}, return_token_ids=True)
    assert tokenizer().decode(prefixed["prompt_token_ids"]) == "The state"


@check(ChatRequest)
def of_add_generation_prompt(face: Face) -> None:
    begun = {"chat_template_kwargs": {"suffix": " is"}, "prompt": "It", "return_token_ids": True}
    for wanted, prompt in ((None, "It is"), (True, "It is"), (False, "It")):
        told = choice(face, **begun, add_generation_prompt=wanted)
        assert tokenizer().decode(told["prompt_token_ids"]) == prompt


@check(ChatRequest)
def of_continue_final_message(face: Face) -> None:
    begun = {"chat_template_kwargs": {"suffix": " is"}, "prompt": "It", "return_token_ids": True}
    told = choice(face, **begun, continue_final_message=True)
    assert tokenizer().decode(told["prompt_token_ids"]) == "It"


def prompt_of(face: Face, message: dict[str, Any]) -> str:
    """What the template makes of a message."""
    answer = face.server.client.post("/tokenize", json={"messages": [message]})
    assert answer.status_code == 200, answer.text
    return tokenizer().decode(answer.json()["tokens"])


@check(Message)
def of_role(face: Face) -> None:
    assert prompt_of(face, {"role": "system", "content": "Be brief."}) == "(Be brief.) "


@check(Message)
def of_content(face: Face) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    assert prompt_of(face, {"role": "user", "content": parts}) == "Hello"
    assert prompt_of(face, {"role": "user", "content": "Hello"}) == "Hello"


@check(Message)
def of_name(face: Face) -> None:
    assert prompt_of(face, {"role": "user", "content": ": hi", "name": "ann"}) == "ann: hi"


@check(TextPart)
def of_type(face: Face) -> None:
    image = {"role": "user", "content": [{"type": "image", "text": "x"}]}
    assert face.server.client.post("/tokenize", json={"messages": [image]}).status_code == 400


@check(TextPart)
def of_text(face: Face) -> None:
    assert prompt_of(face, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}) == "Hi"


@check(StreamOptions)
def of_include_usage(face: Face) -> None:
    of_stream_options(Face(face.server, CompletionRequest))


def post(face: Face, path: str, **fields: Any) -> dict[str, Any]:
    answer = face.server.client.post(path, json=fields)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


@check(TokenizeRequest)
def of_prompt_(face: Face) -> None:
    body = post(face, "/tokenize", prompt=PROMPT)
    assert body == {"count": 6, "max_model_len": 1024, "tokens": tokenizer().encode(PROMPT)}


@check(TokenizeRequest)
def of_messages_(face: Face) -> None:
    assert prompt_of(face, {"role": "user", "content": PROMPT}) == PROMPT


@check(TokenizeRequest)
def of_return_token_strs(face: Face) -> None:
    assert "".join(post(face, "/tokenize", prompt=PROMPT, return_token_strs=True)["token_strs"]) == PROMPT


@check(TokenizeRequest)
def of_add_generation_prompt_(face: Face) -> None:
    said = {"messages": [{"role": "user", "content": "It"}], "chat_template_kwargs": {"suffix": " is"}}
    texts = [post(face, "/tokenize", **said, add_generation_prompt=wanted)["tokens"] for wanted in (True, False)]
    assert list(map(tokenizer().decode, texts)) == ["It is", "It"]


@check(TokenizeRequest)
def of_chat_template_kwargs_(face: Face) -> None:
    of_add_generation_prompt_(face)


@check(DetokenizeRequest)
def of_tokens(face: Face) -> None:
    assert post(face, "/detokenize", tokens=tokenizer().encode(PROMPT)) == {"prompt": PROMPT}


def refuses_another_model(face: Face, path: str, **fields: Any) -> None:
    assert face.server.client.post(path, json=fields | {"model": "demo"}).status_code == 200
    assert face.server.client.post(path, json=fields | {"model": "another"}).status_code == 404


@check(TokenizeRequest)
def of_model_(face: Face) -> None:
    refuses_another_model(face, "/tokenize", prompt="x")


@check(DetokenizeRequest)
def of_model__(face: Face) -> None:
    refuses_another_model(face, "/detokenize", tokens=[5])


def embeddings(face: Face, **fields: Any) -> list[list[float]]:
    return [entry["embedding"] for entry in post(face, "/v1/embeddings", **{"input": PROMPT} | fields)["data"]]


@check(EmbeddingRequest)
def of_input(face: Face) -> None:
    one, other = embeddings(face, input=[PROMPT, "The whale"])
    assert len(one) == len(other) == 128
    assert [one] == embeddings(face, input=tokenizer().encode(PROMPT)) == embeddings(face) != [other]
    body = post(face, "/v1/embeddings", input=[PROMPT, "The"])
    assert body["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    assert [entry["index"] for entry in body["data"]] == [0, 1]
    refused = face.server.client.post("/v1/embeddings", json={"input": "word " * 2000})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "input")


@check(EmbeddingRequest)
def of_encoding_format(face: Face) -> None:
    [encoded] = post(face, "/v1/embeddings", input=PROMPT, encoding_format="base64")["data"]
    assert array.array("f", base64.b64decode(encoded["embedding"])).tolist() == embeddings(face)[0]


@check(EmbeddingRequest)
def of_pooling(face: Face) -> None:
    tokens = tokenizer().encode(PROMPT)
    last = [embeddings(face, input=tokens[: i + 1], pooling="last")[0] for i in range(len(tokens))]
    mean = [sum(column) / len(tokens) for column in zip(*last, strict=True)]
    assert embeddings(face, pooling="mean")[0] == pytest.approx(mean, abs=1e-5)


@check(EmbeddingRequest)
def of_layer(face: Face) -> None:
    layers = [embeddings(face, layer=layer)[0] for layer in (0, 5, 14, 27, 28)]
    assert len(set(map(tuple, layers))) == 5
    assert layers[-1] == embeddings(face)[0]
    refused = face.server.client.post("/v1/embeddings", json={"input": PROMPT, "layer": 29})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "layer")


@check(EmbeddingRequest)
def of_priority_(face: Face) -> None:
    assert embeddings(face, priority=-5) == embeddings(face)
    refused = face.server.client.post("/v1/embeddings", json={"input": PROMPT, "priority": 2**31})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "priority")


@check(EmbeddingRequest)
def of_user_(face: Face) -> None:
    assert embeddings(face, user="somebody") == embeddings(face)  # it goes to the log only


@check(EmbeddingRequest)
def of_model___(face: Face) -> None:
    refuses_another_model(face, "/v1/embeddings", input="x")
