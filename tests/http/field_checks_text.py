"""Checks of the fields of completions, including those shared with chat."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

from gptj_dist.answers.schema.chat import ChatRequest
from gptj_dist.answers.schema.completions import CompletionRequest
from gptj_dist.answers.schema.responses import ResponsesRequest
from gptj_dist.answers.schema.sampling import ChoiceFields, SamplingFields
from tests.http.fields import (
    BATCH_SIZE,
    PROMPT,
    Face,
    check,
    choice,
    complete,
    events,
    ids,
    text_of,
    tokenizer,
)
from tests.waiting import wait_until

COMMON_TOKENS = [14, 260, 270, 480, 549, 582]


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


@check(ChoiceFields)
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


@check(ChoiceFields)
def of_use_beam_search(face: Face) -> None:
    """The best text is at least as likely as the greedy one, and the first of more beams at least as likely as it."""
    width = 3
    body = complete(face, use_beam_search=True, n=width, length_penalty=0, return_token_ids=True)
    assert len({tuple(entry["token_ids"]) for entry in body["choices"]}) == width
    assert [entry["finish_reason"] for entry in body["choices"]] == ["length"] * width
    assert body["usage"]["completion_tokens"] == 12 * width
    assert choice(face, use_beam_search=True, n=1)["text"] == choice(face)["text"] != body["choices"][0]["text"]
    assert face.post(use_beam_search=True, stream=True).json()["error"]["param"] == "stream"
    assert face.post(use_beam_search=True, temperature=0.5).json()["error"]["param"] == "temperature"


@check(ChoiceFields)
def of_length_penalty(face: Face) -> None:
    """Texts that end at any of many tokens have different lengths."""
    asked = {"use_beam_search": True, "n": 3, "stop_token_ids": COMMON_TOKENS, "return_token_ids": True}
    short, long = (choice(face, length_penalty=penalty, **asked)["token_ids"] for penalty in (-2, 2))
    assert len(short) < len(long)
    assert face.post(length_penalty=2).json()["error"]["param"] == "length_penalty"


@check(ChoiceFields)
def of_early_stopping(face: Face) -> None:
    """To stop as soon as there are texts finds shorter ones than not to stop while longer ones may be better."""
    asked = {"use_beam_search": True, "n": 3, "stop_token_ids": COMMON_TOKENS, "length_penalty": 2}
    early, never = (complete(face, early_stopping=when, **asked)["usage"] for when in (True, "never"))
    assert early["completion_tokens"] < never["completion_tokens"]
    assert face.post(early_stopping="soon", use_beam_search=True).json()["error"]["param"] == "early_stopping"


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


@check(SamplingFields)
def of_repetition_penalty_range(face: Face) -> None:
    everywhere = ids(face, repetition_penalty=10.0)
    assert ids(face, repetition_penalty=10.0, repetition_penalty_range=-1) == everywhere
    assert ids(face, repetition_penalty=10.0, repetition_penalty_range=1) != everywhere


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


@check(ChoiceFields)
def of_return_token_ids(face: Face) -> None:
    told = choice(face, return_token_ids=True)
    assert told["prompt_token_ids"] == tokenizer().encode(PROMPT)
    assert tokenizer().decode(told["token_ids"]) == told["text"]
    assert "token_ids" not in choice(face)


@check(ChoiceFields)
def of_return_tokens_as_token_ids(face: Face) -> None:
    asked = (
        {"return_token_ids": True, "logprobs": True, "top_logprobs": 3} if face.body is ChatRequest else {"logprobs": 3}
    )
    told = choice(face, **asked, return_tokens_as_token_ids=True)
    if face.body is ChatRequest:
        assert [token["token"] for token in told["logprobs"]["content"]] == [
            f"token_id:{id}" for id in told["token_ids"]
        ]
        assert all(
            one["token"].startswith("token_id:")
            for token in told["logprobs"]["content"]
            for one in token["top_logprobs"]
        )
    else:
        named = {name for top in told["logprobs"]["top_logprobs"] for name in (*top, *told["logprobs"]["tokens"])}
        assert all(name.startswith("token_id:") for name in named)


@check(ChoiceFields)
def of_truncate_prompt_tokens(face: Face) -> None:
    last = tokenizer().encode(PROMPT)[-2:]
    cut = choice(face, truncate_prompt_tokens=2, return_token_ids=True)
    assert cut["prompt_token_ids"] == last
    long = choice(face, prompt="a" * 5000, truncate_prompt_tokens=-1, return_token_ids=True)
    assert len(long["prompt_token_ids"]) == 1024 - 12


@check(ChoiceFields)
def of_prediction(face: Face) -> None:
    text = choice(face)["text"]
    parts = [{"type": "text", "text": text[:5]}, {"type": "text", "text": text[5:]}]
    for content in (text, parts):
        told = complete(face, prediction={"type": "content", "content": content})
        assert told["choices"][0]["text"] == text
        details = told["usage"]["completion_tokens_details"]
        assert details["accepted_prediction_tokens"] > 8
        assert details["accepted_prediction_tokens"] + details["rejected_prediction_tokens"] in range(10, 16)
    assert "completion_tokens_details" not in complete(face)["usage"]
    too_long = face.post(prediction={"type": "content", "content": "a" * 1_000_000})
    assert (too_long.status_code, too_long.json()["error"]["param"]) == (400, "prediction")


@check(SamplingFields)
def of_stream(face: Face) -> None:
    assert "".join(text_of(event) for event in events(face)) == choice(face)["text"]


@check(ChoiceFields)
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
        many = Face(face.server, CompletionRequest)
        working = threads.submit(lambda: complete(many, n=3 * BATCH_SIZE, max_tokens=100, temperature=1, priority=5))
        wait_until(lambda: num_waiting() == 2 * BATCH_SIZE, "there is a queue")
        last = threads.submit(ended_s, 6)
        wait_until(lambda: num_waiting() == 2 * BATCH_SIZE + 1, "the last one waits")
        first = threads.submit(ended_s, -1)
        assert first.result() < last.result()
        assert len(working.result()["choices"]) == 3 * BATCH_SIZE


@check(SamplingFields)
def of_cache_salt(face: Face) -> None:
    prompt = 8 * f"Of {face.body.__name__}: {PROMPT} "

    def num_cached(salt: str) -> int:
        usage = face.post(prompt=prompt, cache_salt=salt).json()["usage"]
        details = usage["input_tokens_details" if face.body is ResponsesRequest else "prompt_tokens_details"]
        return int(details["cached_tokens"])

    assert num_cached("one") == num_cached("other") == 0
    assert num_cached("one") >= 16
    assert face.post(cache_salt="").status_code == 400


@check(SamplingFields)
def of_user(face: Face) -> None:
    assert choice(face, user="somebody") == choice(face)  # it goes to the log only


@check(SamplingFields)
def of_timeout_s(face: Face) -> None:
    late = face.post(max_tokens=800, timeout_s=0.05)
    assert (late.status_code, late.json()["error"]["param"]) == (408, "timeout_s")
    assert late.headers["x-should-retry"] == "false"
    assert choice(face, timeout_s=60) == choice(face)
