"""Which pipeline a prompt goes to: the most of it is cached there, unless that pipeline is busier than it saves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from gptj_dist.engine.prefix import extend_keys
from gptj_dist.engine.record import RequestRecord, new_records
from gptj_dist.engine.request import Prompt, Request
from gptj_dist.engine.routing import MAX_KEYS, SENT_LIFETIME_S, SHORT_KEY_BYTES, Route, Router, RoutingFacts, expected_s
from gptj_dist.engine.scheduler import Scheduler
from gptj_dist.engine.scheduling import SchedulerConfig
from gptj_dist.params import SamplingParams
from tests.unit.test_prefix_cache import Server

SIZE = 4
TEXT = tuple(range(1, 101))
PARAMS = SamplingParams(max_tokens=8)
IDLE = RoutingFacts(row_s=0.01)
INBOX = "tcp://ingress"


def holding(tokens: Sequence[int], params: SamplingParams = PARAMS, **changes: Any) -> RoutingFacts:
    """The facts of a pipeline that has computed the tokens."""
    keys: list[bytes] = []
    extend_keys(keys, params, tokens, SIZE, len(tokens) // SIZE)
    return replace(IDLE, keys=b"".join(key[:SHORT_KEY_BYTES] for key in keys), **changes)


class Ingress:
    """A router, and the number of its last stream."""

    def __init__(self, **facts: RoutingFacts | None) -> None:
        self.router = Router(SIZE)
        self.facts = facts
        self.router.meet(facts)
        self.stream_id = -1
        self.now_s = 100.0

    def send(self, tokens: Sequence[int], params: SamplingParams = PARAMS, num_choices: int = 1) -> tuple[str, Route]:
        return self.send_records(new_records(tokens, params, num_choices))

    def send_records(self, records: Sequence[RequestRecord]) -> tuple[str, Route]:
        self.stream_id += 1
        order, route = self.router.choose(self.facts, str(self.stream_id), (INBOX, self.stream_id), records, self.now_s)
        assert sorted(order) == sorted(self.facts)
        return order[0], route

    def publish(self, **facts: RoutingFacts | None) -> None:
        self.facts |= facts
        self.router.meet(self.facts)


class TestExpectedTime:
    def test_it_is_the_wait_and_the_rows_until_the_last_token(self) -> None:
        facts = RoutingFacts(wait_s=2.0, row_s=0.01)
        assert expected_s(facts, num_rows=100, num_requests=0, num_tokens=50) == pytest.approx(3.0)
        assert expected_s(facts, num_rows=100, num_requests=4, num_tokens=50) == pytest.approx(4.0)

    def test_requests_that_end_early_run_beside_others_for_a_shorter_time(self) -> None:
        facts = RoutingFacts(row_s=0.01, early_share=0.1)
        assert expected_s(facts, 0, num_requests=1, num_tokens=1000) == pytest.approx(0.05)
        assert expected_s(facts, 0, num_requests=1, num_tokens=2) == pytest.approx(0.01)


class TestSessions:
    """Text that is nowhere cached, so that nothing but the session speaks for a pipeline."""

    def send(self, ingress: Ingress, session: str, number: int = 0, max_tokens: int = 8) -> tuple[str, Route]:
        params = SamplingParams(max_tokens=max_tokens)
        [record] = new_records([number + 1] * 20, params, 1)
        return ingress.send_records([replace(record, session=session)])

    def homes(self, *names: str) -> dict[str, str]:
        facts: dict[str, Any] = dict.fromkeys(names, IDLE)
        return {str(session): self.send(Ingress(**facts), str(session))[0] for session in range(60)}

    def test_all_requests_of_one_go_to_the_same_pipeline_from_every_ingress(self) -> None:
        homes = self.homes("a", "b", "c")
        assert {name: list(homes.values()).count(name) > 10 for name in "abc"} == dict.fromkeys("abc", True)
        assert self.homes("c", "b", "a") == homes
        ingress = Ingress(a=IDLE, b=IDLE, c=IDLE)
        routes = set()
        for number in range(3):
            name, route = self.send(ingress, "7", number)
            assert name == homes["7"]
            routes.add(route)
            ingress.router.end(name, str(ingress.stream_id))
        assert Route.SESSION in routes

    def test_when_a_pipeline_comes_or_goes_no_other_sessions_change_theirs(self) -> None:
        before, after = self.homes("a", "b"), self.homes("a", "b", "c")
        changed = {session for session, name in after.items() if name != before[session]}
        assert changed == {session for session, name in after.items() if name == "c"}
        assert 0 < len(changed) < 40

    @pytest.mark.parametrize(("num_requests", "stays"), [(0, True), (2, True), (40, False)])
    def test_one_leaves_its_pipeline_while_that_is_much_busier(self, num_requests: int, stays: bool) -> None:
        home = self.homes("a", "b")["7"]
        facts: dict[str, Any] = {"a": IDLE, "b": IDLE} | {home: replace(IDLE, num_requests=num_requests)}
        assert (self.send(Ingress(**facts), "7", max_tokens=50)[0] == home) == stays

    def test_one_follows_its_prefix_where_most_of_a_long_one_is(self) -> None:
        home = self.homes("a", "b")["7"]
        other = "b" if home == "a" else "a"
        [record] = new_records(TEXT, PARAMS, 1)
        facts: dict[str, Any] = {home: IDLE, other: holding(TEXT)}
        assert Ingress(**facts).send_records([replace(record, session="7")]) == (other, Route.PREFIX)


def test_a_prompt_goes_where_most_of_it_is_cached() -> None:
    ingress = Ingress(a=IDLE, b=holding(TEXT[:40]), c=holding(TEXT[:20]))
    assert ingress.send(TEXT) == ("b", Route.PREFIX)
    assert ingress.send((0, *TEXT))[1] is Route.NEW


def test_unless_that_pipeline_is_busier_than_that_saves() -> None:
    """40 cached tokens save 0.4 s of 1 s. Nine requests cost 9 * 0.5 * 8 rows, which are 0.36 s."""
    assert Ingress(a=IDLE, b=holding(TEXT[:40], wait_s=0.3)).send(TEXT) == ("b", Route.PREFIX)
    assert Ingress(a=IDLE, b=holding(TEXT[:40], wait_s=0.6)).send(TEXT) == ("a", Route.LOAD)
    assert Ingress(a=IDLE, b=holding(TEXT[:40], num_requests=9)).send(TEXT) == ("b", Route.PREFIX)
    assert Ingress(a=IDLE, b=holding(TEXT[:40], num_requests=14)).send(TEXT) == ("a", Route.LOAD)


def test_a_pipeline_that_has_ended_is_the_last_choice() -> None:
    ingress = Ingress(a=holding(TEXT, down_s=float("inf")), b=replace(IDLE, num_requests=100))
    assert ingress.send(TEXT) == ("b", Route.LOAD)


def test_prompts_that_nobody_knows_take_turns() -> None:
    ingress = Ingress(a=IDLE, b=IDLE, c=IDLE)
    chosen = [ingress.send((first, *TEXT), replace(PARAMS, max_tokens=1))[0] for first in range(200, 209)]
    assert sorted(chosen) == [*"aaabbbccc"]


def test_what_was_sent_counts_until_the_pipeline_has_published_it() -> None:
    ingress = Ingress(a=IDLE, b=IDLE)
    first, _ = ingress.send(TEXT)
    assert ingress.send(TEXT) == (first, Route.PREFIX)
    ingress.publish(**{first: replace(IDLE, received={INBOX: ingress.stream_id})})
    assert ingress.send((*TEXT, 5))[1] is Route.NEW, "the pipeline has it, and holds nothing"


def test_facts_from_before_a_request_came_do_not_hide_it() -> None:
    ingress = Ingress(a=IDLE, b=IDLE)
    first, _ = ingress.send(TEXT)
    ingress.publish(a=replace(IDLE, received={INBOX: ingress.stream_id - 1, "tcp://other": 99}), b=IDLE)
    assert ingress.send(TEXT) == (first, Route.PREFIX)


def test_a_request_that_never_got_there_is_forgotten() -> None:
    ingress = Ingress(a=IDLE, b=IDLE)
    first, _ = ingress.send(TEXT, num_choices=100)
    ingress.now_s += SENT_LIFETIME_S
    other, _ = ingress.send((0, *TEXT))
    assert other != first
    ingress.publish()
    assert ingress.send(TEXT)[1] is Route.NEW


def test_calls_that_have_ended_are_no_load_but_what_they_computed_is_there() -> None:
    """Both before the pipeline has published that it has a call, and after."""
    ingress = Ingress(a=IDLE, b=IDLE)
    first, _ = ingress.send(TEXT, num_choices=100)
    assert ingress.send(TEXT)[1] is Route.LOAD
    ingress.router.end(first, "0")
    assert ingress.send(TEXT) == (first, Route.PREFIX)
    ingress = Ingress(a=IDLE, b=holding(TEXT))
    assert [ingress.send(TEXT), ingress.send(TEXT)] == [("b", Route.PREFIX)] * 2
    computing, received = {INBOX: [0, 1], "tcp://other": [0]}, {INBOX: 1}
    ingress.publish(b=holding(TEXT, wait_s=5.0, num_requests=2, received=received, computing=computing))
    for call in ("other", "0", "0"):
        ingress.router.end("b", call)
    assert ingress.send(TEXT) == ("a", Route.LOAD)
    ingress.router.end("b", "1")
    assert ingress.send(TEXT) == ("b", Route.PREFIX)
    ingress.router.end("gone", "2")


def test_facts_from_before_a_call_ended_do_not_bring_it_back() -> None:
    ingress = Ingress(a=IDLE, b=holding(TEXT))
    assert ingress.send(TEXT, num_choices=2) == ("b", Route.PREFIX)
    ingress.router.end("b", "0")
    late = holding(TEXT, wait_s=5.0, num_requests=2, received={INBOX: 0}, computing={INBOX: [0, 1]})
    ingress.publish(b=late)
    assert ingress.send(TEXT) == ("b", Route.PREFIX)
    ingress.publish(b=replace(late, num_requests=3, received={INBOX: 1}, computing={"tcp://other": [0, 1], INBOX: [2]}))
    assert ingress.send(TEXT)[1] is Route.LOAD


def test_another_choice_for_a_request_replaces_the_last_one() -> None:
    ingress = Ingress(a=IDLE, b=IDLE)
    first, _ = ingress.send(TEXT)
    ingress.facts.pop(first)
    ingress.stream_id -= 1
    assert ingress.send(TEXT)[0] != first


def test_a_moved_request_goes_where_its_tokens_are() -> None:
    [record] = new_records(TEXT[:20], PARAMS, 1)
    moved = record.moved(TEXT[20:24], "")
    assert Ingress(a=holding(TEXT[:16]), b=holding(TEXT[:20])).send_records([moved]) == ("b", Route.PREFIX)


def test_salts_have_prefixes_of_their_own_and_prompts_with_logprobs_none() -> None:
    salted, scored = replace(PARAMS, cache_salt="mine"), replace(PARAMS, prompt_logprobs=0)
    ingress = Ingress(a=holding(TEXT), b=holding(TEXT, salted))
    assert ingress.send(TEXT, salted) == ("b", Route.PREFIX)
    assert ingress.send(TEXT, scored)[1] is Route.NEW


def test_pipelines_that_have_published_nothing_yet_are_chosen_by_what_was_sent() -> None:
    for ingress in (Ingress(a=None, b=None), Ingress(a=IDLE, b=None)):
        assert {ingress.send((first, *TEXT))[0] for first in (200, 201)} == {"a", "b"}


class TestFacts:
    def test_a_pipeline_publishes_what_is_cached_and_what_its_requests_compute(self) -> None:
        server = Server()
        server.run(TEXT[:30])
        server.begin((0, *TEXT[:11]))
        facts = RoutingFacts.of(server.scheduler, 0.0, 0.0)
        assert facts.num_requests == 1
        ingress = Ingress(a=IDLE, b=replace(facts, row_s=0.01, num_requests=0))
        assert ingress.send(TEXT) == ("b", Route.PREFIX)
        ingress = Ingress(a=IDLE, b=replace(facts, row_s=0.01, num_requests=0))
        assert ingress.send((0, *TEXT)) == ("b", Route.PREFIX)

    def test_the_oldest_blocks_are_left_out(self) -> None:
        server = Server(num_blocks=2 * MAX_KEYS)
        for first in range(3):
            server.run((first, *range(MAX_KEYS * SIZE // 2)))
        facts = RoutingFacts.of(server.scheduler, 0.0, 0.0)
        assert len(facts.keys) == MAX_KEYS * SHORT_KEY_BYTES
        ingress = Ingress(a=IDLE, b=replace(facts, row_s=0.01))
        routes = [ingress.send((first, *range(30)))[1] for first in range(3)]
        assert routes == [Route.NEW, Route.PREFIX, Route.PREFIX]

    def test_a_full_pipeline_has_a_turn_for_each_that_waits(self) -> None:
        scheduler = Scheduler(SchedulerConfig(1, 100, SIZE, max_batch_size=1, eos_token_ids=()))
        for request_id in range(4):
            scheduler.add(Request(request_id, Prompt(TEXT[:5]), PARAMS, 0))
        scheduler.schedule()
        assert RoutingFacts.of(scheduler, 2.0, 0.0).wait_s == pytest.approx(8.0)

    def test_without_a_prefix_cache_there_are_no_keys(self) -> None:
        server = Server(keeps_prefixes=False)
        server.run(TEXT)
        assert RoutingFacts.of(server.scheduler, 0.0, 0.0).keys == b""
