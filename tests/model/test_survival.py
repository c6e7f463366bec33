"""Requests whose stages die tell, in float32, the bits that they would have told: each once, and none is missing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from dataclasses import replace

import pytest

from gptj_dist.config import PipelineConfig
from gptj_dist.engine.async_engine import AsyncEngine
from gptj_dist.engine.mailbox import Delta
from gptj_dist.engine.plan import Plan, Result
from gptj_dist.engine.record import new_records
from gptj_dist.errors import StageFailedError
from gptj_dist.params import Grammar, Pooling, SamplingParams
from gptj_dist.stages.local import LocalExecutor, start_local
from tests.adapters import chosen, model_config, write_lora

CONFIG = PipelineConfig(
    "demo", device="cpu", dtype="float32", stages=2, max_chunk_tokens=16, kv_cache_gb=0.006, max_batch_size=8
)
PROMPT = tuple(range(300, 361))
SAMPLED = SamplingParams(max_tokens=40, seed=3, ignore_eos=True, logprobs=1, prompt_logprobs=0)
REQUESTS = (
    ((7, 8, 9), replace(SAMPLED, repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.2), 2),
    (PROMPT, SAMPLED, 3),
    (PROMPT[:20], SamplingParams(max_tokens=0, prompt_logprobs=2), 1),
    (PROMPT, SamplingParams(max_tokens=0, pooling=Pooling("mean", 5)), 1),
    (PROMPT[:9], SamplingParams(max_tokens=1, temperature=0, logprobs=0), 1),
    (PROMPT[2:], replace(SAMPLED, ignore_eos=False, structured_outputs=Grammar.json({"type": "array"})), 2),
    ((5, 6, 7, 8), SamplingParams(max_tokens=30, seed=1, ignore_eos=True, logprobs=1, allowed_token_ids=(5, 6)), 1),
    (PROMPT[5:], SamplingParams(max_tokens=25, temperature=0, stop_token_ids=(198,), min_tokens=3, logprobs=0), 1),
    (PROMPT[:25], SamplingParams(max_tokens=20, use_beam_search=True, n=3, length_penalty=2, logprobs=1), 1),
)


class MortalStages:
    """An executor that dies after a number of results."""

    def __init__(self, executor: LocalExecutor, num_results: int) -> None:
        self._executor = executor
        self._num_left = num_results

    def submit(self, plan: Plan) -> None:
        self._executor.submit(plan)

    async def receive(self) -> Result:
        if self._num_left == 0:
            raise StageFailedError("a stage died")
        self._num_left -= 1
        return await self._executor.receive()


async def collect(stream: AsyncGenerator[Delta, None]) -> list[object]:
    """All that a stream tells, each list joined."""
    deltas = [delta async for delta in stream]
    lists = [(delta.token_ids, delta.logprobs, delta.prompt_logprobs) for delta in deltas]
    return [
        *(sum(parts, ()) for parts in zip(*lists, strict=True)),
        deltas[-1].finish_reason,
        deltas[-1].embedding,
        deltas[-1].beams,
    ]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> SamplingParams:
    """Greedy, with an adapter."""
    config = model_config("demo")
    path = write_lora(tmp_path_factory.mktemp("adapter"), config, ("attn.q_proj", "mlp.fc_in"), size=0.5)
    return SamplingParams(max_tokens=20, temperature=0, ignore_eos=True, adapters=(chosen(path, config),))


async def told_with_deaths(
    lifetimes: Sequence[int], adapted: SamplingParams, config: PipelineConfig = CONFIG
) -> tuple[list[list[object]], int, int]:
    """What all requests tell, and the numbers of preemptions and accepted drafts; stages die after these numbers of
    results."""
    pipeline, executor = start_local(config)
    engine = AsyncEngine(pipeline.make_scheduler(), executor, pipeline.limits())
    streams = [
        stream
        for prompt_ids, params, num_choices in (
            *REQUESTS,
            (PROMPT[3:], adapted, 2),
            (PROMPT[4:], replace(adapted, structured_outputs=Grammar("regex", "[a-z ]{9,}"), logprobs=1), 1),
            (PROMPT[:9], replace(adapted, use_beam_search=True, n=2), 1),
        )
        for stream in engine.generate_all(new_records(prompt_ids, params, num_choices))
    ]
    telling = asyncio.gather(*map(collect, streams))
    num_preemptions = 0
    for num_results in lifetimes:
        engine.resume(pipeline.make_scheduler(), MortalStages(executor, num_results), pipeline.limits())
        with suppress(StageFailedError):
            await engine.run()
        num_preemptions += engine.scheduler.num_preemptions
        executor.close()
        pipeline, executor = start_local(config)
    engine.resume(pipeline.make_scheduler(), executor, pipeline.limits())
    driver = asyncio.create_task(engine.run())
    told = await telling
    driver.cancel()
    executor.close()
    return told, num_preemptions + engine.scheduler.num_preemptions, engine.stats.num_accepted


@pytest.fixture(scope="module")
def expected(adapted: SamplingParams) -> list[list[object]]:
    """Without deaths and drafts."""
    return asyncio.run(told_with_deaths((), adapted, replace(CONFIG, speculation=False)))[0]


@pytest.mark.parametrize("lifetimes", [(1, 2, 3, 5), (12, 25)])
def test_nothing_is_told_twice_and_nothing_is_missing_after_deaths(
    lifetimes: Sequence[int], adapted: SamplingParams, expected: list[list[object]]
) -> None:
    told, num_preemptions, num_accepted = asyncio.run(told_with_deaths(lifetimes, adapted))
    assert told == expected
    assert num_preemptions > 0
    assert num_accepted > 0
