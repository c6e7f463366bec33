"""Files and directories that are not what they should be: one sentence says what they are, and what to do."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gptj_dist.checkpoint.foreign import kind_of_files
from gptj_dist.checkpoint.hub import DEMO, resolve_model
from gptj_dist.checkpoint.index import check_checkpoint, read_model_config
from gptj_dist.checkpoint.loader import StageTensors
from gptj_dist.checkpoint.synthetic import write_checkpoint
from gptj_dist.config import LayerRange, ModelConfig, PipelineConfig
from gptj_dist.errors import CheckpointError
from gptj_dist.stages.blueprint import draw_blueprint
from gptj_dist.text.tokenizer import Tokenizer

CONFIG = ModelConfig(
    vocab_size=40, num_layers=2, d_model=16, num_heads=2, rotary_dim=4, d_ff=64, context_length=32, eos_token_ids=(0,)
)
LFS_POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4c3b1aa0bd0ab0cbbc1bd7a0bb1ae4eb4c7f4b4b1aa0bd0ab0cbbc1bd7a0bb1a\nsize 24207819307\n"
)


def _tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.safetensors"))
    return out.getvalue()


def _zip() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("readme.txt", "hello")
    return out.getvalue()


KINDS = {
    "Git-LFS pointer, .*`git lfs pull`": LFS_POINTER,
    "GGUF": b"GGUF\x03\x00\x00\x00" + bytes(64),
    "GGML": b"lmgg\x60\xc4\x00\x00" + bytes(64),
    "ONNX": b"\x08\x07\x12\x07pytorch\x1a\x052.1.0:\xf0\x01\n" + bytes(64),
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(64),
    "NumPy": b"\x93NUMPY\x01\x00" + bytes(64),
    "gzip: unpack": gzip.compress(b"weights", mtime=0),
    "tar archive: unpack": _tar(),
    "empty: download": b"",
    "web page": b"\n<!DOCTYPE html>\n<html><body>401</body></html>",
    "web page, ": b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
    "zip, but not one of PyTorch's: unpack": _zip(),
}


@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(("said", "content"), KINDS.items(), ids=list(KINDS))
def test_a_file_of_weights_that_is_something_else_is_called_what_it_is(
    tmp_path: Path, form: str, said: str, content: bytes
) -> None:
    write_checkpoint(tmp_path, CONFIG)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / form).write_bytes(content)

    with pytest.raises(CheckpointError, match=rf"{form} .*{said}") as error:
        check_checkpoint(tmp_path, CONFIG)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("said", ["Git-LFS pointer, .*`git lfs pull`", "empty: download", "web page", "gzip: unpack"])
def test_a_json_file_that_is_something_else_is_called_what_it_is(tmp_path: Path, name: str, said: str) -> None:
    write_checkpoint(tmp_path, CONFIG, max_shard_bytes=8192)
    (tmp_path / name).write_bytes(KINDS[said])

    with pytest.raises(CheckpointError, match=rf"{name} is .*{said}"):
        check_checkpoint(tmp_path, read_model_config(tmp_path))


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "merges.txt"])
@pytest.mark.parametrize("said", ["Git-LFS pointer, .*`git lfs pull`", "empty: download", "web page"])
def test_a_tokenizer_file_that_is_something_else_is_called_what_it_is(tmp_path: Path, name: str, said: str) -> None:
    gpt2 = Path(resolve_model(DEMO)).parent / "text" / "gpt2_bpe"
    for file in ("vocab.json", "merges.txt"):
        shutil.copy(gpt2 / file, tmp_path)
    (tmp_path / name).write_bytes(KINDS[said])

    with pytest.raises(CheckpointError, match=rf"{name} is .*{said}"):
        Tokenizer.load(tmp_path)


def test_a_file_of_torch_save_is_read_under_the_other_forms_name(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIG)
    truth = {name: tensor.clone() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    torch.save(truth, tmp_path / "model.safetensors")

    out = torch.empty(40, 16)
    with StageTensors(tmp_path, CONFIG, LayerRange.whole(2)) as tensors:
        tensors.read("lm_head.weight", out)
    assert torch.equal(out, truth["lm_head.weight"])


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], "a LoRA adapter, .*merge_and_unload"),
        (["model-q4_0.gguf", "README.md"], "GGUF files of llama.cpp"),
        (["model.onnx", "model.onnx_data"], "an ONNX export"),
        (["tf_model.h5"], "weights of TensorFlow"),
        (["flax_model.msgpack"], "weights of Flax"),
        (["latest", "zero_to_fp32.py"], "a checkpoint of DeepSpeed: run its zero_to_fp32.py"),
        (["model.bin", "vocabulary.txt"], "a model of CTranslate2"),
    ],
)
@pytest.mark.parametrize("has_config", [True, False])
def test_a_directory_of_another_tool_is_called_what_it_is(
    tmp_path: Path, files: list[str], said: str, has_config: bool
) -> None:
    if has_config:
        write_checkpoint(tmp_path, CONFIG)
        (tmp_path / "model.safetensors").unlink()
        shutil.copy(resolve_model(DEMO) / "tokenizer.json", tmp_path)
    for file in files:
        (tmp_path / file).write_bytes(b"{}")

    with pytest.raises(CheckpointError, match=rf"it holds {said}"):
        draw_blueprint(PipelineConfig(str(tmp_path)))
    assert kind_of_files(files) is not None


def test_the_parent_of_a_checkpoint_names_the_checkpoint_within(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint-500", CONFIG)

    with pytest.raises(CheckpointError, match=r"did you mean .*/checkpoint-500\?"):
        draw_blueprint(PipelineConfig(str(tmp_path)))


def test_an_adapter_beside_whole_weights_is_no_hindrance(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIG)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))

    model = read_model_config(tmp_path)
    check_checkpoint(tmp_path, model)
    assert model == CONFIG


def _truncated(path: Path) -> None:
    path.write_bytes(b"\x00")


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda path: path.write_bytes(KINDS["GGUF"]), "a GGUF file"),
        (lambda path: path.write_bytes(LFS_POINTER), "a Git-LFS pointer"),
        (_truncated, "name the directory that holds"),
    ],
)
def test_a_file_in_place_of_a_directory_is_called_what_it_is(
    tmp_path: Path, write: Callable[[Path], object], said: str
) -> None:
    write(tmp_path / "model.file")

    with pytest.raises(CheckpointError, match=rf"model\.file is a file: {said}"):
        resolve_model(str(tmp_path / "model.file"))
