"""Weights that other tools have quantised are the numbers that an independent reader makes of them."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from gptj_dist import LLM, SamplingParams
from gptj_dist.checkpoint.convert import convert_checkpoint
from gptj_dist.checkpoint.index import check_checkpoint, plain_tensors, read_model_config
from gptj_dist.checkpoint.inspection import inspect_checkpoint
from gptj_dist.checkpoint.loader import StageTensors
from gptj_dist.checkpoint.synthetic import write_checkpoint
from gptj_dist.cli import app
from gptj_dist.config import LayerRange, PipelineConfig
from gptj_dist.errors import CheckpointError
from gptj_dist.model.quantized import dequantize, empty_weight, quantize
from gptj_dist.quantization import Quantization, offset_name, scale_name
from gptj_dist.stages.blueprint import quantized_model
from tests.conversions import Silent
from tests.layout_files import CASES, CONFIG, Case, gptq, read_gptq, write_case, write_weights

WHOLE = LayerRange.whole(CONFIG.num_layers)
FC_IN = "transformer.h.1.mlp.fc_in.weight"

Checkpoint = tuple[Path, Case, dict[str, Tensor]]


@pytest.fixture(scope="module", params=CASES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """One of each layout, and its numbers."""
    case = CASES[request.param]
    directory = tmp_path_factory.mktemp("checkpoint")
    return directory, case, write_case(directory, case)


def test_the_numbers_are_those_of_an_independent_reader(checkpoint: Checkpoint) -> None:
    directory, _, numbers = checkpoint
    with StageTensors(directory, CONFIG, WHOLE) as tensors:
        for name, expected in numbers.items():
            out = torch.full(expected.shape, torch.nan)
            tensors.read(name, out)
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def test_weights_stay_quantised_where_the_layout_allows_it(checkpoint: Checkpoint) -> None:
    directory, case, numbers = checkpoint
    config = read_model_config(directory)
    quantization = config.quantization
    if "f16" in case.file:
        assert quantization is None
        return
    assert quantization is not None
    assert quantization.is_stored == case.is_kept
    if not case.is_kept:
        assert quantization.layer_bits == (8, 8)
        return
    bits = quantization.layer_bits[1]
    assert bits is not None
    rows, columns = plain_tensors(config, WHOLE)[FC_IN]
    group = quantization.group_of(columns, bits)
    weight = empty_weight(rows, columns, bits, group, torch.device("cpu"), quantization.has_offsets)
    with StageTensors(directory, config, WHOLE) as tensors:
        tensors.read(FC_IN, weight.values)
        tensors.read(scale_name(FC_IN), weight.scales)
        if weight.offsets is not None:
            tensors.read(offset_name(FC_IN), weight.offsets)
    torch.testing.assert_close(dequantize(weight), numbers[FC_IN], rtol=1e-5, atol=1e-6)


def _logprobs(model: Path, **settings: Any) -> Tensor:
    """Of the tokens of a prompt, and the likeliest ones."""
    prompt = [5, 77, 140, 9, 200, 31]
    with LLM(model, device="cpu", dtype="float32", kv_cache_gb=0.01, **settings) as llm:
        (output,) = llm.generate(prompt, SamplingParams(max_tokens=1, prompt_logprobs=5))
    return torch.tensor([[step.logprob, *sorted(value for _, value in step.top)] for step in output.prompt_logprobs])


@pytest.mark.parametrize(
    "name", ["GPTQ", "AWQ", "load_in_8bit", "bitsandbytes of 2021", "GGML q4_0, ggjt", "GGML q5_1, ggjt"]
)
def test_a_model_serves_as_its_numbers_do(tmp_path: Path, name: str) -> None:
    numbers = write_case(tmp_path / "quantised", CASES[name])
    write_case(tmp_path / "plain", Case(gptq(4, 32)))
    write_weights(tmp_path / "plain" / "model.safetensors", numbers)
    expected = _logprobs(tmp_path / "plain")
    tolerance = 1e-4 if CASES[name].is_kept else 0.05
    for stages in (1, 2):
        found = _logprobs(tmp_path / "quantised", stages=stages)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


# What is said


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("GPTQ", "GPTQ, 4 bits, groups of 32: kept as they are"),
        ("GPTQ, odd groups", "GPTQ, 4 bits, groups of 128: quantised anew to int8, for a row is no whole number"),
        ("GPTQ-for-LLaMa, pickled", "GPTQ, 4 bits, a scale a row: kept as they are"),
        ("bitsandbytes of 2021", "bitsandbytes of 2021, 8 bits by a code book: quantised anew to int8, for a code"),
        ("GGML q4_0, ggjt", "GGML, q4_0: kept as they are"),
    ],
)
def test_inspect_and_the_log_say_what_becomes_of_the_weights(
    tmp_path: Path, name: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_case(tmp_path, CASES[name])
    inspection = inspect_checkpoint(tmp_path)
    assert inspection.oddities[0].startswith(said)
    assert inspection.num_parameters == sum(map(math.prod, plain_tensors(CONFIG, WHOLE).values()))
    with caplog.at_level(logging.INFO), StageTensors(tmp_path, read_model_config(tmp_path), WHOLE):
        assert said in caplog.text


def test_tensors_of_an_old_adapter_are_named_as_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_case(tmp_path, CASES["bitsandbytes of 2021"])
    state = torch.load(tmp_path / "pytorch_model.bin")
    torch.save(
        state | {"transformer.h.0.attn.q_proj.adapter.0.weight": torch.ones(2, 64)}, tmp_path / "pytorch_model.bin"
    )
    with StageTensors(tmp_path, read_model_config(tmp_path), WHOLE):
        assert "skipped that GPT-J does not have: transformer.h.0.attn.q_proj.adapter.0.weight" in caplog.text


# What the user wants


def test_weights_of_another_tool_become_what_the_user_wants(tmp_path: Path) -> None:
    write_case(tmp_path, CASES["bitsandbytes of 2021"])
    model = read_model_config(tmp_path)

    def quantized(quantize: str) -> Quantization | None:
        return quantized_model(model, PipelineConfig(str(tmp_path), quantize=quantize), [1, 1]).quantization

    assert quantized("none") is None
    assert quantized("int8") == model.quantization
    assert quantized("int4") == Quantization.of_stages([1, 1], [4, 4])


def test_inspect_says_that_convert_quantises_anew(tmp_path: Path) -> None:
    write_case(tmp_path, CASES["GPTQ"])
    result = CliRunner().invoke(app, ["inspect", str(tmp_path)])
    assert "GPTQ, 4 bits, groups of 32: kept as they are" in result.stdout
    assert "DIRECTORY --quantize int8` gives each stage its own files, of weights quantised anew" in result.stdout


def test_they_are_converted_as_numbers(tmp_path: Path) -> None:
    numbers = write_case(tmp_path / "from", CASES["GPTQ"])
    convert_checkpoint(tmp_path / "from", tmp_path / "to", "float32", False, Silent())
    assert read_model_config(tmp_path / "to").quantization is None
    with StageTensors(tmp_path / "to", CONFIG, WHOLE) as tensors:
        out = torch.empty(numbers[FC_IN].shape)
        tensors.read(FC_IN, out)
    torch.testing.assert_close(out, numbers[FC_IN], rtol=1e-5, atol=1e-6)


def test_convert_writes_gptq_that_an_independent_reader_reads(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "from", CONFIG)
    result = CliRunner().invoke(
        app, ["convert", str(tmp_path / "from"), str(tmp_path / "to"), "--quantize", "int4", "--form", "gptq"]
    )
    assert result.exit_code == 0, result.output
    config = read_model_config(tmp_path / "to")
    assert config.quantization is not None
    assert (config.quantization.layer_bits, config.quantization.head_bits) == ((4, 4), None)
    plain = {
        name: tensor for path in (tmp_path / "from").glob("*.safetensors") for name, tensor in load_file(path).items()
    }
    state = {
        name: tensor for path in (tmp_path / "to").glob("*.safetensors") for name, tensor in load_file(path).items()
    }
    numbers = read_gptq(state, FC_IN, 4, 64)
    expected = dequantize(quantize(plain[FC_IN], 4))
    torch.testing.assert_close(numbers, expected, rtol=1e-3, atol=1e-6)
    with StageTensors(tmp_path / "to", CONFIG, WHOLE) as tensors:
        out = torch.empty(expected.shape)
        tensors.read(FC_IN, out)
        tensors.read("lm_head.weight", head := torch.empty(264, 64))
    torch.testing.assert_close(out, numbers)
    assert torch.equal(head, plain["lm_head.weight"])
    refused = CliRunner().invoke(app, ["convert", str(tmp_path / "from"), str(tmp_path / "x"), "--form", "gptq"])
    assert "add --quantize int4" in str(refused.exception)


# What is refused


def _method(**fields: Any) -> dict[str, Any]:
    return {"quantization_config": fields}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (_method(quant_method="gptq", bits=4, desc_act=True), "columns in another order .*use a checkpoint without"),
        (_method(quant_method="gptq", bits=3), "GPTQ of 3 bits is not read, only of 4 and 8: use the original"),
        (_method(quant_method="gptq", bits=4, checkpoint_format="marlin"), "form of GPTQ, marlin, is not read"),
        (_method(quant_method="gptq", bits=4, group_size="x"), "groups of x columns"),
        (_method(quant_method="gptq", bits=4, group_size=1 << 40), "groups of 1099511627776 columns"),
        (_method(quant_method="awq", version="gemv"), "AWQ, gptj-dist reads 4 bits in the form gemm alone"),
        (_method(quant_method="compressed-tensors", format="float-quantized"), "pack-quantized with one scheme"),
        (_method(quant_method="compressed-tensors", config_groups=[7]), "pack-quantized with one scheme"),
        (
            _method(load_in_4bit=True, quant_method="bitsandbytes"),
            "bitsandbytes' 4 bits, which gptj-dist does not read",
        ),
        (_method(quant_method="auto-round", packing_format="auto_round:llm"), "autoround in its form auto_round:llm"),
        (_method(quant_method="hqq\x1b"), r"quantised by hqq\\x1b, which gptj-dist does not read"),
    ],
)
def test_what_is_not_read_is_refused_in_one_sentence(tmp_path: Path, fields: dict[str, Any], said: str) -> None:
    write_case(tmp_path, Case(gptq(4, 32), fields))
    with pytest.raises(CheckpointError, match=f"(?i){said}") as error:
        read_model_config(tmp_path)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 300


def test_columns_in_another_order_are_found_without_a_configuration(tmp_path: Path) -> None:
    case = CASES["GPTQ-for-LLaMa"]
    write_case(tmp_path, case)
    state = load_file(tmp_path / case.file)
    state["transformer.h.0.attn.k_proj.g_idx"] = torch.arange(64, dtype=torch.int32).flip(0)
    write_weights(tmp_path / case.file, state)
    config = replace(CONFIG, quantization=None)
    name = "transformer.h.0.attn.k_proj.weight"
    with StageTensors(tmp_path, config, WHOLE) as tensors, pytest.raises(CheckpointError, match="in another order"):
        tensors.read(name, torch.empty(64, 64))


def test_several_models_in_a_directory_are_refused(tmp_path: Path) -> None:
    write_case(tmp_path, CASES["GGML q4_0"])
    write_case(tmp_path, CASES["GGML q8_0"])
    with pytest.raises(
        CheckpointError, match=r"several models, ggml-model-q4_0-0\.bin, ggml-model-q8_0-2\.bin: leave one"
    ):
        read_model_config(tmp_path)


def test_a_wrong_shape_is_named(tmp_path: Path) -> None:
    write_case(tmp_path, CASES["GPTQ"])
    state = load_file(tmp_path / "model.safetensors")
    state["transformer.h.0.attn.k_proj.scales"] = torch.ones(3, 64)
    write_weights(tmp_path / "model.safetensors", state)
    with pytest.raises(
        CheckpointError, match=r"misshapen: transformer.h.0.attn.k_proj.scales is \[3, 64\], not \[2, 64\]"
    ):
        check_checkpoint(tmp_path, read_model_config(tmp_path))


def test_damaged_ggml_files_are_read_or_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / CASES["GGML q4_0, ggjt"].file
    write_case(tmp_path, CASES["GGML q4_0, ggjt"])
    whole = path.read_bytes()
    random = Random(3)
    refusals = []
    for number in range(150):
        data = bytearray(whole)
        if number % 5 == 0:
            del data[random.randrange(len(data)) :]
        else:  # a word of a header: the file's, or a tensor's, which are not far from names
            at = random.choice(
                (random.randrange(0, 44, 4), whole.index(b"transformer.h.1") - random.randrange(4, 24, 4))
            )
            data[at : at + 4] = random.choice((b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff", bytes(4), random.randbytes(4)))
        path.write_bytes(data)
        try:
            check_checkpoint(tmp_path, read_model_config(tmp_path))
        except CheckpointError as error:
            refusals.append(str(error))
    assert len(refusals) > 50
    assert all(text.isprintable() and len(text) < 1000 for text in refusals)
