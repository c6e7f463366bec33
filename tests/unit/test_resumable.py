"""Streams that go on after their connection broke: the client gets each event once, from whichever ingress it asks."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from gptj_dist.answers.event_ids import EventId, Received
from gptj_dist.engine.limits import EngineLimits
from gptj_dist.engine.mailbox import Delta
from gptj_dist.engine.record import RequestRecord
from gptj_dist.engine.request import FinishReason
from gptj_dist.errors import InvalidRequestError
from gptj_dist.serving import keeper, kept_streams
from gptj_dist.serving.kept_streams import LIFETIME_S, KeptStreams, News, Opening, Reply
from gptj_dist.serving.keys import ApiKey, hash_key
from tests.fakes import fake_token
from tests.front_app import LIMITS, TOKENIZER, FrontApp, _logprobs, eventually, front_app

TIMEOUT_S = 60
NUM_TOKENS = 8
COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
PROMPT = {"prompt": "My fellow citizens", "max_tokens": NUM_TOKENS, "stream": True}
MESSAGES = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": NUM_TOKENS, "stream": True}
INPUT = {"input": "Hello", "max_output_tokens": NUM_TOKENS, "stream": True}
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "unseeded": (COMPLETIONS, PROMPT | {"stream_options": {"include_usage": True}}),
    "three": (COMPLETIONS, PROMPT | {"n": 3, "seed": 4, "logprobs": 2}),
    "two prompts": (COMPLETIONS, PROMPT | {"prompt": ["One", "Two"], "echo": True, "logprobs": 1}),
    "usage so far": (COMPLETIONS, PROMPT | {"seed": 5, "stream_options": {"continuous_usage_stats": True}}),
    "chat": (CHAT, MESSAGES | {"seed": 6, "logprobs": True, "top_logprobs": 1}),
    "response": (RESPONSES, INPUT | {"seed": 7}),
}
IDS = {COMPLETIONS: "cmpl-r", CHAT: "chatcmpl-r", RESPONSES: "resp_r"}
CALLS = 'Well. <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call><tool_call>'
CALLS += '{"name": "f", "arguments": {"a": 22}}</tool_call>'
WEIGHTS = "those"
KEYS = (ApiKey("ann", hash_key("a")), ApiKey("bob", hash_key("b")))


@dataclass(slots=True)
class Pipelines:
    """A `TokenSource` whose tokens depend on noise key and position alone.

    Args:
        size: tokens of each delta.
        most: after this number of tokens of each completion, it waits until `may_go_on`.
    """

    size: int = 1
    most: int = NUM_TOKENS
    may_go_on: asyncio.Event = field(default_factory=asyncio.Event)
    num_open: int = 0
    records: list[RequestRecord] = field(default_factory=list)

    def limits(self) -> EngineLimits:
        return LIMITS

    def streams(self, records: Sequence[RequestRecord]) -> list[AsyncGenerator[Delta, None]]:
        self.records += records
        return list(map(self._stream, records))

    async def _stream(self, record: RequestRecord) -> AsyncGenerator[Delta, None]:
        self.num_open += 1
        num_tokens, params = len(record.token_ids), record.params
        of_prompt = () if num_tokens else _logprobs(record.prompt_ids[1:], params.prompt_logprobs)
        try:
            while num_tokens < params.max_tokens:
                if num_tokens >= self.most:
                    await self.may_go_on.wait()
                await asyncio.sleep(0)
                stop = min(num_tokens + self.size, params.max_tokens)
                ids = tuple(1000 + fake_token(record.noise_key % 2**20, place) for place in range(num_tokens, stop))
                reason = FinishReason.LENGTH if stop == params.max_tokens else None
                weights = "" if num_tokens > len(record.token_ids) else WEIGHTS
                yield Delta(ids, reason, _logprobs(ids, params.logprobs), of_prompt, weights=weights)
                num_tokens, of_prompt = stop, ()
        finally:
            self.num_open -= 1


class Caller(Pipelines):
    """A `TokenSource` whose only text says something and then calls two tools."""

    async def _stream(self, record: RequestRecord) -> AsyncGenerator[Delta, None]:
        ids = [*TOKENIZER.encode(CALLS), 50256]
        for start in range(len(record.token_ids), len(ids), self.size):
            await asyncio.sleep(0)
            stop = start + self.size
            yield Delta(tuple(ids[start:stop]), FinishReason.STOP if stop >= len(ids) else None)


class Store:
    """As a handle to the deployment of `Streams`."""

    def __init__(self) -> None:
        self.kept = KeptStreams(lambda: 0.0)
        self.is_dead = False
        self.all_parts: list[tuple[int, Delta]] = []
        self.update = SimpleNamespace(remote=self._update)
        self.take = SimpleNamespace(remote=self._take)

    async def _update(self, news: Sequence[News]) -> Reply:
        if self.is_dead:
            raise ConnectionError("dead")
        return self.kept.update(news)

    async def _take(self, *arguments: Any) -> Any:
        return self.kept.take(*arguments)

    def read(self) -> list[tuple[int, Delta]]:
        """What is kept of the only stream."""
        [stream] = self.kept._streams.values()
        return keeper._read(stream.parts)

    def lose(self, number: int) -> None:
        """Loses the last deltas of each completion of the only stream."""
        [(names, stream)] = self.kept._streams.items()
        read = self.all_parts = self.all_parts or keeper._read(stream.parts)
        kept: list[tuple[int, Delta]] = []
        for index in {index for index, _ in read}:
            of_index = [item for item in read if item[0] == index]
            kept += of_index[: max(0, len(of_index) - number)]
        self.kept.update([News(names, -1, stream.opening, 0, (keeper._PART.encode(tuple(kept)),))])
        stream.run = -2  # what its run adds does not count


@pytest.fixture(autouse=True)
def _no_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "INTERVAL_S", 0.0)
    monkeypatch.setattr(keeper, "MIN_INTERVAL_S", 0.0)


def run(scenario: Coroutine[None, None, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, TIMEOUT_S))


@asynccontextmanager
async def ingress(store: Store | None, source: Pipelines, keys: Sequence[ApiKey] = ()) -> AsyncIterator[FrontApp]:
    """An ingress whose streams the store keeps."""
    handle: Any = store
    async with front_app(source=source, keys=keys, streams=handle) as front:
        yield front
        assert source.num_open == 0


async def ask(front: FrontApp, path: str, body: dict[str, Any], key: str = "a") -> list[str]:
    """All events of a stream."""
    headers = {"authorization": f"Bearer {key}", "x-request-id": "r"}
    response = await front.client.post(path, json=body, headers=headers)
    assert response.status_code == 200, response.text
    return response.text.split("\n\n")[:-1]


async def resume(front: FrontApp, request_id: str = "r", last_id: str | None = None, key: str = "a") -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"} | ({} if last_id is None else {"last-event-id": last_id})
    return await front.client.get(f"/v1/streams/{request_id}", headers=headers)


def id_of(event: str) -> str:
    return event.partition("\n")[0].removeprefix("id: ")


def content(events: Sequence[str]) -> Any:
    """What a client makes of the events: all that is in them, by completion, whatever came in one piece."""
    pieces: dict[Any, list[Any]] = {}
    for event in events:
        data = event.partition("data: ")[2]
        if data == "[DONE]":
            pieces.setdefault("done", []).append(data)
            continue
        body = json.loads(data)
        for choice in body.pop("choices", ()):
            logprobs = choice.pop("logprobs", None) or {}
            of = pieces.setdefault(choice["index"], [body["id"], body["created"], "", [], None])
            of[2] += choice.get("text") or choice.get("delta", {}).get("content") or ""
            of[3] += logprobs.get("content") or list(zip(*logprobs.values(), strict=True))
            of[4] = choice["finish_reason"] or of[4]
        pieces["usage"] = [body.get("usage")]
        if "response" in body:
            pieces.setdefault(body["type"], []).append(body["response"])
    return pieces


@pytest.mark.parametrize("name", REQUESTS)
def test_whichever_event_was_the_last_the_rest_follows_byte_for_byte_from_another_ingress(name: str) -> None:
    async def scenario() -> None:
        store = Store()
        async with ingress(store, Pipelines()) as first, ingress(store, Pipelines()) as other:
            usual = await ask(first, *REQUESTS[name])
            assert len(set(map(id_of, usual))) == len(usual)
            await eventually(lambda: len(store.kept._streams) == 1)
            for number, event in enumerate(usual):
                response = await resume(other, IDS[REQUESTS[name][0]], id_of(event))
                rest = response.text.split("\n\n")[:-1]
                assert content([*usual[: number + 1], *rest]) == content(usual)
                if "n" not in REQUESTS[name][1] and name != "two prompts":
                    assert rest == usual[number + 1 :]
                assert response.status_code == (200 if rest else 204)
            assert len((await resume(other)).text.split("\n\n")[:-1]) == len(usual)

    run(scenario())


@pytest.mark.parametrize("num_lost", [1, 4])
@pytest.mark.parametrize("name", REQUESTS)
def test_tokens_that_were_not_kept_are_computed_again_however_they_come(name: str, num_lost: int) -> None:
    async def scenario() -> None:
        store = Store()
        async with ingress(store, Pipelines(size=2)) as first, ingress(store, source := Pipelines(size=3)) as other:
            usual = await ask(first, *REQUESTS[name])
            await eventually(lambda: len(store.kept._streams) == 1)
            for place in range(len(usual)):
                store.lose(num_lost)
                rest = (await resume(other, "r", id_of(usual[place]))).text.split("\n\n")[:-1]
                assert content([*usual[: place + 1], *rest]) == content(usual)
                if name == "response" and rest:
                    assert json.loads(rest[0].partition("data: ")[2])["sequence_number"] == place + 1
            assert source.records
            assert all(record.is_accepted and record.num_moves == 0 for record in source.records)
            assert all(record.weights == (WEIGHTS if record.token_ids else "") for record in source.records)

    run(scenario())


def output_of(events: Sequence[str]) -> list[dict[str, Any]]:
    """The items that a client makes of the events of a response, whose numbers count up."""
    items: list[dict[str, Any]] = []
    for number, event in enumerate(events):
        body = json.loads(event.partition("data: ")[2])
        assert body["sequence_number"] == number
        match body["type"].removeprefix("response."):
            case "output_item.added":
                assert body["output_index"] == len(items)
                items.append({"id": body["item"]["id"], "text": "", "is_done": False})
            case "output_text.delta" | "function_call_arguments.delta":
                item = items[body["output_index"]]
                assert (item["id"], item["is_done"]) == (body["item_id"], False)
                item["text"] += body["delta"]
            case "output_text.done" | "function_call_arguments.done":
                assert items[body["output_index"]]["text"] == body.get("text", body.get("arguments"))
            case "output_item.done":
                items[body["output_index"]] |= body["item"] | {"is_done": True}
            case "completed":
                assert [item["id"] for item in body["response"]["output"]] == [item["id"] for item in items]
    return items


@pytest.mark.parametrize(("size", "other_size"), [(1, 1), (1, 7), (7, 1), (100, 3)])
def test_calls_of_tools_go_on_from_any_event_however_tokens_come(size: int, other_size: int) -> None:
    tools = [{"type": "function", "name": "f", "parameters": {"properties": {"a": {"type": "integer"}}}}]

    async def scenario() -> None:
        store = Store()
        async with ingress(store, Caller(size)) as first, ingress(store, Caller(other_size)) as other:
            usual = await ask(first, RESPONSES, {"input": "x", "tools": tools, "stream": True})
            items = output_of(usual)
            assert [item["text"] for item in items] == ["Well. ", '{"a": 1}', '{"a": 22}']
            assert all(item["is_done"] for item in items)
            assert len(set(map(id_of, usual))) == len(usual)
            await eventually(lambda: len(store.kept._streams) == 1)
            for number, event in enumerate(usual):
                store.lose(2)
                rest = (await resume(other, "resp_r", id_of(event))).text.split("\n\n")[:-1]
                assert output_of([*usual[: number + 1], *rest]) == items

    run(scenario())


@pytest.mark.parametrize("size", [1, 5])
def test_a_stop_string_ends_a_resumed_stream_where_it_would_have(size: int) -> None:
    async def scenario() -> None:
        store = Store()
        async with ingress(store, Pipelines()) as first, ingress(store, Pipelines(size)) as other:
            path, body = REQUESTS["chat"]
            text = content(await ask(first, path, body))[0][2]
            half = len(text) // 2
            usual = await ask(first, path, body | {"stop": [text[half : half + 4]]})
            assert content(usual)[0][2] == text[: text.index(text[half : half + 4])]
            for number, event in enumerate(usual):
                store.lose(2)
                rest = (await resume(other, "r", id_of(event))).text.split("\n\n")[:-1]
                assert content([*usual[: number + 1], *rest]) == content(usual)

    run(scenario())


def test_a_client_that_leaves_stops_the_computation_and_gets_the_rest_when_it_comes_back() -> None:
    async def scenario() -> None:
        store, source = Store(), Pipelines(most=5)
        async with ingress(store, Pipelines()) as usual_one, ingress(store, source) as front:
            path, body = REQUESTS["chat"]
            usual = await ask(usual_one, path, body)
            headers = {"x-request-id": "r"}
            async with front.client.stream("POST", path, json=body, headers=headers) as response:
                lines = response.aiter_lines()
                last_id = (await anext(lines)).removeprefix("id: ")
            await eventually(lambda: not source.num_open)
            source.may_go_on.set()
            rest = (await resume(front, "r", last_id)).text.split("\n\n")[:-1]
            assert content([usual[0], *rest])[0][2:] == content(usual)[0][2:]
            assert len(source.records[1].token_ids) == 5

    run(scenario())


def test_a_stream_that_is_resumed_while_it_runs_ends_where_it_ran() -> None:
    async def scenario() -> None:
        store, source = Store(), Pipelines(most=5)
        async with ingress(store, source) as first, ingress(store, Pipelines()) as other:
            path, body = REQUESTS["chat"]
            old = asyncio.create_task(ask(first, path, body))
            await eventually(lambda: bool(store.kept._streams) and source.num_open == 1)
            new = await resume(other)
            await eventually(lambda: not first.admission.num_admitted or _is_taken(store))
            source.may_go_on.set()
            *begun, last = await old
            assert "goes on at another connection" in last
            assert len(begun) <= 6
            assert content(new.text.split("\n\n")[:-1])["done"] == ["[DONE]"]

    def _is_taken(store: Store) -> bool:
        [stream] = store.kept._streams.values()
        return bool(stream.former_runs)

    run(scenario())


def test_without_the_flag_events_have_no_ids_and_nothing_can_be_resumed() -> None:
    async def scenario() -> None:
        async with ingress(None, Pipelines()) as front:
            events = await ask(front, *REQUESTS["chat"])
            assert all(event.startswith("data: ") for event in events)
            assert (await resume(front)).json()["error"]["code"] == "not_found"

    run(scenario())


def test_another_key_does_not_find_the_stream_and_a_wrong_id_is_a_400() -> None:
    async def scenario() -> None:
        store = Store()
        async with ingress(store, Pipelines(), KEYS) as front:
            events = await ask(front, *REQUESTS["chat"])
            await eventually(lambda: bool(store.kept._streams))
            for answer in (await resume(front, key="b"), await resume(front, "other")):
                assert (answer.status_code, answer.json()["error"]["code"]) == (404, "stream_not_found")
            for wrong in ("x", "1:2,3", "9" * 20 + ":1", id_of(events[0]) + "x"):
                answer = await resume(front, last_id=wrong)
                assert (answer.status_code, "Last-Event-ID" in answer.text) == (400, True)
            head = await front.client.head("/v1/streams/r", headers={"authorization": "Bearer a"})
            assert head.status_code == 200
            assert (await resume(front, last_id=id_of(events[-1]))).status_code == 204

    run(scenario())


@pytest.mark.parametrize("is_dead", [True, False], ids=["dead for a while", "restarted"])
def test_what_a_store_has_forgotten_is_kept_again_and_no_stream_is_harmed(is_dead: bool) -> None:
    async def scenario() -> None:
        store, source = Store(), Pipelines(most=5)
        async with ingress(store, source) as front, ingress(store, Pipelines()) as other:
            asked = asyncio.create_task(ask(front, *REQUESTS["three"]))
            await eventually(lambda: len(store.kept._streams) == 1 and source.num_open == 3)
            store.is_dead = is_dead
            for _ in range(100):
                await asyncio.sleep(0)
            store.kept = KeptStreams(lambda: 0.0)
            store.is_dead = False
            await eventually(lambda: len(store.kept._streams) == 1)
            source.may_go_on.set()
            usual = await asked
            await eventually(lambda: len(store.read()) == 3 * NUM_TOKENS)
            assert content((await resume(other)).text.split("\n\n")[:-1]) == content(usual)

    run(scenario())


NAMES = ("ann", "r")
OPENING = Opening("ChatRequest", b"x" * 100, 0, 0)


def news(run_: int, number: int, part: bytes = b"x", opening: Opening | None = None, name: str = "r") -> News:
    return News(("ann", name), run_, opening, number, (part,) if part else ())


def test_a_stream_is_kept_for_a_minute_after_its_ingress_was_last_heard_of() -> None:
    now_s = 0.0
    kept = KeptStreams(lambda: now_s)
    kept.update([news(1, 0, opening=OPENING)])
    now_s = LIFETIME_S
    kept.update([news(1, 1, b"")])
    now_s = 2 * LIFETIME_S
    assert kept.take(NAMES, 2) is not None
    now_s = 3 * LIFETIME_S + 1
    assert kept.take(NAMES, 3) is None
    assert kept._num_bytes == 0


def test_what_is_kept_is_bounded_and_the_oldest_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_streams, "MAX_KEPT_BYTES", 1000)
    monkeypatch.setattr(kept_streams, "MAX_KEPT_STREAMS", 5)
    kept = KeptStreams(lambda: 0.0)
    for number in range(9):
        kept.update([news(number, 0, opening=OPENING, name=str(number))])
    assert [name for _, name in kept._streams] == ["4", "5", "6", "7", "8"]
    kept.update([news(8, 1, b"x" * 700, name="8")])
    assert [name for _, name in kept._streams] == ["7", "8"]
    kept.update([news(8, 2, b"x" * 1000, name="8")])
    assert not kept._streams
    assert kept._num_bytes == 0


def test_a_stream_of_which_a_part_was_lost_is_not_kept_and_a_run_that_was_taken_adds_nothing() -> None:
    kept = KeptStreams(lambda: 0.0)
    assert kept.update([news(1, 0, opening=OPENING)]).taken == []
    assert kept.take(NAMES, 2) is not None
    assert kept.update([news(1, 1), news(2, 1)]).taken == [1]
    stream = kept.take(NAMES, 3)
    assert stream is not None
    assert stream.parts == [b"x", b"x"]
    kept.update([news(3, 3)])
    assert kept.take(NAMES, 4) is None


def test_a_later_stream_of_the_same_id_takes_the_place_of_the_earlier_one_which_goes_on() -> None:
    kept = KeptStreams(lambda: 0.0)
    kept.update([news(1, 0, opening=OPENING), news(2, 0, b"y", opening=OPENING)])
    assert kept.update([news(1, 1)]).taken == []
    stream = kept.take(NAMES, 3)
    assert stream is not None
    assert stream.parts == [b"y"]


def test_an_id_is_read_as_it_is_written() -> None:
    assert EventId.parsed("12+2:7,5e", 2) == EventId(12, 2, (Received(7), Received(5, has_end=True)))
    of_first = Received(7, partly=Received(24, has_end=True))
    assert EventId.parsed("12+11:7>24e,5", 2) == EventId(12, 11, (of_first, Received(5)))
    assert str(of_first) == "7>24e"
    for wrong in ("", "12", "12:", "12:7", "12:7,5,", "-1:7,5", "1:7,5e,9", "1:7,5e\n", "1:7>,5", "1:7>8>9,5"):
        with pytest.raises(InvalidRequestError, match="is not the id of an event"):
            EventId.parsed(wrong, 2)
