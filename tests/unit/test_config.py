"""Settings: a checkpoint's shape, a pipeline's settings, and how both refuse what cannot work."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
from transformers import GPTJConfig

from gptj_dist.config import LayerRange, ModelConfig, PipelineConfig, refuse_unknown_keys
from gptj_dist.errors import CheckpointError, ConfigurationError

GPTJ_6B: Mapping[str, Any] = {
    "activation_function": "gelu_new",
    "architectures": ["GPTJForCausalLM"],
    "bos_token_id": 50256,
    "eos_token_id": 50256,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gptj",
    "n_embd": 4096,
    "n_head": 16,
    "n_inner": None,
    "n_layer": 28,
    "n_positions": 2048,
    "rotary_dim": 64,
    "tie_word_embeddings": False,
    "vocab_size": 50400,
}


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in GPTJ_6B.items() if name != key}


def test_gptj_6bs_own_config_is_read() -> None:
    assert ModelConfig.from_hf(GPTJ_6B) == ModelConfig(
        vocab_size=50400,
        num_layers=28,
        d_model=4096,
        num_heads=16,
        rotary_dim=64,
        d_ff=16384,
        context_length=2048,
        eos_token_ids=(50256,),
        bos_token_id=50256,
        dtype="float32",
        layer_norm_eps=1e-5,
        has_tied_embeddings=False,
    )
    assert ModelConfig.from_hf(GPTJ_6B).head_dim == 256


@pytest.mark.parametrize(
    ("changes", "field", "expected"),
    [
        ({"n_inner": 1000}, "d_ff", 1000),
        ({"rotary_dim": 256}, "rotary_dim", 256),
        ({"torch_dtype": "float64"}, "dtype", "float32"),
        ({"torch_dtype": "float16"}, "dtype", "float16"),
        ({"torch_dtype": "torch.bfloat16"}, "dtype", "bfloat16"),
        ({"dtype": "bfloat16", "torch_dtype": "float16"}, "dtype", "bfloat16"),
        ({"dtype": None}, "dtype", "float32"),
        ({"tie_word_embeddings": True}, "has_tied_embeddings", True),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_eps", 1e-6),
        ({"eos_token_id": 7}, "eos_token_ids", (7,)),
        ({"eos_token_id": [50257, 198, 198]}, "eos_token_ids", (50257, 198)),
        ({"eos_token_id": []}, "eos_token_ids", ()),
        ({"eos_token_id": None}, "eos_token_ids", ()),
        ({"bos_token_id": None, "eos_token_id": [198, 7]}, "empty_prompt_ids", (198,)),
        ({"bos_token_id": 198}, "empty_prompt_ids", (198,)),
        ({"bos_token_id": None, "eos_token_id": None}, "empty_prompt_ids", ()),
    ],
    ids=str,
)
def test_what_fine_tunes_change_is_read(changes: dict[str, Any], field: str, expected: object) -> None:
    assert getattr(ModelConfig.from_hf({**GPTJ_6B, **changes}), field) == expected


@pytest.mark.parametrize("key", ["n_inner", "rotary_dim", "eos_token_id", "tie_word_embeddings", "layer_norm_epsilon"])
def test_fields_that_have_a_default_may_be_left_out(key: str) -> None:
    assert ModelConfig.from_hf(without(key)) == ModelConfig.from_hf(GPTJ_6B)


def test_a_config_without_rotary_dim_means_64_as_in_transformers() -> None:
    fields = {**without("rotary_dim"), "n_embd": 1024, "n_head": 8}
    assert ModelConfig.from_hf(fields).rotary_dim == GPTJConfig().rotary_dim == 64


def test_a_config_without_rotary_dim_is_refused_where_heads_are_narrower_than_64() -> None:
    with pytest.raises(CheckpointError, match=r"lacks rotary_dim, which then is 64, .* the 32 dimensions of a head"):
        ModelConfig.from_hf({**without("rotary_dim"), "n_embd": 1024, "n_head": 32})


@pytest.mark.parametrize("key", ["vocab_size", "n_layer", "n_embd", "n_head", "n_positions"])
def test_a_missing_field_is_named(key: str) -> None:
    with pytest.raises(CheckpointError, match=rf"lacks {key}$"):
        ModelConfig.from_hf(without(key))


def test_all_missing_fields_are_named_together() -> None:
    with pytest.raises(CheckpointError, match="lacks vocab_size, n_layer, n_embd, n_head, n_positions"):
        ModelConfig.from_hf({"model_type": "gptj"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
        ({"model_type": None}, "model_type is None"),
        ({"activation_function": "relu"}, "activation_function 'relu'"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"vocab_size": "50400"}, "vocab_size"),
        ({"n_layer": -1}, "n_layer"),
        ({"n_layer": 2.5}, "n_layer"),
        ({"n_head": True}, "n_head"),
        ({"n_positions": None}, "n_positions"),
        ({"n_embd": 4095}, "n_embd 4095 is not a multiple"),
        ({"rotary_dim": 63}, "rotary_dim"),
        ({"rotary_dim": 258}, "rotary_dim"),
        ({"rotary_dim": -2}, "rotary_dim"),
        ({"rotary_dim": "64"}, "rotary_dim"),
        ({"rotary_dim": 64.0}, "rotary_dim"),
        ({"rotary_dim": 0}, "rotary_dim"),
        ({"rotary_dim": None}, "rotary_dim"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"n_inner": 0}, "n_inner"),
        ({"n_inner": "big"}, "n_inner"),
        ({"eos_token_id": "50256"}, "eos_token_id"),
        ({"eos_token_id": 50256.0}, "eos_token_id"),
        ({"eos_token_id": True}, "eos_token_id"),
        ({"eos_token_id": [50256, 50400]}, "eos_token_id 50400 is not a number below vocab_size 50400"),
        ({"eos_token_id": [50256, None]}, "eos_token_id"),
        ({"eos_token_id": [[50256]]}, "eos_token_id"),
        ({"eos_token_id": -1}, "eos_token_id"),
        ({"eos_token_id": 50400}, "eos_token_id"),
        ({"layer_norm_epsilon": "small"}, "layer_norm_epsilon"),
        ({"layer_norm_epsilon": None}, "layer_norm_epsilon"),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_a_gptj_is_refused_and_the_field_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_hf({**GPTJ_6B, **changes})


def test_a_layer_range_knows_its_place() -> None:
    first, middle, last = (LayerRange(stage, 3, 2 * stage, 2 * stage + 2) for stage in range(3))
    assert [layers.num_layers for layers in (first, middle, last)] == [2, 2, 2]
    assert [layers.is_first for layers in (first, middle, last)] == [True, False, False]
    assert [layers.is_last for layers in (first, middle, last)] == [False, False, True]
    lone = LayerRange(0, 1, 0, 28)
    assert lone.is_first
    assert lone.is_last


@pytest.mark.parametrize(
    ("settings", "num_stages"), [({}, 1), ({"stages": 4}, 4), ({"layers": (8, 7, 7, 6)}, 4), ({"layers": (28,)}, 1)]
)
def test_stages_are_counted_from_either_setting(settings: dict[str, Any], num_stages: int) -> None:
    assert PipelineConfig("demo", **settings).num_stages == num_stages


def test_stages_and_layers_may_agree() -> None:
    assert PipelineConfig("demo", stages=2, layers=(14, 14)).num_stages == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": ""}, "model"),
        ({"stages": "2"}, r"stages must be int \| None, got '2'"),
        ({"stages": True}, r"stages must be int \| None, got True"),
        ({"layers": (1, "x")}, r"layers must be tuple\[int, \.\.\.\] \| None"),
        ({"max_batch_size": 2.5}, "max_batch_size must be int, got 2.5"),
        ({"max_batch_size": None}, "max_batch_size must be int, got None"),
        ({"kv_cache_gb": "1"}, r"kv_cache_gb must be float \| None, got '1'"),
        ({"device": "tpu"}, "device must be one of auto, cpu, cuda, or one of them for each stage, .* got 'tpu'"),
        ({"device": "cpu,"}, "device must be one of auto, cpu, cuda"),
        ({"stages": 3, "device": "cpu,cuda"}, "device names 2 stages, but stages is 3"),
        ({"layers": (9, 9, 10), "stage_nodes": ("any", "any")}, "stage_nodes names 2 stages, but layers is 3"),
        ({"plan": "auto", "layers": (14, 14)}, "plan auto chooses layers and nodes: leave out layers"),
        ({"plan": "auto", "device": "cpu,cuda"}, "plan auto chooses layers and nodes"),
        ({"dtype": "float32", "wire_dtype": "int8"}, "float32 is the exact mode, and wire_dtype int8 would round"),
        ({"stage_nodes": ()}, "stage_nodes must name at least one stage"),
        ({"stage_nodes": ("zone=",)}, "stage_nodes takes addresses such as 10.0.0.2, labels .* got 'zone='"),
        ({"stage_nodes": ("alpha",)}, "stage_nodes takes addresses"),
        ({"dtype": "int8"}, "dtype must be 'auto' or 'float32' or 'bfloat16' or 'float16', got 'int8'"),
        ({"stages": 0}, "stages"),
        ({"layers": ()}, "layers"),
        ({"layers": (28, 0)}, "layers"),
        ({"stages": 3, "layers": (14, 14)}, "layers names 2 stages, but stages is 3"),
        ({"threads_per_stage": 0}, "threads_per_stage"),
        ({"max_model_len": 0}, "max_model_len"),
        ({"max_batch_size": 0}, "max_batch_size"),
        ({"max_chunk_tokens": 0}, "max_chunk_tokens"),
        ({"kv_cache_gb": 0}, "kv_cache_gb"),
        ({"kv_cache_gb": float("nan")}, "kv_cache_gb"),
        ({"cpus_per_stage": -1}, "cpus_per_stage"),
        ({"gpus_per_stage": -0.5}, "gpus_per_stage"),
        ({"gpus_per_stage": 1, "device": "cpu"}, "gpus_per_stage"),
        ({"gpus_per_stage": 1, "device": "cpu,cpu", "stages": 2}, "gpus_per_stage"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        PipelineConfig(**{"model": "demo", **settings})


def test_a_pipeline_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PipelineConfig("demo").stages = 2  # type: ignore[misc]


def test_an_unknown_key_is_refused_with_the_nearest_name() -> None:
    known = [field.name for field in dataclasses.fields(PipelineConfig)]
    refuse_unknown_keys(known, known)
    with pytest.raises(ConfigurationError, match="'stage': did you mean 'stages'"):
        refuse_unknown_keys(["stage"], known)
    with pytest.raises(ConfigurationError, match=r"'zzz': known are .*layers.*stages"):
        refuse_unknown_keys(["model", "zzz"], known)
