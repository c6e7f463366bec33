"""`gptj-dist verify`: it passes what is right, and says from where on something is wrong."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptj_dist import cli
from gptj_dist.checkpoint.index import read_model_config
from gptj_dist.checkpoint.synthetic import write_checkpoint
from gptj_dist.cli.checkpoints.verify import PROMPTS
from gptj_dist.config import ModelConfig
from gptj_dist.errors import CheckpointError
from gptj_dist.operate import verification
from gptj_dist.operate.verification import LayerTrace, compare, trace_ours, trace_theirs
from gptj_dist.text.vocabulary import eos_token_id, write_tokenizer

CONFIG = ModelConfig(300, 4, 32, 2, 8, 128, 64, (eos_token_id(300),))
TIED = replace(CONFIG, has_tied_embeddings=True)
TOLERANCE = 1e-4
TOKEN_IDS = [[5, 200, 17, 17, 80], [9]]


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    lines: list[str]
    errors: str


class Command:
    """`gptj-dist verify`, in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def run(self, *arguments: object) -> Done:
        self._monkeypatch.setattr(sys, "argv", ["gptj-dist", "verify", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = self._capsys.readouterr()
        return Done(int(end.value.code or 0), captured.out.splitlines(), captured.err)

    def refuses(self, *arguments: object) -> str:
        """The one line in which it does."""
        done = self.run(*arguments)
        (line,) = done.errors.splitlines()
        assert (done.code, done.lines) == (2, [])
        return line


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(monkeypatch, capsys)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small model with a tokenizer."""
    return _write(tmp_path / "model", CONFIG)


def _write(directory: Path, config: ModelConfig) -> Path:
    write_checkpoint(directory, config, init_std=0.25)
    write_tokenizer(directory, config.vocab_size)
    return directory


def _spoiled(model: Path, tensor: str) -> Path:
    """A copy of a model in which one number of a tensor is another."""
    copy = model.with_name("spoiled")
    copy.mkdir()
    for path in model.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    tensors = load_file(copy / "model.safetensors")
    tensors[tensor].view(-1)[17] += 0.5
    save_file(tensors, copy / "model.safetensors")
    return copy


def test_the_demo_verifies() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gptj_dist", "verify", "demo"], capture_output=True, text=True, timeout=200, check=False
    )

    *prompts, last = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert len(prompts) == len(PROMPTS)
    assert all(line.endswith(": ok") for line in prompts)
    assert last.startswith("4 of 4 prompts agree with transformers ")


@pytest.mark.parametrize("config", [CONFIG, TIED, replace(CONFIG, num_layers=1)])
def test_traces_of_a_sound_model_agree_everywhere(tmp_path: Path, config: ModelConfig) -> None:
    directory = _write(tmp_path / "model", config)
    pairs = zip(trace_theirs(directory, TOKEN_IDS), trace_ours(str(directory), config, TOKEN_IDS), strict=True)
    for prompt, (theirs, ours) in zip(TOKEN_IDS, pairs, strict=True):
        assert len(theirs.hidden) == len(ours.hidden) == config.num_layers + 1
        assert theirs.logits.shape == (len(prompt), config.vocab_size)
        for a, b in zip((*theirs.hidden, theirs.logits), (*ours.hidden, ours.logits), strict=True):
            assert a.shape == b.shape
            assert float((a - b).abs().max()) <= TOLERANCE * float(a.abs().max())


def test_pickled_model_verifies(command: Command, model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    torch.save(weights, model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()

    done = command.run(model)
    assert done.code == 0, (done.lines, done.errors)


@pytest.mark.parametrize(
    ("tensor", "part"),
    [
        ("transformer.wte.weight", "embedding"),
        ("transformer.h.0.ln_1.bias", "layer 0"),
        ("transformer.h.2.mlp.fc_in.weight", "layer 2"),
        ("transformer.h.3.mlp.fc_out.bias", "layer 3"),
        ("transformer.ln_f.weight", "head"),
        ("lm_head.bias", "head"),
    ],
)
def test_the_part_that_reads_another_number_is_named(model: Path, tensor: str, part: str) -> None:
    prompt = [list(range(60))]  # token 0, whose row the number is in if it is the embedding's, is one of them
    (theirs,), (ours,) = trace_theirs(model, prompt), trace_ours(str(_spoiled(model, tensor)), CONFIG, prompt)

    comparison = compare(theirs, ours, TOLERANCE)

    assert comparison.largest > TOLERANCE
    assert comparison.first is not None
    assert comparison.first.part == part


def test_logits_that_are_no_numbers_differ() -> None:
    sound = LayerTrace((torch.ones(2, 3), torch.ones(2, 3)), torch.ones(2, 5))
    broken = LayerTrace((torch.ones(2, 3), torch.full((2, 3), torch.nan)), torch.full((2, 5), torch.nan))
    for theirs, ours in ((sound, broken), (broken, broken)):
        first = compare(theirs, ours, TOLERANCE).first
        assert first is not None
        assert first.part == "layer 0"


def test_difference_is_told_with_its_layer_its_numbers_and_its_file(
    command: Command, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled = _spoiled(model, "transformer.h.1.attn.v_proj.weight")
    monkeypatch.setattr(verification, "trace_theirs", lambda _, prompts: trace_theirs(model, prompts))

    done = command.run(spoiled, "--prompt", "Some text.", "--prompt", "And more.")

    first, reason, *_, last = done.lines
    assert done.code == 1
    assert first.startswith("'Some text.': ")
    assert first.endswith(": differs")
    assert reason.startswith("  the first to differ is the layer 1: by ")
    assert reason.endswith("look at transformer.h.1.* in model.safetensors")
    assert last.startswith("2 of 2 prompts differ from transformers ")


def test_prompts_come_from_the_command_line_and_from_a_file(command: Command, model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("one\n\nto be or not\n")

    done = command.run(model, "--prompt", "zero", "--prompts", tmp_path / "prompts")

    assert [line.partition(":")[0] for line in done.lines[:-1]] == ["'zero'", "'one'", "'to be or not'"]


def test_built_in_prompts_are_cut_to_the_context_and_others_refused(command: Command, model: Path) -> None:
    assert f"{CONFIG.context_length} tokens" in command.run(model).lines[-2]

    assert "more than the model's context of 64" in command.refuses(model, "--prompt", "x" * 500)


def test_without_transformers_it_says_how_to_get_it(
    command: Command, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)

    assert "pip install 'transformers>=5'" in command.refuses(model)


def test_too_little_memory_is_told_before_anything_is_loaded(
    command: Command, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "free_bytes", lambda _: 1000)

    assert "in float32, but only 1 kB of memory are free" in command.refuses(model)


@pytest.mark.parametrize("arguments", [("--tolerance", "0"), ("--prompts", "/no/where")])
def test_options_that_cannot_be_are_refused(command: Command, model: Path, arguments: tuple[str, str]) -> None:
    assert arguments[0] in command.refuses(model, *arguments)


def test_what_transformers_cannot_load_is_said_in_one_line(tmp_path: Path) -> None:
    model = _write(tmp_path / "model", CONFIG)
    (model / "model.safetensors").write_bytes(b"no such format")
    assert read_model_config(model) == CONFIG
    with pytest.raises(CheckpointError, match="transformers cannot load") as error:
        trace_theirs(model, TOKEN_IDS)
    assert "\n" not in str(error.value)
