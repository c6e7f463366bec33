"""The policy that decides how many pipelines there are, and the load that pipelines publish for it."""

from __future__ import annotations

from typing import Any

import pytest
from ray.serve._private.common import TimeStampedValue
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from gptj_dist.engine.load import Load
from gptj_dist.engine.request import Prompt, Request
from gptj_dist.engine.scheduler import Scheduler
from gptj_dist.engine.scheduling import SchedulerConfig
from gptj_dist.params import SamplingParams
from gptj_dist.serving.app import _scaling
from gptj_dist.serving.scaling import KEPT_S, LOAD, scale


class Policy:
    """Asks the policy and keeps its state, as Serve does."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}

    def number(self, now_s: float, *loads: float, target: int = 1) -> int:
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
            raw_metrics={LOAD: {i: [TimeStampedValue(now_s, load)] for i, load in enumerate(loads)}},
            capacity_adjusted_min_replicas=0,
            capacity_adjusted_max_replicas=100,
            policy_state=self.state,
            last_scale_up_time=None,
            last_scale_down_time=None,
            current_time=now_s,
            config=AutoscalingConfig(),
        )
        number, self.state = scale(context)
        return number


@pytest.fixture
def policy() -> Policy:
    return Policy()


@pytest.mark.parametrize(("loads", "number"), [((0.0,), 0), ((0.1,), 1), ((0.5,), 1), ((0.6,), 2), ((0.5, 2.1), 6)])
def test_every_pipeline_is_half_full_at_most(policy: Policy, loads: tuple[float, ...], number: int) -> None:
    assert policy.number(0, *loads) == number


def test_pipelines_that_have_published_nothing_change_nothing(policy: Policy) -> None:
    assert policy.number(0, target=3) == 3


def test_it_grows_at_once_and_shrinks_to_what_was_needed_lately(policy: Policy) -> None:
    assert policy.number(0, 1.0) == 2
    assert policy.number(1, 2.0) == 4
    assert policy.number(10, 1.2) == 4
    assert policy.number(2 + KEPT_S, 0.2) == 3
    assert policy.number(11 + KEPT_S, 0.2) == 1
    assert policy.number(12 + KEPT_S, 0.0) == 1
    assert policy.number(12 + 2 * KEPT_S, 0.0) == 0


@pytest.mark.parametrize(
    ("load", "share"), [(Load(0.7, 0.2, 0.4), 0.7), (Load(0.2, 0.7, 0.4), 0.7), (Load(0.2, 0.2, 1.0), 0.5)]
)
def test_the_load_is_the_largest_share(load: Load, share: float) -> None:
    assert load.share == share


def test_requests_that_wait_count_with_the_blocks_that_they_want() -> None:
    scheduler = Scheduler(SchedulerConfig(1, 16, 16, 2, (), max_chunk_tokens=64))
    for number in range(3):
        scheduler.add(Request(number, Prompt(tuple(range(48))), SamplingParams(max_tokens=16), 0))
    assert Load.of(scheduler, max_batch_size=2, wait_s=0.0) == Load(1.5, 9 / 16, 0.0)
    assert scheduler.schedule() is not None
    assert Load.of(scheduler, max_batch_size=2, wait_s=0.0).places == 1.5


def test_serve_scales_by_our_policy_unless_another_is_asked_for() -> None:
    ours = _scaling({"autoscaling_config": {"min_replicas": 0, "max_replicas": 3}})["autoscaling_config"]
    assert AutoscalingConfig(**ours).policy.policy_function == "gptj_dist.serving.scaling:scale"
    for given in ({"num_replicas": 2}, {"autoscaling_config": {"target_ongoing_requests": 4}}):
        assert _scaling(given) == given
