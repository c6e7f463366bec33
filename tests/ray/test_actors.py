"""Stages as Ray actors joined by ZeroMQ: the same bits as in one process, however many there are."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from array import array
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.util.placement_group import placement_group, remove_placement_group

from gptj_dist import LLM, SamplingParams
from gptj_dist.config import PipelineConfig
from gptj_dist.engine.async_engine import AsyncEngine
from gptj_dist.engine.mailbox import Delta
from gptj_dist.engine.plan import Chunk, Plan, Result
from gptj_dist.engine.record import new_records
from gptj_dist.engine.request import Prompt, Request
from gptj_dist.engine.scheduler import Scheduler
from gptj_dist.engine.scheduling import SchedulerConfig
from gptj_dist.errors import CheckpointError, ConfigurationError, StageFailedError
from gptj_dist.logs import LogSettings
from gptj_dist.params import Pooling
from gptj_dist.placement import StageResources
from gptj_dist.stages import actor_classes
from gptj_dist.stages.actor import CONCURRENCY_GROUPS, PlacedStage, Stage
from gptj_dist.stages.blueprint import draw_blueprint
from gptj_dist.stages.group import Placement, StageGroup
from gptj_dist.stages.local import load_local
from gptj_dist.stages.transport import open_transport
from gptj_dist.stages.transport.frames import EndFrame, Frame, PlanFrame
from gptj_dist.stages.wire import decode_hidden, encode_hidden
from tests.http.server import local_ray

pytestmark = pytest.mark.ray

PROMPTS = ["The state of the Union is", "Call me Ishmael. " * 8, "It is", "My fellow citizens, the whale " * 3]
HALF_A_CPU = StageResources("cpu", 0.5, 0)
NUM_BLOCKS = 7
"""Little enough that requests are preempted."""


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with local_ray():
        yield


GREEDY = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)


class LogitsStage(Stage):
    """A stage whose last one sends logits where it would send tokens."""

    def _compute(self, frame: Frame) -> Frame:
        assert isinstance(frame, PlanFrame)
        before = None if frame.hidden is None else decode_hidden(frame.hidden)
        return PlanFrame(frame.plan, encode_hidden(self._runner.forward(frame.plan, before)))


Logits = dict[tuple[int, int], torch.Tensor]
"""By request and position."""


class Recorder:
    """Drives a scheduler over `compute`, and keeps every row of logits; tokens are the greedy ones."""

    def __init__(self, num_stages: int, prompts: list[list[int]]) -> None:
        self.scheduler = Scheduler(
            SchedulerConfig(num_stages, NUM_BLOCKS, 16, 8, eos_token_ids=(0,), max_chunk_tokens=7)
        )
        params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
        for request_id, prompt in enumerate(prompts):
            self.scheduler.add(Request(request_id, Prompt(tuple(prompt)), params, noise_key=0))
        self.logits: Logits = {}

    def land(self, plan: Any, logits: torch.Tensor) -> None:
        chunks = [chunk for chunk in plan.chunks if chunk.samples]
        for chunk, row in zip(chunks, logits, strict=True):
            self.logits[chunk.request_id, chunk.start + len(chunk.token_ids)] = row.clone()
        self.scheduler.update(Result(plan.plan_id, tuple(logits.argmax(dim=-1).tolist())))


def logits_in_one_process(prompts: list[list[int]]) -> Logits:
    _, (runner,) = load_local(PipelineConfig("demo", device="cpu", dtype="float32"))
    recorder = Recorder(1, prompts)
    while (plan := recorder.scheduler.schedule()) is not None:
        recorder.land(plan, runner.forward(plan, None))
    return recorder.logits


def logits_of_actors(num_stages: int, prompts: list[list[int]]) -> Logits:
    blueprint = draw_blueprint(PipelineConfig("demo", stages=num_stages, device="cpu"))
    actor_class = ray.remote(concurrency_groups=CONCURRENCY_GROUPS)(LogitsStage)
    specs = blueprint.stage_specs(["cpu"] * num_stages)
    stages = [actor_class.options(num_cpus=0.5).remote() for _ in specs]
    places = ray.get([stage.become.remote(spec, 3) for stage, spec in zip(stages, specs, strict=True)])
    addresses = [placed.address for placed in places]
    ray.get([stage.load.remote("float32", 1, 2) for stage in stages])
    ray.get([stage.allocate.remote(NUM_BLOCKS) for stage in stages])
    transport = open_transport(epoch=3)
    inbound, outbound = transport.inbound("127.0.0.1"), transport.outbound(addresses[0])
    runs = [stage.run.remote(address) for stage, address in zip(stages, [*addresses[1:], inbound.address], strict=True)]
    recorder = Recorder(num_stages, prompts)
    with contextlib.closing(inbound), contextlib.closing(outbound):
        while recorder.scheduler.has_requests:
            while (plan := recorder.scheduler.schedule()) is not None:
                outbound.send(PlanFrame(plan, None))
            frame = inbound.receive()
            assert isinstance(frame, PlanFrame)
            assert frame.hidden is not None
            has_rows = frame.hidden.shape[0] > 0
            logits = decode_hidden(frame.hidden) if has_rows else torch.empty(frame.hidden.shape)
            recorder.land(frame.plan, logits)
        assert recorder.scheduler.num_preemptions > 0
        outbound.send(EndFrame())
        ray.get(runs, timeout=20)
    return recorder.logits


def test_logits_of_actors_over_zeromq_have_the_bits_of_one_process() -> None:
    with LLM("demo", device="cpu") as llm:
        prompts = [llm.tokenizer.encode(prompt) for prompt in PROMPTS]
    expected = logits_in_one_process(prompts)
    assert len(expected) == 12 * len(PROMPTS)
    for num_stages in (1, 4):
        found = logits_of_actors(num_stages, prompts)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected), f"{num_stages} stages"


@asynccontextmanager
async def running_group(
    config: PipelineConfig, epoch: int = 0, log: LogSettings | None = None
) -> AsyncIterator[tuple[StageGroup, AsyncEngine, asyncio.Task[None]]]:
    """A started group in a placement group of its own, an engine over it, and the task that drives the engine."""
    blueprint = draw_blueprint(config)
    bundles = placement_group([{"CPU": 0.1}, *[{"CPU": 0.5}] * len(blueprint.layers)])
    placement = Placement(bundles, (HALF_A_CPU,) * len(blueprint.layers), name=f"test-{epoch}-{len(blueprint.layers)}")
    try:
        group, pipeline = await StageGroup.start(blueprint, placement, epoch, log)
        engine = AsyncEngine(pipeline.make_scheduler(), group, pipeline.limits())
        driver = asyncio.create_task(engine.run())
        try:
            yield group, engine, driver
        finally:
            driver.cancel()
            await asyncio.gather(driver, return_exceptions=True)
            await group.stop()
    finally:
        remove_placement_group(bundles)


async def rejoined(group: StageGroup, engine: AsyncEngine, epoch: int) -> asyncio.Task[None]:
    """Joins the stages to the next ring; returns the task that drives the engine over it."""
    loaded = await group.join(epoch)
    engine.resume(loaded.make_scheduler(), group, loaded.limits())
    return asyncio.create_task(engine.run())


async def complete(engine: AsyncEngine, prompt: list[int], params: SamplingParams, choice: int) -> tuple[int, ...]:
    return await _tokens(engine.generate(prompt, params, choice))


async def _tokens(stream: AsyncIterator[Delta]) -> tuple[int, ...]:
    tokens = [delta.token_ids async for delta in stream]
    return tuple(token for ids in tokens for token in ids)


@pytest.mark.parametrize("num_stages", [1, 4])
def test_greedy_and_seeded_tokens_of_actors_are_those_of_one_process(num_stages: int) -> None:
    all_params = [SamplingParams(max_tokens=15, temperature=0), SamplingParams(max_tokens=15, seed=5, top_p=0.95)]
    with LLM("demo", device="cpu", dtype="float32") as llm:
        prompts = [llm.tokenizer.encode(prompt) for prompt in PROMPTS]
        expected = [
            output.completions[0].token_ids for params in all_params for output in llm.generate(prompts, params)
        ]

    async def run() -> list[tuple[int, ...]]:
        async with running_group(PipelineConfig("demo", stages=num_stages, dtype="float32")) as (_, engine, _):
            return await asyncio.gather(
                *(complete(engine, prompt, params, 0) for params in all_params for prompt in prompts)
            )

    assert asyncio.run(run()) == expected


def test_shared_prompts_and_embeddings_of_actors_are_those_of_one_process() -> None:
    depths = (0, 5, 14, 28)
    sampling = SamplingParams(max_tokens=9, seed=2, n=4, repetition_penalty=1.3)
    with LLM("demo", device="cpu", dtype="float32") as llm:
        prompt = llm.tokenizer.encode(PROMPTS[1])
        expected = [completion.token_ids for completion in llm.generate(prompt, sampling)[0].completions]
        expected_embeddings = [llm.embed(prompt, layer=depth)[0] for depth in depths]

    async def embedding(engine: AsyncEngine, depth: int) -> tuple[float, ...]:
        params = SamplingParams(max_tokens=0, pooling=Pooling("mean", depth))
        [delta] = [delta async for delta in engine.generate(prompt, params)]
        assert delta.embedding is not None
        return tuple(array("f", delta.embedding))

    async def run() -> tuple[list[tuple[int, ...]], list[tuple[float, ...]]]:
        async with running_group(PipelineConfig("demo", stages=3, dtype="float32"), epoch=2) as (_, engine, _):
            streams = engine.generate_all(new_records(prompt, sampling, 4))
            completing = asyncio.gather(*map(_tokens, streams))
            embeddings = await asyncio.gather(*(embedding(engine, depth) for depth in depths))
            return await completing, embeddings

    assert asyncio.run(run()) == (expected, expected_embeddings)


def test_a_stage_that_dies_is_named_with_its_cause_process_and_last_log_line() -> None:
    causes = {signal.SIGKILL: "was killed by SIGKILL", signal.SIGSEGV: "crashed: Segmentation fault", None: "died: "}

    async def run() -> None:
        log = LogSettings("text", "demo", "of-test")
        async with running_group(PipelineConfig("demo", stages=2), epoch=1, log=log) as (group, engine, driver):
            stream = engine.generate([1, 2, 3], SamplingParams(max_tokens=900, ignore_eos=True))
            for epoch, (signal_number, cause) in enumerate(causes.items(), start=2):
                await anext(stream)
                process = group._members[1].placed.process
                if signal_number is None:
                    ray.kill(group._members[1].actor)
                else:
                    os.kill(process.pid, signal_number)
                with pytest.raises(StageFailedError, match="stage 1 died"):
                    await asyncio.wait_for(driver, timeout=20)
                (loss,) = await group.losses()
                assert (loss.stage, loss.pid, loss.node) == (1, process.pid, socket.gethostname())
                assert loss.cause.startswith(cause)
                assert loss.last_log_line is not None
                assert "stage ready" in loss.last_log_line
                driver = await rejoined(group, engine, epoch)
            driver.cancel()

    asyncio.run(run())


def test_streams_go_on_when_lost_stages_are_replaced_and_the_others_keep_their_processes() -> None:
    params = SamplingParams(max_tokens=60, ignore_eos=True, seed=3)

    async def run() -> None:
        config = PipelineConfig("demo", stages=3, dtype="float32")
        async with running_group(config, epoch=20) as (group, engine, driver):
            expected = [await complete(engine, prompt, params, 0) for prompt in ([1, 2, 3], [4] * 40)]
            for epoch, lost in ((21, [0, 2]), (22, [0, 1, 2])):
                streams = [engine.generate(prompt, params) for prompt in ([1, 2, 3], [4] * 40)]
                begun = [(await anext(stream)).token_ids for stream in streams]
                pids = _pids(group)
                for index in lost:
                    os.kill(pids[index], signal.SIGKILL)
                with pytest.raises(StageFailedError):
                    await asyncio.wait_for(driver, timeout=20)
                driver = await rejoined(group, engine, epoch)
                rest = await asyncio.gather(*map(_tokens, streams))
                assert [first + later for first, later in zip(begun, rest, strict=True)] == expected
                assert [index for index in range(3) if _pids(group)[index] != pids[index]] == lost
            driver.cancel()

    asyncio.run(run())


def test_a_stage_that_dies_while_another_is_replaced_is_replaced_by_the_next_join() -> None:
    async def run() -> None:
        async with running_group(PipelineConfig("demo", stages=2), epoch=30) as (group, engine, driver):
            expected = await complete(engine, [1, 2, 3], GREEDY, 0)
            pids = _pids(group)
            os.kill(pids[0], signal.SIGKILL)
            with pytest.raises(StageFailedError):
                await asyncio.wait_for(driver, timeout=20)
            joining = asyncio.create_task(group.join(31))
            while 0 in group._members:  # noqa: ASYNC110  # the timeout of the test limits it
                await asyncio.sleep(0.01)
            os.kill(pids[1], signal.SIGKILL)
            await asyncio.gather(joining, return_exceptions=True)  # as it happens: before or after stage 1 was renewed
            second_driver = await rejoined(group, engine, 32)
            assert await complete(engine, [1, 2, 3], GREEDY, 0) == expected
            assert not set(pids) & set(_pids(group))
            second_driver.cancel()

    asyncio.run(run())


def test_a_spare_takes_the_place_of_a_lost_stage_and_gets_a_successor() -> None:
    async def run() -> None:
        async with running_group(PipelineConfig("demo", stages=2, spares=1), epoch=60) as (group, engine, driver):
            expected = await complete(engine, [1, 2, 3], GREEDY, 0)
            ((spare,),) = group._spares.values()
            for epoch in (61, 62):
                os.kill(_pids(group)[1], signal.SIGKILL)
                with pytest.raises(StageFailedError):
                    await asyncio.wait_for(driver, timeout=20)
                driver = await rejoined(group, engine, epoch)
                assert group._members[1].actor == spare
                ((spare,),) = group._spares.values()
                assert await complete(engine, [1, 2, 3], GREEDY, 0) == expected
            driver.cancel()

    asyncio.run(run())


def test_a_stage_that_hangs_is_found_killed_and_replaced() -> None:
    async def run() -> None:
        async with running_group(PipelineConfig("demo", stages=2), epoch=40) as (group, engine, driver):
            expected = await complete(engine, [1, 2, 3], GREEDY, 0)
            pids = _pids(group)
            os.kill(pids[1], signal.SIGSTOP)
            stream = engine.generate([1, 2, 3], GREEDY)
            going_on = asyncio.create_task(_tokens(stream))
            with pytest.raises(StageFailedError, match="stage 1 hung"):
                await asyncio.wait_for(driver, timeout=60)
            (loss,) = await group.losses()
            assert (loss.pid, loss.cause.partition(":")[0]) == (pids[1], "hung")
            second_driver = await rejoined(group, engine, 41)
            assert await going_on == expected
            assert _pids(group)[0] == pids[0]
            with pytest.raises(ProcessLookupError):
                os.kill(pids[1], 0)
            second_driver.cancel()

    asyncio.run(run())


class SlowStage(Stage):
    """A stage that takes longer for a step than one that hangs has time to give a sign of life."""

    def _compute(self, frame: Frame) -> Frame:
        run_layer = self._runner._pass

        def slow(*arguments: Any) -> None:
            time.sleep(0.4)
            run_layer(*arguments)

        self._runner._pass = slow  # type: ignore[assignment,method-assign]
        try:
            return super()._compute(frame)
        finally:
            self._runner._pass = run_layer  # type: ignore[method-assign]


def test_a_slow_stage_is_not_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actor_classes, "Stage", SlowStage)

    async def run() -> None:
        async with running_group(PipelineConfig("demo", stages=2), epoch=50) as (group, engine, driver):
            assert len(await complete(engine, [1, 2, 3], replace(GREEDY, max_tokens=1), 0)) == 1
            assert not driver.done()
            assert not group._present_ring.deaths

    asyncio.run(run())


def _pids(group: StageGroup) -> list[int]:
    return [group._members[index].placed.process.pid for index in sorted(group._members)]


def test_an_exception_in_a_stage_is_the_cause_of_its_death_and_processes_are_called_by_pipeline_and_stage() -> None:
    async def run() -> None:
        async with running_group(PipelineConfig("demo", stages=2), epoch=5) as (group, _, _):
            titles = [title_of(pid).removesuffix(".run") for pid in _pids(group)]
            assert titles == [f"ray::gptj-dist:test-5-2:stage-{index}" for index in range(2)]
            group.submit(Plan(0, (), (), (Chunk(7, 0, (1,), (), True),)))  # a request that no stage knows
            while not group._present_ring.deaths:  # noqa: ASYNC110  # a death sets no event; the timeout of the test limits it
                await asyncio.sleep(0.01)
            (loss,) = await group.losses()
            assert (loss.stage, loss.cause) == (0, "failed: KeyError: 7")

    asyncio.run(run())


def title_of(pid: int) -> str:
    """As `ps` shows it."""
    return Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0")


def test_a_checkpoint_that_breaks_while_loading_is_told_and_leaves_no_actor(tmp_path: Any) -> None:
    from gptj_dist.checkpoint.synthetic import write_checkpoint
    from gptj_dist.config import ModelConfig

    write_checkpoint(tmp_path, ModelConfig(4128, 4, 16, 2, 8, 64, 64, (0,)))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((draw_path() / name).read_bytes())
    blueprint = draw_blueprint(PipelineConfig(str(tmp_path), stages=2))
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    bundles = placement_group([{"CPU": 0.1}, {"CPU": 0.5}, {"CPU": 0.5}])
    before = set(map(str, ray.util.list_named_actors(all_namespaces=True)))
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        asyncio.run(_start(blueprint, Placement(bundles, (HALF_A_CPU,) * 2, "broken")))
    remove_placement_group(bundles)
    assert set(map(str, ray.util.list_named_actors(all_namespaces=True))) == before


class StageWithoutCompiler(Stage):
    """A stage whose machine has no compiled attention, if it is the last."""

    def become(self, *arguments: Any) -> PlacedStage:
        placed = super().become(*arguments)
        if not self._runner._spec.layers.is_last:
            return placed
        return replace(placed, device=replace(placed.device, kernels="torch's attention"))


def test_a_float32_pipeline_of_unlike_kernels_is_refused_and_leaves_no_actor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actor_classes, "Stage", StageWithoutCompiler)
    bundles = placement_group([{"CPU": 0.1}, {"CPU": 0.5}, {"CPU": 0.5}])
    before = set(map(str, ray.util.list_named_actors(all_namespaces=True)))
    with pytest.raises(ConfigurationError, match=r"stage 1 on .* has torch's attention; install a C compiler"):
        asyncio.run(
            _start(draw_blueprint(PipelineConfig("demo", stages=2)), Placement(bundles, (HALF_A_CPU,) * 2, "unlike"))
        )
    remove_placement_group(bundles)
    assert set(map(str, ray.util.list_named_actors(all_namespaces=True))) == before


async def _start(blueprint: Any, placement: Placement) -> None:
    await StageGroup.start(blueprint, placement, epoch=9)


def draw_path() -> Any:
    from gptj_dist.checkpoint.hub import resolve_model

    return resolve_model("demo")
