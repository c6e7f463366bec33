"""From settings to stages: what is refused before anything starts, which type, how much KV cache."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from gptj_dist.checkpoint.hub import DEMO, resolve_model
from gptj_dist.checkpoint.synthetic import write_checkpoint
from gptj_dist.config import DTYPE_BYTES, DeviceKind, DTypeName, LayerRange, ModelConfig, PipelineConfig
from gptj_dist.errors import CheckpointError, ConfigurationError
from gptj_dist.planning.cost import kv_bytes_per_token, weight_bytes
from gptj_dist.planning.partition import layer_ranges
from gptj_dist.stages.blueprint import (
    Blueprint,
    DeviceReport,
    StageReport,
    choose_dtype,
    draw_blueprint,
    require_equal_bits,
)
from gptj_dist.stages.room import count_kv_blocks, foresee_reports, require_memory
from gptj_dist.token_rules import TokenRules

GIGABYTE = 10**9
MODEL = ModelConfig(
    vocab_size=40, num_layers=4, d_model=16, num_heads=2, rotary_dim=4, d_ff=64, context_length=1000, eos_token_ids=(0,)
)
CPU = DeviceReport("cpu", "here/cpu", 4, 100 * GIGABYTE, ("float32", "bfloat16"))
OLD_GPU = DeviceReport("NVIDIA T4", "here/gpu", 4, 100 * GIGABYTE, ("float32", "float16"))


def _blueprint(**settings: Any) -> Blueprint:
    config = PipelineConfig(DEMO, **settings)
    return Blueprint(config, MODEL, (LayerRange(0, 1, 0, 4),), config.max_model_len or 1000, rules=TokenRules(40))


def _report(*, free_bytes: int, kv_bytes: int = 1000, pool: str = "here/cpu", kind: DeviceKind = "cpu") -> StageReport:
    return StageReport(
        layers=LayerRange(0, 1, 0, 4),
        device=replace(CPU, memory_pool=pool),
        kind=kind,
        pid=1,
        dtype="float32",
        weight_bytes=0,
        free_bytes=free_bytes,
        kv_bytes_per_token=kv_bytes,
    )


# Types


@pytest.mark.parametrize(
    ("checkpoint", "devices", "expected"),
    [
        ("bfloat16", [CPU], "bfloat16"),
        ("bfloat16", [OLD_GPU], "float32"),
        ("float16", [CPU], "float32"),
        ("float16", [OLD_GPU], "float16"),
        ("float16", [OLD_GPU, CPU], "float32"),
        ("float32", [OLD_GPU, CPU], "float32"),
    ],
)
def test_auto_takes_the_checkpoints_type_where_all_devices_are_good_at_it(
    checkpoint: DTypeName, devices: Sequence[DeviceReport], expected: DTypeName
) -> None:
    assert choose_dtype(PipelineConfig(DEMO), replace(MODEL, dtype=checkpoint), devices) == expected


GPTJ_6B = ModelConfig(50400, 28, 4096, 16, 64, 16384, 2048, (50256,))


@pytest.mark.parametrize(
    ("checkpoint", "num_devices", "gigabytes", "expected"),
    [
        ("float32", 1, 24, "bfloat16"),  # 24.2 GB of weights
        ("float16", 1, 24, "bfloat16"),
        ("float32", 1, 32, "float32"),
        ("float32", 4, 8, "float32"),
        ("float32", 2, 8, "bfloat16"),
        ("bfloat16", 1, 1, "bfloat16"),  # nothing fits: what was to be
    ],
)
def test_auto_takes_16_bits_where_all_memory_is_too_small_for_more(
    checkpoint: DTypeName, num_devices: int, gigabytes: int, expected: DTypeName
) -> None:
    devices = [replace(CPU, memory_pool=f"host{i}/cpu", total_bytes=gigabytes * GIGABYTE) for i in range(num_devices)]
    assert choose_dtype(PipelineConfig(DEMO), replace(GPTJ_6B, dtype=checkpoint), devices) == expected


def test_memory_that_stages_share_counts_once() -> None:
    devices = [replace(CPU, total_bytes=24 * GIGABYTE)] * 2
    assert choose_dtype(PipelineConfig(DEMO), GPTJ_6B, devices) == "bfloat16"


def test_weights_that_no_memory_could_hold_are_refused_with_both_numbers() -> None:
    config = PipelineConfig(DEMO, dtype="float32")
    blueprint = Blueprint(config, GPTJ_6B, layer_ranges((14, 14)), 1000, rules=TokenRules(50400))
    apart = [replace(CPU, memory_pool=f"host{i}/cpu", total_bytes=13 * GIGABYTE) for i in range(2)]

    require_memory(blueprint, "float32", apart)
    with pytest.raises(ConfigurationError, match=r"here/cpu need 24\.2 GB .*float32, but it has 20\.0 GB"):
        require_memory(blueprint, "float32", [replace(CPU, total_bytes=20 * GIGABYTE)] * 2)


def test_a_type_that_was_asked_for_is_taken() -> None:
    assert choose_dtype(PipelineConfig(DEMO, dtype="float16"), MODEL, [CPU]) == "float16"


# KV cache


def test_auto_takes_half_of_a_machines_free_memory_and_nine_tenths_of_a_gpus() -> None:
    blueprint = _blueprint(max_batch_size=1000)
    for kind, share in (("cpu", 0.5), ("cuda", 0.9)):
        report = _report(free_bytes=16_000_000, kind=kind)  # type: ignore[arg-type]
        assert count_kv_blocks(blueprint, [report]) == int(16_000 * share) // 16


def test_stages_in_one_memory_divide_it() -> None:
    blueprint = _blueprint(max_batch_size=1000)
    sharing = [_report(free_bytes=free_bytes) for free_bytes in (32_000_000, 16_000_000, 24_000_000, 16_000_000)]
    # The last to load saw what is left for all of them: 8 million bytes for 4 stages of 1,000 bytes a token.
    assert count_kv_blocks(blueprint, sharing) == 2000 // 16
    apart = [replace(report, device=replace(CPU, memory_pool=f"node-{i}")) for i, report in enumerate(sharing)]
    assert count_kv_blocks(blueprint, apart) == 8000 // 16


def test_the_tightest_memory_decides_for_all_stages() -> None:
    blueprint = _blueprint(max_batch_size=1000)
    reports = [
        _report(free_bytes=10_000_000, pool="a", kind="cuda", kv_bytes=7),
        _report(free_bytes=GIGABYTE, pool="b", kind="cuda", kv_bytes=100_000),
        _report(free_bytes=GIGABYTE, pool="c", kind="cuda", kv_bytes=1),
    ]
    assert count_kv_blocks(blueprint, reports) == 9000 // 16


def test_auto_takes_no_more_than_all_requests_can_use() -> None:
    blueprint = _blueprint(max_batch_size=3, max_model_len=160)
    assert count_kv_blocks(blueprint, [_report(free_bytes=GIGABYTE)]) == 3 * 10


def test_auto_has_room_for_all_requests_where_their_length_is_no_whole_number_of_blocks() -> None:
    """Each of 3 requests of 150 tokens needs 10 blocks, as blocks are not shared."""
    blueprint = _blueprint(max_batch_size=3, max_model_len=150)
    assert count_kv_blocks(blueprint, [_report(free_bytes=GIGABYTE)]) == 3 * 10


def test_a_context_shorter_than_a_block_is_no_trouble() -> None:
    blueprint = _blueprint(max_batch_size=1, max_model_len=10)
    assert count_kv_blocks(blueprint, [_report(free_bytes=GIGABYTE)]) == 1


def test_kv_cache_gb_is_for_the_whole_pipeline() -> None:
    blueprint = _blueprint(kv_cache_gb=0.008)
    reports = [_report(free_bytes=GIGABYTE, kv_bytes=bytes_) for bytes_ in (1000, 3000)]
    assert count_kv_blocks(blueprint, reports) == 2000 // 16


def test_kv_cache_gb_may_take_all_that_is_free_but_no_more() -> None:
    report = _report(free_bytes=16_000_000)
    assert count_kv_blocks(_blueprint(kv_cache_gb=0.016), [report]) == 1000
    with pytest.raises(ConfigurationError, match=r"kv_cache_gb 0\.017 is room for 17000 tokens.*enough for 16000"):
        count_kv_blocks(_blueprint(kv_cache_gb=0.017), [report])


def test_less_than_a_block_is_refused() -> None:
    assert count_kv_blocks(_blueprint(kv_cache_gb=16e-6), [_report(free_bytes=GIGABYTE)]) == 1
    with pytest.raises(ConfigurationError, match="room for 15 tokens, at least 16 are needed"):
        count_kv_blocks(_blueprint(kv_cache_gb=15e-6), [_report(free_bytes=GIGABYTE)])
    with pytest.raises(ConfigurationError, match="room for 15 tokens, at least 16 are needed"):
        count_kv_blocks(_blueprint(), [_report(free_bytes=30_999)])


def test_a_full_machine_is_refused_in_words() -> None:
    with pytest.raises(ConfigurationError, match="room for"):
        count_kv_blocks(_blueprint(), [_report(free_bytes=0)])


@pytest.mark.parametrize(
    ("kind", "dtype", "expected"),
    [
        ("cuda", "float16", 458_752),
        ("cuda", "float32", 917_504),
        ("cpu", "bfloat16", 458_752),
        ("cpu", "float16", 917_504),
        ("cpu", "float32", 917_504),
    ],
)
def test_what_a_token_of_gptj_costs(kind: DeviceKind, dtype: DTypeName, expected: int) -> None:
    model = replace(MODEL, d_model=4096, num_heads=16)
    assert kv_bytes_per_token(model, 28, dtype, kind) == expected


def test_reports_are_foreseen_with_what_all_stages_of_a_memory_leave_of_it() -> None:
    config = PipelineConfig(DEMO, dtype="float32")
    blueprint = Blueprint(config, GPTJ_6B, layer_ranges((14, 14)), 1000, rules=TokenRules(50400))
    gpus = [replace(OLD_GPU, memory_pool=f"here/gpu-{i}") for i in range(2)]

    shared = foresee_reports(blueprint, ["cpu"] * 2, [CPU, CPU], {"here/cpu": 50 * GIGABYTE})
    # 24.2 GB of weights; for each stage a process of 0.5 GB, and a layer of 0.81 GB that is being packed.
    assert [report.free_bytes / GIGABYTE for report in shared] == pytest.approx([23.19, 23.19], abs=0.01)
    apart = foresee_reports(blueprint, ["cuda"] * 2, gpus, {"here/gpu-0": 14 * GIGABYTE, "here/gpu-1": 12 * GIGABYTE})
    assert [report.free_bytes / GIGABYTE for report in apart] == pytest.approx([0.9, -1.1], abs=0.01)
    assert [report.weight_bytes / GIGABYTE for report in apart] == pytest.approx([12.1, 12.1], abs=0.01)


# Weights


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_weight_bytes_are_those_of_the_stages_tensors(tmp_path: Path, is_tied: bool, num_stages: int) -> None:
    model = replace(MODEL, has_tied_embeddings=is_tied)
    write_checkpoint(tmp_path, model)
    sizes: dict[str, int] = {}
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            sizes[name] = file.get_tensor(name).numel()
    for dtype, num_bytes in DTYPE_BYTES.items():
        for stage in range(num_stages):
            layers = LayerRange(stage, num_stages, 4 * stage // num_stages, 4 * (stage + 1) // num_stages)
            expected = sum(size for name, size in sizes.items() if _is_of(name, layers, is_tied))
            if is_tied and num_stages == 1:  # the head's copy is packed
                expected += sizes["transformer.wte.weight"]
            assert weight_bytes(model, layers, dtype) == expected * num_bytes


def _is_of(name: str, layers: LayerRange, is_tied: bool) -> bool:
    if name.startswith("transformer.h."):
        return layers.start <= int(name.split(".")[2]) < layers.stop
    if name == "transformer.wte.weight":
        return layers.is_first or (layers.is_last and is_tied)
    return layers.is_last


def test_gptj_6b_weighs_what_it_is_known_to() -> None:
    model = ModelConfig(50400, 28, 4096, 16, 64, 16384, 2048, (50256,))
    assert weight_bytes(model, LayerRange(0, 1, 0, 28), "float16") == 2 * 6_050_882_784
    assert weight_bytes(model, LayerRange(1, 3, 10, 11), "float16") == 2 * 201_355_264


# Blueprints


def test_a_blueprint_of_the_demo_knows_its_stages() -> None:
    blueprint = draw_blueprint(PipelineConfig(DEMO, stages=4, max_batch_size=5))
    specs = blueprint.stage_specs(["cpu"] * len(blueprint.layers))
    assert [spec.layers.stage for spec in specs] == [0, 1, 2, 3]
    assert [spec.layers.start for spec in specs[1:]] == [spec.layers.stop for spec in specs[:-1]]
    assert specs[0].layers.start == 0
    assert specs[-1].layers.stop == 28
    assert all(spec.max_model_len == 1024 and spec.max_batch_size == 5 for spec in specs)
    assert all(spec.rules.spare_ids and max(spec.rules.spare_ids) == 4127 for spec in specs)


def test_layers_that_a_person_chose_are_taken() -> None:
    specs = draw_blueprint(PipelineConfig(DEMO, layers=(3, 20, 5), max_model_len=100)).stage_specs(["cpu"] * 3)
    assert [spec.layers.num_layers for spec in specs] == [3, 20, 5]
    assert specs[0].max_model_len == 100


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages": 29}, "cannot cut 28 layers into 29 stages"),
        ({"layers": (8, 7, 7, 7)}, "add up to 29, but the model has 28"),
        ({"max_model_len": 1025}, "max_model_len 1025 exceeds the model's context of 1024"),
    ],
)
def test_settings_that_do_not_suit_the_model_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        draw_blueprint(PipelineConfig(DEMO, **settings))


def _demo_copy(directory: Path) -> Path:
    copy = directory / "model"
    shutil.copytree(resolve_model(DEMO), copy)
    copy.chmod(0o755)
    for path in copy.iterdir():
        path.chmod(0o644)
    return copy


def test_a_directory_that_is_not_there_is_refused() -> None:
    with pytest.raises(CheckpointError, match="there is no directory /nowhere/at/all"):
        draw_blueprint(PipelineConfig("/nowhere/at/all"))


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, file: str) -> None:
    model = _demo_copy(tmp_path)
    (model / file).unlink()
    with pytest.raises(CheckpointError, match=file.replace(".", r"\.")):
        draw_blueprint(PipelineConfig(str(model)))


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    model = _demo_copy(tmp_path)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"n_layer": 29, "n_inner": 256}))
    with pytest.raises(CheckpointError, match=r"missing: transformer\.h\.28.*misshapen: transformer\.h\.0\.mlp"):
        draw_blueprint(PipelineConfig(str(model)))


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    model = _demo_copy(tmp_path)
    with (model / "model.safetensors").open("r+b") as file:
        file.truncate(1_000_000)
    with pytest.raises(CheckpointError, match="truncated"):
        draw_blueprint(PipelineConfig(str(model)))


# Bits

COMPILED = replace(CPU, kernels="compiled attention", vectors="torch 2.13.0 with AVX512")
WITHOUT_COMPILER = replace(COMPILED, kernels="torch's attention", memory_pool="there/cpu")
OLDER = replace(COMPILED, vectors="torch 2.13.0 with AVX2", memory_pool="there/cpu")


@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("devices", [[COMPILED, WITHOUT_COMPILER], [WITHOUT_COMPILER, COMPILED, COMPILED]])
def test_a_float32_pipeline_of_unlike_kernels_is_refused(dtype: Any, devices: list[DeviceReport]) -> None:
    with pytest.raises(ConfigurationError, match=r"stage 0 on \w+ has .* stage 1 on \w+ has .* install a C compiler"):
        require_equal_bits(PipelineConfig(DEMO, dtype=dtype), "float32", devices)


def test_unlike_cpus_are_refused_where_the_user_chose_float32() -> None:
    with pytest.raises(ConfigurationError, match=r"stage 0 on here has .*AVX512 and stage 2 on there has .*AVX2;"):
        require_equal_bits(PipelineConfig(DEMO, dtype="float32"), "float32", [COMPILED, COMPILED, OLDER])


def test_unlike_cpus_serve_with_a_warning_where_float32_was_chosen_for_speed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    require_equal_bits(PipelineConfig(DEMO), "float32", [COMPILED, OLDER])
    assert "AVX512 and stage 1 on there has torch 2.13.0 with AVX2" in caplog.text


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_unlike_stages_are_accepted_in_16_bits(dtype: Any, caplog: pytest.LogCaptureFixture) -> None:
    require_equal_bits(PipelineConfig(DEMO, dtype=dtype), dtype, [COMPILED, WITHOUT_COMPILER, OLDER])
    assert not caplog.text


def test_like_stages_are_accepted_in_float32(caplog: pytest.LogCaptureFixture) -> None:
    require_equal_bits(PipelineConfig(DEMO), "float32", [COMPILED, replace(COMPILED, memory_pool="there/cpu")])
    assert not caplog.text


def test_a_relative_path_becomes_absolute_so_that_processes_elsewhere_find_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").symlink_to(resolve_model("demo"))
    monkeypatch.chdir(tmp_path)
    for name in ("model", "./model", "../" + tmp_path.name + "/model"):
        path = Path(draw_blueprint(PipelineConfig(name)).config.model)
        assert path.is_absolute()
        assert path.resolve() == resolve_model("demo").resolve()
    assert draw_blueprint(PipelineConfig("demo")).config.model == "demo"


def test_the_cut_counts_the_bits_of_lm_head_and_layers(tmp_path: Path) -> None:
    """`lm_head` has the size of a layer, and twice its bytes beside layers of 4 bits."""
    model = replace(MODEL, vocab_size=12 * 64, num_layers=9, d_model=64, d_ff=256)
    write_checkpoint(tmp_path, model)
    shutil.copy(resolve_model(DEMO) / "tokenizer.json", tmp_path)
    cuts = {
        quantize: [each.num_layers for each in draw_blueprint(config).layers]
        for quantize in (None, "int8", "int4")
        for config in [PipelineConfig(str(tmp_path), stages=4, quantize=quantize)]
    }
    assert cuts == {None: [3, 2, 2, 2], "int8": [3, 2, 2, 2], "int4": [3, 3, 2, 1]}
