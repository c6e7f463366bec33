"""Inspection: what a checkpoint holds, and what is odd about it, told without reading a weight."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from gptj_dist.checkpoint.hub import DEMO, resolve_model
from gptj_dist.checkpoint.inspection import inspect_checkpoint
from gptj_dist.checkpoint.synthetic import write_checkpoint
from gptj_dist.cli import app
from gptj_dist.config import ModelConfig
from gptj_dist.errors import CheckpointError
from gptj_dist.text.vocabulary import write_tokenizer

CONFIG = ModelConfig(40, 4, 16, 2, 4, 64, 32, (0,))
TIED = replace(CONFIG, has_tied_embeddings=True)
NO_TOKENIZER = "no tokenizer: it can be converted, but not served"
SHARD_BYTES = 8192

State = dict[str, torch.Tensor]


def _state(directory: Path) -> State:
    state: State = load_file(directory / "model.safetensors")
    return state


def _as_pickle(directory: Path, state: State) -> None:
    (directory / "model.safetensors").unlink()
    torch.save(state, directory / "pytorch_model.bin")


def _oddities(directory: Path) -> list[str]:
    """All but the tokenizer, which no synthetic checkpoint has."""
    return [oddity for oddity in inspect_checkpoint(directory).oddities if oddity != NO_TOKENIZER]


def _output(model: str) -> str:
    done = CliRunner().invoke(app, ["inspect", model])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_sizes_are_those_of_the_tensors(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIG, dtype="bfloat16")
    state = _state(tmp_path)

    found = inspect_checkpoint(tmp_path)

    assert found.num_parameters == sum(t.numel() for t in state.values())
    assert found.bytes_of_dtype == {"bfloat16": sum(t.nbytes for t in state.values())}
    assert found.embedding_bytes == 40 * 16 * 2
    assert found.layer_bytes == [sum(t.nbytes for n, t in state.items() if ".h.1." in n)] * 4
    assert found.head_bytes == (2 * 16 + 40 * 16 + 40) * 2
    assert found.file_bytes == {"model.safetensors": (tmp_path / "model.safetensors").stat().st_size}
    assert _oddities(tmp_path) == []


def test_layer_1_is_not_taken_for_layer_10(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, replace(CONFIG, num_layers=12))

    assert len(set(inspect_checkpoint(tmp_path).layer_bytes)) == 1


def test_files_of_a_sharded_checkpoint_are_all_counted(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIG, max_shard_bytes=SHARD_BYTES)

    found = inspect_checkpoint(tmp_path)

    assert found.num_bytes == sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert len(found.file_bytes) > 1
    assert found.form == "safetensors"


def test_the_demo_has_nothing_odd() -> None:
    assert inspect_checkpoint(resolve_model(DEMO)).oddities == []


def test_masks_of_old_versions_are_told_with_their_bytes(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIG, legacy_buffers=True)

    (oddity,) = _oddities(tmp_path)

    assert oddity.startswith("masks of old versions of transformers, 4.11 kB,")  # 4 * (32 * 32 + 4)
    assert oddity.endswith("and 5 more")


def test_names_without_prefix_are_told(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIG)
    _as_pickle(tmp_path, {name.removeprefix("transformer."): t for name, t in _state(tmp_path).items()})

    assert _oddities(tmp_path)[0].startswith(
        "names that are not GPT-J's own are read as if they were: wte.weight as transformer.wte.weight, "
    )


def test_tensors_that_gptj_does_not_have_are_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIG)
    save_file(_state(tmp_path) | {"v_head.summary.weight": torch.zeros(3)}, tmp_path / "model.safetensors")

    assert _oddities(tmp_path) == ["tensors that GPT-J does not have, which are skipped: v_head.summary.weight"]


def test_remarks_are_safe_to_print_whatever_the_names_in_the_files(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIG)
    save_file(_state(tmp_path) | {"\x1b[2J.attn.bias": torch.zeros(3)}, tmp_path / "model.safetensors")
    (tmp_path / "a\x1b[2J.bin").touch()

    remarks = _oddities(tmp_path)
    assert len(remarks) == 2
    assert all(remark.isprintable() for remark in remarks)


def test_weights_of_64_bits_are_called_so(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIG)
    save_file({name: tensor.double() for name, tensor in _state(tmp_path).items()}, tmp_path / "model.safetensors")

    assert list(inspect_checkpoint(tmp_path).bytes_of_dtype) == ["float64"]
    assert _oddities(tmp_path) == ["config.json says float32, the weights are float64"]


def test_dtype_of_the_config_that_is_not_the_weights_is_told(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIG)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"dtype": "float32"', '"dtype": "float16"'))
    assert _oddities(tmp_path) == ["config.json says float16, the weights are float32"]

    config.write_text(config.read_text().replace('"dtype": "float16",', ""))
    assert _oddities(tmp_path) == ["config.json does not name the dtype: that of the embedding is used"]


def test_tensors_of_another_dtype_than_most_are_told_by_name(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIG)
    state = _state(tmp_path)
    state["transformer.h.2.ln_1.bias"] = state["transformer.h.2.ln_1.bias"].half()
    save_file(state, tmp_path / "model.safetensors")

    assert _oddities(tmp_path) == ["float16, where most are float32: transformer.h.2.ln_1.bias"]
    assert re.search(r"^layers      4 of 12\.\d kB, but layer 2: 12\.\d kB$", _output(str(tmp_path)), re.MULTILINE)


def test_tensors_that_are_not_contiguous_or_share_bytes_are_told_by_name(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIG)
    state = _state(tmp_path)
    state["transformer.h.1.mlp.fc_in.weight"] = state["transformer.h.1.mlp.fc_in.weight"].T.contiguous().T
    state["transformer.h.0.ln_1.weight"] = state["transformer.h.3.ln_1.weight"]
    _as_pickle(tmp_path, state)

    assert _oddities(tmp_path) == [
        "not contiguous, so that loading takes longer and more memory: transformer.h.1.mlp.fc_in.weight",
        "sharing their bytes: transformer.h.0.ln_1.weight with transformer.h.3.ln_1.weight",
    ]


def test_weights_that_are_not_read_are_told_with_their_bytes(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIG)
    (tmp_path / "pytorch_model.bin").write_bytes(bytes(3000))
    (tmp_path / "flax_model.msgpack").write_bytes(bytes(4000))
    (tmp_path / "README.md").write_bytes(bytes(5000))

    assert _oddities(tmp_path) == ["not read, 7 kB in all: flax_model.msgpack, pytorch_model.bin"]


def test_missing_tokenizer_is_told(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIG)

    assert inspect_checkpoint(tmp_path).oddities == [NO_TOKENIZER]
    assert "tokenizer   none\n" in _output(str(tmp_path))


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="only Linux counts the bytes that a process reads")
def test_no_weights_are_read(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, ModelConfig(4000, 4, 256, 2, 4, 1024, 32, (0,)))
    _as_pickle(tmp_path, _state(tmp_path))
    inspect_checkpoint(tmp_path)

    before = int(Path("/proc/self/io").read_text().split()[1])
    inspect_checkpoint(tmp_path)
    num_read = int(Path("/proc/self/io").read_text().split()[1]) - before

    assert num_read < (tmp_path / "pytorch_model.bin").stat().st_size / 20


# The command


def test_command_shows_the_model_and_its_vocabulary() -> None:
    assert _output(DEMO).splitlines()[1:11] == [
        "model       28 layers of width 128, 4 heads, context of 1024 tokens, vocabulary of 4128",
        "weights     safetensors, 1 file, 13.2 MB",
        "parameters  6,591,264",
        "dtype       float16",
        "embedding   1.06 MB",
        "layers      28 of 395 kB",
        "head        1.07 MB",
        "tokenizer   4096 entries for 4128 rows; 32 rows stand for no text and are generated only where they are named",
        "template    none: chat needs --chat-template",
        "end         0 '<|endoftext|>'",
    ]


def test_command_shows_how_texts_end_and_are_sampled(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, ModelConfig(300, 4, 16, 2, 4, 64, 32, (298,)))
    write_tokenizer(tmp_path, 300)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    fields = {
        "eos_token_id": [299, 13],
        "temperature": 0.7,
        "max_new_tokens": 64,
        "suppress_tokens": [3],
        "num_beams": 4,
    }
    (tmp_path / "generation_config.json").write_text(json.dumps(fields | {"do_sample": False}))

    lines = _output(str(tmp_path)).splitlines()

    assert "template    for chat" in lines
    assert "end         298 'ent', 299 '<|endoftext|>', 13 '.'" in lines
    assert "generation  defaults temperature 0.7, max_tokens 64; 1 tokens or runs of tokens are ruled out" in lines
    assert "- generation_config.json asks for what is not applied: num_beams 4, do_sample False" in lines


def test_command_says_that_nothing_ends_a_text(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, replace(CONFIG, eos_token_ids=()))

    assert "end         no token ends a text\n" in _output(str(tmp_path))
    assert "- no eos_token_id: texts end at max_tokens" in _output(str(tmp_path))


def test_command_says_that_embeddings_are_tied(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TIED)

    assert "head        288 B, tied to the embedding\n" in _output(str(tmp_path))


def test_broken_tokenizer_is_a_line_and_not_the_end(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIG)
    (tmp_path / "tokenizer.json").write_text("{")

    assert "tokenizer   cannot be loaded, " in _output(str(tmp_path))


@pytest.mark.parametrize("max_shard_bytes", [None, SHARD_BYTES])
def test_conversion_is_advised_where_every_stage_would_fetch_one_file_of_everything(
    tmp_path: Path, max_shard_bytes: int | None
) -> None:
    write_checkpoint(tmp_path, CONFIG, max_shard_bytes=max_shard_bytes)

    assert (f"`gptj-dist convert {tmp_path} DIRECTORY`" in _output(str(tmp_path))) == (max_shard_bytes is None)


def test_broken_checkpoint_ends_in_one_line_and_exit_code_2(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIG)
    os.truncate(tmp_path / "model.safetensors", 5000)
    with pytest.raises(CheckpointError) as error:
        inspect_checkpoint(tmp_path)

    command = [sys.executable, "-m", "gptj_dist", "inspect", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"gptj-dist: {error.value}\n"


@pytest.mark.parametrize("has_index", [False, True])
def test_hub_model_without_its_weights_shows_what_its_config_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_index: bool
) -> None:
    write_checkpoint(tmp_path, CONFIG, max_shard_bytes=SHARD_BYTES, dtype="float16")
    num_parameters = json.loads((tmp_path / "model.safetensors.index.json").read_text())["metadata"]["total_size"] // 2
    files = sorted(tmp_path.glob("model-*.safetensors"))
    for file in files[has_index:]:
        file.unlink()
    if not has_index:
        (tmp_path / "model.safetensors.index.json").unlink()
    monkeypatch.setattr("gptj_dist.checkpoint.hub.resolve_model", lambda *_: tmp_path)

    text = _output("owner/name")

    missing = f"{len(files) - 1} files are" if has_index else "1 file is"
    assert f"weights     {missing} not downloaded; by config.json {num_parameters:,} parameters, float16, " in text
    assert "model       4 layers of width 16" in text
