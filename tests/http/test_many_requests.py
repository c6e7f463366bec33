"""Hundreds of requests of all shapes at once: every answer is the one to its own request."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import httpx
import pytest

from gptj_dist import LLM, SamplingParams
from gptj_dist.checkpoint.hub import resolve_model
from gptj_dist.llm import Output
from gptj_dist.text.tokenizer import Tokenizer
from tests.http.server import Server, serving
from tests.http.test_completions import stream_events

pytestmark = pytest.mark.ray

NUM_REQUESTS = 500
NUM_CONNECTIONS = 64
TEXT = (resolve_model("demo") / "heldout.txt").read_text("utf-8")
TEMPLATE = "{% for message in messages %}<{{ message.content }}>{% endfor %}"

Form = Literal["text", "ids", "texts", "lists of ids", "chat"]
Manner = Literal["whole", "stream", "cut"]
Said = tuple[str, str | None, list[float] | None]
"""A choice: its text, why it ended, the log probability of each token."""


@dataclass(frozen=True)
class Case:
    """A request.

    Args:
        prompts: what the model is to continue; one for all but lists.
        manner: a client that cuts goes away after the first event.
    """

    number: int
    form: Form
    manner: Manner
    prompts: tuple[str, ...]
    params: SamplingParams

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.form == "chat" else "/v1/completions"

    @property
    def id(self) -> str:
        return f"job-{self.number}"

    def body(self, tokenizer: Tokenizer) -> dict[str, Any]:
        params = self.params
        names = ("max_tokens", "temperature", "top_p", "seed", "n", "logprobs")
        fields = {name: getattr(params, name) for name in names} | {"stop": list(params.stop)}
        fields["stream"] = self.manner != "whole"
        if self.form == "chat":
            fields |= {"logprobs": params.logprobs is not None, "top_logprobs": params.logprobs}
            return fields | {"messages": [{"role": "user", "content": self.prompts[0][1:-1]}]}
        ids = [tokenizer.encode(prompt) for prompt in self.prompts]
        forms = {"text": self.prompts[0], "ids": ids[0], "texts": list(self.prompts), "lists of ids": ids}
        return fields | {"prompt": forms[self.form]}


def make_cases() -> Iterator[Case]:
    """Each of them continues another piece of the text."""
    chance = random.Random(20)
    for number in range(NUM_REQUESTS):
        form: Form = chance.choice(get_args(Form))
        manner: Manner = chance.choices(("whole", "stream", "cut"), (9, 9, 2))[0]
        num_prompts = 2 if form in ("texts", "lists of ids") else 1
        prompts = [f"{number}. {_piece(chance)}" for _ in range(num_prompts)]
        params = SamplingParams(
            max_tokens=chance.randint(1, 12),
            temperature=chance.choice((0.0, 0.8, 1.3)),
            top_p=chance.choice((1.0, 0.9)),
            seed=number,
            n=chance.choice((1, 1, 1, 2, 3)),
            stop=chance.choice(((), (), (",", " of"), ("e",))),
            logprobs=chance.choice((None, None, 2)),
        )
        yield Case(number, form, manner, tuple(f"<{p}>" if form == "chat" else p for p in prompts), params)


def _piece(chance: random.Random) -> str:
    begin = chance.randrange(len(TEXT) - 100)
    return TEXT[begin : begin + chance.randint(5, 100)].strip()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    from gptj_dist.checkpoint.hub import resolve_model

    return Tokenizer.load(resolve_model("demo"))


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return list(make_cases())


@pytest.fixture(scope="module")
def expected(cases: Sequence[Case]) -> list[list[Said]]:
    """What the engine says without HTTP and without Ray."""
    settings: dict[str, Any] = {"device": "cpu", "dtype": "float32"}
    with LLM("demo", **settings) as llm, ThreadPoolExecutor(NUM_CONNECTIONS) as threads:
        return list(threads.map(lambda case: _said(llm.generate(list(case.prompts), case.params)), cases))


def _said(outputs: Sequence[Output]) -> list[Said]:
    return [
        (one.text, one.finish_reason, [token.logprob for token in one.logprobs] or None)
        for output in outputs
        for one in output.completions
    ]


async def ask(client: httpx.AsyncClient, case: Case, body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The answer's parts: one, or the events until the client goes away."""
    headers = {"x-request-id": case.id}
    if case.manner == "whole":
        response = await client.post(case.path, json=body, headers=headers)
        assert response.status_code == 200, response.text
        return [response.json()]
    async with client.stream("POST", case.path, json=body, headers=headers) as response:
        assert response.status_code == 200, await response.aread()
        lines = response.aiter_lines()
        if case.manner == "cut":
            return [json.loads((await anext(lines)).removeprefix("data: "))]
        return stream_events([line async for line in lines])


async def ask_all(server: Server, cases: Sequence[Case], tokenizer: Tokenizer) -> dict[int, list[dict[str, Any]]]:
    """The answers by the cases' numbers."""
    waiting, answers = iter(cases), {}

    async def ask_on_one_connection() -> None:
        async with httpx.AsyncClient(base_url=server.base, timeout=120) as client:
            for case in waiting:
                answers[case.number] = await ask(client, case, case.body(tokenizer))

    await asyncio.gather(*(ask_on_one_connection() for _ in range(NUM_CONNECTIONS)))
    return answers


def joined(parts: Sequence[Mapping[str, Any]]) -> list[Said]:
    """The choices of an answer, in order; those of a stream are put together."""
    pieces: dict[int, list[dict[str, Any]]] = {}
    for part in parts:
        for choice in part["choices"]:
            pieces.setdefault(choice["index"], []).append(choice)
    return [_one(pieces[index]) for index in sorted(pieces)]


def _one(pieces: Sequence[Mapping[str, Any]]) -> Said:
    text = "".join(piece["text"] if "text" in piece else _content(piece) for piece in pieces)
    told = [piece["logprobs"] for piece in pieces]
    reasons = [piece["finish_reason"] for piece in pieces if piece["finish_reason"]]
    assert len(reasons) <= 1
    logprobs = None if told[0] is None else [number for one in told for number in _numbers(one)]
    return text, reasons[0] if reasons else None, logprobs


def _content(piece: Mapping[str, Any]) -> str:
    content: str = (piece.get("message") or piece["delta"])["content"]
    return content


def _numbers(logprobs: Mapping[str, Any]) -> list[float]:
    if "content" in logprobs:
        return [token["logprob"] for token in logprobs["content"]]
    return list(logprobs["token_logprobs"])


def test_hundreds_of_requests_of_all_shapes_get_their_own_answers_and_leave_nothing(
    cases: Sequence[Case], expected: Sequence[Sequence[Said]], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    settings = {"model": "demo", "stages": 2, "device": "cpu", "dtype": "float32", "chat_template": str(template)}
    with serving(settings) as server:
        answers = asyncio.run(ask_all(server, cases, tokenizer))
        server.wait_until_idle()
        status = server.status()
        assert (status.num_running, status.num_waiting, status.num_used_blocks) == (0, 0, 0)
    assert len(answers) == NUM_REQUESTS
    for case, says in zip(cases, expected, strict=True):
        parts = answers[case.number]
        assert {part["id"].partition("-")[2] for part in parts} == {case.id}
        if case.manner == "cut":
            choice = parts[0]["choices"][0]
            assert says[choice["index"]][0].startswith(_one([choice])[0]), case
        else:
            assert joined(parts) == says, case


def test_the_requests_are_as_different_as_promised(cases: Sequence[Case], expected: Sequence[Sequence[Said]]) -> None:
    assert len({case.prompts for case in cases}) == NUM_REQUESTS
    kinds = Counter((case.form, case.manner) for case in cases)
    assert len(kinds) == len(get_args(Form)) * len(get_args(Manner))
    assert {case.params.n for case in cases} == {1, 2, 3}
    assert {case.params.max_tokens for case in cases} == set(range(1, 13))
    assert {reason for says in expected for _, reason, _ in says} == {"stop", "length"}
