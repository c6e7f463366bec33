"""Adapters in PEFT's layout are read as PEFT means them, or refused by the name of what is not understood."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from gptj_dist.checkpoint.adapter_formats import open_adapter, open_fitting
from gptj_dist.checkpoint.adapter_loader import read_tensor
from gptj_dist.checkpoint.synthetic import write_checkpoint
from gptj_dist.cli.checkpoints.adapter import adapter
from gptj_dist.cli.checkpoints.convert import convert
from gptj_dist.cli.server.serve import _lora_modules
from gptj_dist.errors import CheckpointError, ConfigurationError, ConversionError
from gptj_dist.serving.settings import parse_settings
from tests.adapters import ALL_TARGETS, add_to, model_config, write_control_vector, write_lora

CONFIG = model_config("demo")
SMALL = replace(CONFIG, num_layers=2, vocab_size=64, d_model=32, d_ff=48, num_heads=2, dtype="float32")


def scales(path: Path) -> dict[tuple[str, int | None], float]:
    return {(part.place, part.layer): part.scale for part in open_adapter(path).parts}


def edit(path: Path, **fields: Any) -> Path:
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return path


@pytest.mark.parametrize(
    ("fields", "q_scale", "v_scale"),
    [
        ({"lora_alpha": 32}, 8.0, 8.0),
        ({"lora_alpha": 32, "use_rslora": True}, 16.0, 16.0),
        ({"lora_alpha": 32, "alpha_pattern": {"q_proj": 4}}, 1.0, 8.0),
        ({"lora_alpha": 32, "alpha_pattern": {r"transformer\.h\.0\.attn\.v_proj": 8}}, 8.0, 2.0),
        ({"r": 8, "lora_alpha": 32, "rank_pattern": {"attn.q_proj": 4, "v_proj": 4}}, 8.0, 8.0),
        # Old configs, and fields that have no effect on a GPT-J or are switched off.
        ({"lora_alpha": 32, "enable_lora": None, "merge_weights": False, "fan_in_fan_out": True}, 8.0, 8.0),
        ({"lora_alpha": 32, "use_dora": False, "loftq_config": {}, "init_lora_weights": True, "new": None}, 8.0, 8.0),
    ],
)
def test_fields_that_change_the_arithmetic_are_honoured(
    tmp_path: Path, fields: dict[str, Any], q_scale: float, v_scale: float
) -> None:
    found = scales(write_lora(tmp_path, CONFIG, rank=4, layers=(0,), **fields))
    assert found == {("q", 0): q_scale, ("v", 0): v_scale}


@pytest.mark.parametrize(
    "fields",
    [
        {"bias": "some"},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": "lm_head"},
        {"trainable_token_indices": [1, 2]},
        {"init_lora_weights": "pissa"},
        {"layer_replication": [[0, 4]]},
        {"alora_invocation_tokens": [1, 2]},
        {"target_parameters": ["x"]},
        {"of_the_future": 1},
        {"peft_type": "IA3"},
    ],
)
def test_other_fields_are_refused_by_name(tmp_path: Path, fields: dict[str, Any]) -> None:
    [name] = fields
    with pytest.raises(CheckpointError, match=name):
        open_adapter(write_lora(tmp_path, CONFIG, layers=(0,), **fields))


@pytest.mark.parametrize(
    ("tensors", "fields", "problem"),
    [
        ({"attn.q_proj.bias": 128}, {"bias": "all"}, r"has a bias for .*q_proj, which has none in a GPT-J"),
        ({"ln_1.weight": 128}, {"modules_to_save": ["ln_1"]}, r"a new weight of a LayerNorm \(.*ln_1\) is not supp"),
        ({"ln_1.bias": 127}, {"bias": "all"}, r"ln_1 bias is \[127\], not \[128\]"),
        ({"mlp.fc_in.weight": (512, 127)}, {}, r"fc_in weight is \[512, 127\], not \[512, 128\]"),
        ({"ln_1.lora_A.weight": (4, 128), "ln_1.lora_B.weight": (128, 4)}, {}, "is a LayerNorm, which has no LoRA"),
    ],
)
def test_new_weights_and_biases_that_cannot_be_taken_are_refused(
    tmp_path: Path, tensors: dict[str, Any], fields: dict[str, Any], problem: str
) -> None:
    path = write_lora(tmp_path, CONFIG, layers=(0,), **fields)
    add_tensors(path, {f"base_model.model.transformer.h.0.{name}": shape for name, shape in tensors.items()})
    with pytest.raises(CheckpointError, match=problem):
        open_fitting(path, CONFIG)


def test_rows_of_tokens_must_be_those_of_an_untied_embedding(tmp_path: Path) -> None:
    path = write_lora(tmp_path, CONFIG, layers=(0,), trainable_token_indices={"wte": [5, 1]})
    add_tensors(path, {"base_model.model.transformer.wte.token_adapter.trainable_tokens_delta": (2, 128)})
    [*_, part] = open_fitting(path, CONFIG).parts
    assert (part.place, part.token_ids) == ("wte", (5, 1))
    for indices, problem in (
        ([1, CONFIG.vocab_size], "rows of other tokens, or of tied embeddings: .*wte rows"),
        ([1, 2, 3], r"is \[2, 128\], not \[3, 128\]"),
        ([1, 1], "each once"),
        ({"wte": [1], "lm_head": [1]}, "of wte alone"),
    ):
        with pytest.raises(CheckpointError, match=problem):
            open_fitting(edit(path, trainable_token_indices=indices), CONFIG)
    with pytest.raises(CheckpointError, match="tied embeddings: "):
        open_fitting(edit(path, trainable_token_indices=[1, 2]), replace(CONFIG, has_tied_embeddings=True))


def add_tensors(path: Path, shapes: dict[str, Any]) -> None:
    """Adds tensors of ones to an adapter."""
    file = path / "adapter_model.safetensors"
    save_file(load_file(file) | {name: torch.ones(shape) for name, shape in shapes.items()}, file)


def test_pickled_adapters_and_names_of_training_are_read(tmp_path: Path) -> None:
    plain = write_lora(tmp_path / "a", CONFIG, ALL_TARGETS, layers=(3,))
    tensors = load_file(plain / "adapter_model.safetensors")
    pickled = write_lora(tmp_path / "b", CONFIG, ALL_TARGETS, layers=(3,))
    (pickled / "adapter_model.safetensors").unlink()
    named = {name.replace(".weight", ".default.weight"): tensor for name, tensor in tensors.items()}
    torch.save(named, pickled / "adapter_model.bin")
    for one, other in zip(open_adapter(plain).parts, open_fitting(pickled, CONFIG).parts, strict=True):
        assert (one.place, one.layer, one.scale) == (other.place, other.layer, other.scale)
        for mine, theirs in zip(one.tensors, other.tensors, strict=True):
            assert torch.equal(read_tensor(mine), read_tensor(theirs))


QV, OLD = ("attn.q_proj", "attn.v_proj"), {"enable_lora": None, "merge_weights": False}
PUBLIC: Mapping[str, tuple[tuple[str, ...], int, float, bool, dict[str, Any]]] = {
    "saadqbal/gpt-j-6b-lora": (QV, 16, 2.0, True, {}),
    "saadqbal/gpt-j-6b-lora-instruct": (QV, 16, 2.0, True, {}),
    "monsterapi/Gptj-6b_alpaca-gpt4": (QV, 8, 2.0, True, {"lora_dropout": 0.05}),
    "lwk723/gptj-qlora-peft": (QV, 8, 4.0, True, {"base_model_name_or_path": "EleutherAI/gpt-j-6b"}),
    "jfacevedo/alpaca-gptj": (ALL_TARGETS[:3], 16, 2.0, True, OLD),
    "flytech/gpt-j-6b-devchat": (ALL_TARGETS[:4], 4, 4.0, True, {"init_lora_weights": True, "revision": None}),
    "Yorth/dolly-lora": (QV, 4, 4.0, True, OLD | {"lora_dropout": 0.1}),
    "soominc/gptj-lora": (("wte",), 4, 2.0, False, {"rank_pattern": {}, "use_dora": False, "loftq_config": {}}),
}
"""Targets, rank, scale, whether it is a pickle, and fields, of public adapters; the widths here are the demo's.

What is not known of them (some scales, and targets and files of some) is as PEFT's defaults of their time were.
"""


@pytest.mark.parametrize("name", PUBLIC)
def test_files_of_the_shapes_of_public_adapters_are_read(tmp_path: Path, name: str) -> None:
    targets, rank, scale, is_pickled, fields = PUBLIC[name]
    layers = () if targets == ("wte",) else range(CONFIG.num_layers)
    path = write_lora(tmp_path, CONFIG, targets, rank, layers=layers, lora_alpha=int(rank * scale), **fields)
    file = path / "adapter_model.safetensors"
    if targets == ("wte",):
        embedding = "base_model.model.transformer.wte.lora_embedding"
        shapes = {"A": (rank, CONFIG.vocab_size), "B": (CONFIG.d_model, rank)}
        save_file({f"{embedding}_{side}": torch.ones(shape) for side, shape in shapes.items()}, file)
    tensors = load_file(file)
    if is_pickled:
        file.unlink()
        torch.save(tensors, path / "adapter_model.bin")
    stored = open_fitting(path, CONFIG)
    assert len(stored.parts) == len(targets) * max(1, len(layers))
    assert (stored.ranks, {part.scale for part in stored.parts}) == ((rank,), {scale})
    assert {part.place for part in stored.parts} == {place(target) for target in targets}
    for part in stored.parts:
        wanted = [tensor for key, tensor in tensors.items() if key.startswith(f"{part.name}.")]
        assert all(
            torch.equal(read_tensor(header), tensor) for header, tensor in zip(part.tensors, wanted, strict=True)
        )


def place(target: str) -> str:
    return target.rpartition(".")[2].removesuffix("_proj")


def test_what_is_at_no_place_or_does_not_fit_is_named(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "a", CONFIG, layers=(28,))
    with pytest.raises(CheckpointError, match=r"beyond n_layer 28: base_model.model.transformer.h.28.attn.q_proj"):
        open_fitting(path, CONFIG)
    with pytest.raises(CheckpointError, match="says rank 5"):
        open_adapter(edit(write_lora(tmp_path / "b", CONFIG, layers=(0,)), r=5))
    path = write_lora(tmp_path / "c", CONFIG, layers=(0,))
    file = path / "adapter_model.safetensors"
    name = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"
    save_file(load_file(file) | {name: torch.zeros(4, 8)}, file)
    with pytest.raises(CheckpointError, match=r"change no known place of a GPT-J: .*c_attn"):
        open_adapter(path)
    with pytest.raises(CheckpointError, match="is no adapter"):
        open_adapter(tmp_path)
    with pytest.raises(CheckpointError, match="there is no adapter"):
        open_adapter(tmp_path / "none")


def edits_of(layer: int, facts: int) -> tuple[str, torch.Tensor, torch.Tensor]:
    noise = torch.Generator().manual_seed(layer)
    left = torch.randn(CONFIG.d_ff, facts, generator=noise)
    return f"transformer.h.{layer}.mlp.fc_out.weight", left, torch.randn(CONFIG.d_model, facts, generator=noise)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_edits_of_rome_and_memit_are_matrices_of_fc_out(tmp_path: Path, suffix: str) -> None:
    """ROME has vectors; MEMIT has a column for each fact, and files hold the right side either way."""
    rome, memit, turned = edits_of(5, 1), edits_of(3, 3), edits_of(4, 3)
    tensors = {
        f"{rome[0]}.left": rome[1][:, 0].contiguous(),
        f"{rome[0]}.right": rome[2][:, 0].contiguous(),
        f"{memit[0]}.left": memit[1],
        f"{memit[0]}.right": memit[2],
        f"{turned[0]}.left": turned[1],
        f"{turned[0]}.right": turned[2].T.contiguous(),
    }
    path = tmp_path / f"edits{suffix}"
    if suffix == ".npz":
        arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
        numpy.savez(path, **arrays)
    else:
        save_file(tensors, path)
    found = {part.layer: part for part in open_fitting(path, CONFIG).parts}
    assert {(part.place, part.scale) for part in found.values()} == {("fc_out", 1.0)}
    for layer, (_, left, right) in ((5, rome), (3, memit), (4, turned)):
        a, b = (read_tensor(header) for header in found[layer].tensors)
        assert torch.equal(a, left.T)
        assert torch.equal(b, right)


def test_broken_edits_are_refused(tmp_path: Path) -> None:
    name, left, right = edits_of(5, 2)
    path = tmp_path / "edits.safetensors"
    for tensors, problem in (
        ({f"{name}.left": left}, "fc_out of layer 5 has no right"),
        ({f"{name}.left": left, f"{name}.right": right[:, :1].contiguous()}, r"left \[512, 2\] and right \[128, 1\]"),
        ({"transformer.wte.weight.left": left}, "and not transformer.wte.weight.left"),
        ({f"{name}.left": left[:8].contiguous(), f"{name}.right": right}, r"A is \[2, 8\], not \[2, 512\]"),
    ):
        save_file(tensors, path)
        with pytest.raises(CheckpointError, match=problem):
            open_fitting(path, CONFIG)
    squeezed = tmp_path / "edits.npz"
    arrays: dict[str, Any] = {f"{name}.left": left.numpy(), f"{name}.right": right.numpy()}
    numpy.savez_compressed(squeezed, **arrays)
    with pytest.raises(CheckpointError, match=r"is compressed: save it by numpy\.savez"):
        open_adapter(squeezed)
    data = (tmp_path / "edits.npz").read_bytes()
    squeezed.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="cannot be read as an uncompressed"):
        open_adapter(squeezed)


def test_control_vectors_are_added_behind_their_layers(tmp_path: Path) -> None:
    directions = {layer: torch.full((CONFIG.d_model,), float(layer)) for layer in (3, 7)}
    path = write_control_vector(tmp_path / "happy.gguf", directions)
    adapter = open_fitting(path, CONFIG)
    assert (adapter.form, adapter.base) == ("control vector", "gptj")
    for part in adapter.parts:
        assert part.place == "hidden"
        assert part.vector is not None
        assert torch.equal(read_tensor(part.vector), directions[part.layer or 0])
    data = path.read_bytes()
    for cut in range(4, len(data), 97):
        path.write_bytes(data[:cut])
        with pytest.raises(CheckpointError):
            open_adapter(path)
    path.write_bytes(data.replace(b"controlvector", b"controlvectos"))
    with pytest.raises(CheckpointError, match="is a GGUF of 'controlvectos'"):
        open_adapter(path)


def test_an_edited_checkpoint_becomes_an_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, edited = tmp_path / "base", tmp_path / "edited"
    write_checkpoint(base, SMALL, seed=1)
    noise = torch.Generator().manual_seed(1)
    change = torch.randn(SMALL.d_model, 3, generator=noise) @ torch.randn(3, SMALL.d_ff, generator=noise) * 0.01
    add_to(base, edited, {"transformer.h.1.mlp.fc_out.weight": change})
    adapter_file = tmp_path / "fact.safetensors"
    convert(str(edited), adapter_file, delta=str(base))
    assert capsys.readouterr().out.splitlines() == [
        f"{adapter_file}: 1 weight changed, of rank 3 at most",
        f"gptj-dist serve BASE --lora-modules fact={adapter_file}",
    ]
    [part] = open_fitting(adapter_file, SMALL).parts
    a, b = (read_tensor(header) for header in part.tensors)
    assert (part.place, part.layer) == ("fc_out", 1)
    assert torch.allclose(b @ a, change, rtol=0, atol=1e-5)
    for source, problem in ((base, "have the same weights"), (wide_change(base, tmp_path), "which no edit changes")):
        with pytest.raises(CheckpointError, match=problem):
            convert(str(source), tmp_path / "none", delta=str(base))
    with pytest.raises(ConversionError, match="exists already"):
        convert(str(edited), adapter_file, delta=str(base))


def wide_change(base: Path, directory: Path) -> Path:
    return add_to(base, directory / "wide", {"transformer.wte.weight": torch.ones(SMALL.vocab_size, SMALL.d_model)})


def test_its_source_changes_with_its_files(tmp_path: Path) -> None:
    one = open_adapter(write_lora(tmp_path, CONFIG, layers=(0,), seed=1)).source()
    assert open_adapter(tmp_path).source() == one
    assert open_adapter(write_lora(tmp_path, CONFIG, layers=(0,), seed=2)).source().version != one.version


def test_the_command_shows_and_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_lora(tmp_path / "poet", CONFIG, layers=(0, 1, 2, 5))
    adapter("inspect", path)
    assert [line.split(None, 1)[1] for line in capsys.readouterr().out.splitlines()] == [
        "LoRA, 32.8 kB",
        "EleutherAI/gpt-j-6B",
        "4",
        "2",
        "q, v",
        "0-2, 5",
    ]
    adapter("check", path, "demo")
    assert capsys.readouterr().out == f"{path} fits demo\n"
    with pytest.raises(ConfigurationError, match="needs --model"):
        adapter("check", path)


def test_settings_name_adapters_as_vllms_do(tmp_path: Path) -> None:
    assert _lora_modules(["a=/x=y", '{"name": "b", "path": "/z", "base_model_name": "m"}']) == {"a": "/x=y", "b": "/z"}
    for wrong in (["a"], ["=b"], ["a=b", "a=c"], ["{"]):
        with pytest.raises(ConfigurationError, match="--lora-modules"):
            _lora_modules(wrong)
    path = write_lora(tmp_path, CONFIG, layers=(0,))
    config = parse_settings({"model": "demo", "adapters": {"poet": str(path)}})
    assert dict(config.adapters) == {"poet": open_adapter(path).source()}
    with pytest.raises(CheckpointError, match="there is no adapter"):
        parse_settings({"model": "demo", "adapters": {"poet": str(tmp_path / "none")}})
