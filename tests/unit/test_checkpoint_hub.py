"""Finding a model and fetching what a stage needs of it. No network: a fake plays the hub."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from gptj_dist.checkpoint.hub import DEMO, fetch_weights, resolve_model
from gptj_dist.checkpoint.index import CheckpointIndex, expected_tensors, read_model_config
from gptj_dist.checkpoint.loader import StageTensors
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
    eos_token_id=0,
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


@pytest.mark.parametrize("model", ["/no/where", "./nowhere", "../nowhere", "~/nowhere", "a/b/c"])
def test_path_that_does_not_exist_is_not_looked_for_on_the_hub(model: str) -> None:
    with pytest.raises(CheckpointError, match="there is no directory") as error:
        resolve_model(model)
    assert model in _assert_one_line(error)


class FakeHub:
    """Plays the hub: one repository in `remote`, whose files appear in the cache's snapshot as they are asked for."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.remote = root / "remote"
        self.snapshot = root / "cache" / COMMIT
        self.snapshot.mkdir(parents=True)
        self.remote.mkdir()
        self.downloads: list[str] = []
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self._snapshot_download)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self._hf_hub_download)
        monkeypatch.setattr(huggingface_hub, "file_exists", self._file_exists)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def _snapshot_download(self, repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert (repo, revision) == ("owner/name", "main")
        for path in self.remote.iterdir():
            if any(path.match(pattern) for pattern in allow_patterns):
                self._copy(path.name)
        return str(self.snapshot)

    def _hf_hub_download(self, repo: str, file: str, *, revision: str) -> None:
        assert (repo, revision) == ("owner/name", COMMIT)
        self._copy(file)

    def _file_exists(self, repo: str, file: str, *, revision: str) -> bool:
        assert (repo, revision) == ("owner/name", COMMIT)
        return (self.remote / file).exists()

    def _copy(self, file: str) -> None:
        self.downloads.append(file)
        (self.snapshot / file).write_bytes((self.remote / file).read_bytes())


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    return FakeHub(tmp_path, monkeypatch)


@pytest.mark.parametrize("max_shard_bytes", [None, SHARD_BYTES])
def test_resolving_a_hub_model_downloads_no_weights(hub: FakeHub, max_shard_bytes: int | None) -> None:
    write_checkpoint(hub.remote, CONFIG, max_shard_bytes=max_shard_bytes)
    for file in ("tokenizer.json", "tokenizer_config.json", "README.md"):
        (hub.remote / file).write_text("{}")

    directory = resolve_model("owner/name", "main")

    assert read_model_config(directory) == CONFIG
    index = {"model.safetensors.index.json"} if max_shard_bytes else set()
    assert set(hub.downloads) == {"config.json", "tokenizer.json", "tokenizer_config.json"} | index


def test_fetch_weights_asks_only_for_the_files_of_the_stage(hub: FakeHub) -> None:
    write_checkpoint(hub.remote, CONFIG, max_shard_bytes=SHARD_BYTES)
    directory = resolve_model("owner/name", "main")
    hub.downloads.clear()

    fetch_weights("owner/name", directory, LAST, CONFIG)

    assert hub.downloads == CheckpointIndex(hub.remote).files(expected_tensors(CONFIG, LAST))
    assert set(hub.downloads) < {file.name for file in hub.remote.iterdir()}
    StageTensors(directory, CONFIG, LAST).close()


def test_fetch_weights_asks_for_the_only_file_of_an_unsharded_model(hub: FakeHub) -> None:
    write_checkpoint(hub.remote, CONFIG)
    directory = resolve_model("owner/name", "main")

    fetch_weights("owner/name", directory, LAST, CONFIG)

    assert hub.downloads == ["config.json", "model.safetensors"]
    StageTensors(directory, CONFIG, LAST).close()


def test_fetch_weights_does_nothing_for_local_models(hub: FakeHub) -> None:
    for model in (DEMO, str(hub.remote)):
        fetch_weights(model, resolve_model(model), LAST, CONFIG)
    assert hub.downloads == []


def test_hub_model_of_pickles_is_refused_before_any_download_of_weights(hub: FakeHub) -> None:
    (hub.remote / "pytorch_model.bin").write_bytes(b"PK")

    with pytest.raises(CheckpointError, match=r"pickles .* safetensors are needed .*refs/pr/40") as error:
        resolve_model("owner/name", "main")
    _assert_one_line(error)
    assert hub.downloads == []


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (GatedRepoError, "it is gated"),
        (RepositoryNotFoundError, "no such repository"),
        (RevisionNotFoundError, "it has no revision 'dev'"),
    ],
)
def test_refusal_by_the_hub_is_one_line(monkeypatch: pytest.MonkeyPatch, kind: Any, reason: str) -> None:
    def refuse(*_args: object, **_kwargs: object) -> str:
        raise kind.__new__(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(CheckpointError, match=reason) as error:
        resolve_model("owner/name", "dev")
    assert "'owner/name'" in _assert_one_line(error)


def test_unforeseen_failure_of_the_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object, **_kwargs: object) -> str:
        raise OSError("disk is full\nwith a long explanation")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=r"OSError: disk is full$") as error:
        resolve_model("owner/name")
    _assert_one_line(error)


@pytest.mark.parametrize("model", ["owner/name", "gpt2"])
def test_hub_name_without_network_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))

    with pytest.raises(CheckpointError, match="the hub cannot be reached") as error:
        resolve_model(model)
    assert repr(model) in _assert_one_line(error)


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
