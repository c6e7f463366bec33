"""What a shorter type on the wire costs: logits of a pipeline against transformers' in float32."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import GPTJForCausalLM

from gptj_dist.checkpoint.hub import resolve_model
from gptj_dist.config import PipelineConfig, WireChoice
from gptj_dist.engine.plan import Chunk, NewRequest, Plan
from gptj_dist.params import SamplingParams
from gptj_dist.stages.blueprint import draw_blueprint
from gptj_dist.stages.runner import StageRunner
from gptj_dist.stages.wire import decode_hidden, encode_hidden

NUM_STAGES = 4
NUM_BLOCKS = 8
TOKEN_IDS = tuple(range(7, 1007, 16))


def logits(wire: WireChoice) -> torch.Tensor:
    """Of the last token [vocab_size], through stages between which hidden states cross in this type."""
    blueprint = draw_blueprint(PipelineConfig("demo", stages=NUM_STAGES, device="cpu", wire_dtype=wire))
    hidden: torch.Tensor | None = None
    new = NewRequest(1, SamplingParams(), 1, len(TOKEN_IDS))
    plan = Plan(0, (), (new,), (Chunk(1, 0, TOKEN_IDS, tuple(range(NUM_BLOCKS)), True),))
    for spec in blueprint.stage_specs(["cpu"] * NUM_STAGES):
        runner = StageRunner(replace(spec, max_batch_size=1))
        runner.load("float32", 1)
        runner.allocate(NUM_BLOCKS)
        hidden = runner.forward(plan, hidden)
        if not spec.layers.is_last:
            hidden = decode_hidden(encode_hidden(hidden, spec.wire), "float32")
    assert hidden is not None
    return hidden[0]


@pytest.fixture(scope="module")
def reference() -> torch.Tensor:
    directory: Path = resolve_model("demo")
    model = GPTJForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.inference_mode():
        found: torch.Tensor = model(torch.tensor([TOKEN_IDS])).logits[0, -1]
    return found


@pytest.mark.parametrize(
    ("wire", "most"), [("same", 1e-4), ("float16", 2e-2), ("bfloat16", 0.15), ("int8", 0.4)], ids=str
)
def test_logits_stay_close_to_transformers(wire: WireChoice, most: float, reference: torch.Tensor) -> None:
    error = float((logits(wire) - reference).abs().max())
    assert error < most
    if wire != "same":  # else nothing would have been rounded
        assert error > 1e-4
