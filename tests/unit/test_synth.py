"""`gptj-dist synth`: random checkpoints that everything else takes for real ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gptj_dist.checkpoint.index import check_checkpoint, read_header, read_model_config
from gptj_dist.config import ModelConfig
from gptj_dist.errors import ConfigurationError
from gptj_dist.llm import LLM
from gptj_dist.params import SamplingParams
from gptj_dist.text.tokenizer import Tokenizer
from gptj_dist.text.vocabulary import eos_token_id, write_tokenizer

pytestmark = pytest.mark.slow


def _synth(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gptj_dist", "synth", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_every_size_can_be_chosen(tmp_path: Path) -> None:
    sizes = ("--num-layers", 3, "--d-model", 48, "--num-heads", 3, "--rotary-dim", 4, "--vocab-size", 300)
    done = _synth("tiny", tmp_path / "m", *sizes, "--context-length", 64, "--d-ff", 100, "--dtype", "float16")

    assert done.returncode == 0, done.stderr
    assert read_model_config(tmp_path / "m") == ModelConfig(
        300, 3, 48, 3, 4, 100, 64, (299,), "float16", bos_token_id=299
    )
    check_checkpoint(tmp_path / "m", read_model_config(tmp_path / "m"))


@pytest.mark.parametrize("shard_gb", [None, 0.0002])
def test_both_forms_hold_the_same_weights_for_transformers_and_for_us(tmp_path: Path, shard_gb: float | None) -> None:
    shards = () if shard_gb is None else ("--shard-gb", shard_gb)
    for form in ("safetensors", "bin"):
        done = _synth("tiny", tmp_path / form, "--form", form, "--dtype", "float32", "--seed", 7, *shards)
        assert done.returncode == 0, done.stderr
    pickled = {name for path in (tmp_path / "bin").glob("*.bin") for name in read_header(path)}
    assert "transformer.h.3.attn.masked_bias" in pickled
    assert (len(list((tmp_path / "bin").glob("*.bin"))) > 1) == (shard_gb is not None)

    models = [AutoModelForCausalLM.from_pretrained(tmp_path / form) for form in ("safetensors", "bin")]
    states = [model.state_dict() for model in models]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    greedy = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    texts = []
    for form in ("safetensors", "bin"):
        with LLM(str(tmp_path / form), stages=2, kv_cache_gb=0.01) as llm:
            texts.append(llm.generate("Call me Ishmael.", greedy)[0].text)
    assert texts[0] == texts[1]


@pytest.mark.parametrize("vocab_size", [257, 400, 50257, 50400])
def test_tokenizer_of_any_vocabulary_is_that_of_transformers_and_names_every_id(
    tmp_path: Path, vocab_size: int
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gptj"}))
    write_tokenizer(tmp_path, vocab_size)
    ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    text = "The whale, né Moby — 'tis 1851!<|endoftext|>\n\n  And so on"

    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    assert eos_token_id(vocab_size) in ids
    assert max(ids) < vocab_size
    assert ours.num_entries == vocab_size
    assert ours.decode([id for id in ids if id != eos_token_id(vocab_size)]) == text.replace("<|endoftext|>", "")


def test_vocabulary_that_cannot_hold_the_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="vocab_size must be at least 257, got 256"):
        write_tokenizer(tmp_path, 256)


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (("--num-heads", 7), "n_embd 64 is not a multiple of n_head 7"),
        (("--vocab-size", 100), "vocab_size must be at least 257"),
        (("--rotary-dim", 99), "rotary_dim must be even, from 2 to the 16 dimensions of a head, got 99"),
    ],
)
def test_impossible_shape_is_refused_in_one_line_and_leaves_nothing(
    tmp_path: Path, args: tuple[object, ...], reason: str
) -> None:
    done = _synth("tiny", tmp_path / "m", *args)

    assert (done.returncode, done.stdout) == (2, "")
    assert reason in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_what_exists_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "precious").touch()

    done = _synth("tiny", tmp_path / "m")

    assert done.returncode == 2
    assert "exists already" in done.stderr
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["precious"]
