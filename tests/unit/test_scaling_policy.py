"""The policy that decides how many pipelines there are, and the load that pipelines publish for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from ray.serve._private.common import TimeStampedValue
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from gptj_dist.chunking import StepCost
from gptj_dist.engine.load import RECENT_S, WINDOW_S, Arrivals, Load, RequestCost
from gptj_dist.engine.plan import Result, StageTiming
from gptj_dist.engine.request import Prompt, Request
from gptj_dist.engine.scheduler import Scheduler
from gptj_dist.engine.scheduling import SchedulerConfig
from gptj_dist.params import SamplingParams
from gptj_dist.serving.app import _scaling
from gptj_dist.serving.scaling import KEPT_S, NEEDED, Scale


class Policy:
    """Asks the policy and keeps its state, as Serve does."""

    def __init__(self, scale: Scale | None = None) -> None:
        self.scale = scale or Scale()
        self.state: dict[str, Any] = {}

    def number(self, now_s: float, *needed: float, target: int = 1) -> int:
        context = AutoscalingContext(
            deployment_id=None,
            deployment_name="Pipeline",
            app_name="gptj",
            current_num_replicas=target,
            target_num_replicas=target,
            running_replicas=[],
            total_num_requests=0,
            total_queued_requests=None,
            aggregated_metrics=None,
            raw_metrics={NEEDED: {i: [TimeStampedValue(now_s, load)] for i, load in enumerate(needed)}},
            capacity_adjusted_min_replicas=0,
            capacity_adjusted_max_replicas=100,
            policy_state=self.state,
            last_scale_up_time=None,
            last_scale_down_time=None,
            current_time=now_s,
            config=AutoscalingConfig(),
        )
        number, self.state = self.scale(context)
        return number


@pytest.fixture
def policy() -> Policy:
    return Policy()


@pytest.mark.parametrize(("needed", "number"), [((0.0,), 0), ((0.1,), 1), ((1.0,), 1), ((1.1,), 2), ((0.5, 2.1), 3)])
def test_there_are_as_many_pipelines_as_requests_need(policy: Policy, needed: tuple[float, ...], number: int) -> None:
    assert policy.number(0, *needed) == number


def test_pipelines_that_have_published_nothing_change_nothing(policy: Policy) -> None:
    assert policy.number(0, target=3) == 3


def test_it_grows_at_once_and_shrinks_to_what_was_needed_lately(policy: Policy) -> None:
    assert policy.number(0, 2.0) == 2
    assert policy.number(1, 4.0) == 4
    assert policy.number(10, 2.2) == 4
    assert policy.number(2 + KEPT_S, 0.2) == 3
    assert policy.number(11 + KEPT_S, 0.2) == 1
    assert policy.number(12 + KEPT_S, 0.0) == 1
    assert policy.number(12 + 2 * KEPT_S, 0.0) == 0


def test_how_long_a_number_is_kept_is_a_setting() -> None:
    policy = Policy(Scale(kept_s=3.0))
    assert policy.number(0, 2.0) == 2
    assert policy.number(3, 0.2) == 2
    assert policy.number(4, 0.2) == 1


USUAL = Load(running=0.2, wanted=0.2, arriving=0.4, backlog_s=0.0, is_in_use=True)


@pytest.mark.parametrize(
    ("load", "number"),
    [
        (USUAL, 0.4),  # by places
        (replace(USUAL, wanted=0.6), 0.5),  # by time: many short requests
        (replace(USUAL, running=1.0, wanted=5.0, arriving=1.6), 2.0),  # as many as can compute them, whatever waits
        (replace(USUAL, running=1.0, wanted=5.0, arriving=0.8, backlog_s=24.0), 2.0),  # what waits takes time, too
        (replace(USUAL, running=0.9, wanted=0.9, arriving=0.0), 1.0),  # few and long ones
        (replace(USUAL, running=0.99, wanted=0.99, arriving=0.0), 1.1),
        (replace(USUAL, running=0.0, wanted=0.0, arriving=0.0), 0.01),  # came lately
        (replace(USUAL, is_in_use=False), 0.0),  # the server's own
    ],
)
def test_pipelines_are_needed_for_places_and_time(load: Load, number: float) -> None:
    assert load.pipelines == pytest.approx(number)


SIZE, LEFT = 16, 16


def loaded(num_requests: int, num_blocks: int = 64, max_batch_size: int = 2) -> Scheduler:
    scheduler = Scheduler(SchedulerConfig(1, num_blocks, SIZE, max_batch_size, (), max_chunk_tokens=64))
    for number in range(num_requests):
        scheduler.add(Request(number, Prompt(tuple(range(48))), SamplingParams(max_tokens=LEFT), 0))
    return scheduler


def load_of(scheduler: Scheduler, max_batch_size: int = 2) -> Load:
    return Arrivals(0.0).load(scheduler, 1, max_batch_size, early_share=0.0, has_requests=True, now_s=0.0)


def test_requests_that_wait_count_with_the_blocks_that_they_want() -> None:
    scheduler = loaded(3, num_blocks=16)
    assert load_of(scheduler).wanted == 1.5
    assert scheduler.schedule() is not None
    load = load_of(scheduler)
    assert (load.running, load.wanted) == (0.5, 1.5)
    assert load_of(loaded(3, num_blocks=16), max_batch_size=32).wanted == 9 / 16


def test_what_comes_takes_time() -> None:
    cost = RequestCost.of(StepCost(0.02, 0.001), num_stages=2, num_at_once=4, early_share=0.1)
    assert cost.seconds(100, 5) == pytest.approx(0.1 + 5 * 0.011)
    assert cost.seconds(100, 50) == pytest.approx(0.1 + 10 * 0.011)  # usually they end before that
    arrivals = Arrivals(0.0)
    for second in range(10):
        arrivals.note(second, 100, 5)
    assert arrivals.share(cost, 9.5) == pytest.approx(3 * cost.seconds(100, 5) / WINDOW_S)
    assert arrivals.has_any(9 + RECENT_S)
    assert not arrivals.has_any(9.1 + RECENT_S)
    assert arrivals.share(cost, 60.0) == 0


def test_a_pipeline_that_has_just_started_knows_its_arrivals() -> None:
    cost, arrivals = RequestCost(0.001, 0.0, None), Arrivals(100.0)
    arrivals.note(100.5, 500, 5)
    assert arrivals.share(cost, 100.5) == pytest.approx(0.5)
    assert arrivals.share(cost, 102.0) == pytest.approx(0.25)


def test_work_that_waits_is_measured_in_seconds() -> None:
    scheduler = loaded(5)
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.update(Result(plan.plan_id, (7,), timings=(StageTiming(0, 10**9),)))
    cost = RequestCost.of(scheduler.step_cost, 1, max(1, scheduler.num_running), 0.0)
    load = load_of(scheduler)
    assert load.backlog_s == pytest.approx(scheduler.num_waiting * cost.seconds(48, LEFT))
    assert load.backlog_s > 0


def test_serve_scales_by_our_policy_unless_another_is_asked_for() -> None:
    ours = _scaling({"autoscaling_config": {"min_replicas": 0, "max_replicas": 3}})["autoscaling_config"]
    assert AutoscalingConfig(**ours).policy.policy_function == "gptj_dist.serving.scaling:Scale"
    for given in ({"num_replicas": 2}, {"autoscaling_config": {"target_ongoing_requests": 4}}):
        assert _scaling(given) == given
