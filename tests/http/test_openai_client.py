"""OpenAI's own client gets what it expects of an OpenAI server: answers, streams, errors, retries, time limits."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessageParam

from tests.http.front import Front, fronted
from tests.http.keys import key_of, write_keys
from tests.http.server import Server, serving
from tests.waiting import wait_until

pytestmark = pytest.mark.ray

PROMPT = "The state of the Union is"
MESSAGES: list[ChatCompletionMessageParam] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "How is"}, {"type": "text", "text": " the Union?"}]},
]
TEMPLATE = (
    "{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "{% for message in messages %}{{ message.role }}: {{ message.content }}"
    "{% for call in message.tool_calls %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor +%}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
NUM_RUNNING = 16
UNENDING: dict[str, Any] = {"max_tokens": 900, "n": 128, "extra_body": {"ignore_eos": True}}
"""Computing all of it would take longer than `wait_until_idle` waits."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory: Path = tmp_path_factory.mktemp("settings")
    template = directory / "template.jinja"
    template.write_text(TEMPLATE)
    settings = {
        "model": "demo",
        "device": "cpu",
        "dtype": "float32",
        "max_batch_size": NUM_RUNNING,
        "chat_template": str(template),
        "api_keys": write_keys(directory / "keys.yaml", ann={}, bob={"requests_per_minute": 1}),
    }
    with serving(settings, api_key=key_of("ann")) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    """A client that refuses answers which are not of OpenAI's types."""
    with openai.OpenAI(
        base_url=f"{server.base}/v1", api_key=key_of("ann"), max_retries=0, _strict_response_validation=True
    ) as client:
        yield client


def lenient(client: openai.OpenAI) -> openai.OpenAI:
    """For nulls that OpenAI's server says too, but its type of a completion does not have: the `finish_reason` of
    pieces before the last, the log probability of an echoed prompt's first token."""
    return client.with_options(_extra_kwargs={"_strict_response_validation": False})


@asynccontextmanager
async def asynchronous(server: Server) -> AsyncGenerator[openai.AsyncOpenAI, None]:
    async with openai.AsyncOpenAI(base_url=f"{server.base}/v1", api_key=key_of("ann"), max_retries=0) as client:
        yield client


def text_of(chunks: Sequence[Completion], index: int = 0) -> str:
    return "".join(choice.text for chunk in chunks for choice in chunk.choices if choice.index == index)


def content_of(chunks: Sequence[ChatCompletionChunk], index: int = 0) -> str:
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices if choice.index == index]
    assert [delta.role for delta in deltas[:2]] == ["assistant", None]
    return "".join(delta.content or "" for delta in deltas)


# Answers


def test_models_are_listed_and_found_by_name(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").owned_by == "gptj-dist"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-5")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_a_streamed_completion_is_the_one_that_is_not_streamed(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "demo", "prompt": PROMPT, "max_tokens": 24, "seed": 5, "n": 3, "stop": ["\n"]}
    whole = client.completions.create(**asked)
    chunks = list(lenient(client).completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert len({choice.text for choice in whole.choices}) == 3
    for choice in whole.choices:
        assert text_of(chunks, choice.index) == choice.text
        ends = [c.finish_reason for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert [end for end in ends if end] == [choice.finish_reason]
    assert whole.usage is not None
    assert [chunk.usage for chunk in chunks] == [None] * (len(chunks) - 1) + [whole.usage]
    assert chunks[-1].choices == []
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_streamed_chat_is_the_one_that_is_not_streamed(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "demo", "messages": MESSAGES, "max_tokens": 24, "seed": 5, "n": 2}
    whole: ChatCompletion = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    for choice in whole.choices:
        assert choice.message.role == "assistant"
        assert content_of(chunks, choice.index) == choice.message.content
    assert whole.usage is not None
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    prompt = "system: Be brief.\nuser: How is the Union?\nassistant:"
    as_text = client.completions.create(model="demo", prompt=prompt, max_tokens=24, seed=5, n=2)
    assert [choice.text for choice in as_text.choices] == [choice.message.content for choice in whole.choices]
    assert as_text.usage is not None
    assert as_text.usage.total_tokens == whole.usage.total_tokens


def test_an_answer_goes_back_in_as_the_client_dumps_it(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "demo", "max_tokens": 8, "temperature": 0}
    answer = client.chat.completions.create(messages=MESSAGES, **asked).choices[0].message
    followed: Any = [*MESSAGES, answer.model_dump(), {"role": "user", "content": "Why?"}]
    plain: Any = [*MESSAGES, {"role": "assistant", "content": answer.content}, {"role": "user", "content": "Why?"}]
    texts = [
        client.chat.completions.create(messages=messages, **asked, **hints).choices[0].message.content
        for messages, hints in (
            (followed, {"store": False, "metadata": {"a": "b"}, "service_tier": "flex", "prompt_cache_key": "k"}),
            (plain, {"tool_choice": "auto", "safety_identifier": "u"}),
        )
    ]
    assert texts[0] == texts[1]


def test_the_clients_own_accumulation_of_a_stream_gives_the_whole_answer(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "demo", "messages": MESSAGES, "max_tokens": 12, "seed": 2, "logprobs": True}
    text = client.chat.completions.create(**asked).choices[0].message.content or ""
    ended = asked | {"stop": text[8:10]}  # that client takes the end of max_tokens for an error
    whole = client.chat.completions.create(**ended).choices[0]
    with client.chat.completions.stream(**ended) as stream:
        final = stream.get_final_completion().choices[0]
    assert (final.finish_reason, final.message.content) == ("stop", text[: text.index(text[8:10])])
    assert (whole.finish_reason, whole.message.content) == ("stop", final.message.content)
    assert final.logprobs == whole.logprobs


def test_logprobs_of_completions_and_of_chat_are_the_same_numbers(client: openai.OpenAI) -> None:
    rendered = "system: Be brief.\nuser: How is the Union?\nassistant:"
    legacy = client.completions.create(model="demo", prompt=rendered, max_tokens=8, temperature=0, logprobs=2)
    chat = client.chat.completions.create(
        model="demo", messages=MESSAGES, max_tokens=8, temperature=0, logprobs=True, top_logprobs=2
    )
    lists, logprobs = legacy.choices[0].logprobs, chat.choices[0].logprobs
    assert lists is not None
    assert logprobs is not None
    assert logprobs.content is not None
    assert lists.tokens == [token.token for token in logprobs.content]
    assert lists.token_logprobs == [token.logprob for token in logprobs.content]
    for token in logprobs.content:
        assert len(token.top_logprobs) == 2
        assert (token.top_logprobs[0].token, token.top_logprobs[0].logprob) == (token.token, token.logprob)


def test_echo_scores_the_prompt(client: openai.OpenAI) -> None:
    scored = lenient(client).completions.create(model="demo", prompt=PROMPT, max_tokens=0, echo=True, logprobs=0)
    continued = lenient(client).completions.create(
        model="demo", prompt=PROMPT, max_tokens=4, temperature=0, echo=True, logprobs=0
    )
    assert scored.choices[0].text == PROMPT
    assert continued.choices[0].text.startswith(PROMPT)
    first, second = scored.choices[0].logprobs, continued.choices[0].logprobs
    assert first is not None
    assert second is not None
    assert first.token_logprobs is not None
    assert second.token_logprobs is not None
    assert second.token_logprobs[:6] == first.token_logprobs
    assert len(second.token_logprobs) == 10


def test_embeddings_are_the_same_as_numbers_and_in_base64(client: openai.OpenAI) -> None:
    texts = ["The whale", "Call me Ishmael."]
    # The client asks for base64 by itself, and its strict mode looks at it before it is decoded.
    as_base64 = lenient(client).embeddings.create(model="demo", input=texts)
    as_numbers = client.embeddings.create(model="demo", input=texts, encoding_format="float")
    vectors = [entry.embedding for entry in as_base64.data]
    assert vectors == [entry.embedding for entry in as_numbers.data]
    assert [len(vector) for vector in vectors] == [128, 128]
    assert vectors[0] != vectors[1]
    assert as_base64.usage.prompt_tokens == as_base64.usage.total_tokens > 2


def test_vllms_fields_travel_in_extra_body(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="demo", prompt=PROMPT, max_tokens=5, extra_body={"allowed_token_ids": [300], "return_token_ids": True}
    )
    assert answer.choices[0].model_extra is not None
    assert answer.choices[0].model_extra["token_ids"] == [300] * 5


def test_the_request_id_is_the_one_of_the_header_and_of_the_body(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "demo", "prompt": PROMPT, "max_tokens": 2}
    made = client.completions.create(**asked)
    assert made._request_id
    assert made.id == f"cmpl-{made._request_id}"
    given = client.completions.create(**asked, extra_headers={"x-request-id": "job-7"})
    assert (given._request_id, given.id) == ("job-7", "cmpl-job-7")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**asked, temperature=-1, extra_headers={"x-request-id": "job-8"})
    assert caught.value.request_id == "job-8"


def test_the_raw_response_has_headers_and_the_same_answer(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "demo", "prompt": PROMPT, "max_tokens": 4, "seed": 1}
    raw = client.completions.with_raw_response.create(**asked)
    assert raw.headers["content-type"] == "application/json"
    assert raw.parse().choices == client.completions.create(**asked).choices
    with client.completions.with_streaming_response.create(**asked, stream=True) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert list(response.iter_lines())[-2:] == ["data: [DONE]", ""]


def test_the_asynchronous_client_gets_the_same(server: Server, client: openai.OpenAI) -> None:
    def asked(seed: int) -> dict[str, Any]:
        return {"model": "demo", "max_tokens": 10, "seed": seed}

    async def streamed(asynchronous_client: openai.AsyncOpenAI, seed: int) -> str:
        stream = await asynchronous_client.chat.completions.create(messages=MESSAGES, **asked(seed), stream=True)
        return content_of([chunk async for chunk in stream])

    async def all_at_once() -> tuple[list[str], list[Completion], list[str]]:
        async with asynchronous(server) as other:
            chats = await asyncio.gather(*(streamed(other, seed) for seed in range(8)))
            texts = await asyncio.gather(*(other.completions.create(prompt=PROMPT, **asked(seed)) for seed in range(8)))
            return chats, texts, [model.id async for model in other.models.list()]

    chats, texts, models = asyncio.run(all_at_once())
    assert models == ["demo"]
    for seed in range(8):
        chat = client.chat.completions.create(messages=MESSAGES, **asked(seed))
        assert chats[seed] == chat.choices[0].message.content
        assert texts[seed].choices == client.completions.create(prompt=PROMPT, **asked(seed)).choices


# Tools


def test_calls_of_tools_are_whole_and_streamed_the_same_and_go_back_in(client: openai.OpenAI) -> None:
    properties = {"city": {"type": "string", "maxLength": 20}, "days": {"enum": [1, 2, 3]}}
    schema: Any = {"type": "object", "properties": properties, "required": ["city"], "additionalProperties": False}
    tools: Any = [{"type": "function", "function": {"name": "forecast", "parameters": schema, "strict": True}}]
    asked: dict[str, Any] = {"model": "demo", "messages": MESSAGES, "max_tokens": 200, "seed": 4, "n": 2}
    asked |= {"tools": tools, "tool_choice": "required", "parallel_tool_calls": False}
    whole = client.chat.completions.create(**asked)
    with client.chat.completions.stream(**asked) as stream:
        final = stream.get_final_completion()
    for choice, streamed in zip(whole.choices, final.choices, strict=True):
        [call] = choice.message.tool_calls or []
        [same] = streamed.message.tool_calls or []
        assert call.type == same.type == "function"
        jsonschema.Draft202012Validator(schema).validate(json.loads(call.function.arguments))
        assert (same.function.name, same.function.arguments) == ("forecast", call.function.arguments)
        assert choice.finish_reason == streamed.finish_reason == "tool_calls"
        assert choice.message.content is None
        assert not streamed.message.content
    message = whole.choices[0].message
    assert message.tool_calls is not None
    result: Any = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "Rain."}
    followed: Any = [*MESSAGES, message.model_dump(), result]
    answer = client.chat.completions.create(model="demo", messages=followed, tools=tools, max_tokens=4)
    assert answer.usage is not None
    assert whole.usage is not None
    assert answer.usage.prompt_tokens > whole.usage.prompt_tokens


# Responses


def test_a_streamed_response_is_the_one_that_is_not_streamed(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "demo", "input": "How is the Union?", "max_output_tokens": 16, "temperature": 0}
    whole = client.responses.create(**asked, instructions="Be brief.")
    events = list(client.responses.create(**asked, instructions="Be brief.", stream=True))
    final = events[-1].response
    assert events[0].type == "response.created"
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert (final.output_text, final.status, final.usage) == (whole.output_text, whole.status, whole.usage)
    prompt = "system: Be brief.\nuser: How is the Union?\nassistant:"
    as_text = client.completions.create(model="demo", prompt=prompt, max_tokens=16, temperature=0, stop="\nuser:")
    assert as_text.choices[0].text == whole.output_text


def test_the_clients_own_accumulation_of_a_response_gives_the_whole(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "demo", "input": "How is the Union?", "max_output_tokens": 8, "temperature": 0}
    text = client.responses.create(**asked).output_text
    ended = asked | {"extra_body": {"stop": text[8:10]}}  # that client takes the end of max_output_tokens for an error
    with client.responses.stream(**ended) as stream:
        assert stream.get_final_response().output_text == text[: text.index(text[8:10])]


def test_a_conversation_of_responses_goes_on_without_the_server_remembering_it(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "demo", "max_output_tokens": 8, "temperature": 0, "store": False}
    question: Any = {"role": "user", "content": "How is the Union?"}
    first = client.responses.create(input=[question], **asked)
    followed: Any = [question, *first.model_dump()["output"], {"role": "user", "content": "Why?"}]
    assert client.responses.create(input=followed, **asked).output_text
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(input="Why?", previous_response_id=first.id, **asked)
    assert caught.value.param == "previous_response_id"


# Errors


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 3e9}, "temperature"),
        ({"max_tokens": 5000}, "max_tokens"),
        ({"top_p": 1.5}, "top_p"),
        ({"logprobs": 21}, "logprobs"),
        ({"suffix": "end"}, "suffix"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"extra_body": {"guided_json": {"type": "object"}}}, "guided_json"),
    ],
)
def test_a_bad_value_is_a_bad_request_error_with_its_param(
    client: openai.OpenAI, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="demo", prompt=PROMPT, **fields)
    assert (caught.value.param, caught.value.type) == (param, "invalid_request_error")
    assert param in caught.value.message


def test_a_bad_stream_is_an_error_before_it_begins(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="demo", messages=MESSAGES, max_tokens=5000, stream=True)
    assert caught.value.code == "context_length_exceeded"


def test_an_unknown_model_is_a_not_found_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-5", messages=MESSAGES)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_what_is_not_served_is_a_not_found_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.images.generate(model="demo", prompt="a whale")
    assert caught.value.code == "not_found"


@pytest.mark.parametrize("key", [key_of("nobody"), key_of("ann") + " x", key_of("ann").upper()])
def test_a_wrong_key_is_an_authentication_error(client: openai.OpenAI, key: str) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        client.with_options(api_key=key).models.list()
    assert (caught.value.code, caught.value.type) == ("invalid_api_key", "authentication_error")


def test_a_key_that_is_used_up_is_a_rate_limit_error(client: openai.OpenAI) -> None:
    limited = client.with_options(api_key=key_of("bob"))
    assert limited.completions.create(model="demo", prompt=PROMPT, max_tokens=1).choices
    with pytest.raises(openai.RateLimitError) as caught:
        limited.completions.create(model="demo", prompt=PROMPT, max_tokens=1)
    assert caught.value.code == "rate_limit_exceeded"
    assert 0 < int(caught.value.response.headers["retry-after"]) <= 60
    assert client.completions.create(model="demo", prompt=PROMPT, max_tokens=1).choices


# Retries


def client_of(front: Front, max_retries: int) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{front.base}/v1", api_key=key_of("ann"), max_retries=max_retries)


def test_a_client_waits_out_a_server_that_is_loading(server: Server) -> None:
    with fronted(server.base, num_refusals=2) as front, client_of(front, max_retries=2) as client:
        raw = client.completions.with_raw_response.create(model="demo", prompt=PROMPT, max_tokens=3)
        assert raw.retries_taken == 2
        assert raw.parse().choices
        assert front.num_calls == 3


def test_a_client_that_gives_up_hears_why(server: Server) -> None:
    with fronted(server.base, num_refusals=9) as front, client_of(front, max_retries=1) as client:
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(model="demo", prompt=PROMPT)
        assert (caught.value.status_code, caught.value.code) == (503, "not_ready")
        assert front.num_calls == 2


def test_what_would_fail_again_is_not_tried_again(server: Server) -> None:
    with fronted(server.base, num_refusals=0) as front, client_of(front, max_retries=2) as client:
        with pytest.raises(openai.APIStatusError) as caught:
            client.completions.create(model="demo", prompt=PROMPT, **UNENDING | {"extra_body": {"timeout_s": 0.05}})
        assert caught.value.status_code == 408
        assert front.num_calls == 1
    server.wait_until_idle()


# Clients that do not wait


def test_a_clients_own_time_limit_ends_the_work(server: Server, client: openai.OpenAI) -> None:
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=1.0).completions.create(model="demo", prompt=PROMPT, **UNENDING)
    server.wait_until_idle()


def test_a_stream_that_is_closed_early_ends_the_work(server: Server, client: openai.OpenAI) -> None:
    with lenient(client).completions.create(model="demo", prompt=PROMPT, **UNENDING, stream=True) as stream:
        assert next(iter(stream)).choices
        wait_until(lambda: server.status().num_running == NUM_RUNNING, "as many run as may")
    server.wait_until_idle()


def test_a_cancelled_task_ends_the_work(server: Server) -> None:
    async def cancel() -> None:
        async with asynchronous(server) as client:
            task = asyncio.create_task(client.chat.completions.create(model="demo", messages=MESSAGES, **UNENDING))
            await asyncio.to_thread(wait_until, lambda: server.status().num_running == NUM_RUNNING, "it runs")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(cancel())
    server.wait_until_idle()
