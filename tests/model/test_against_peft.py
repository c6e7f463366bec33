"""LoRA adapters change GPT-J as PEFT's own implementation does, on transformers' GPT-J."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPTJForCausalLM

from gptj_dist import SamplingParams
from gptj_dist.checkpoint.synthetic import write_checkpoint
from gptj_dist.config import ModelConfig
from tests.adapters import chosen
from tests.model.test_exact import Model, Work

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # PEFT asks transformers for a deprecated property, and says what it saves, and what cannot be merged.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True`"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. 18 LoRA tensor"),
]

CONFIG = ModelConfig(
    vocab_size=150,
    num_layers=3,
    d_model=48,
    num_heads=3,
    rotary_dim=4,
    d_ff=100,
    context_length=64,
    eos_token_ids=(3,),
)
GREEDY = SamplingParams(8, temperature=0.0, ignore_eos=True)
PROMPT = tuple(range(20, 43))
MATRICES = ["q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"]
CASES: Mapping[str, dict[str, Any]] = {
    "LoRA": {"target_modules": MATRICES},
    "rsLoRA with patterns": {
        "target_modules": MATRICES,
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2, r"h\.1\.mlp\.fc_in": 6},
        "alpha_pattern": {"v_proj": 3, r"h\.2\.attn\.[kq]_proj": 40},
    },
    "DoRA with patterns": {
        "target_modules": MATRICES,
        "use_dora": True,
        "rank_pattern": {"fc_out": 2},
        "alpha_pattern": {"q_proj": 3},
    },
    "DoRA and all biases": {"target_modules": [*MATRICES, "lm_head"], "use_dora": True, "bias": "all"},
    "biases of LoRA's modules": {"target_modules": ["q_proj", "fc_in", "fc_out"], "bias": "lora_only"},
    "biases of B": {"target_modules": MATRICES, "lora_bias": True},
    "embedding and head": {"target_modules": ["wte", "lm_head"]},
    "whole modules": {"target_modules": ["q_proj"], "modules_to_save": ["wte", "lm_head", "fc_out", "k_proj"]},
    "whole modules and all biases": {"target_modules": ["v_proj"], "modules_to_save": ["fc_in"], "bias": "all"},
    "rows of tokens": {"target_modules": ["v_proj"], "trainable_token_indices": [21, 3, 149, 30]},
    "some layers": {"target_modules": MATRICES, "layers_to_transform": [0, 2], "layers_pattern": "h"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    write_checkpoint(directory, CONFIG, seed=2, init_std=0.15)
    return directory


@pytest.fixture(scope="module")
def packed(base: Path) -> Model:
    return Model(str(base))


@pytest.fixture(scope="module")
def plain(base: Path) -> Model:
    """In two stages, whose layers are those of devices where weights are not packed."""
    model = Model(str(base))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gptj_dist.model.layers.can_pack", lambda *_: False)
        patch.setattr("gptj_dist.model.linear.can_pack", lambda *_: False)
        model.run({0: Work(PROMPT, GREEDY)}, layers=(1, 2))
    return model


@pytest.mark.parametrize("case", CASES)
def test_its_logits_are_those_of_peft(case: str, base: Path, packed: Model, plain: Model, tmp_path: Path) -> None:
    unchanged = GPTJForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft = get_peft_model(unchanged, LoraConfig(r=4, lora_alpha=12, **CASES[case])).eval()
    noise = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=noise), alpha=0.05)
    peft.save_pretrained(tmp_path)
    works = {0: Work(PROMPT[:9], GREEDY), 1: Work(PROMPT, replace(GREEDY, adapters=(chosen(tmp_path, CONFIG),)))}
    for model, layers in ((packed, (3,)), (plain, (1, 2))):
        without = model.run({0: works[0], 1: Work(PROMPT, GREEDY)}, layers=layers)
        run = model.run(works, layers=layers, max_chunk_tokens=7)
        with torch.no_grad():
            expected = peft(torch.tensor([run.token_ids[1]])).logits[0]
        for (request, position), row in run.logits.items():
            wanted = expected[position - 1] if request else without.logits[request, position]
            assert torch.allclose(row, wanted, rtol=0, atol=1e-4), (request, position)
        first = (1, len(PROMPT))
        assert not torch.allclose(run.logits[first], without.logits[first], rtol=0, atol=1e-2)
