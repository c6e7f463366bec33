"""Adapters of requests equal merged weights, and a row's bits depend on nothing but its own request."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import Parameter
from transformers import GPTJForCausalLM

from examples.adapters import main
from gptj_dist import LLM, AdapterChoice, SamplingParams
from gptj_dist.checkpoint.synthetic import write_checkpoint
from gptj_dist.config import ModelConfig
from gptj_dist.errors import CheckpointError, InvalidRequestError
from tests.adapters import ALL_TARGETS, add_to, chosen, merge, model_config, write_control_vector, write_lora
from tests.model.test_exact import Model, Run, Work

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = ModelConfig(
    vocab_size=211,
    num_layers=4,
    d_model=76,
    num_heads=4,
    rotary_dim=6,
    d_ff=190,
    context_length=128,
    eos_token_ids=(3,),
)
GREEDY = SamplingParams(12, temperature=0.0, ignore_eos=True)
PROMPT = tuple(range(20, 57))
SHAPES: Sequence[tuple[tuple[str, ...], int]] = (
    (("attn.q_proj", "attn.v_proj"), 16),
    (("attn.q_proj", "attn.v_proj"), 8),
    (("attn.q_proj", "attn.k_proj", "attn.v_proj"), 16),
    (("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj"), 4),
    (("mlp.fc_in",), 4),
    (("mlp.fc_out",), 1),
    (ALL_TARGETS, 8),
    (ALL_TARGETS, 3),
)
"""Targets and ranks, those of public adapters of GPT-J among them."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    write_checkpoint(directory, CONFIG, seed=1, init_std=0.15)
    return directory


@pytest.fixture(scope="module")
def model(base: Path) -> Model:
    return Model(str(base))


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    directory = tmp_path_factory.mktemp("adapters")
    return [
        write_lora(directory / f"a{number}", CONFIG, targets, rank, seed=number)
        for number, (targets, rank) in enumerate(SHAPES)
    ]


def works_of(paths: Sequence[Path]) -> dict[int, Work]:
    """One request without an adapter, one with each, and one with three, of different strengths."""
    choices: list[tuple[AdapterChoice, ...]] = [(), *((chosen(path, CONFIG),) for path in paths)]
    strengths = (0.5, -1.0, 2.0)
    mixed = (paths[0], paths[6], paths[4])
    choices.append(
        tuple(chosen(path, CONFIG, strength=strength) for path, strength in zip(mixed, strengths, strict=True))
    )
    return {
        id_: Work(PROMPT[: 5 + 3 * id_], replace(GREEDY, adapters=adapters)) for id_, adapters in enumerate(choices)
    }


@pytest.fixture(scope="module")
def alone(model: Model, paths: list[Path]) -> Run:
    torch.set_num_threads(1)
    runs = [model.run({id_: work}) for id_, work in works_of(paths).items()]
    return Run(
        token_ids={id_: tokens for run in runs for id_, tokens in run.token_ids.items()},
        logits={key: row for run in runs for key, row in run.logits.items()},
        num_preemptions=0,
        most_in_flight=1,
    )


def assert_same_bits(run: Run, expected: Run) -> None:
    assert run.token_ids == expected.token_ids
    wrong = [key for key, row in run.logits.items() if not torch.equal(row, expected.logits[key])]
    assert run.logits.keys() == expected.logits.keys()
    assert not wrong


def test_adapters_equal_merged_weights(base: Path, paths: list[Path], alone: Run, tmp_path: Path) -> None:
    merges: list[list[tuple[Path, float]]] = [[], *([(path, 2.0)] for path in paths)]
    merges.append([(paths[0], 1.0), (paths[6], -2.0), (paths[4], 4.0)])
    for id_, (adapters, work) in enumerate(zip(merges, works_of(paths).values(), strict=True)):
        merged = Model(str(merge(base, tmp_path / str(id_), adapters)))
        expected = merged.run({id_: Work(work.prompt_ids, GREEDY)})
        assert alone.token_ids[id_] == expected.token_ids[id_]
        for key, row in expected.logits.items():
            assert torch.allclose(alone.logits[key], row, rtol=0, atol=1e-4)
    assert len({tuple(tokens[-8:]) for tokens in alone.token_ids.values()}) > 5


@pytest.mark.parametrize(("layers", "max_chunk_tokens"), [((4,), 10_000), ((2, 2), 7), ((1, 1, 1, 1), 1)])
def test_a_rows_bits_depend_neither_on_the_batch_nor_on_the_cut(
    model: Model, paths: list[Path], alone: Run, layers: Sequence[int], max_chunk_tokens: int
) -> None:
    assert_same_bits(model.run(works_of(paths), layers=layers, max_chunk_tokens=max_chunk_tokens), alone)


def test_preempted_requests_keep_their_adapters(model: Model, paths: list[Path], alone: Run) -> None:
    run = model.run(works_of(paths), layers=(2, 2), max_chunk_tokens=16, num_blocks=12)
    assert run.num_preemptions > 0
    assert_same_bits(run, alone)


@pytest.mark.parametrize("replaced", ["model.adapters.load_library", "model.layers.can_pack"])
def test_other_paths_add_the_same(
    base: Path, paths: list[Path], alone: Run, replaced: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the compiled library, whose rows have the same bits, too; and in layers of two products."""
    monkeypatch.setattr(f"gptj_dist.{replaced}", lambda *_: None)
    other = Model(str(base))
    run = other.run(works_of(paths))
    if replaced == "model.adapters.load_library":
        assert_same_bits(other.run(works_of(paths), layers=(2, 2), max_chunk_tokens=7), run)
    assert run.token_ids == alone.token_ids
    assert all(torch.allclose(row, alone.logits[key], rtol=0, atol=1e-4) for key, row in run.logits.items())


def test_a_request_without_adapters_takes_todays_path(
    model: Model, alone: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("gptj_dist.model.layers.FusedLayer.changed", raising=False)
    monkeypatch.delattr("gptj_dist.model.layers.JoinedLayer.changed", raising=False)
    run = model.run({0: Work(PROMPT[:5], GREEDY)})
    assert run.token_ids[0] == alone.token_ids[0]


def test_an_adapter_that_was_overwritten_ends_its_own_requests_only(
    model: Model, paths: list[Path], alone: Run, tmp_path: Path
) -> None:
    path = write_lora(tmp_path / "gone", CONFIG, seed=5)
    work = Work(PROMPT[:9], replace(GREEDY, adapters=(chosen(path, CONFIG),)))
    write_lora(path, CONFIG, seed=6)
    run = model.run({0: works_of(paths)[0], 20: work}, layers=(2, 2))
    assert run.token_ids[0] == alone.token_ids[0]
    assert run.token_ids[20] == list(work.prompt_ids)


def test_edits_and_control_vectors_equal_the_changed_model(base: Path, model: Model, tmp_path: Path) -> None:
    noise = torch.Generator().manual_seed(3)
    weight = "transformer.h.2.mlp.fc_out.weight"
    left, right = torch.randn(CONFIG.d_ff, 3, generator=noise), torch.randn(CONFIG.d_model, 3, generator=noise) * 0.2
    edits = tmp_path / "edits.safetensors"
    save_file({f"{weight}.left": left, f"{weight}.right": right}, edits)
    direction = torch.randn(CONFIG.d_model, generator=noise)
    vector = write_control_vector(tmp_path / "vector.gguf", {1: direction})
    # A vector behind layer 1 is the same as one that fc_out's bias of layer 1 has more.
    for path, strength, change in (
        (edits, 1.0, {weight: right @ left.T}),
        (vector, 0.7, {"transformer.h.1.mlp.fc_out.bias": 0.7 * direction}),
    ):
        changed = Model(str(add_to(base, tmp_path / path.stem, change)))
        expected = changed.run({0: Work(PROMPT, GREEDY)})
        choice = chosen(path, CONFIG, strength=strength)
        run = model.run({0: Work(PROMPT, replace(GREEDY, adapters=(choice,)))}, layers=(2, 2))
        assert run.token_ids == expected.token_ids
        for key, row in expected.logits.items():
            assert torch.allclose(run.logits[key], row, rtol=0, atol=1e-4)
        assert expected.token_ids != model.run({0: Work(PROMPT, GREEDY)}).token_ids


def test_activations_are_added_at_the_first_positions(base: Path, model: Model, tmp_path: Path) -> None:
    """At four positions behind layer 1, and at all behind layer 2: as transformers' layers with these sums do it."""
    noise = torch.Generator().manual_seed(8)
    vectors, everywhere = (torch.randn(*shape, CONFIG.d_model, generator=noise) for shape in ((4,), ()))
    path = tmp_path / "love.safetensors"
    save_file({"direction.1": vectors, "direction.2": everywhere}, path)
    alike = chosen(write_control_vector(tmp_path / "all.gguf", {1: everywhere}), CONFIG)
    adapters = (chosen(path, CONFIG, strength=0.5), alike)
    works = {0: Work(PROMPT, replace(GREEDY, adapters=adapters)), 1: Work(PROMPT[:9], GREEDY)}
    works[2] = Work(PROMPT[:3], replace(GREEDY, adapters=adapters[:1]))
    run = model.run(works, layers=(2, 2), max_chunk_tokens=7)
    expected: Any = GPTJForCausalLM.from_pretrained(base, dtype=torch.float32).eval()

    for id_ in (0, 2):
        token_ids = torch.tensor([run.token_ids[id_]])
        behind_1 = torch.zeros(token_ids.shape[1], CONFIG.d_model)
        behind_1[:4] = 0.5 * vectors
        if id_ == 0:
            behind_1 += everywhere
        hooks = [
            expected.transformer.h[layer].register_forward_hook(lambda _m, _x, hidden, change=change: hidden + change)
            for layer, change in ((1, behind_1), (2, 0.5 * everywhere))
        ]
        with torch.no_grad():
            logits = expected(token_ids).logits[0]
        for hook in hooks:
            hook.remove()
        rows = {position: row for (request, position), row in run.logits.items() if request == id_}
        assert all(torch.allclose(row, logits[position - 1], rtol=0, atol=1e-4) for position, row in rows.items())
    for id_, work in works.items():
        alone = model.run({id_: work})
        assert all(torch.equal(run.logits[key], row) for key, row in alone.logits.items())
    save_file({"direction.1": torch.zeros(129, CONFIG.d_model)}, path)
    with pytest.raises(CheckpointError, match=r"direction\.1 has 129 positions, 128 are served"):
        chosen(path, CONFIG)


def test_lm_steers_equal_their_formula(base: Path, model: Model, tmp_path: Path) -> None:
    """Of the second of three steers: `logits = W (h + eps h P1 P2^T) + b`, as a LoRA of lm_head would have it."""
    noise = torch.Generator().manual_seed(6)
    first, second = (torch.randn(3, CONFIG.d_model, 5, generator=noise) for _ in range(2))
    steers = tmp_path / "steers.bin"
    parameters = {"projector1": Parameter(first), "projector2": Parameter(second)}
    torch.save([Namespace(epsilon=1e-3, model_name="gpt-j", steer_values=[1.0]), parameters, 10_000], steers)
    steer = chosen(Path(f"{steers}#1"), CONFIG, strength=0.01)
    [file] = base.glob("*.safetensors")
    head = load_file(file)["lm_head.weight"]
    lora = write_lora(tmp_path / "same", CONFIG, layers=(), r=5, lora_alpha=0.05)
    tensors = {"lm_head.lora_A.weight": first[1].T.contiguous(), "lm_head.lora_B.weight": head @ second[1]}
    save_file(tensors, lora / "adapter_model.safetensors")
    of_steer, of_lora = (
        model.run({0: Work(PROMPT, replace(GREEDY, adapters=(choice,)))}) for choice in (steer, chosen(lora, CONFIG))
    )
    assert of_steer.token_ids == of_lora.token_ids
    for key, row in of_lora.logits.items():
        assert torch.allclose(of_steer.logits[key], row, rtol=0, atol=1e-4)
    with pytest.raises(CheckpointError, match="there are 3 steers"):
        chosen(Path(f"{steers}#3"), CONFIG)
    without_bias = add_to(base, tmp_path / "without", {"lm_head.bias": -load_file(file)["lm_head.bias"]})
    expected = Model(str(without_bias)).run({0: Work(PROMPT, replace(GREEDY, adapters=(steer,)))})
    adapters = (steer, chosen(Path(f"{steers}#no-bias"), CONFIG))
    run = model.run({0: Work(PROMPT, replace(GREEDY, adapters=adapters))}, layers=(2, 2))
    assert run.token_ids == expected.token_ids
    for key, row in expected.logits.items():
        assert torch.allclose(run.logits[key], row, rtol=0, atol=1e-4)
        assert not torch.allclose(of_steer.logits[key], row, rtol=0, atol=1e-2)


@pytest.mark.parametrize("layer_kind", ["packed", "plain"])
def test_dora_equals_weights_of_given_norms(
    base: Path, tmp_path: Path, layer_kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if layer_kind == "plain":
        monkeypatch.setattr("gptj_dist.model.layers.can_pack", lambda *_: False)
        monkeypatch.setattr("gptj_dist.model.linear.can_pack", lambda *_: False)
    path = write_lora(tmp_path / "dora", CONFIG, ALL_TARGETS, seed=9, use_dora=True, use_rslora=True)
    [file] = base.glob("*.safetensors")
    weights, lora = load_file(file), load_file(path / "adapter_model.safetensors")
    added = {}
    for name in lora:
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            weight = f"{module.removeprefix('base_model.model.')}.weight"
            before = weights[weight].double()
            scale = 2 * 4 / 4**0.5
            after = before + scale * (lora[f"{module}.lora_B.weight"].double() @ lora[name].double())
            magnitude = lora[f"{module}.lora_magnitude_vector"].double()
            added[weight] = magnitude[:, None] * after / after.norm(dim=1, keepdim=True) - before
    expected = Model(str(add_to(base, tmp_path / "changed", added))).run({0: Work(PROMPT, GREEDY)})
    choice = chosen(path, CONFIG)
    run = Model(str(base)).run({0: Work(PROMPT, replace(GREEDY, adapters=(choice,)))}, layers=(2, 2))
    assert run.token_ids == expected.token_ids
    for key, row in expected.logits.items():
        assert torch.allclose(run.logits[key], row, rtol=0, atol=1e-4)


def test_adapters_of_embedding_and_head_equal_merged_weights(base: Path, model: Model, tmp_path: Path) -> None:
    noise = torch.Generator().manual_seed(4)
    path = write_lora(tmp_path / "ends", CONFIG, layers=())
    a_in, b_in = torch.randn(4, CONFIG.vocab_size, generator=noise), torch.randn(CONFIG.d_model, 4, generator=noise)
    a_out, b_out = torch.randn(4, CONFIG.d_model, generator=noise), torch.randn(CONFIG.vocab_size, 4, generator=noise)
    tensors = {
        "base_model.model.transformer.wte.lora_embedding_A": a_in * 0.02,
        "base_model.model.transformer.wte.lora_embedding_B": b_in,
        "base_model.model.lm_head.lora_A.weight": a_out * 0.02,
        "base_model.model.lm_head.lora_B.weight": b_out,
    }
    save_file(tensors, path / "adapter_model.safetensors")
    added = {"transformer.wte.weight": 0.04 * (b_in @ a_in).T, "lm_head.weight": 0.04 * b_out @ a_out}
    expected = Model(str(add_to(base, tmp_path / "changed", added))).run({0: Work(PROMPT, GREEDY)})
    adapted = Work(PROMPT, replace(GREEDY, adapters=(chosen(path, CONFIG),)))
    run = model.run({0: adapted, 1: Work(PROMPT[:9], GREEDY)}, layers=(1, 3), max_chunk_tokens=7)
    assert run.token_ids[0] == expected.token_ids[0]
    for key, row in expected.logits.items():
        assert torch.allclose(run.logits[key], row, rtol=0, atol=1e-4)
    assert run.token_ids[1] == model.run({1: Work(PROMPT[:9], GREEDY)}).token_ids[1]


def test_the_offline_api_loads_replaces_and_unloads_adapters(tmp_path: Path) -> None:
    config = model_config("demo")
    poet = write_lora(tmp_path / "poet", config, seed=1, size=0.5)
    pirate = write_lora(tmp_path / "pirate", config, ALL_TARGETS, seed=2, size=0.5)
    text = "It was the best of times, it was"

    def told(llm: LLM, *choices: AdapterChoice) -> str:
        [output] = llm.generate(text, replace(GREEDY, adapters=choices), use_tqdm=False)
        return output.text

    with LLM("demo", device="cpu", dtype="float32", stages=2, adapters={"poet": poet}) as llm:
        plain, of_poet = told(llm), told(llm, AdapterChoice("poet"))
        assert plain != of_poet
        assert told(llm, AdapterChoice("poet", strength=0.0)) == plain
        llm.load_adapter("pirate", pirate)
        of_pirate = told(llm, AdapterChoice("pirate"))
        llm.load_adapter("poet", pirate)
        assert told(llm, AdapterChoice("poet")) == of_pirate
        llm.unload_adapter("poet")
        with pytest.raises(InvalidRequestError, match="no adapter 'poet' is loaded; there is 'pirate'") as raised:
            told(llm, AdapterChoice("poet"))
        assert raised.value.param == "adapters"
        misfit = write_lora(tmp_path / "misfit", replace(config, d_ff=8), ("mlp.fc_out",), layers=(27,))
        with pytest.raises(CheckpointError, match=r"h\.27\.mlp\.fc_out A is \[4, 8\], not \[4, 512\]"):
            llm.load_adapter("misfit", misfit)
        assert told(llm) == plain


def test_the_example_shows_a_lora_an_edit_and_steering(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = model_config("demo")
    noise = torch.Generator().manual_seed(1)
    weight = "transformer.h.5.mlp.fc_out.weight"
    edits = tmp_path / "fact.safetensors"
    left, right = (torch.randn(width, generator=noise) for width in (config.d_ff, config.d_model))
    save_file({f"{weight}.left": left, f"{weight}.right": right}, edits)
    vector = write_control_vector(tmp_path / "mood.gguf", {9: 5 * torch.randn(config.d_model, generator=noise)})
    plain = set()
    for path in (write_lora(tmp_path / "poet", config, size=0.5), edits, vector):
        main(["demo", str(path), "Call me", "--strengths", "0", "1"])
        without, changed = (line.split(None, 1)[1] for line in capsys.readouterr().out.splitlines())
        assert without != changed
        plain.add(without)
    assert len(plain) == 1
