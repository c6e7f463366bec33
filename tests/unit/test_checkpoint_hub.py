"""Finding a model: names that need no hub, and names that no hub can have (see `test_hub_protocol` for the rest)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest

from gptj_dist.checkpoint.hub import fetch_weights, resolve_model
from gptj_dist.checkpoint.synthetic import write_checkpoint
from gptj_dist.config import LayerRange, ModelConfig
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
LAST = LayerRange(1, 2, 2, 4)
SHARD_BYTES = 8192
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def _assert_one_line(error: pytest.ExceptionInfo[CheckpointError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 400
    return text


def test_directory_resolves_to_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))

    for model in ("owner/name", "./owner/name", str(tmp_path / "owner/name"), "~/owner/name"):
        assert resolve_model(model) == tmp_path / "owner" / "name"


@pytest.mark.parametrize("model", ["/no/where", "./nowhere", "../nowhere", "~/nowhere", "a/b/c", "models/", "C:\\gptj"])
def test_path_that_does_not_exist_is_not_looked_for_on_the_hub(model: str) -> None:
    with pytest.raises(CheckpointError, match="there is no directory") as error:
        resolve_model(model)
    assert model in _assert_one_line(error)


@pytest.mark.parametrize(
    ("model", "advice"), [("gpt-j-6b", "did you mean 'EleutherAI/gpt-j-6b'?"), ("layers", "hub names are OWNER/NAME")]
)
def test_name_without_an_owner_is_refused_before_the_hub_is_asked(
    model: str, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_args, **_kwargs: pytest.fail("the hub was asked"))
    with pytest.raises(CheckpointError, match="neither a directory nor a hub name") as error:
        resolve_model(model)
    assert advice in _assert_one_line(error)


def test_file_in_place_of_a_directory_is_named_as_that(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIG)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a file: name the directory"):
        resolve_model(str(tmp_path / "model.safetensors"))


def test_the_weights_of_a_local_model_are_where_they_are(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIG)

    assert fetch_weights(str(tmp_path), resolve_model(str(tmp_path)), LAST, CONFIG) == [tmp_path / "model.safetensors"]


def test_unforeseen_failure_of_the_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object, **_kwargs: object) -> str:
        raise OSError("the wind has changed\nwith a long explanation")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(CheckpointError, match=r"OSError: the wind has changed\)") as error:
        resolve_model("owner/name")
    _assert_one_line(error)


def test_name_that_the_hub_cannot_have_is_refused_in_one_line() -> None:
    with pytest.raises(CheckpointError, match="neither a directory nor a hub name") as error:
        resolve_model("my model!")
    _assert_one_line(error)


def test_finding_and_checking_load_neither_torch_nor_ray_nor_the_hub() -> None:
    code = (
        "import sys, gptj_dist.checkpoint.index, gptj_dist.checkpoint.hub;"
        "print({'torch', 'ray', 'huggingface_hub'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"
