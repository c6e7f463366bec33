"""Checkpoints on disk: what they hold, what is refused, reading a stage, writing random ones."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPTJForCausalLM

from gptj_dist.checkpoint.hub import DEMO, resolve_model
from gptj_dist.checkpoint.index import (
    CheckpointIndex,
    check_checkpoint,
    expected_tensors,
    read_model_config,
    stage_headers,
)
from gptj_dist.checkpoint.loader import StageTensors
from gptj_dist.checkpoint.synthetic import write_checkpoint
from gptj_dist.config import DTypeName, LayerRange, ModelConfig
from gptj_dist.errors import CheckpointError

CONFIG = ModelConfig(
    vocab_size=40,
    num_layers=4,
    d_model=16,
    num_heads=2,
    rotary_dim=4,
    d_ff=64,
    context_length=32,
    eos_token_ids=(0,),
)
TIED = replace(CONFIG, has_tied_embeddings=True)
WHOLE = LayerRange(0, 1, 0, 4)
FIRST, LAST = LayerRange(0, 2, 0, 2), LayerRange(1, 2, 2, 4)
SHARD_BYTES = 8192

EditTensors = Callable[[dict[str, torch.Tensor]], object]


def _read_stage(directory: Path, layers: LayerRange, config: ModelConfig = CONFIG) -> dict[str, torch.Tensor]:
    with StageTensors(directory, config, layers) as tensors:
        return {name: _read(tensors, name, shape) for name, shape in expected_tensors(config, layers).items()}


def _read(tensors: StageTensors, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    out = torch.full(shape, torch.nan, dtype=dtype)
    tensors.read(name, out)
    return out


def _edit(directory: Path, edit: EditTensors) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors")


def _shards(directory: Path) -> set[str]:
    return {path.name for path in directory.glob("model-*.safetensors")}


# What a checkpoint holds


def test_expected_tensors_of_the_stages_make_up_the_model_once() -> None:
    first, last = expected_tensors(CONFIG, FIRST), expected_tensors(CONFIG, LAST)

    assert not first.keys() & last.keys()
    assert first | last == expected_tensors(CONFIG, WHOLE)
    assert "transformer.wte.weight" in first
    assert first["transformer.h.1.mlp.fc_in.weight"] == (64, 16)
    assert last["lm_head.bias"] == (40,)
    assert len(first | last) == 1 + 4 * 10 + 4


def test_tied_embeddings_go_to_the_first_and_to_the_last_stage() -> None:
    first, last = expected_tensors(TIED, FIRST), expected_tensors(TIED, LAST)

    assert first["transformer.wte.weight"] == last["transformer.wte.weight"] == (40, 16)
    assert "lm_head.weight" not in last


def test_config_survives_the_way_through_config_json(tmp_path: Path) -> None:
    for config in (CONFIG, replace(TIED, dtype="bfloat16", d_ff=48)):
        write_checkpoint(tmp_path, config)
        assert read_model_config(tmp_path) == config


def test_the_demo_checkpoint_is_whole() -> None:
    directory = resolve_model(DEMO)
    config = read_model_config(directory)
    layers = LayerRange.whole(config.num_layers)

    assert stage_headers(CheckpointIndex(directory), config, layers).keys() == expected_tensors(config, layers).keys()


# Reading


@pytest.mark.parametrize("max_shard_bytes", [None, SHARD_BYTES])
def test_stages_read_the_same_bytes_as_safetensors_does(tmp_path: Path, max_shard_bytes: int | None) -> None:
    write_checkpoint(tmp_path, CONFIG, max_shard_bytes=max_shard_bytes)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (max_shard_bytes is not None)
    truth = {name: tensor for file in files for name, tensor in load_file(file).items()}

    check_checkpoint(tmp_path, CONFIG)
    read = _read_stage(tmp_path, FIRST) | _read_stage(tmp_path, LAST)

    assert read.keys() == truth.keys()
    assert all(torch.equal(read[name], truth[name]) for name in truth)


@pytest.mark.parametrize("dtype", get_args(DTypeName))
def test_tensors_are_cast_to_whatever_they_are_read_into(tmp_path: Path, dtype: DTypeName) -> None:
    write_checkpoint(tmp_path, CONFIG, dtype=dtype)
    truth = load_file(tmp_path / "model.safetensors")

    assert read_model_config(tmp_path).dtype == dtype
    with StageTensors(tmp_path, CONFIG, WHOLE) as tensors:
        for name, tensor in truth.items():
            for target in (torch.float32, torch.bfloat16, torch.float16):
                assert torch.equal(_read(tensors, name, tuple(tensor.shape), target), tensor.to(target))


def test_stage_needs_only_the_files_of_its_own_tensors(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIG, max_shard_bytes=SHARD_BYTES)
    needed = CheckpointIndex(tmp_path).files(expected_tensors(CONFIG, LAST))
    others = _shards(tmp_path) - set(needed)
    assert needed
    assert others
    for file in others:
        (tmp_path / file).unlink()

    assert len(_read_stage(tmp_path, LAST)) == len(expected_tensors(CONFIG, LAST))
    with pytest.raises(CheckpointError, match=min(others)):
        check_checkpoint(tmp_path, CONFIG)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensor_is_read_into_a_view_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr("gptj_dist.checkpoint.loader.STAGING_BYTES", 3 * 16 * 4)
    write_checkpoint(tmp_path, CONFIG)
    truth = load_file(tmp_path / "model.safetensors")["lm_head.weight"].to(dtype)
    joined = torch.zeros(40, 20, dtype=dtype)

    with StageTensors(tmp_path, CONFIG, LAST) as tensors:
        tensors.read("lm_head.weight", joined[:, 2:18])

    assert torch.equal(joined[:, 2:18], truth)
    assert not joined[:, :2].any()
    assert not joined[:, 18:].any()


def test_stage_does_not_give_out_tensors_of_other_stages(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIG)
    with StageTensors(tmp_path, CONFIG, FIRST) as tensors, pytest.raises(KeyError):
        tensors.read("lm_head.bias", torch.empty(40))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux takes the advice")
def test_pages_of_a_tensor_that_was_read_are_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, CONFIG)
    advice: list[tuple[int, int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _fd, *args: advice.append(args))
    header = CheckpointIndex(tmp_path).headers(["lm_head.weight"])["lm_head.weight"]

    with StageTensors(tmp_path, CONFIG, LAST) as tensors:
        tensors.read("lm_head.weight", torch.empty(40, 16))

    assert advice == [(header.offset_bytes, 40 * 16 * 4, os.POSIX_FADV_DONTNEED)]


def test_tied_checkpoint_without_a_head_bias_has_a_bias_of_zeros(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TIED, dtype="float16")
    _edit(tmp_path, lambda tensors: tensors.pop("lm_head.bias"))

    check_checkpoint(tmp_path, TIED)
    bias = _read_stage(tmp_path, LAST, TIED)["lm_head.bias"]

    assert torch.equal(bias, torch.zeros(40))


def test_untied_checkpoint_without_a_head_bias_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIG)
    _edit(tmp_path, lambda tensors: tensors.pop("lm_head.bias"))

    with pytest.raises(CheckpointError, match=r"missing: lm_head\.bias$"):
        StageTensors(tmp_path, CONFIG, LAST)


# Refusing


def test_all_problems_are_reported_together_by_name(tmp_path: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["transformer.ln_f.bias"]
        tensors["transformer.h.9.ln_1.bias"] = torch.zeros(16)
        tensors["transformer.wte.weight"] = torch.zeros(39, 16)
        tensors["lm_head.weight"] = torch.zeros(40, 16, dtype=torch.int8)

    write_checkpoint(tmp_path, CONFIG)
    _edit(tmp_path, spoil)

    with pytest.raises(CheckpointError) as error:
        check_checkpoint(tmp_path, CONFIG)

    assert str(error.value).partition(": ")[2] == (
        "missing: transformer.ln_f.bias; beyond n_layer 4: transformer.h.9.ln_1.bias; "
        "misshapen: transformer.wte.weight is [39, 16], not [40, 16]; unreadable: lm_head.weight is I8"
    )


def test_long_lists_of_problems_are_cut(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIG)

    with pytest.raises(CheckpointError, match=r"missing: transformer\.h\.4\..* and 12 more$") as error:
        check_checkpoint(tmp_path, replace(CONFIG, num_layers=6))
    assert str(error.value).count("transformer.h.") == 8


@pytest.mark.parametrize("max_shard_bytes", [None, SHARD_BYTES])
def test_names_without_the_prefix_of_the_whole_model_are_understood(
    tmp_path: Path, max_shard_bytes: int | None
) -> None:
    write_checkpoint(tmp_path, CONFIG, max_shard_bytes=max_shard_bytes)
    truth = _read_stage(tmp_path, LAST)
    for file in tmp_path.glob("*.safetensors"):
        save_file({name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}, file)
    index = tmp_path / "model.safetensors.index.json"
    if max_shard_bytes is not None:
        index.write_text(index.read_text().replace('"transformer.', '"'))

    check_checkpoint(tmp_path, CONFIG)
    read = _read_stage(tmp_path, LAST)
    assert all(torch.equal(read[name], truth[name]) for name in truth)


@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "base_model.model.",
        "base_model.",
        "pretrained_model.",
        "model.",
        "_fsdp_wrapped_module.",
    ],
)
def test_names_with_the_prefix_of_a_wrapper_are_understood(tmp_path: Path, prefix: str, form: str) -> None:
    write_checkpoint(tmp_path, CONFIG)
    truth = _read_stage(tmp_path, WHOLE)
    _rename(tmp_path, lambda name: prefix + name, form)

    check_checkpoint(tmp_path, CONFIG)
    assert all(torch.equal(tensor, truth[name]) for name, tensor in _read_stage(tmp_path, WHOLE).items())


def test_parts_that_wrappers_put_into_names_are_passed_over_in_an_index_too(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIG, max_shard_bytes=SHARD_BYTES)
    truth = _read_stage(tmp_path, WHOLE)
    for file in tmp_path.glob("*.safetensors"):
        save_file({name.replace(".h.", ".h._orig_mod."): t for name, t in load_file(file).items()}, file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(".h.", ".h._orig_mod."))

    assert all(torch.equal(tensor, truth[name]) for name, tensor in _read_stage(tmp_path, WHOLE).items())


def _rename(directory: Path, renamed: Callable[[str], str], form: str) -> None:
    tensors = {renamed(name): tensor for name, tensor in load_file(directory / "model.safetensors").items()}
    (directory / "model.safetensors").unlink()
    if form.endswith(".bin"):
        torch.save(tensors, directory / form)
    else:
        save_file(tensors, directory / form)


@pytest.mark.parametrize("extra", ["v_head.summary.weight", "foo.bar", "transformer.h.0.attn.extra", "score.weight"])
def test_tensors_that_gptj_does_not_have_are_skipped_and_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, extra: str
) -> None:
    write_checkpoint(tmp_path, CONFIG)
    truth = _read_stage(tmp_path, WHOLE)
    _edit(tmp_path, lambda tensors: tensors.update({extra: torch.zeros(3)}))

    check_checkpoint(tmp_path, CONFIG)
    read = _read_stage(tmp_path, FIRST) | _read_stage(tmp_path, LAST)

    assert all(torch.equal(read[name], truth[name]) for name in truth)
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: tensors skipped that GPT-J does not have: {extra}"
    ]


@pytest.mark.parametrize("name", ["q_proj.lora_A.weight", "q_proj.lora_B.default.weight", "q_proj.base_layer.weight"])
def test_weights_beside_an_adapter_that_is_not_merged_are_refused(tmp_path: Path, name: str) -> None:
    write_checkpoint(tmp_path, CONFIG)
    adapter = f"base_model.model.transformer.h.0.attn.{name}"
    _edit(tmp_path, lambda tensors: tensors.update({adapter: torch.zeros(4, 16)}))

    with pytest.raises(CheckpointError, match=r"not merged into the weights .*merge_and_unload"):
        check_checkpoint(tmp_path, CONFIG)


@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16])
def test_weights_of_64_bits_are_read_as_the_nearest_numbers(tmp_path: Path, form: str, target: torch.dtype) -> None:
    write_checkpoint(tmp_path, CONFIG)
    truth = {name: tensor.double() * (1 + 1e-9) for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    save_file(truth, tmp_path / "model.safetensors")
    _rename(tmp_path, str, form)
    fields = json.loads((tmp_path / "config.json").read_text())
    for dtype in ("float64", "torch.float64", None):
        (tmp_path / "config.json").write_text(json.dumps({**fields, "dtype": dtype}))
        assert read_model_config(tmp_path).dtype == "float32"

    check_checkpoint(tmp_path, CONFIG)
    with StageTensors(tmp_path, CONFIG, WHOLE) as tensors:
        for name, tensor in truth.items():
            assert torch.equal(_read(tensors, name, tuple(tensor.shape), target), tensor.to(target))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", [torch.float32, torch.float16])
def test_a_weight_that_is_no_number_is_refused_by_its_name(
    tmp_path: Path, value: float, stored: torch.dtype, target: torch.dtype
) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["lm_head.weight"].to(stored)
        tensors["lm_head.weight"][39, 15] = value

    write_checkpoint(tmp_path, CONFIG)
    _edit(tmp_path, spoil)

    with (
        StageTensors(tmp_path, CONFIG, LAST) as tensors,
        pytest.raises(CheckpointError, match=r"^lm_head\.weight holds NaN or infinity"),
    ):
        tensors.read("lm_head.weight", torch.empty(40, 16, dtype=target))


@pytest.mark.parametrize(
    ("number", "stored", "target", "advice"),
    [
        (70_000.0, torch.float32, torch.float16, "beyond 65504, which float16 cannot hold: choose bfloat16 or float32"),
        (-65_520.0, torch.bfloat16, torch.float16, "which float16 cannot hold"),
        (3.4e38, torch.float32, torch.bfloat16, "which bfloat16 cannot hold: choose float32"),
        (1e39, torch.float64, torch.float32, "which float32 cannot hold"),
    ],
)
def test_a_weight_that_the_type_cannot_hold_is_refused_by_its_name(
    tmp_path: Path, number: float, stored: torch.dtype, target: torch.dtype, advice: str
) -> None:
    write_checkpoint(tmp_path, CONFIG)
    _edit(tmp_path, lambda tensors: tensors.update({"lm_head.bias": torch.full((40,), number, dtype=stored)}))

    with StageTensors(tmp_path, CONFIG, LAST) as tensors, pytest.raises(CheckpointError, match=advice) as error:
        tensors.read("lm_head.bias", torch.empty(40, dtype=target))
    assert str(error.value).startswith("lm_head.bias holds numbers beyond")


def test_the_largest_number_of_a_type_is_not_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIG)
    _edit(tmp_path, lambda tensors: tensors.update({"lm_head.bias": torch.full((40,), 65504.0)}))

    with StageTensors(tmp_path, CONFIG, LAST) as tensors:
        assert (_read(tensors, "lm_head.bias", (40,), torch.float16) == 65504.0).all()


def test_a_tensor_under_both_its_names_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIG)
    _edit(tmp_path, lambda tensors: tensors.update({"wte.weight": tensors["lm_head.weight"].clone()}))

    with pytest.raises(CheckpointError, match="holds tensors twice"):
        check_checkpoint(tmp_path, CONFIG)


def test_legacy_buffers_are_passed_over(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIG, legacy_buffers=True)
    assert "transformer.h.0.attn.masked_bias" in CheckpointIndex(tmp_path).file_of

    check_checkpoint(tmp_path, CONFIG)
    assert len(_read_stage(tmp_path, WHOLE)) == len(expected_tensors(CONFIG, WHOLE))


@pytest.mark.parametrize("num_bytes", [5, 100, -1])
def test_truncated_file_is_refused(tmp_path: Path, num_bytes: int) -> None:
    write_checkpoint(tmp_path, CONFIG)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:num_bytes])

    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated"):
        check_checkpoint(tmp_path, CONFIG)


def test_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIG)
    with StageTensors(tmp_path, CONFIG, WHOLE) as tensors:
        os.truncate(tmp_path / "model.safetensors", 1000)
        with pytest.raises(CheckpointError, match="truncated while"):
            tensors.read("lm_head.weight", torch.empty(40, 16))


@pytest.mark.parametrize(
    "header",
    [
        "{not json",
        "[]",
        '{"a": 1}',
        '{"a": {"dtype": "F32", "shape": [2]}}',
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}',
        '{"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 8]}}',
        '{"a": {"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]}}',
        '{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 8]}}',
        '{"a": {"dtype": "X", "shape": [2], "data_offsets": [0, 1' + "0" * 30 + "]}}",
        "[" * 100_000,
    ],
)
def test_corrupt_header_is_refused(tmp_path: Path, header: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(8))

    with pytest.raises(CheckpointError, match=r"model\.safetensors has a corrupt header"):
        CheckpointIndex(tmp_path)


@pytest.mark.parametrize(
    "index",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": "../../secret.safetensors"}}',
        '{"weight_map": {"wte.weight": "a", "transformer.wte.weight": "b"}}',
    ],
)
def test_broken_index_is_refused_by_its_name(tmp_path: Path, index: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)

    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        CheckpointIndex(tmp_path)


def test_tensor_that_is_not_in_the_file_that_the_index_names_is_missing(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIG, max_shard_bytes=SHARD_BYTES)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.bias"] = index["weight_map"]["transformer.wte.weight"]
    path.write_text(json.dumps(index))

    with pytest.raises(CheckpointError, match=r"missing: lm_head\.bias$"):
        check_checkpoint(tmp_path, CONFIG)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"model_type": "llama"}'])
def test_missing_or_broken_config_is_refused_by_its_name(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)

    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_model_config(tmp_path)


def test_directory_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none of model\.safetensors, "):
        CheckpointIndex(tmp_path)


# Writing


@pytest.mark.parametrize("config", [CONFIG, TIED])
@pytest.mark.parametrize("max_shard_bytes", [None, SHARD_BYTES])
def test_transformers_loads_a_synthetic_checkpoint_in_full(
    tmp_path: Path, config: ModelConfig, max_shard_bytes: int | None
) -> None:
    write_checkpoint(tmp_path, config, max_shard_bytes=max_shard_bytes)

    model, info = GPTJForCausalLM.from_pretrained(tmp_path, output_loading_info=True)

    assert not any(info.values())
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in _read_stage(tmp_path, WHOLE, config).items())


def test_synthetic_weights_depend_on_the_seed_and_not_on_the_shards(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", CONFIG)
    write_checkpoint(tmp_path / "b", CONFIG, max_shard_bytes=SHARD_BYTES)
    write_checkpoint(tmp_path / "c", CONFIG, seed=1)
    a, b, c = (_read_stage(tmp_path / name, WHOLE) for name in "abc")

    assert all(torch.equal(a[name], b[name]) and not torch.equal(a[name], c[name]) for name in a)


def test_synthetic_biases_are_not_zero_and_layer_norms_not_one(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIG, init_std=0.1)

    for name, tensor in _read_stage(tmp_path, WHOLE).items():
        centre = 1.0 if name.endswith(("ln_1.weight", "ln_f.weight")) else 0.0
        assert (tensor != centre).all()
        assert (tensor - centre).abs().max() < 0.6


def test_no_shard_exceeds_its_limit(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIG, max_shard_bytes=SHARD_BYTES)

    for file in tmp_path.glob("*.safetensors"):
        assert sum(tensor.nbytes for tensor in load_file(file).values()) <= SHARD_BYTES
