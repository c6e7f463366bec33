"""Checks of the fields of chat, responses, `/tokenize`, `/detokenize` and embeddings."""

from __future__ import annotations

import array
import base64
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from gptj_dist.answers.schema.chat import ChatRequest, Message
from gptj_dist.answers.schema.completions import CompletionRequest
from gptj_dist.answers.schema.content import Prediction, TextPart
from gptj_dist.answers.schema.embeddings import EmbeddingRequest
from gptj_dist.answers.schema.input_items import InputPart, MessageItem
from gptj_dist.answers.schema.repartition import RepartitionRequest
from gptj_dist.answers.schema.responses import ResponsesRequest
from gptj_dist.answers.schema.sampling import StreamOptions
from gptj_dist.answers.schema.tokens import DetokenizeRequest, TokenizeRequest
from tests.http.field_checks_text import of_prediction, of_stream_options
from tests.http.fields import (
    PROMPT,
    Face,
    check,
    choice,
    complete,
    events,
    post,
    prompt_of,
    refuses_another_model,
    tokenizer,
)
from tests.http.keys import bearer, key_of


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
def of_prompt_logprobs_(face: Face) -> None:
    assert face.post(prompt_logprobs=0).status_code == 400


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


def response(face: Face, **fields: Any) -> dict[str, Any]:
    return post(face, "/v1/responses", **{"input": PROMPT, "max_output_tokens": 12, "temperature": 0} | fields)


@check(ResponsesRequest)
def of_input_(face: Face) -> None:
    said = [{"role": "user", "content": "The state of"}, {"role": "assistant", "content": " the Union is"}]
    assert response(face, input=said)["output"][0]["content"] == response(face)["output"][0]["content"]
    assert response(face, input="Call me")["output"][0]["content"] != response(face)["output"][0]["content"]


@check(ResponsesRequest)
def of_instructions(face: Face) -> None:
    told = response(face, instructions="Be brief.")
    assert told["instructions"] == "Be brief."
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
    assert told["output"][0]["content"] == response(face, input=system)["output"][0]["content"]


@check(ResponsesRequest)
def of_max_output_tokens(face: Face) -> None:
    assert response(face, max_output_tokens=5, ignore_eos=True)["usage"]["output_tokens"] == 5


@check(ResponsesRequest)
def of_include(face: Face) -> None:
    [part] = response(face, include=["message.output_text.logprobs"], ignore_eos=True)["output"][0]["content"]
    as_text = choice(Face(face.server, CompletionRequest), logprobs=0)["logprobs"]
    assert [token["logprob"] for token in part["logprobs"]] == as_text["token_logprobs"]


@check(ResponsesRequest)
def of_top_logprobs_(face: Face) -> None:
    told = response(face, include=["message.output_text.logprobs"], top_logprobs=3)
    assert {len(token["top_logprobs"]) for token in told["output"][0]["content"][0]["logprobs"]} == {3}


@check(ResponsesRequest)
def of_metadata(face: Face) -> None:
    assert response(face, metadata={"a": "b"})["metadata"] == {"a": "b"}


@check(ResponsesRequest)
def of_text__(face: Face) -> None:
    refused = face.server.client.post("/v1/responses", json={"input": "x", "text": {"format": {"type": "json_schema"}}})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "text")
    assert response(face, text={"format": {"type": "text"}})["text"] == {"format": {"type": "text"}}


def prompt_tokens(face: Face, **item: Any) -> int:
    usage = response(face, input=[{"role": "user", "content": "Hello"} | item])["usage"]
    return int(usage["input_tokens"])


@check(MessageItem)
def of_type_(face: Face) -> None:
    assert prompt_tokens(face, type="message") == prompt_tokens(face)
    item = {"type": "reasoning", "role": "user", "content": "x"}
    assert face.server.client.post("/v1/responses", json={"input": [item]}).status_code == 400


@check(MessageItem)
def of_role_(face: Face) -> None:
    assert prompt_tokens(face, role="system") == len(tokenizer().encode("(Hello) "))


@check(MessageItem)
def of_content_(face: Face) -> None:
    parts = [{"type": "input_text", "text": "Hel"}, {"type": "output_text", "text": "lo and more"}]
    assert prompt_tokens(face, content=parts) == len(tokenizer().encode("Hello and more"))


@check(InputPart)
def of_type__(face: Face) -> None:
    item = {"role": "user", "content": [{"type": "input_image", "text": "x"}]}
    assert face.server.client.post("/v1/responses", json={"input": [item]}).status_code == 400


@check(InputPart)
def of_text_(face: Face) -> None:
    of_content_(face)


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


@check(Prediction)
def of_type___(face: Face) -> None:
    refused = Face(face.server, CompletionRequest).post(prediction={"type": "text", "content": "x"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prediction.type")


@check(Prediction)
def of_content__(face: Face) -> None:
    of_prediction(Face(face.server, ChatRequest))


@check(StreamOptions)
def of_include_usage(face: Face) -> None:
    of_stream_options(Face(face.server, CompletionRequest))


@check(StreamOptions)
def of_continuous_usage_stats(face: Face) -> None:
    chunks = events(Face(face.server, CompletionRequest), stream_options={"continuous_usage_stats": True})
    assert [chunk["usage"]["prompt_tokens"] for chunk in chunks] == [6] * len(chunks)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 12


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


@check(CompletionRequest)
@check(ChatRequest)
def of_add_special_tokens(face: Face) -> None:
    """The demo's tokenizer has no tokens to add; `tests/unit/test_service.py` has one that does."""
    assert choice(face, add_special_tokens=True)["text"] == choice(face, add_special_tokens=False)["text"]
    refused = face.post(add_special_tokens="x")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "add_special_tokens")


@check(TokenizeRequest)
def of_add_special_tokens_(face: Face) -> None:
    assert post(face, "/tokenize", prompt=PROMPT, add_special_tokens=True) == post(face, "/tokenize", prompt=PROMPT)


@check(EmbeddingRequest)
def of_add_special_tokens__(face: Face) -> None:
    assert embeddings(face, add_special_tokens=False) == embeddings(face, add_special_tokens=True) == embeddings(face)


@check(RepartitionRequest)
def of_layers_(face: Face) -> None:
    """The verb asks for it, too; a stream that runs meanwhile does not notice."""
    body = Face(face.server, CompletionRequest)
    fields = {"max_tokens": 300, "ignore_eos": True, "seed": 1}
    expected = choice(body, cache_salt="before", **fields)["text"]
    with ThreadPoolExecutor(1) as readers:
        reading = readers.submit(choice, body, cache_salt="meanwhile", **fields)
        answer = face.server.client.post("/debug/repartition", json={"layers": [10, 10, 8]}).json()
        command = [sys.executable, "-m", "gptj_dist", "repartition", "--layers", "9,10,9", "--json"]
        keyed = {**os.environ, "GPTJ_API_KEY": key_of("admin"), "GPTJ_URL": face.server.base}
        done = subprocess.run(command, env=keyed, capture_output=True, text=True, timeout=120, check=True)
        assert reading.result()["text"] == expected
    (pipeline,) = answer["pipelines"]
    assert (pipeline["layers"], pipeline["problem"]) == ([10, 10, 8], None)
    assert {moved["pause_ms"] > 0 for moved in pipeline["moved"]} <= {True}
    assert json.loads(done.stdout)["pipelines"][0]["layers"] == [9, 10, 9]
    (told,) = face.server.client.get("/debug/pipeline").json()["pipelines"]
    assert [stage["layers"] for stage in told["stages"]] == [[0, 8], [9, 18], [19, 27]]
    assert 'reason="asked"} 0.0' not in face.server.client.get("/metrics").text
    for layers in ([28], [14, 14], [28, 0, 0], [9, 9, 9]):
        refused = face.server.client.post("/debug/repartition", json={"layers": layers})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "layers")
    guest = httpx.post(f"{face.server.base}/debug/repartition", json={"layers": [9, 10, 9]}, headers=bearer("guest"))
    assert guest.status_code == 403
