"""How a batch gets its answers: so many at a time, again where it may help, and not forever."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable

import httpx
import pytest

from gptj_dist.cli.client import ServerAddress
from gptj_dist.cli.text.batch_answers import BatchAnswer, respond
from gptj_dist.cli.text.batch_http import HttpAnswerer
from gptj_dist.cli.text.batch_requests import BatchRequest
from gptj_dist.cli.text.batch_run import BatchRun, Patience, TryAgain
from gptj_dist.errors import GPTJDistError, ServerError

REQUESTS = [BatchRequest(f"id-{i}", "/v1/completions", {"prompt": str(i)}) for i in range(20)]


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.naps_s: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.naps_s.append(seconds)
        self.now_s += seconds
        await asyncio.sleep(0)

    def patience(self, wait_s: float) -> Patience:
        return Patience(wait_s, clock=lambda: self.now_s, sleep=self.sleep)


def run_batch(
    outcome: Callable[[BatchRequest], BatchAnswer | TryAgain],
    requests: list[BatchRequest],
    clock: Clock,
    wait_s: float = 60,
) -> tuple[list[BatchAnswer], list[str]]:
    """Answers and notes of a batch of two at a time."""
    answers: list[BatchAnswer] = []
    notes: list[str] = []

    class Scripted:
        async def answer(self, request: BatchRequest) -> BatchAnswer | TryAgain:
            await asyncio.sleep(0)
            return outcome(request)

    run = BatchRun(Scripted(), answers.append, notes.append, clock.patience(wait_s))
    asyncio.run(run.run(iter(requests), concurrency=2))
    return answers, notes


def fine(request: BatchRequest) -> BatchAnswer:
    return respond(request, 200, {}, None)


def test_never_more_requests_are_under_way_than_wanted_and_each_is_answered_once() -> None:
    most = 0

    class Counting:
        num_under_way = 0

        async def answer(self, request: BatchRequest) -> BatchAnswer:
            nonlocal most
            self.num_under_way += 1
            most = max(most, self.num_under_way)
            for _ in range(int(request.body["prompt"]) % 3):
                await asyncio.sleep(0)
            self.num_under_way -= 1
            return fine(request)

    answers: list[BatchAnswer] = []
    run = BatchRun(Counting(), answers.append, lambda _: None, Clock().patience(1))
    asyncio.run(run.run(iter(REQUESTS), concurrency=3))
    assert most == 3
    assert Counter(answer.custom_id for answer in answers) == Counter(request.custom_id for request in REQUESTS)


def test_a_busy_server_is_asked_again_when_it_said() -> None:
    clock = Clock()
    outcomes = iter([TryAgain("busy (429)", 7.0), TryAgain("busy (429)", 3.0)])
    answers, notes = run_batch(lambda request: next(outcomes, None) or fine(request), REQUESTS[:1], clock)
    assert [answer.custom_id for answer in answers] == ["id-0"]
    assert clock.naps_s == [7.0, 3.0]
    assert notes == ["busy (429); it is asked again"]


def test_without_a_word_on_when_pauses_grow_up_to_half_a_minute() -> None:
    clock = Clock()
    outcomes = iter([TryAgain("away")] * 8)
    run_batch(lambda request: next(outcomes, None) or fine(request), REQUESTS[:1], clock, wait_s=1000)
    assert clock.naps_s == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


def test_a_batch_that_gets_no_answer_for_long_ends_with_the_reason() -> None:
    clock = Clock()
    with pytest.raises(ServerError, match="no answer for 60 s: still loading"):
        run_batch(lambda _: TryAgain("still loading (503)", 5.0), REQUESTS, clock)
    assert 60 <= clock.now_s < 75


def test_answers_to_others_keep_a_batch_waiting_for_one() -> None:
    clock = Clock()

    def outcome(request: BatchRequest) -> BatchAnswer | TryAgain:
        if request.custom_id == "id-0" and clock.now_s < 500:
            return TryAgain("busy (429)", 30.0)
        clock.now_s += 30
        return fine(request)

    answers, _ = run_batch(outcome, REQUESTS, clock)
    assert len(answers) == len(REQUESTS)


def test_an_error_that_concerns_all_requests_ends_the_batch() -> None:
    def outcome(request: BatchRequest) -> BatchAnswer:
        if request.custom_id == "id-3":
            raise ServerError("no key")
        return fine(request)

    with pytest.raises(ServerError, match="no key"):
        run_batch(outcome, REQUESTS, Clock())


def posted(answer: Callable[[httpx.Request], httpx.Response]) -> BatchAnswer | TryAgain:
    """What one attempt over HTTP comes to."""

    async def post() -> BatchAnswer | TryAgain:
        endpoint = ServerAddress("http://host/model", "secret", 3.0)
        async with HttpAnswerer(endpoint, 1, httpx.MockTransport(answer)) as answerer:
            return await answerer.answer(REQUESTS[0])

    return asyncio.run(post())


def failing(status: int, message: str, param: str | None = None, **headers: str) -> httpx.Response:
    error = {"message": message, "param": param}
    return httpx.Response(status, json={"error": error}, headers={k.replace("_", "-"): v for k, v in headers.items()})


def test_over_http_an_answer_is_what_the_server_said() -> None:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json={"id": "cmpl-1", "usage": {"completion_tokens": 5}})

    outcome = posted(answer)
    assert isinstance(outcome, BatchAnswer)
    assert outcome.response == {
        "status_code": 200,
        "request_id": "cmpl-1",
        "body": {"id": "cmpl-1", "usage": {"completion_tokens": 5}},
    }
    assert (outcome.num_output_tokens, outcome.is_failure) == (5, False)
    assert str(seen[0].url) == "http://host/model/v1/completions"
    assert (json.loads(seen[0].content), seen[0].headers["authorization"]) == ({"prompt": "0"}, "Bearer secret")


@pytest.mark.parametrize(
    "response",
    [failing(400, "wrong", "prompt"), failing(404, "no such model", "model"), failing(500, "internal error")],
)
def test_a_request_that_is_refused_for_good_has_its_error_as_the_answer(response: httpx.Response) -> None:
    outcome = posted(lambda _: response)
    assert isinstance(outcome, BatchAnswer)
    assert outcome.is_failure
    assert outcome.response is not None
    assert outcome.response["status_code"] == response.status_code
    assert outcome.response["body"] == response.json()


def test_a_count_of_tokens_that_is_none_is_not_counted() -> None:
    for usage in ([1], {"completion_tokens": "5"}, {"output_tokens": None}, None):
        outcome = posted(lambda _, usage=usage: httpx.Response(200, json={"usage": usage}))  # type: ignore[misc]
        assert isinstance(outcome, BatchAnswer)
        assert outcome.num_output_tokens == 0


def test_a_limit_that_waiting_does_not_lift_is_an_answer() -> None:
    outcome = posted(lambda _: failing(429, "more than the key may ever", x_should_retry="false"))
    assert isinstance(outcome, BatchAnswer)
    assert outcome.is_failure


@pytest.mark.parametrize(
    ("response", "outcome"),
    [
        (failing(429, "full", Retry_After="7"), TryAgain("full (429)", 7.0)),
        (failing(503, "still loading", Retry_After="5"), TryAgain("still loading (503)", 5.0)),
        (httpx.Response(502, html="<h1>Bad gateway</h1>"), TryAgain("Bad Gateway (502)", None)),
    ],
)
def test_a_server_that_is_busy_or_loads_is_to_be_asked_again(response: httpx.Response, outcome: TryAgain) -> None:
    assert posted(lambda _: response) == outcome


def raising(error: Exception) -> Callable[[httpx.Request], httpx.Response]:
    def answer(_: httpx.Request) -> httpx.Response:
        raise error

    return answer


def test_a_server_that_is_away_is_to_be_asked_again_and_one_that_is_silent_has_failed_the_request() -> None:
    away = posted(raising(httpx.ConnectError("refused")))
    assert isinstance(away, TryAgain)
    assert "no server answers" in away.reason
    cut = posted(raising(httpx.RemoteProtocolError("cut")))
    assert isinstance(cut, TryAgain)
    silent = posted(raising(httpx.ReadTimeout("late")))
    assert isinstance(silent, BatchAnswer)
    assert silent.response is None
    assert silent.error == {
        "code": "timeout",
        "message": "http://host/model was silent for 3 s; --timeout gives it longer",
    }


@pytest.mark.parametrize(
    "response",
    [
        failing(401, "no key"),
        failing(404, "POST /v1/completions is not served here"),
        httpx.Response(200, html="<h1>Welcome</h1>"),
    ],
)
def test_what_would_be_the_same_for_every_request_is_no_answer_to_one(response: httpx.Response) -> None:
    with pytest.raises(GPTJDistError):
        posted(lambda _: response)
