"""A burst beyond what an ingress answers at a time is refused at once, and nothing of a request that ended counts."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, ExitStack, suppress
from typing import Any

import httpx
import pytest
from starlette.requests import ClientDisconnect
from starlette.types import Message

from gptj_dist.answers.merge import merge
from gptj_dist.answers.request_limits import MAX_COMPLETIONS
from gptj_dist.errors import TooManyRequestsError
from gptj_dist.serving.http.admission import Admission
from gptj_dist.serving.http.endpoints import EventResponse
from gptj_dist.serving.keys import ApiKey, hash_key
from gptj_dist.serving.outages import ServerOutage
from gptj_dist.serving.retry_after import MAX_RETRY_AFTER_S, retry_after_s
from tests.front_app import FrontApp, eventually, front_app
from tests.http.keys import bearer, key_of

MOST = 20


def run(scenario: Callable[[FrontApp], Awaitable[None]], keys: Sequence[ApiKey] = ()) -> None:
    async def main() -> None:
        async with front_app(max_requests=MOST, keys=keys) as app:
            await scenario(app)

    asyncio.run(main())


@pytest.mark.parametrize("stream", [True, False])
def test_a_burst_is_refused_while_the_admitted_wait_and_others_are_answered(stream: bool) -> None:
    """No token comes before the refusals have: they do not wait for anything of the pipelines."""

    async def scenario(app: FrontApp) -> None:
        app.source.may_go_on.clear()
        body = {"prompt": "a", "max_tokens": 2, "stream": stream}
        calls = [asyncio.create_task(app.client.post("/v1/completions", json=body)) for _ in range(3 * MOST)]
        await eventually(lambda: sum(call.done() for call in calls) == 2 * MOST)
        refused = [call.result() for call in calls if call.done()]
        assert {response.status_code for response in refused} == {429}
        assert all(response.headers["retry-after"] == "5" for response in refused)
        assert f"answering {MOST} requests" in refused[0].json()["error"]["message"]
        await eventually(lambda: len(app.source.asked) == MOST)
        assert (await app.client.get("/health")).status_code == 200
        unread = await app.client.post("/v1/completions", content=b"not JSON")
        assert unread.status_code == 429, "a refused request's body is not read"
        app.source.may_go_on.set()
        statuses = [response.status_code for response in await asyncio.gather(*calls)]
        assert (statuses.count(200), statuses.count(429)) == (MOST, 2 * MOST)
        assert app.admission.num_admitted == 0
        assert (await app.client.post("/v1/completions", json=body)).status_code == 200

    run(scenario)


@pytest.mark.parametrize(
    "fields",
    [{"prompt": "a" * 100_000}, {"model": "other"}, {"max_tokens": 1}, {"timeout_s": 0.01, "max_tokens": 2000}],
)
@pytest.mark.parametrize("stream", [True, False])
def test_however_a_request_ends_it_no_longer_counts(fields: dict[str, Any], stream: bool) -> None:
    async def scenario(app: FrontApp) -> None:
        await app.client.post("/v1/completions", json={"prompt": "a", "stream": stream} | fields)
        await eventually(lambda: not app.metrics.num_in_flight)
        assert app.admission.num_admitted == app.source.num_open == 0

    run(scenario)


def test_a_client_that_leaves_in_mid_stream_no_longer_counts() -> None:
    async def scenario(app: FrontApp) -> None:
        body = {"prompt": "a", "max_tokens": 2000, "stream": True}
        async with app.client.stream("POST", "/v1/completions", json=body) as response:
            await anext(response.aiter_lines())
        await eventually(lambda: not app.metrics.num_in_flight and not app.source.num_open)
        assert app.admission.num_admitted == 0

    run(scenario)


@pytest.mark.parametrize("stream", [True, False])
def test_a_call_that_is_cancelled_at_any_moment_no_longer_counts(stream: bool) -> None:
    """Serve's proxies cancel the calls of clients that have left."""
    body = json.dumps({"prompt": "a", "max_tokens": 2, "stream": stream}).encode()

    async def call(app: FrontApp) -> None:
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if not messages:
                await asyncio.Event().wait()
            return messages.pop()

        async def send(_: Message) -> None:
            await asyncio.sleep(0)

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": []}
        await app.call(scope | {"asgi": {"spec_version": "2.3"}}, receive, send)

    async def scenario(app: FrontApp) -> None:
        for num_turns in itertools.count():
            calling = asyncio.create_task(call(app))
            for _ in range(num_turns):
                await asyncio.sleep(0)
            is_answered = calling.done()
            calling.cancel()
            await asyncio.gather(calling, return_exceptions=True)
            assert (app.admission.num_admitted, app.source.num_open) == (0, 0), f"cancelled in turn {num_turns}"
            if is_answered:
                await calling
                assert num_turns > 10
                return

    run(scenario)


def test_a_client_that_leaves_before_the_first_event_is_sent_ends_what_was_begun() -> None:
    admission = Admission(1)

    async def events() -> AsyncGenerator[bytes, None]:
        yield b"never sent"

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(_: Message) -> None:
        raise OSError("the connection is gone")

    async def main() -> None:
        stack = AsyncExitStack()
        stack.enter_context(admission.admitted())
        scope = {"type": "http", "asgi": {"spec_version": "2.4"}, "extensions": {}}
        with suppress(OSError, ClientDisconnect):
            await EventResponse(events(), stack)(scope, receive, send)

    asyncio.run(main())
    assert admission.num_admitted == 0


def test_admission_refuses_beyond_its_most_and_counts_errors_out() -> None:
    admission = Admission(1)

    def fail() -> None:
        with admission.admitted():
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    with admission.admitted(), pytest.raises(TooManyRequestsError):
        admission.admitted().__enter__()
    assert admission.num_admitted == 0


def test_of_many_streams_one_begins_in_a_turn_of_the_loop() -> None:
    begun: list[int] = []
    turn = 0

    async def stream() -> AsyncGenerator[int, None]:
        begun.append(turn)
        yield 1

    async def count_turns() -> None:
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    async def main() -> int:
        counting = asyncio.create_task(count_turns())
        number = len([item async for item in merge([stream() for _ in range(100)])])
        counting.cancel()
        return number

    assert asyncio.run(main()) == 100
    assert len(set(begun)) == 100


def test_a_full_server_still_answers_another_keys_requests() -> None:
    async def scenario(app: FrontApp) -> None:
        app.source.may_go_on.clear()

        def post(name: str) -> asyncio.Task[httpx.Response]:
            body = {"prompt": "a", "max_tokens": 2}
            return asyncio.create_task(app.client.post("/v1/completions", json=body, headers=bearer(name)))

        flood = [post("a") for _ in range(MOST + 5)]
        await eventually(lambda: sum(call.done() for call in flood) == 5)
        others = [post("b") for _ in range(MOST)]
        await eventually(lambda: sum(call.done() for call in others) == MOST // 2)
        app.source.may_go_on.set()
        assert Counter(call.status_code for call in await asyncio.gather(*flood)) == {200: MOST, 429: 5}
        assert Counter(call.status_code for call in await asyncio.gather(*others)) == {200: MOST // 2, 429: MOST // 2}
        assert app.admission.num_admitted == 0

    keys = [ApiKey(name, hash_key(key_of(name))) for name in ("a", "b")]
    run(scenario, keys)


def test_retry_after_is_the_time_in_which_the_requests_of_now_end_at_the_present_rate() -> None:
    now_s = 0.0

    def wait_s(admission: Admission) -> int | None:
        with pytest.raises(TooManyRequestsError) as refused, admission.admitted():
            pass
        return refused.value.retry_after_s

    def end_one_and_begin_another(admission: Admission) -> None:
        under_way.pop(0).close()
        under_way.append(begin(admission))

    def begin(admission: Admission) -> ExitStack:
        stack = ExitStack()
        stack.enter_context(admission.admitted())
        return stack

    admission = Admission(100, clock=lambda: now_s)
    under_way = [begin(admission) for _ in range(100)]
    assert wait_s(admission) == 5
    for _ in range(300):
        now_s += 0.2
        end_one_and_begin_another(admission)
    assert wait_s(admission) == pytest.approx(20, abs=1)
    now_s += 1000
    assert wait_s(admission) == pytest.approx(412, abs=1)
    for stack in under_way[:60]:
        stack.close()
    under_way += [begin(admission) for _ in range(60)]
    assert wait_s(admission) == 5


def test_a_client_is_told_to_wait_whole_seconds_one_at_least_and_not_for_ever() -> None:
    told = {0.0: 1, 0.2: 1, 1.0: 1, 1.01: 2, 1e9: MAX_RETRY_AFTER_S}
    assert {estimate_s: retry_after_s(estimate_s) for estimate_s in told} == told


def test_while_no_pipeline_computes_retry_after_is_the_rest_of_the_outage_and_the_time_at_the_rate_before_it() -> None:
    now_s, outage = 0.0, ServerOutage(0.0, 12.0)

    def told_s() -> int | None:
        with pytest.raises(TooManyRequestsError) as refused, admission.admitted():
            pass
        return refused.value.retry_after_s

    admission = Admission(20, clock=lambda: now_s, outage=lambda: outage)
    under_way = [ExitStack() for _ in range(20)]
    for stack in under_way:
        stack.enter_context(admission.admitted())
    assert told_s() == 12 + 5
    for _ in range(100):
        now_s += 0.2
        under_way.pop(0).close()
        under_way.append(ExitStack())
        under_way[-1].enter_context(admission.admitted())
    for down_s in (0.0, 5.0, 11.0):
        outage = ServerOutage(down_s, 12.0 - down_s)
        now_s = 20.0 + down_s
        assert told_s() == pytest.approx(12.0 - down_s + 20 * 0.2, abs=1)


def test_requests_for_many_completions_are_refused_before_they_take_memory() -> None:
    async def scenario(app: FrontApp) -> None:
        app.source.may_go_on.clear()
        large: dict[str, Any] = {"prompt": ["a"] * 1024, "max_tokens": 1}
        num_fit = MAX_COMPLETIONS // 1024
        flood = [asyncio.create_task(app.client.post("/v1/completions", json=large)) for _ in range(num_fit + 3)]
        await eventually(lambda: sum(call.done() for call in flood) == 3)
        refused = await app.client.post("/v1/embeddings", json={"input": "a"})
        assert refused.json()["error"]["message"].startswith("this server is answering requests for 8192 completions")
        app.source.may_go_on.set()
        assert Counter(call.status_code for call in await asyncio.gather(*flood)) == {200: num_fit, 429: 3}
        assert (await app.client.post("/v1/completions", json=large)).status_code == 200

    run(scenario)
