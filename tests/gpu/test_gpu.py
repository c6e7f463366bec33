"""On an NVIDIA GPU: the numbers are transformers', in blocks of the cache, however the layers are cut."""

from __future__ import annotations

import pytest
import torch
from transformers import GPTJForCausalLM

from gptj_dist.checkpoint.hub import resolve_model
from gptj_dist.config import DTypeName, PipelineConfig
from gptj_dist.engine.plan import Chunk, NewRequest, Plan
from gptj_dist.llm import LLM
from gptj_dist.params import SamplingParams
from gptj_dist.stages.local import load_local

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

TOKEN_IDS = tuple(range(5, 105))


def logits_step_by_step(dtype: DTypeName, chunk_tokens: int) -> torch.Tensor:
    """Logits of the last token of each chunk: [chunks, vocab_size]."""
    _, (runner,) = load_local(PipelineConfig("demo", device="cuda", dtype=dtype, kv_cache_gb=0.01))
    rows = []
    blocks = list(range(12, 0, -1))
    for start in range(0, len(TOKEN_IDS), chunk_tokens):
        tokens = TOKEN_IDS[start : start + chunk_tokens]
        num_new = -(-(start + len(tokens)) // 16) - -(-start // 16)
        new_blocks = tuple(blocks.pop() for _ in range(num_new))
        new = (NewRequest(0, 0.0, 1.0, 0, 0.0, 0, 0),) if start == 0 else ()
        rows.append(runner.forward(Plan(start, (), new, (Chunk(0, start, tokens, new_blocks, True),)), None))
    return torch.cat(rows).cpu()


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
