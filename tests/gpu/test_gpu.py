"""On an NVIDIA GPU: the numbers are transformers' and the CPU's, however the layers are cut, and the host never waits.

The tests of `tests/model` run the kernels on the GPU, too, where there is one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from transformers import GPTJForCausalLM

from gptj_dist.checkpoint.hub import resolve_model
from gptj_dist.config import DTypeName, PipelineConfig
from gptj_dist.engine.plan import Chunk, NewRequest, Plan
from gptj_dist.llm import LLM
from gptj_dist.model.sampler import Sampler, SampleSpec
from gptj_dist.params import SamplingParams
from gptj_dist.stages.local import load_local
from gptj_dist.stages.runner import StageRunner
from gptj_dist.token_rules import TokenRules

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

TOKEN_IDS = tuple(range(5, 105))
GREEDY = SamplingParams(temperature=0)


def logits_step_by_step(dtype: DTypeName, chunk_tokens: int) -> torch.Tensor:
    """Logits of the last token of each chunk: [chunks, vocab_size]."""
    _, (runner,) = load_local(PipelineConfig("demo", device="cuda", dtype=dtype, kv_cache_gb=0.01))
    rows = []
    blocks = list(range(12, 0, -1))
    for start in range(0, len(TOKEN_IDS), chunk_tokens):
        tokens = TOKEN_IDS[start : start + chunk_tokens]
        num_new = -(-(start + len(tokens)) // 16) - -(-start // 16)
        new_blocks = tuple(blocks.pop() for _ in range(num_new))
        new = (NewRequest(0, GREEDY, 0, 0),) if start == 0 else ()
        rows.append(runner.forward(Plan(start, (), new, (Chunk(0, start, tokens, new_blocks, True),)), None))
    return torch.cat(rows).cpu()


def load_one(dtype: DTypeName = "float32", max_batch_size: int = 8) -> StageRunner:
    """The demo model, as one stage."""
    config = PipelineConfig("demo", device="cuda", dtype=dtype, kv_cache_gb=0.02, max_batch_size=max_batch_size)
    _, (runner,) = load_local(config)
    return runner


def new_requests(num_requests: int) -> tuple[NewRequest, ...]:
    return tuple(NewRequest(id_, GREEDY, 0, 0) for id_ in range(num_requests))


@contextmanager
def no_waiting() -> Iterator[None]:
    """Raises where the host would wait for the GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def theirs(dtype: torch.dtype) -> torch.Tensor:
    model = GPTJForCausalLM.from_pretrained(resolve_model("demo"), dtype=dtype).cuda().eval()
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([TOKEN_IDS]).cuda()).logits[0].float().cpu()
    return logits


@pytest.mark.parametrize("chunk_tokens", [1, 7, 100])
def test_float32_logits_are_those_of_transformers(chunk_tokens: int) -> None:
    last = [min(start + chunk_tokens, len(TOKEN_IDS)) - 1 for start in range(0, len(TOKEN_IDS), chunk_tokens)]
    error = (logits_step_by_step("float32", chunk_tokens) - theirs(torch.float32)[last]).abs().max()
    assert error < 1e-4


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_sixteen_bit_errors_are_at_most_a_fifth_above_those_of_transformers(
    dtype: DTypeName, torch_dtype: torch.dtype
) -> None:
    exact = theirs(torch.float32)
    ours = (logits_step_by_step(dtype, 1) - exact).square().mean().sqrt()
    assert ours <= 1.2 * (theirs(torch_dtype) - exact).square().mean().sqrt()


def test_greedy_text_does_not_depend_on_the_cut() -> None:
    params = SamplingParams(max_tokens=40, temperature=0)
    texts = set()
    for stages in (1, 2, 4):
        with LLM("demo", device="cuda", dtype="float32", stages=stages, kv_cache_gb=0.1) as llm:
            texts.add(llm.generate("The state of the Union is", params)[0].text)
    assert len(texts) == 1


def test_greedy_text_is_the_cpus() -> None:
    params = SamplingParams(max_tokens=60, temperature=0)
    prompts = ["The state of the Union is", "In the beginning", "It was"]
    texts = []
    for device in ("cpu", "cuda"):
        with LLM("demo", device=device, dtype="float32", kv_cache_gb=0.1) as llm:
            texts.append([completion.text for completion in llm.generate(prompts, params)])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_replayed_steps_have_the_logits_of_steps_made_anew(dtype: DTypeName) -> None:
    """A micro-batch with a row that is not sampled is made anew."""
    runner = load_one(dtype)
    prompts = tuple(Chunk(id_, 0, TOKEN_IDS[id_ : id_ + 20], (2 * id_ + 1, 2 * id_), False) for id_ in range(6))
    runner.forward(Plan(0, (), new_requests(6), prompts), None)
    for num_rows in (1, 3, 5):
        rows = tuple(Chunk(id_, 20, (7 + id_,), (), True) for id_ in range(num_rows))
        replayed = runner.forward(Plan(1, (), (), rows), None)
        anew = runner.forward(Plan(2, (), (), (*rows, Chunk(5, 20, (9,), (), False))), None)
        assert float((replayed - anew).abs().max()) < (1e-4 if dtype == "float32" else 0.05)


def test_the_host_waits_for_nothing_but_the_sampled_tokens() -> None:
    """Neither for chunks, nor for a micro-batch of both kinds, nor for single rows; once all kernels are compiled."""
    runner = load_one("float16")
    sampler = Sampler(TokenRules(4128, (0,), spare_ids=(3, 4)), torch.device("cuda", 0))
    early, late = SamplingParams(temperature=0.8, top_p=0.9, min_p=0.1, min_tokens=9), SamplingParams(top_k=7)
    specs = [SampleSpec(early, noise_key=1, position=5), SampleSpec(late, noise_key=2, position=6)]
    for plan in two_requests(first_id=0):
        sampler.draw(runner.forward(plan, None), specs)
    for plan in two_requests(first_id=2):
        with no_waiting():
            sampler.draw(runner.forward(plan, None), specs)


def two_requests(first_id: int) -> list[Plan]:
    """Their prompts, one token and two more, one token each."""
    a, b = first_id, first_id + 1
    new = tuple(NewRequest(id_, GREEDY, 0, 0) for id_ in (a, b))
    prompts = tuple(Chunk(id_, 0, TOKEN_IDS[:20], (2 * id_, 2 * id_ + 1), True) for id_ in (a, b))
    return [
        Plan(0, (), new, prompts),
        Plan(1, (), (), (Chunk(a, 20, (5,), (), True), Chunk(b, 20, (6, 7), (), True))),
        Plan(2, (), (), (Chunk(a, 21, (8,), (), True), Chunk(b, 22, (9,), (), True))),
    ]


def test_the_sampler_draws_what_it_draws_on_the_cpu() -> None:
    logits = torch.randn(24, 50400, generator=torch.Generator().manual_seed(0)) * 3
    settings = [
        SamplingParams(
            max_tokens=99,
            temperature=i % 3 * 0.5,
            top_p=1 - i % 2 * 0.1,
            top_k=i % 4 * 10,
            min_p=i % 5 * 0.02,
            min_tokens=99 * (i % 2),
        )
        for i in range(24)
    ]
    specs = [SampleSpec(params, noise_key=i, position=i) for i, params in enumerate(settings)]
    rules = TokenRules(50400, (50256,), spare_ids=tuple(range(50257, 50400)))
    devices = (torch.device("cpu"), torch.device("cuda", 0))
    drawn = [Sampler(rules, device).draw(logits.to(device), specs).tolist() for device in devices]
    assert drawn[0] == drawn[1]
