"""Every field of a completion request does what it promises, on a real Serve. A new field without a check fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from gptj_dist.serving.schema.completions import CompletionRequest
from gptj_dist.text.tokenizer import Tokenizer
from tests.http.server import Server, serving
from tests.http.test_completions import stream_events

pytestmark = pytest.mark.ray

PROMPT = "The state of the Union is"
GREEDY = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
Check = Callable[[Server], None]
CHECKS: dict[str, Check] = {}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving({"model": "demo", "stages": 3, "device": "cpu", "dtype": "float32"}) as server:
        yield server


def check(function: Check) -> Check:
    """Registers the check of the field that the function is named after."""
    CHECKS[function.__name__.removeprefix("of_")] = function
    return function


@pytest.mark.parametrize("field", CompletionRequest.model_fields)
def test_the_field_has_its_effect(server: Server, field: str) -> None:
    CHECKS[field](server)


def choice(server: Server, **fields: Any) -> dict[str, Any]:
    """The first choice of a greedy completion."""
    first: dict[str, Any] = server.complete(**GREEDY | fields)["choices"][0]
    return first


def ids(server: Server, **fields: Any) -> list[int]:
    return list(choice(server, return_token_ids=True, **fields)["token_ids"])


def tokenizer() -> Tokenizer:
    from gptj_dist.checkpoint.hub import resolve_model

    return Tokenizer.load(resolve_model("demo"))


def events(server: Server, **fields: Any) -> list[dict[str, Any]]:
    with server.client.stream("POST", "/v1/completions", json=GREEDY | {"stream": True} | fields) as response:
        return stream_events(list(response.iter_lines()))


@check
def of_model(server: Server) -> None:
    assert server.complete(**GREEDY, model="demo")["model"] == "demo"
    assert server.client.post("/v1/completions", json=GREEDY | {"model": "another"}).status_code == 404


@check
def of_prompt(server: Server) -> None:
    assert choice(server, prompt="Call me")["text"] != choice(server)["text"]


@check
def of_max_tokens(server: Server) -> None:
    assert server.complete(**GREEDY | {"max_tokens": 5})["usage"]["completion_tokens"] == 5
    assert server.complete(**GREEDY | {"max_tokens": 0, "echo": True})["usage"]["completion_tokens"] == 0


@check
def of_temperature(server: Server) -> None:
    assert ids(server) == ids(server)
    assert ids(server, temperature=2.0, seed=1) != ids(server, temperature=0.9, seed=1)


@check
def of_seed(server: Server) -> None:
    one, again, other = (ids(server, temperature=1.5, seed=seed) for seed in (1, 1, 2))
    assert one == again != other


@check
def of_top_p(server: Server) -> None:
    assert ids(server, temperature=3.0, top_p=1e-6) == ids(server) != ids(server, temperature=3.0, seed=1)


@check
def of_top_k(server: Server) -> None:
    assert ids(server, temperature=3.0, top_k=1) == ids(server)


@check
def of_min_p(server: Server) -> None:
    assert ids(server, temperature=3.0, min_p=1.0) == ids(server)


@check
def of_n(server: Server) -> None:
    choices = server.complete(**GREEDY | {"temperature": 1.5, "n": 3})["choices"]
    assert [entry["index"] for entry in choices] == [0, 1, 2]
    assert len({entry["text"] for entry in choices}) == 3


@check
def of_best_of(server: Server) -> None:
    asked = {"temperature": 1.5, "seed": 4, "max_tokens": 6, "logprobs": 0}
    every = server.complete(**GREEDY | asked | {"n": 6})["choices"]
    means = {entry["text"]: sum(entry["logprobs"]["token_logprobs"]) / 6 for entry in every}
    body = server.complete(**GREEDY | asked | {"n": 2, "best_of": 6})
    assert [entry["text"] for entry in body["choices"]] == sorted(means, key=lambda text: -means[text])[:2]
    assert [entry["index"] for entry in body["choices"]] == [0, 1]
    assert body["usage"]["completion_tokens"] == 36
    plain = server.complete(**GREEDY | asked | {"n": 2, "best_of": 6, "logprobs": None})["choices"]
    assert [(entry["text"], entry["logprobs"]) for entry in plain] == [(e["text"], None) for e in body["choices"]]


@check
def of_stop(server: Server) -> None:
    text = choice(server)["text"]
    ended = choice(server, stop=text[6:9])
    assert (ended["text"], ended["finish_reason"]) == (text[: text.index(text[6:9])], "stop")


@check
def of_include_stop_str_in_output(server: Server) -> None:
    text = choice(server)["text"]
    end = text.index(text[6:9]) + 3
    assert choice(server, stop=text[6:9], include_stop_str_in_output=True)["text"] == text[:end]


@check
def of_stop_token_ids(server: Server) -> None:
    whole = ids(server)
    ended = choice(server, stop_token_ids=[whole[5]], return_token_ids=True)
    assert (ended["token_ids"], ended["finish_reason"]) == (whole[: whole.index(whole[5]) + 1], "stop")


@check
def of_min_tokens(server: Server) -> None:
    whole = ids(server)
    assert whole[2] not in ids(server, stop_token_ids=[whole[2]], min_tokens=8)[:8]


@check
def of_ignore_eos(server: Server) -> None:
    only_eos = {"allowed_token_ids": [tokenizer().encode("<|endoftext|>")[0]]}
    assert len(ids(server, **only_eos)) == 12
    assert len(ids(server, **only_eos, ignore_eos=False)) == 1


@check
def of_skip_special_tokens(server: Server) -> None:
    only_eos = {"allowed_token_ids": [tokenizer().encode("<|endoftext|>")[0]], "max_tokens": 2}
    assert choice(server, **only_eos)["text"] == ""
    assert choice(server, **only_eos, skip_special_tokens=False)["text"] == "<|endoftext|>" * 2


@check
def of_allowed_token_ids(server: Server) -> None:
    assert set(ids(server, allowed_token_ids=[300, 400])) <= {300, 400}


@check
def of_bad_words(server: Server) -> None:
    word = choice(server)["text"].split()[1]
    assert word in choice(server)["text"]
    runs = [tokenizer().encode(text) for text in (word, f" {word}")]
    without = ids(server, bad_words=[word])
    assert all(run != without[i : i + len(run)] for run in runs for i in range(len(without)))


@check
def of_logit_bias(server: Server) -> None:
    assert ids(server, logit_bias={"300": 100}) == [300] * 12


@check
def of_presence_penalty(server: Server) -> None:
    only_two = {"allowed_token_ids": [300, 400], "logit_bias": {"300": 1.0}, "max_tokens": 4}
    assert len(set(ids(server, **only_two, presence_penalty=2.0))) == 2 or ids(server, **only_two)[0] == 300
    assert ids(server, presence_penalty=2.0) != ids(server, presence_penalty=-2.0)


@check
def of_frequency_penalty(server: Server) -> None:
    assert ids(server, frequency_penalty=2.0) != ids(server, frequency_penalty=-2.0)


@check
def of_repetition_penalty(server: Server) -> None:
    generated = ids(server, repetition_penalty=10.0)
    assert len(set(generated)) == len(generated)


@check
def of_logprobs(server: Server) -> None:
    told = choice(server, logprobs=3, return_token_ids=True)
    logprobs = told["logprobs"]
    assert logprobs["tokens"] == [tokenizer().token_text(token_id) for token_id in told["token_ids"]]
    for top, logprob in zip(logprobs["top_logprobs"], logprobs["token_logprobs"], strict=True):
        assert max(top.values()) == logprob
    assert all(len(top) in (2, 3) for top in logprobs["top_logprobs"])  # two tokens may have the same text
    assert [told["text"][at : at + 3] for at in logprobs["text_offset"][:3]] == [
        "".join(logprobs["tokens"][i:])[:3] for i in range(3)
    ]
    parts = [event["choices"][0]["logprobs"] for event in events(server, logprobs=3)]
    for name, values in logprobs.items():
        assert [value for part in parts for value in part[name]] == values
    assert choice(server)["logprobs"] is None


@check
def of_prompt_logprobs(server: Server) -> None:
    told = choice(server, prompt_logprobs=2, return_token_ids=True)
    assert told["prompt_logprobs"][0] is None
    for token_id, entries in zip(told["prompt_token_ids"][1:], told["prompt_logprobs"][1:], strict=True):
        assert {entry["rank"] for entry in entries.values()} >= {1, 2}
        assert entries[str(token_id)]["decoded_token"] == tokenizer().token_text(token_id)


@check
def of_echo(server: Server) -> None:
    alone = choice(server, logprobs=1)
    echoed = choice(server, logprobs=1, echo=True, return_token_ids=True)
    assert echoed["text"] == PROMPT + alone["text"]
    num_prompt = len(echoed["prompt_token_ids"])
    assert echoed["logprobs"]["token_logprobs"][0] is None
    assert "".join(echoed["logprobs"]["tokens"][:num_prompt]) == PROMPT
    assert echoed["logprobs"]["token_logprobs"][num_prompt:] == alone["logprobs"]["token_logprobs"]
    scored = choice(server, logprobs=1, echo=True, max_tokens=0)
    assert scored["text"] == PROMPT
    assert scored["logprobs"]["token_logprobs"] == echoed["logprobs"]["token_logprobs"][:num_prompt]
    streamed = events(server, echo=True)
    assert "".join(event["choices"][0]["text"] for event in streamed) == echoed["text"]


@check
def of_return_token_ids(server: Server) -> None:
    told = choice(server, return_token_ids=True)
    assert told["prompt_token_ids"] == tokenizer().encode(PROMPT)
    assert tokenizer().decode(told["token_ids"]) == told["text"]
    assert "token_ids" not in choice(server)


@check
def of_truncate_prompt_tokens(server: Server) -> None:
    last = tokenizer().encode(PROMPT)[-2:]
    cut = choice(server, truncate_prompt_tokens=2, return_token_ids=True, echo=True)
    assert cut["prompt_token_ids"] == last
    assert cut["text"].startswith(tokenizer().decode(last))
    long = choice(server, prompt=[7] * 5000, truncate_prompt_tokens=-1, return_token_ids=True)
    assert len(long["prompt_token_ids"]) == 1024 - 12


@check
def of_stream(server: Server) -> None:
    assert "".join(event["choices"][0]["text"] for event in events(server)) == choice(server)["text"]


@check
def of_stream_options(server: Server) -> None:
    *_, last = events(server, stream_options={"include_usage": True})
    assert last["usage"]["completion_tokens"] == 12


@check
def of_user(server: Server) -> None:
    assert choice(server, user="somebody") == choice(server)  # it goes to the log only
