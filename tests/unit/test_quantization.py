"""The bits of weights, from the settings to each stage: what is understood, what is refused, and the sizes."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from typer.testing import CliRunner

from gptj_dist import LLM, SamplingParams
from gptj_dist.checkpoint.convert import convert_checkpoint
from gptj_dist.checkpoint.hub import DEMO, resolve_model
from gptj_dist.checkpoint.index import CheckpointIndex, check_checkpoint, read_model_config
from gptj_dist.checkpoint.inspection import inspect_checkpoint
from gptj_dist.checkpoint.synthetic import write_checkpoint
from gptj_dist.cli import app
from gptj_dist.config import LayerRange, ModelConfig, PipelineConfig
from gptj_dist.errors import CheckpointError, ConfigurationError
from gptj_dist.model.quantized import quantize
from gptj_dist.params import TokenLogprobs
from gptj_dist.planning.cost import Chunks, step_work, weight_bytes, working_bytes
from gptj_dist.quantization import Bits, Quantization, stage_bits
from gptj_dist.stages.blueprint import draw_blueprint, quantized_name
from tests.adapters import write_lora

SIX_B = ModelConfig(50400, 28, 4096, 16, 64, 16384, 2048, (50256,), dtype="float16")
WHOLE = LayerRange.whole(28)


def _uniform(bits: Bits) -> ModelConfig:
    return SIX_B.quantized(Quantization.of_stages([28], [bits]))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("int8", (8, 8, 8)),
        ("int4", (4, 4, 4)),
        ("0-1:int8,2:int4", (8, 8, 4)),
        ("1:int4", (None, 4, None)),
        ("2:int4, 0:int8", (8, None, 4)),
    ],
)
def test_bits_are_those_of_all_stages_or_of_each(text: str, expected: tuple[Bits | None, ...]) -> None:
    assert stage_bits(text, 3) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fp8", "fp8 is not served; int8 has as many bits, and loses less"),
        ("0:fp8", "fp8 is not served"),
        ("int3", "takes int8, int4, or the bits of stages, such as 0-1:int8,2:int4, not 'int3'"),
        ("", "takes int8, int4"),
        ("0-1", "takes int8, int4"),
        ("0:int8,0-2:int4", "names a stage twice"),
        ("2-1:int8", "ends before it begins"),
    ],
)
def test_other_texts_are_refused_before_anything_starts(text: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        PipelineConfig("demo", quantize=text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantize": "2:int8", "stages": 2}, "quantize names stage 2, but there are 2, from 0"),
        ({"quantize": "auto"}, "quantize auto is for `gptj-dist plan --devices`"),
    ],
)
def test_bits_that_do_not_suit_the_stages_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        draw_blueprint(PipelineConfig("demo", **settings))


def test_int4_needs_whole_groups_of_columns() -> None:
    odd = ModelConfig(211, 2, 75, 5, 6, 173, 203, (3,))
    with pytest.raises(ConfigurationError, match="multiples of 64, and this model has 75: use int8"):
        odd.quantized(Quantization.of_stages([1, 1], [None, 4]))
    assert odd.quantized(Quantization.of_stages([2], [8])).quantization is not None


def test_each_stage_has_its_bits_and_the_ends_have_eight() -> None:
    blueprint = draw_blueprint(PipelineConfig("demo", quantize="0-1:int8,2:int4", layers=(10, 10, 8)))
    quantization = blueprint.model.quantization
    assert quantization == Quantization((8,) * 20 + (4,) * 8, embedding_bits=8, head_bits=8)
    assert [quantized_name(blueprint.model, layers) for layers in blueprint.layers] == ["int8", "int8", "int4"]
    partly = draw_blueprint(PipelineConfig("demo", quantize="1:int4", stages=3)).model.quantization
    assert partly is not None
    assert (partly.embedding_bits, partly.head_bits) == (None, None)


def test_gptj_6b_weighs_half_and_a_third_of_16_bits() -> None:
    assert weight_bytes(SIX_B, WHOLE, "float16") == pytest.approx(12.1e9, rel=0.01)
    assert weight_bytes(_uniform(8), WHOLE, "float16") == pytest.approx(6.05e9, rel=0.01)
    assert weight_bytes(_uniform(4), WHOLE, "float16") == pytest.approx(3.6e9, rel=0.01)
    stages = [LayerRange(0, 2, 0, 14), LayerRange(1, 2, 14, 28)]
    whole = sum(weight_bytes(_uniform(4), stage, "float32") for stage in stages)
    assert whole == pytest.approx(weight_bytes(_uniform(4), WHOLE, "float32"))


def test_a_step_reads_the_bytes_that_the_weights_have() -> None:
    def read(model: ModelConfig, has_samples: bool) -> float:
        return step_work(model, WHOLE, "bfloat16", "cpu", [Chunks(1, 1, 1, has_samples)]).weight_bytes

    layers, head = 28 * SIX_B.layer_matrix_parameters, SIX_B.embedding_parameters
    assert read(SIX_B, True) == 2 * (layers + head)
    assert read(_uniform(8), True) == layers + head
    assert read(_uniform(4), True) == 0.5625 * layers + head
    assert read(_uniform(4), False) == 0.5625 * layers


def test_a_matrix_is_read_in_the_checkpoints_type_before_it_is_quantised() -> None:
    assert working_bytes(_uniform(8), "float32", "cuda") - working_bytes(SIX_B, "float32", "cuda") == (
        2 * SIX_B.layer_parameters
    )
    assert working_bytes(_uniform(8), "float32", "cpu") < working_bytes(SIX_B, "float32", "cpu")


# A quantised checkpoint


class _Silent:
    def note(self, text: str) -> None:
        pass

    def progress(self, done_bytes: int, total_bytes: int) -> None:
        pass


def _values_and_scales(matrix: Tensor, bits: Bits) -> tuple[Tensor, Tensor]:
    made = quantize(matrix, bits)
    return made.values, made.scales


def _convert(source: Path, destination: Path, bits: Bits | None) -> Path:
    convert_checkpoint(source, destination, None, False, _Silent(), bits, _values_and_scales)
    return destination


def _text(model: Path, **settings: Any) -> tuple[tuple[int, ...], tuple[TokenLogprobs, ...]]:
    """Twelve greedy tokens with their log probabilities."""
    params = SamplingParams(max_tokens=12, temperature=0, logprobs=3)
    with LLM(model, dtype="float32", kv_cache_gb=0.1, **settings) as llm:
        (output,) = llm.generate("The state of the Union is", params, use_tqdm=False)
    (completion,) = output.completions
    return completion.token_ids, completion.logprobs


@pytest.mark.parametrize("bits", [4, 8])
def test_a_converted_checkpoint_is_what_loading_makes(tmp_path: Path, bits: Bits) -> None:
    demo = resolve_model(DEMO)
    made = _convert(demo, tmp_path / "made", bits)
    config = read_model_config(made)
    assert config.quantization == replace(Quantization.of_stages([28], [bits]), is_stored=True)
    assert _text(made, stages=2) == _text(demo, quantize=f"int{bits}")
    assert _text(made, quantize=f"int{bits}") == _text(made)
    shown = inspect_checkpoint(made)
    assert shown.num_parameters == inspect_checkpoint(demo).num_parameters
    assert set(shown.bytes_of_dtype) == {"float16", "float32", "int8"} | ({"int4", "bfloat16"} if bits == 4 else set())
    assert not shown.oddities
    assert shown.num_bytes < 1.05 * weight_bytes(config, WHOLE, "float16")
    again = _convert(made, tmp_path / "again", None)
    assert (again / "config.json").read_text() == (made / "config.json").read_text()
    for file in made.glob("*.safetensors"):
        assert (again / file.name).read_bytes() == file.read_bytes()


def test_bits_cannot_become_others(tmp_path: Path) -> None:
    made = _convert(resolve_model(DEMO), tmp_path / "made", 8)
    with pytest.raises(ConfigurationError, match="has int8 weights, which cannot become others: leave out quantize"):
        draw_blueprint(PipelineConfig(str(made), quantize="int4"))
    with pytest.raises(ConfigurationError, match="is quantised already: convert the checkpoint that it was made of"):
        _convert(made, tmp_path / "other", 4)


def test_tied_embeddings_of_few_bits_go_to_both_ends(tmp_path: Path) -> None:
    tied = ModelConfig(97, 2, 64, 2, 8, 128, 64, (0,), has_tied_embeddings=True)
    write_checkpoint(tmp_path / "tied", tied)
    made = _convert(tmp_path / "tied", tmp_path / "made", 4)
    check_checkpoint(made, read_model_config(made))
    names = CheckpointIndex(made).file_of
    assert "transformer.wte.weight_scale" in names
    assert "lm_head.weight" not in names


@pytest.mark.parametrize(
    ("stored", "message"),
    [({"bits": 3, "group_size": 64}, "unknown bits 3"), ({"bits": 4, "group_size": 32}, "groups of 32"), ({}, "None")],
)
def test_bits_of_another_version_are_refused(stored: dict[str, int], message: str, tmp_path: Path) -> None:
    made = _convert(resolve_model(DEMO), tmp_path / "made", 4)
    fields = json.loads((made / "config.json").read_text())
    fields["quantization_config"] = {"quant_method": "gptj-dist", **stored}
    (made / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=message):
        read_model_config(made)


def test_scales_that_are_missing_are_named(tmp_path: Path) -> None:
    made = _convert(resolve_model(DEMO), tmp_path / "made", 4)
    path = made / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["transformer.h.3.mlp.fc_in.weight_scale"]
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"missing: transformer\.h\.3\.mlp\.fc_in\.weight_scale"):
        draw_blueprint(PipelineConfig(str(made)))


# What it costs


def test_drift_measures_the_demo() -> None:
    """Goals: perplexity at most 0.5 % higher with int8, 3 % with int4."""
    result = CliRunner().invoke(app, ["drift", "demo", "--dtype", "float32", "--tokens", "2048"])
    assert result.exit_code == 0, result.output
    rows = [re.split(r"\s{2,}", line.strip()) for line in result.stdout.splitlines() if "float32" in line]
    assert [row[0] for row in rows] == ["float32", "int8 in float32", "int4 in float32"]
    (int8, int4) = ([float(text.rstrip("%")) for text in row[2:]] for row in rows[1:])
    assert abs(int8[0]) < 0.5
    assert abs(int4[0]) < 3
    assert int8[1] > 98
    assert int4[1] > 88
    assert 0 < int8[2] < int4[2] < 0.05
    assert "2,040 tokens were predicted." in result.stdout


def test_drift_says_what_it_needs(tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("A whale.")
    for arguments, message in (
        ([str(tmp_path)], "--text names a file"),
        (["demo", "--text", str(tmp_path / "none")], "cannot be read"),
        (["demo", "--text", str(short)], "at least 256 are needed"),
        (["demo", "--quantize", "fp8"], "fp8 is not served"),
    ):
        result = CliRunner().invoke(app, ["drift", *arguments])
        assert message in str(result.exception)


@pytest.mark.parametrize("bits", [8, 4])
def test_dora_on_weights_that_are_stored_in_few_bits_is_refused_and_a_lora_is_not(bits: Bits, tmp_path: Path) -> None:
    """DoRA needs the norms of the weights' rows."""
    converted = _convert(resolve_model(DEMO), tmp_path / "few", bits)
    config = read_model_config(converted)
    paths = {kind: write_lora(tmp_path / kind, config, use_dora=kind == "dora") for kind in ("dora", "lora")}
    with LLM(converted, dtype="float32", kv_cache_gb=0.1) as llm:
        llm.load_adapter("lora", paths["lora"])
        with pytest.raises(CheckpointError, match="quantised: take the checkpoint that it was made of"):
            llm.load_adapter("dora", paths["dora"])
