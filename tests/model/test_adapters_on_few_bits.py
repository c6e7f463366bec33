"""Adapters beside weights of few bits: as merged into the numbers that these stand for, and the same in any company."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptj_dist import SamplingParams
from gptj_dist.checkpoint.synthetic import write_checkpoint
from gptj_dist.config import ModelConfig
from gptj_dist.model.quantized import dequantize, quantize
from gptj_dist.quantization import Bits
from tests.adapters import ALL_TARGETS, add_to, chosen, merge, write_lora
from tests.model.test_exact import Model, Run, Work

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = ModelConfig(
    vocab_size=211,
    num_layers=3,
    d_model=64,
    num_heads=4,
    rotary_dim=6,
    d_ff=192,
    context_length=96,
    eos_token_ids=(3,),
)
GREEDY = SamplingParams(8, temperature=0.0, ignore_eos=True)
PROMPT = tuple(range(20, 51))


def write_dequantized(base: Path, destination: Path, bits: Bits) -> Path:
    """Writes the model whose matrices are what those of `base` are in few bits; embedding and head have 8."""
    [file] = base.glob("*.safetensors")
    added = {}
    for name, tensor in load_file(file).items():
        if tensor.dim() == 2:
            added[name] = dequantize(quantize(tensor, bits if ".h." in name else 8)).double() - tensor
    return add_to(base, destination, added)


def write_ends(path: Path, config: ModelConfig) -> tuple[Path, dict[str, torch.Tensor]]:
    """Writes a LoRA of embedding and head; returns it with what it adds to the weights."""
    noise = torch.Generator().manual_seed(4)
    a_in, a_out = (torch.randn(4, width, generator=noise) * 0.02 for width in (config.vocab_size, config.d_model))
    b_in, b_out = (torch.randn(width, 4, generator=noise) for width in (config.d_model, config.vocab_size))
    write_lora(path, config, layers=())
    tensors = {
        "base_model.model.transformer.wte.lora_embedding_A": a_in,
        "base_model.model.transformer.wte.lora_embedding_B": b_in,
        "base_model.model.lm_head.lora_A.weight": a_out,
        "base_model.model.lm_head.lora_B.weight": b_out,
    }
    save_file(tensors, path / "adapter_model.safetensors")
    return path, {"transformer.wte.weight": 2 * (b_in @ a_in).T, "lm_head.weight": 2 * b_out @ a_out}


def write_whole(path: Path, base: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """Writes an adapter with a new matrix; returns it with what the matrix has more than that of the checkpoint."""
    [file] = base.glob("*.safetensors")
    name = "transformer.h.1.mlp.fc_out.weight"
    change = 0.1 * torch.randn(CONFIG.d_model, CONFIG.d_ff, generator=torch.Generator().manual_seed(5))
    write_lora(path, CONFIG, layers=(), modules_to_save=["fc_out"])
    save_file({f"base_model.model.{name}": load_file(file)[name] + change}, path / "adapter_model.safetensors")
    return path, {name: change}


def assert_close(run: Run, request: int, expected: Run) -> None:
    assert run.token_ids[request] == expected.token_ids[0]
    for (_, position), row in expected.logits.items():
        assert torch.allclose(run.logits[request, position], row, rtol=0, atol=1e-4)


@pytest.mark.parametrize("bits", [8, 4])
def test_adapters_equal_merged_weights_whatever_the_company(bits: Bits, tmp_path: Path) -> None:
    base = tmp_path / "base"
    write_checkpoint(base, CONFIG, seed=1, init_std=0.15)
    numbers = write_dequantized(base, tmp_path / "numbers", bits)
    lora = write_lora(tmp_path / "lora", CONFIG, ALL_TARGETS, 8, seed=3)
    ends, added = write_ends(tmp_path / "ends", CONFIG)
    whole, new = write_whole(tmp_path / "whole", base)
    weights = [
        numbers,
        merge(numbers, tmp_path / "0", [(lora, 2.0)]),
        add_to(numbers, tmp_path / "1", added),
        add_to(numbers, tmp_path / "2", new),
    ]
    adapters: Sequence[Sequence[Path]] = ((), (lora,), (ends,), (whole,))
    works = {
        id_: Work(PROMPT, replace(GREEDY, adapters=tuple(chosen(path, CONFIG) for path in paths)))
        for id_, paths in enumerate(adapters)
    }
    model = Model(str(base), bits)
    run = model.run(works, layers=(1, 2), max_chunk_tokens=7)
    for id_, work in works.items():
        assert_close(run, id_, Model(str(weights[id_])).run({0: Work(PROMPT, GREEDY)}))
        alone = model.run({id_: work})
        assert all(torch.equal(run.logits[key], row) for key, row in alone.logits.items())
        first = run.logits[id_, len(PROMPT)]
        assert id_ == 0 or not torch.allclose(first, run.logits[0, len(PROMPT)], rtol=0, atol=1e-2)


def test_a_head_that_is_the_embedding_in_few_bits_has_a_change_of_its_own(tmp_path: Path) -> None:
    config = replace(CONFIG, has_tied_embeddings=True)
    base = tmp_path / "base"
    write_checkpoint(base, config, seed=1, init_std=0.15)
    numbers = write_dequantized(base, tmp_path / "numbers", 8)
    [file] = numbers.glob("*.safetensors")
    untied = tmp_path / "untied"
    write_checkpoint(untied, CONFIG, seed=1, init_std=0.15)
    [file_untied] = untied.glob("*.safetensors")
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["transformer.wte.weight"].clone()}, file_untied)
    ends, added = write_ends(tmp_path / "ends", config)
    expected = Model(str(add_to(untied, tmp_path / "merged", added))).run({0: Work(PROMPT, GREEDY)})
    works = {0: Work(PROMPT[:9], GREEDY), 1: Work(PROMPT, replace(GREEDY, adapters=(chosen(ends, config),)))}
    model = Model(str(base), 8)
    assert_close(model.run(works, layers=(1, 2)), 1, expected)
    assert_close(model.run(works, layers=(3,)), 0, Model(str(numbers)).run({0: works[0]}))
