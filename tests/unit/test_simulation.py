"""The simulator against what queueing theory knows, and against the planner's formula."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest

from gptj_dist.config import BLOCK_SIZE_TOKENS, ModelConfig
from gptj_dist.engine.plan import Chunk, Plan, StageTiming
from gptj_dist.engine.scheduling import SchedulerConfig
from gptj_dist.operate.simulation.clock import Clock, Processor
from gptj_dist.operate.simulation.costs import FREE, MEASURED, CoordinatorCosts, IngressCosts, ServerCosts
from gptj_dist.operate.simulation.deployment import deployments, pipeline_spec
from gptj_dist.operate.simulation.fleet import Fleet, PipelineSpec
from gptj_dist.operate.simulation.flow import FlowFleet, FlowTimes, mean_context
from gptj_dist.operate.simulation.load import ClosedLoop, Lengths, OpenLoop, lengths_of
from gptj_dist.operate.simulation.outcome import Outcome, Trip, percentile, summed_up
from gptj_dist.operate.simulation.stages import SimulatedStages
from gptj_dist.operate.simulation.times import Edge, FormulaTimes, LineTimes, edges
from gptj_dist.planning.cost import Chunks
from gptj_dist.planning.devices import known_device
from gptj_dist.planning.forecast import PlannedStage, Workload, decode_tokens_per_s
from gptj_dist.planning.partition import layer_ranges, plan_partition

SIX_B = Workload(ModelConfig(50400, 28, 4096, 16, 64, 16384, 2048, (50256,), "float16"), "float16", 2048)


def spec(
    num_stages: int, step_s: float, row_s: float = 0.0, hop_s: float = 0.0, batch: int = 64, chunk: int | None = None
) -> PipelineSpec:
    config = SchedulerConfig(
        num_stages, 16_384, BLOCK_SIZE_TOKENS, batch, (), max_chunk_tokens=chunk, keeps_prefixes=False
    )
    times = LineTimes((step_s,) * num_stages, (row_s,) * num_stages)
    return PipelineSpec(config, times, [Edge(hop_s)] * (num_stages + 1))


def plan_of(num_tokens: int) -> Plan:
    return Plan(0, (), (), (Chunk(0, 0, (0,) * num_tokens, (), samples=True),))


# Clock and processors


def test_actions_run_in_the_order_of_time_and_those_of_one_time_in_the_order_asked_for() -> None:
    clock, seen = Clock(), []

    def note(name: str) -> None:
        seen.append((clock.now_s, name))

    for delay_s, name in ((2.0, "c"), (1.0, "a"), (1.0, "b"), (3.0, "d")):
        clock.after(delay_s, partial(note, name))
    clock.run(until_s=3.0)
    assert seen == [(1.0, "a"), (1.0, "b"), (2.0, "c")]
    clock.run()
    assert seen[-1] == (3.0, "d")


def test_a_processor_does_one_thing_after_the_other() -> None:
    clock, begun = Clock(), []
    processor = Processor(clock)

    def job() -> None:
        begun.append(clock.now_s)
        processor.work(2.0)

    for at_s in (0.0, 1.0, 1.5, 10.0):
        clock.at(at_s, lambda: processor.when_free(job))
    clock.run()
    assert begun == [0.0, 2.0, 4.0, 10.0]
    assert processor.busy_s == 8.0


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_jobs_of_equal_length_wait_as_long_as_an_m_d_1_queue_has_it(load: float) -> None:
    """Pollaczek and Khinchine: the mean wait is load / (2 (1 - load)) services."""
    clock, rng, waits = Clock(), random.Random(1), []
    processor = Processor(clock)

    def arrive() -> None:
        came_s = clock.now_s

        def serve() -> None:
            waits.append(clock.now_s - came_s)
            processor.work(1.0)

        processor.when_free(serve)

    now_s = 0.0
    for _ in range(20_000):
        now_s += rng.expovariate(load)
        clock.at(now_s, arrive)
    clock.run()
    assert sum(waits) / len(waits) == pytest.approx(load / (2 * (1 - load)), rel=0.08)


# Stages


def test_plans_fill_the_stages_and_then_come_at_the_period_of_the_slowest() -> None:
    clock, landed = Clock(), []
    stages = SimulatedStages(clock, LineTimes((1.0, 3.0, 2.0), (0.0, 0.0, 0.0)), [Edge(0.5)] * 4)
    for _ in range(4):
        stages.submit(plan_of(1), 0.0, lambda _, timing: landed.append((clock.now_s, timing)))
    clock.run()
    assert [at_s for at_s, _ in landed] == [8.0, 11.0, 14.0, 17.0]
    assert landed[0][1] == StageTiming(0, 3_000_000_000)
    assert stages.busy_s == [4.0, 12.0, 8.0]


def test_a_link_sends_one_frame_after_the_other_while_others_are_on_their_way() -> None:
    clock, landed = Clock(), []
    slow = Edge(10.0, row_bytes=100.0, bytes_s=50.0)  # 2 s a row
    stages = SimulatedStages(clock, LineTimes((0.0, 0.0), (0.0, 0.0)), [Edge(0.0), slow, Edge(0.0)])
    for _ in range(2):
        stages.submit(plan_of(3), 0.0, lambda *_: landed.append(clock.now_s))
    clock.run()
    assert landed == [16.0, 22.0]
    assert stages.sent_s == [0.0, 12.0, 0.0]


def test_there_is_one_edge_more_than_stages() -> None:
    with pytest.raises(ValueError, match="2 stages have 3 edges, got 2"):
        SimulatedStages(Clock(), LineTimes((1.0, 1.0), (0.0, 0.0)), [Edge(0.0)] * 2)


@pytest.mark.parametrize("device", ["cpu", "l4"])
def test_the_time_of_a_plan_is_that_of_the_planners_formula(device: str) -> None:
    stages = [PlannedStage(known_device(device), layers) for layers in layer_ranges(plan_partition(SIX_B.model, 3))]
    chunks = (
        Chunk(0, 300, (0,), (), samples=True),
        Chunk(1, 300, (0,), (), samples=True),
        Chunk(2, 64, (0,) * 100, (), samples=False),
        Chunk(3, 0, (0,) * 37, (), samples=True),
    )
    step = (Chunks(2, 1, 301), Chunks(1, 100, 164, has_samples=False), Chunks(1, 37, 37))
    expected = [stage.step_s(SIX_B, step) for stage in stages]
    assert FormulaTimes(SIX_B, stages).seconds(Plan(0, (), (), chunks)) == pytest.approx(expected)


# A pipeline


@pytest.mark.parametrize("num_stages", [1, 2, 5, 16])
def test_a_lone_request_takes_a_round_for_each_token(num_stages: int) -> None:
    pipeline = spec(num_stages, step_s=0.010, hop_s=0.001, chunk=64)
    outcome = Fleet([pipeline]).run(ClosedLoop(1, 1, Lengths(32, 11)))
    round_s = num_stages * 0.010 + (num_stages + 1) * 0.001
    assert outcome.first_token_s[0] == pytest.approx(round_s)
    assert outcome.token_s[0] == pytest.approx(round_s)
    assert outcome.tokens_per_s == pytest.approx(1 / round_s)
    assert outcome.busy["stages"] == pytest.approx(0.010 / round_s)
    assert outcome.limit == "requests"


@pytest.mark.parametrize("num_stages", [1, 2, 4, 16, 64])
def test_as_many_requests_as_stages_fill_them_and_each_gets_a_token_in_as_many_periods(num_stages: int) -> None:
    fleet = Fleet([spec(num_stages, step_s=0.010, chunk=8)])
    outcome = fleet.run(ClosedLoop(num_stages, num_stages, Lengths(8, 120)))
    assert outcome.token_s[1] == pytest.approx(num_stages * 0.010, rel=0.02)
    assert outcome.tokens_per_s == pytest.approx(100, rel=0.4)  # ramps included
    assert fleet.pipelines[0].scheduler.num_in_flight == 0


def test_the_coordinator_limits_when_a_plan_takes_it_longer_than_a_stage() -> None:
    costs = ServerCosts(CoordinatorCosts(plan_s=0.004))
    outcome = Fleet([spec(8, step_s=0.001, chunk=8)], costs=costs).run(ClosedLoop(8, 8, Lengths(8, 200)))
    assert outcome.limit == "coordinator"
    assert outcome.token_s[0] == pytest.approx(8 * 0.004, rel=0.02)


def test_the_ingress_limits_when_its_tokens_take_longer_than_all_pipelines() -> None:
    costs = ServerCosts(ingress=IngressCosts(token_s=0.001))
    specs = [spec(1, step_s=0.010, chunk=8)] * 4
    for num_ingresses, limit in ((1, "ingress"), (8, "stages")):
        fleet = Fleet(specs, num_ingresses, costs, has_router=False)
        outcome = fleet.run(ClosedLoop(64, 128, Lengths(8, 30)))
        assert outcome.limit == limit
        assert num_ingresses > 1 or outcome.tokens_per_s == pytest.approx(1000, rel=0.05)


@pytest.mark.parametrize("has_router", [True, False])
def test_requests_rate_and_stay_obey_littles_law(has_router: bool) -> None:
    specs = [spec(2, step_s=0.005, row_s=1e-5)] * 3
    fleet = Fleet(specs, 2, ServerCosts(CoordinatorCosts(1e-4, 1e-4), IngressCosts(1e-4, 1e-5, 1e-5)), has_router)
    outcome = fleet.run(OpenLoop(20.0, 600, Lengths(64, 20, 0.5), seed=3))
    stay_s = outcome.first_token_s[0] + 19 * outcome.token_s[0]
    assert outcome.tokens_per_s == pytest.approx(20 * 20, rel=0.1)
    assert outcome.mean_requests == pytest.approx(20 * stay_s, rel=0.2)


def test_prompts_of_one_chunk_wait_at_a_lone_stage_as_an_m_d_1_queue_has_it() -> None:
    """One token is asked for, so each request is one step, and steps do not overlap if a plan holds one request."""
    load, step_s = 0.6, 0.010
    outcome = Fleet([spec(1, step_s, batch=1, chunk=8)]).run(OpenLoop(load / step_s, 4_000, Lengths(8, 1)))
    mean_wait = outcome.mean_requests / (load / step_s) - step_s
    assert mean_wait / step_s == pytest.approx(load / (2 * (1 - load)), rel=0.15)


def test_equal_seeds_give_equal_outcomes_and_others_do_not() -> None:
    def run(seed: int) -> Outcome:
        return Fleet([spec(3, 0.004)] * 2).run(OpenLoop(5.0, 60, Lengths(100, 20, 0.8), seed))

    assert run(1) == run(1) != run(2)


def test_the_planners_rate_of_a_full_pipeline_is_the_simulated_one() -> None:
    """Decode alone: prompts of one token, and outputs that stay near the context that the planner assumes."""
    workload = replace(SIX_B, max_model_len=256)
    stages = [PlannedStage(known_device("l4"), layers) for layers in layer_ranges((7, 7, 7, 7))]
    config = SchedulerConfig(4, 20_000, BLOCK_SIZE_TOKENS, 64, (), keeps_prefixes=False)
    pipeline = PipelineSpec(config, FormulaTimes(workload, stages), edges(workload, stages))
    outcome = Fleet([pipeline]).run(ClosedLoop(32, 32, Lengths(1, 500)))
    assert 1 / outcome.token_s[0] * 32 == pytest.approx(decode_tokens_per_s(workload, stages, 32), rel=0.05)


@pytest.mark.parametrize(("rate", "keeps_up"), [(4.0, True), (8.0, True), (14.0, False)])
def test_a_queue_that_grows_is_told_apart(rate: float, keeps_up: bool) -> None:
    """Ten requests at a time have a token each 10 ms, of 100: ten requests a second."""
    pipeline = spec(1, step_s=0.010, batch=10, chunk=64)
    assert Fleet([pipeline]).run(OpenLoop(rate, 400, Lengths(8, 100, 0.5))).keeps_up == keeps_up


def test_devices_are_dealt_out_to_as_many_pipelines_as_have_room() -> None:
    small = replace(known_device("l4"), name="small", memory_bytes=9e9)
    found = list(deployments(SIX_B, [small, known_device("l4"), small, known_device("l4")]))
    assert [len(deployment.pipelines) for deployment in found] == [1, 2]  # a small one alone has no room
    for pipeline in found[1].pipelines:
        assert "l4" in {stage.device.name for stage in pipeline}


# Very many pipelines


FOUR = [PlannedStage(known_device("l4"), layers) for layers in layer_ranges((7, 7, 7, 7))]


@pytest.mark.parametrize("rate", [1.0, 6.0])
def test_the_coarse_simulation_has_the_rates_and_times_of_the_fine_one(rate: float) -> None:
    load = OpenLoop(rate, 120, Lengths(256, 64, 0.8), seed=2)
    fine = Fleet([pipeline_spec(SIX_B, FOUR, 64)] * 2, costs=MEASURED).run(load)
    times = FlowTimes(SIX_B, FOUR, MEASURED, mean_context(256, 64))
    coarse = FlowFleet(times, 2, 64, 1, MEASURED).run(load)
    assert coarse.tokens_per_s == pytest.approx(fine.tokens_per_s, rel=0.05)
    assert coarse.token_s[0] == pytest.approx(fine.token_s[0], rel=0.08)
    assert coarse.first_token_s[0] == pytest.approx(fine.first_token_s[0], rel=0.25)
    assert coarse.mean_requests == pytest.approx(fine.mean_requests, rel=0.08)


def test_more_ingresses_share_the_work_and_one_that_is_overloaded_says_so() -> None:
    load = OpenLoop(400.0, 2000, Lengths(64, 64), seed=2)
    times = FlowTimes(SIX_B, FOUR, MEASURED, mean_context(64, 64))
    one, four = (FlowFleet(times, 100, 64, count, MEASURED).run(load) for count in (1, 4))
    assert one.limit == "ingress"
    assert 2 * four.busy["ingress"] < one.busy["ingress"] < 4 * four.busy["ingress"]  # each learns of all pipelines
    assert FlowFleet(times, 100, 64, 4, MEASURED).run(load) == four


# Loads and figures


def test_lengths_have_their_means_and_fit_the_context() -> None:
    drawn = lengths_of(OpenLoop(1.0, 20_000, Lengths(200, 60, 0.8)))
    assert sum(prompt for prompt, _ in drawn) / len(drawn) == pytest.approx(200, rel=0.03)
    assert sum(output for _, output in drawn) / len(drawn) == pytest.approx(60, rel=0.03)
    crowded = lengths_of(OpenLoop(1.0, 2_000, Lengths(900, 900, 1.5, most_tokens=1024)))
    assert max(prompt + output for prompt, output in crowded) <= 1024
    assert min(map(min, crowded)) >= 1
    assert set(lengths_of(OpenLoop(1.0, 5, Lengths(12, 3)))) == {(12, 3)}


def test_arrivals_are_a_poisson_process() -> None:
    times = OpenLoop(8.0, 20_000, Lengths(1, 1)).arrivals()
    gaps = [b - a for a, b in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(1 / 8, rel=0.03)
    assert math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) == pytest.approx(1 / 8, rel=0.05)


def test_tokens_count_within_the_time_that_counts() -> None:
    trips = [Trip(0.0, 11, 1.0, 11.0), Trip(5.0, 1, 6.0, 6.0)]
    outcome = summed_up(trips, {"stages": 0.5, "links": 0.2}, 3.0, 8.0)
    assert outcome.tokens_per_s == pytest.approx((5 + 1) / 5)
    assert outcome.mean_requests == pytest.approx((5 + 1) / 5)
    assert outcome.first_token_s[0] == 1.0
    assert outcome.token_s == (1.0, 1.0)
    assert outcome.limit == "requests"
    assert summed_up(trips, {"stages": 0.95, "links": 0.2}, 3.0, 8.0).limit == "stages"
    assert percentile([40.0, 10.0, 30.0, 20.0], 90) == pytest.approx(37)


def test_nothing_but_stages_takes_time_unless_it_is_said() -> None:
    assert ServerCosts(CoordinatorCosts(0, 0, 0, 0), IngressCosts(0, 0, 0, 0, 0)) == FREE
