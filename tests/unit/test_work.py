"""Work that grows with a request: refused by its size before it begins, or done off the event loop."""

from __future__ import annotations

import asyncio
import gzip
import json
import random
import threading
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from typing import Any

import httpx
import pytest
import tokenizers

from gptj_dist.answers.answer import Answer
from gptj_dist.answers.choices import ChoicesForm, Head
from gptj_dist.answers.completion import TextDelta
from gptj_dist.answers.deadline import Deadline
from gptj_dist.answers.json_writing import PIECE_CHARS, PIECE_ELEMENTS, json_bytes
from gptj_dist.answers.schema.base import parse_body
from gptj_dist.answers.schema.completions import CompletionRequest
from gptj_dist.answers.work import INLINE_COST, Work
from gptj_dist.params import TokenLogprobs
from gptj_dist.text.tokenizer import Tokenizer
from tests.front_app import LIMITS, TOKENIZER, FrontApp, eventually, front_app

LARGE = 3_900_000
WINDOW_BYTES = (TOKENIZER.max_token_bytes or 0) * LIMITS.max_model_len


def run(scenario: Callable[[FrontApp], Awaitable[None]]) -> None:
    async def main() -> None:
        async with front_app() as app:
            await scenario(app)

    asyncio.run(main())


async def post(app: FrontApp, path: str, fields: dict[str, Any]) -> httpx.Response:
    return await app.client.post(path, content=json.dumps(fields, separators=(",", ":")).encode())


def completion(**fields: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/completions", {"prompt": "a", **fields}


def chat(number: int, content: str = "a", **fields: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/chat/completions", {"messages": [{"role": "user", "content": content}] * number, **fields}


def biases(number: int) -> dict[str, int]:
    return dict.fromkeys(map(str, range(number)), 1)


HOSTILE: dict[str, tuple[tuple[str, dict[str, Any]], str]] = {
    "one character": (completion(prompt="a" * LARGE), "prompt"),
    "blanks": (completion(prompt=" " * LARGE), "prompt"),
    "characters of many bytes": (completion(prompt="\U0001f600" * (LARGE // 12)), "prompt"),
    "one of several prompts": (completion(prompt=["a", "b" * LARGE]), "prompt"),
    "a million prompts": (completion(prompt=["a"] * 990_000), "prompt"),
    "ten thousand prompts": (completion(prompt=["a"] * 9_000), "prompt"),
    "a million token ids": (completion(prompt=[1] * 990_000), "prompt"),
    "a million lists": (completion(prompt=[[1]] * 900_000), "prompt"),
    "a million bad words": (completion(bad_words=["a"] * 900_000), "bad_words"),
    "ten thousand bad words": (completion(bad_words=["a"] * 9_000), "bad_words"),
    "a long bad word": (completion(bad_words=["a" * LARGE]), "bad_words"),
    "biases": (completion(logit_bias=biases(200_000)), "logit_bias"),
    "fewer biases": (completion(logit_bias=biases(5_000)), "logit_bias"),
    "allowed tokens": (completion(allowed_token_ids=[1] * 900_000), "allowed_token_ids"),
    "a long stop string": (completion(stop="a" * 1_000_000, n=8), "stop"),
    "one of several stop strings": (completion(stop=["a", "a" * 1_000_000]), "stop"),
    "log probabilities": (completion(n=128, logprobs=20, max_tokens=2000), "logprobs"),
    "a long message": (chat(1, "a" * LARGE), "messages"),
    "many messages": (chat(60_000), "messages"),
    "fewer messages": (chat(3_000), "messages"),
    "a long input": (("/v1/responses", {"input": "a" * LARGE}), "input"),
    "an input to embed": (("/v1/embeddings", {"input": "a" * LARGE}), "input"),
    "inputs to embed": (("/v1/embeddings", {"input": ["a"] * 9_000}), "input"),
    "a text to tokenize": (("/tokenize", {"prompt": "a" * LARGE}), "prompt"),
    "tokens to detokenize": (("/detokenize", {"tokens": [1] * 990_000}), "tokens"),
    "a field's name": (completion(**{"x" * LARGE: 1}), "x" * 200),
}


@pytest.mark.parametrize(("call", "param"), HOSTILE.values(), ids=HOSTILE)
def test_sizes_are_refused_by_field_in_few_words_and_before_anything_is_tokenised(
    call: tuple[str, dict[str, Any]], param: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    encode = Tokenizer.encode

    def recording(tokenizer: Tokenizer, text: str, add_special_tokens: bool = False) -> list[int]:
        encoded.append(len(text))
        return encode(tokenizer, text, add_special_tokens)

    monkeypatch.setattr(Tokenizer, "encode", recording)

    async def scenario(app: FrontApp) -> None:
        response = await post(app, *call)
        error = response.json()["error"]
        assert response.status_code == 400
        assert error["param"] == param
        assert len(error["message"]) < 400
        assert sum(encoded) <= len("a")
        assert not app.source.asked

    run(scenario)


def test_a_prompt_that_fills_the_window_to_the_last_byte_is_served() -> None:
    token = max(range(4096), key=lambda token_id: len(TOKENIZER.token_bytes(token_id)))
    text = TOKENIZER.token_bytes(token).decode() * (LIMITS.max_model_len - 1)

    async def scenario(app: FrontApp) -> None:
        response = await app.client.post("/v1/completions", json={"prompt": text, "max_tokens": 1})
        assert response.status_code == 200, response.text
        assert len(app.source.asked[0][0]) == LIMITS.max_model_len - 1
        response = await app.client.post("/v1/completions", json={"prompt": " " * (WINDOW_BYTES + 1)})
        assert response.json()["error"]["code"] == "context_length_exceeded"
        assert str(WINDOW_BYTES + 1) in response.json()["error"]["message"]

    run(scenario)


def test_no_token_stands_for_more_bytes_than_the_bound() -> None:
    rng, most = random.Random(5), TOKENIZER.max_token_bytes
    assert most is not None
    for _ in range(300):
        text = "".join(rng.choices(["a", " ", "\n", "the ", "é", "\U0001f600", "<|endoftext|>", "=" * 9], k=40))
        assert len(text.encode()) <= most * len(TOKENIZER.encode(text))


def test_a_vocabulary_whose_tokens_take_blanks_beside_them_has_no_bound() -> None:
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.add_special_tokens([tokenizers.AddedToken("<|end|>", lstrip=True)])
    assert Tokenizer(bpe).max_token_bytes is None


HEAVY: dict[str, tuple[str, dict[str, Any]]] = {
    "a long prompt that is cut": completion(prompt="word " * 150_000, truncate_prompt_tokens=5, max_tokens=1),
    "many prompts": completion(prompt=["one two three four"] * 1000, max_tokens=1),
    "a text to tokenize": ("/tokenize", {"prompt": "word " * 150_000, "return_token_strs": True}),
    "ids": completion(prompt=[[1] * 400] * 1000, max_tokens=1),
    "ids to detokenize": ("/detokenize", {"tokens": [1] * 400_000}),
    "messages": chat(300, "word " * 5, max_tokens=1),
    "log probabilities": completion(n=40, logprobs=20, max_tokens=100),
    "log probabilities of the prompt": completion(prompt=[1] * 2000, n=4, logprobs=20, echo=True, max_tokens=1),
    "the same in a stream": completion(prompt=[1] * 2000, logprobs=20, echo=True, max_tokens=1, stream=True),
    "the last events of a response": (
        "/v1/responses",
        {
            "input": "a",
            "stream": True,
            "include": ["message.output_text.logprobs"],
            "top_logprobs": 20,
            "max_output_tokens": 100,
        },
    ),
}


def recorded_costs(work: Work) -> list[int]:
    """The costs of all work from now on, which has to run in a thread if its cost is high."""
    costs: list[int] = []
    run_work = work.run

    async def recording(cost: int, function: Callable[[], Any]) -> Any:
        costs.append(cost)
        in_thread = cost > INLINE_COST
        ident = threading.get_ident()

        def checked() -> Any:
            assert (threading.get_ident() != ident) == in_thread
            return function()

        return await run_work(cost, checked)

    work.run = recording  # type: ignore[method-assign]
    return costs


@pytest.mark.parametrize("call", HEAVY.values(), ids=HEAVY)
def test_what_takes_long_runs_in_a_thread(call: tuple[str, dict[str, Any]]) -> None:
    async def scenario(app: FrontApp) -> None:
        costs = recorded_costs(app.work)
        response = await post(app, *call)
        assert response.status_code == 200, response.text[:500]
        assert max(costs) > INLINE_COST

    run(scenario)


def test_bodies_are_unpacked_and_long_texts_written_in_a_thread() -> None:
    async def scenario(app: FrontApp) -> None:
        costs = recorded_costs(app.work)
        packed, headers = gzip.compress(b'{"prompt": "a", "max_tokens": 1}'), {"content-encoding": "gzip"}
        assert (await app.client.post("/v1/completions", content=packed, headers=headers)).status_code == 200
        assert costs[0] > INLINE_COST
        longest = max(range(4096), key=lambda token_id: len(TOKENIZER.token_bytes(token_id)))
        response = await post(app, "/detokenize", {"tokens": [longest] * 300_000})
        assert response.json()["prompt"] == TOKENIZER.token_bytes(longest).decode() * 300_000
        assert costs[-1] > INLINE_COST

    run(scenario)


def test_requests_begin_one_in_a_turn_in_the_order_that_they_came() -> None:
    async def main() -> None:
        work, begun, num_turns = Work(), [], 0

        async def begin(number: int) -> None:
            await work.turns.next()
            begun.append((number, num_turns))

        tasks = [asyncio.create_task(begin(number)) for number in range(50)]
        while not all(task.done() for task in tasks):
            num_turns += 1
            await asyncio.sleep(0)
        numbers, turns = zip(*begun, strict=True)
        assert list(numbers) == list(range(50))
        assert len(set(turns)) == 50

    asyncio.run(main())


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"choices": [], "usage": None},
        {"id": 'a\u2028é"', "choices": [{"text": "\n", "logprobs": {"a": [-0.5, 1e-300]}}] * 3, "n": 1},
        {"prompt": "a\U0001f600\n" * PIECE_CHARS},
        {"tokens": list(range(3 * PIECE_ELEMENTS + 1)), "token_strs": ["\ufffd", "\x00"] * PIECE_ELEMENTS},
    ],
)
def test_documents_are_written_in_pieces_as_they_would_be_whole(document: dict[str, Any]) -> None:
    whole = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    assert json_bytes(document) == whole


def test_an_iterators_elements_are_written_as_a_list_and_freed_one_by_one() -> None:
    class Element(dict[str, int]):
        pass

    elements: list[weakref.ref[Element]] = []

    def made() -> Iterator[Element]:
        for number in range(50):
            elements.append(weakref.ref(element := Element(n=number)))
            yield element
            del element
            assert sum(element() is not None for element in elements) <= 1

    assert json_bytes({"choices": made(), "usage": iter([])}) == json_bytes(
        {"choices": [{"n": number} for number in range(50)], "usage": []}
    )


def test_what_a_client_left_behind_is_freed_in_a_thread_if_that_takes_long() -> None:
    request = parse_body(b'{"prompt": "a"}', CompletionRequest)
    token = TokenLogprobs(1, -0.5, 1, ((1, -0.5),) * 20)

    async def main() -> None:
        async def stream() -> AsyncGenerator[TextDelta, None]:
            yield TextDelta("a", (1,) * INLINE_COST, None, (token,) * INLINE_COST)
            await asyncio.Event().wait()

        work = Work()
        costs = recorded_costs(work)
        form = ChoicesForm(request, Head("", 0, "", "", ""), [], 1, 0)
        answer = Answer(request, form, lambda: [stream()], 1, 1, Deadline(None), work, lambda _: None)
        answering = asyncio.create_task(answer.body())
        await eventually(lambda: answer.num_tokens > 0)
        answering.cancel()
        await asyncio.wait([answering])
        assert answering.cancelled()
        assert max(costs) > INLINE_COST

    asyncio.run(main())
