"""Conversion: the same tensors in files of one layer, whatever happens on the way."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPTJForCausalLM
from typer.testing import CliRunner

from gptj_dist.checkpoint.convert import Conversion, convert_checkpoint
from gptj_dist.checkpoint.index import CheckpointIndex, check_checkpoint, expected_tensors, read_model_config
from gptj_dist.checkpoint.loader import STAGING_BYTES, StageTensors
from gptj_dist.checkpoint.partial import PartialDirectory
from gptj_dist.checkpoint.synthetic import write_checkpoint
from gptj_dist.cli import app
from gptj_dist.config import DTypeName, LayerRange, ModelConfig
from gptj_dist.errors import CheckpointError, ConfigurationError, ConversionError, GPTJDistError
from tests.conversions import Conversions

CONFIG = ModelConfig(40, 4, 16, 2, 4, 64, 32, (0,))
TIED = replace(CONFIG, has_tied_embeddings=True)
TINY = ModelConfig(40, 1, 16, 2, 4, 64, 32, (0,))
WHOLE = LayerRange(0, 1, 0, 4)
SHARD_BYTES = 8192
DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

State = dict[str, torch.Tensor]


class Notes:
    """Keeps what a conversion tells."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.bytes: list[tuple[int, int]] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def progress(self, done_bytes: int, total_bytes: int) -> None:
        self.bytes.append((done_bytes, total_bytes))


class Meanwhile(Notes):
    """Does something once, in the middle of the first file."""

    def __init__(self, action: Callable[[], object]) -> None:
        super().__init__()
        self._action: Callable[[], object] | None = action

    def progress(self, done_bytes: int, total_bytes: int) -> None:
        super().progress(done_bytes, total_bytes)
        if done_bytes and self._action:
            action, self._action = self._action, None
            action()


def _convert(
    source: Path, destination: Path, dtype: DTypeName | None = None, overwrite: bool = False, notes: Notes | None = None
) -> Conversion:
    return convert_checkpoint(source, destination, dtype, overwrite, notes or Notes())


def _contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def _beside(destination: Path) -> list[Path]:
    return list(destination.parent.glob(f"{destination.name}.partial*"))


def _tensors(directory: Path) -> State:
    files = directory.glob("model*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def _stop_after(monkeypatch: pytest.MonkeyPatch, num_files: int, error: BaseException) -> None:
    """The file after so many cannot be begun."""
    counter = itertools.count()
    really_create = PartialDirectory.create

    def create(self: PartialDirectory, name: str) -> Any:
        if next(counter) == num_files:
            raise error
        return really_create(self, name)

    monkeypatch.setattr(PartialDirectory, "create", create)


def _begin(monkeypatch: pytest.MonkeyPatch, source: Path, destination: Path, dtype: DTypeName | None = None) -> None:
    """A conversion that is interrupted when three files are finished."""
    with monkeypatch.context() as patch:
        _stop_after(patch, 3, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            _convert(source, destination, dtype)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "source"
    write_checkpoint(directory, CONFIG)
    (directory / "tokenizer.json").write_text("{}")
    return directory


@pytest.fixture(scope="module")
def conversions() -> Iterator[Conversions]:
    with Conversions() as started:
        yield started


# The result


def _as_pickle(directory: Path, change: Callable[[State], State] = lambda state: state) -> None:
    state = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    torch.save(change(state), directory / "pytorch_model.bin")


def _unprefixed(state: State) -> State:
    return {name.removeprefix("transformer."): tensor for name, tensor in state.items()}


def _transposed(state: State) -> State:
    return {name: t.T.contiguous().T if t.dim() == 2 else t for name, t in state.items()}


def _without_bias(directory: Path) -> None:
    state = load_file(directory / "model.safetensors")
    del state["lm_head.bias"]
    save_file(state, directory / "model.safetensors")


class Form(NamedTuple):
    """A form of source: how it is written, and what is done to it then."""

    config: ModelConfig = CONFIG
    how: dict[str, Any] = {}  # noqa: RUF012
    then: Callable[[Path], object] = lambda _: None


FORMS = {
    "one file": Form(),
    "several files": Form(how={"max_shard_bytes": SHARD_BYTES}),
    "legacy masks": Form(how={"legacy_buffers": True}),
    "tied": Form(config=TIED),
    "tied, without a bias": Form(config=TIED, then=_without_bias),
    "a pickle": Form(then=_as_pickle),
    "a pickle with masks": Form(how={"legacy_buffers": True}, then=_as_pickle),
    "a pickle of names without prefix": Form(then=lambda d: _as_pickle(d, _unprefixed)),
    "a pickle of transposed tensors": Form(then=lambda d: _as_pickle(d, _transposed)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_tensors_cast_as_torch_casts(tmp_path: Path, form: str) -> None:
    config, how, then = FORMS[form]
    for stored in get_args(DTypeName):
        source = tmp_path / stored
        write_checkpoint(source, config, dtype=stored, **how)
        truth = {name: tensor for name, tensor in _tensors(source).items() if name in expected_tensors(config, WHOLE)}
        if then is _without_bias:
            truth["lm_head.bias"] = torch.zeros(40, dtype=truth["lm_head.bias"].dtype)
        then(source)
        for wanted in get_args(DTypeName):
            destination = tmp_path / f"{stored}-{wanted}"
            assert _convert(source, destination, wanted).dtype == wanted
            result = _tensors(destination)
            assert result.keys() == truth.keys()
            for name, tensor in truth.items():
                assert result[name].dtype == DTYPES[wanted]
                assert torch.equal(result[name], tensor.to(DTYPES[wanted]))


@pytest.mark.parametrize("config", [CONFIG, TIED])
def test_transformers_loads_the_result_in_full(tmp_path: Path, config: ModelConfig) -> None:
    write_checkpoint(tmp_path / "source", config)
    _convert(tmp_path / "source", tmp_path / "result", "bfloat16")

    model, info = GPTJForCausalLM.from_pretrained(tmp_path / "result", output_loading_info=True)

    assert not any(info.values())
    state = model.state_dict()
    assert state["transformer.wte.weight"].dtype == torch.bfloat16
    assert all(torch.equal(state[name], tensor) for name, tensor in _tensors(tmp_path / "result").items())


def test_what_the_checkpoint_says_of_generation_stays(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", CONFIG)
    (tmp_path / "source" / "generation_config.json").write_text('{"eos_token_id": [0, 7], "top_k": 5}')

    _convert(tmp_path / "source", tmp_path / "result")

    assert read_model_config(tmp_path / "result").generation == read_model_config(tmp_path / "source").generation
    assert read_model_config(tmp_path / "result").eos_token_ids == (0, 7)


def test_each_stage_has_files_of_its_own(source: Path, tmp_path: Path) -> None:
    _convert(source, tmp_path / "result")
    check_checkpoint(tmp_path / "result", CONFIG)
    index = CheckpointIndex(tmp_path / "result")
    stages = [LayerRange(0, 3, 0, 1), LayerRange(1, 3, 1, 3), LayerRange(2, 3, 3, 4)]

    files = [index.files(expected_tensors(CONFIG, layers)) for layers in stages]

    assert [len(of_stage) for of_stage in files] == [2, 2, 2]
    assert len(set().union(*files)) == 6
    with StageTensors(tmp_path / "result", CONFIG, stages[1]):
        pass


def test_tied_embedding_is_stored_once_and_goes_to_both_ends(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", TIED)
    _convert(tmp_path / "source", tmp_path / "result")
    index = CheckpointIndex(tmp_path / "result")

    assert "lm_head.weight" not in index.file_of
    assert index.files(expected_tensors(TIED, LayerRange(1, 2, 4, 4))) == [
        "model-00001-of-00006.safetensors",
        "model-00006-of-00006.safetensors",
    ]


def test_result_holds_the_tokenizer_a_config_of_its_dtype_and_nothing_else(source: Path, tmp_path: Path) -> None:
    (source / "README.md").write_text("not of the model")
    fields = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**fields, "torch_dtype": "float32"}))

    conversion = _convert(source, tmp_path / "result", "float16")

    written = _contents(tmp_path / "result")
    assert json.loads(written["config.json"]) == {**fields, "dtype": "float16"}
    assert written["tokenizer.json"] == b"{}"
    others = {"config.json", "tokenizer.json", "SHA256SUMS", "model.safetensors.index.json"}
    assert written.keys() == others | {f"model-0000{i}-of-00006.safetensors" for i in range(1, 7)}
    assert conversion.num_files == len(written)
    assert conversion.num_bytes == sum(map(len, written.values())) - len(written["SHA256SUMS"])
    index = json.loads(written["model.safetensors.index.json"])
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in _tensors(tmp_path / "result").values())


def test_checksums_are_those_of_all_other_files(source: Path, tmp_path: Path) -> None:
    _convert(source, tmp_path / "result")
    written = _contents(tmp_path / "result")

    lines = written.pop("SHA256SUMS").decode().splitlines()

    assert lines == [f"{hashlib.sha256(content).hexdigest()}  {name}" for name, content in sorted(written.items())]
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=tmp_path / "result", check=True)


def test_two_runs_give_identical_files(source: Path, tmp_path: Path) -> None:
    _convert(source, tmp_path / "a", "bfloat16")
    os.utime(source / "model.safetensors", (1, 1))
    _convert(source, tmp_path / "b", "bfloat16")

    assert _contents(tmp_path / "a") == _contents(tmp_path / "b")


def test_converting_the_result_again_changes_nothing(source: Path, tmp_path: Path) -> None:
    _convert(source, tmp_path / "a", "bfloat16")
    _convert(tmp_path / "a", tmp_path / "b")

    assert _contents(tmp_path / "a") == _contents(tmp_path / "b")


@pytest.mark.parametrize("is_mixed", [False, True])
def test_dtype_is_that_of_the_weights_or_where_they_differ_the_configs(
    source: Path, tmp_path: Path, is_mixed: bool
) -> None:
    state = load_file(source / "model.safetensors")
    first = next(iter(state))
    save_file(
        {n: t if is_mixed and n == first else t.bfloat16() for n, t in state.items()}, source / "model.safetensors"
    )

    conversion = _convert(source, tmp_path / "result")

    assert conversion.dtype == read_model_config(tmp_path / "result").dtype == ("float32" if is_mixed else "bfloat16")


def test_numbers_that_float16_cannot_hold_are_refused_by_the_tensors_name(source: Path, tmp_path: Path) -> None:
    state = load_file(source / "model.safetensors")
    state["transformer.h.2.mlp.fc_in.weight"][3, 4] = -70000.0
    save_file(state, source / "model.safetensors")

    with pytest.raises(CheckpointError, match=r"transformer\.h\.2\.mlp\.fc_in\.weight holds numbers .* bfloat16"):
        _convert(source, tmp_path / "result", "float16")

    assert list(tmp_path.iterdir()) == [source]
    _convert(source, tmp_path / "result", "bfloat16")


# Where it may be written


@pytest.mark.parametrize("place", ["source", "source/inside", "."])
def test_destination_that_would_touch_the_source_is_refused(source: Path, tmp_path: Path, place: str) -> None:
    before = _contents(source)

    with pytest.raises(ConfigurationError, match=r"the source .* is there"):
        _convert(source, tmp_path / place, overwrite=True)
    assert _contents(source) == before


def test_destination_that_the_sources_files_are_linked_to_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    for file in source.iterdir():
        (tmp_path / "links" / file.name).symlink_to(file)

    with pytest.raises(ConfigurationError, match=r"the source .* is there"):
        _convert(tmp_path / "links", source, overwrite=True)


@pytest.mark.parametrize("name", ["x.partial-0123abcd", "x.partial-replaced"])
def test_source_that_lies_where_unfinished_or_replaced_files_would_is_refused(
    source: Path, tmp_path: Path, name: str
) -> None:
    source.rename(tmp_path / name)

    with pytest.raises(ConfigurationError, match=r"the source .* is there"):
        _convert(tmp_path / name, tmp_path / "x")


def test_destination_that_exists_is_replaced_only_if_asked(source: Path, tmp_path: Path) -> None:
    _convert(source, tmp_path / "result")
    before = _contents(tmp_path / "result")

    with pytest.raises(ConfigurationError, match="exists already"):
        _convert(source, tmp_path / "result", "float16")
    assert _contents(tmp_path / "result") == before

    _convert(source, tmp_path / "result", "float16", overwrite=True)
    assert read_model_config(tmp_path / "result").dtype == "float16"
    assert {path.name for path in tmp_path.iterdir()} == {"source", "result"}


def test_destination_comes_back_if_the_new_one_cannot_take_its_name(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _convert(source, tmp_path / "result")
    before = _contents(tmp_path / "result")
    really_rename = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if target.name == "result" and not self.name.endswith("replaced"):
            raise KeyboardInterrupt
        return really_rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(KeyboardInterrupt):
            _convert(source, tmp_path / "result", "float16", overwrite=True)
    assert _contents(tmp_path / "result") == before

    _convert(source, tmp_path / "result", "float16", overwrite=True)
    assert read_model_config(tmp_path / "result").dtype == "float16"


def test_directory_that_is_no_checkpoint_is_never_replaced(source: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("1")

    with pytest.raises(ConfigurationError, match="no checkpoint"):
        _convert(source, tmp_path / "thesis", overwrite=True)
    assert (tmp_path / "thesis" / "chapter").read_text() == "1"


def test_broken_source_leaves_nothing_behind(source: Path, tmp_path: Path) -> None:
    os.truncate(source / "model.safetensors", 5000)

    with pytest.raises(CheckpointError, match="truncated"):
        _convert(source, tmp_path / "result")
    assert list(tmp_path.iterdir()) == [source]


def test_source_that_changes_meanwhile_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Notes, "progress", lambda *_: os.utime(source / "model.safetensors", (1, 1)))

    with pytest.raises(CheckpointError, match="changed while"):
        _convert(source, tmp_path / "result")
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.skipif(sys.platform != "linux", reason="only there a descriptor tells its path")
def test_everything_is_on_the_disk_before_it_gets_its_name(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    renamed: list[tuple[str, str]] = []

    def recorded(rename: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
        def record(self: Path, target: Path) -> Path:
            assert synced[-1] == str(self)
            renamed.append((self.name, target.name))
            return rename(self, target)

        return record

    monkeypatch.setattr(os, "fsync", lambda file: synced.append(str(Path(f"/proc/self/fd/{file}").readlink())))
    monkeypatch.setattr(Path, "replace", recorded(Path.replace))
    monkeypatch.setattr(Path, "rename", recorded(Path.rename))
    _convert(source, tmp_path / "result")

    assert {target for _, target in renamed[:-1]} == _contents(tmp_path / "result").keys()
    assert renamed[-1][1] == "result"
    assert synced[-1] == str(tmp_path)


# Resuming


def test_finished_files_are_kept_and_the_others_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _convert(source, tmp_path / "undisturbed")
    _begin(monkeypatch, source, tmp_path / "result")
    [partial] = _beside(tmp_path / "result")
    kept = partial / "model-00002-of-00006.safetensors"
    before = kept.stat().st_ino
    notes = Notes()

    _convert(source, tmp_path / "result", notes=notes)

    assert notes.notes[0].startswith("resuming: 3 of 9 files are finished, ")
    assert (tmp_path / "result" / kept.name).stat().st_ino == before
    assert _contents(tmp_path / "result") == _contents(tmp_path / "undisturbed")
    assert notes.bytes[0][0] > 0
    assert notes.bytes == sorted(notes.bytes)
    assert notes.bytes[-1][0] == notes.bytes[-1][1]


@pytest.mark.parametrize("damage", [lambda path: os.truncate(path, 10), Path.unlink])
def test_finished_file_that_was_damaged_is_written_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], object]
) -> None:
    _convert(source, tmp_path / "undisturbed")
    _begin(monkeypatch, source, tmp_path / "result")
    [partial] = _beside(tmp_path / "result")
    damage(partial / "model-00002-of-00006.safetensors")

    _convert(source, tmp_path / "result")

    assert _contents(tmp_path / "result") == _contents(tmp_path / "undisturbed")


@pytest.mark.parametrize("what", ["the dtype", "the source's weights"])
def test_part_of_another_conversion_is_deleted_and_nothing_else(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    _begin(monkeypatch, source, tmp_path / "result", "bfloat16")
    if what == "the source's weights":
        write_checkpoint(source, CONFIG, seed=1)
    (tmp_path / "result.partial-backup").mkdir()
    unfinished = tmp_path / "result.partial-0123abcd"
    unfinished.write_text("of a process that was killed")
    dtype: DTypeName = "float16" if what == "the dtype" else "bfloat16"
    notes = Notes()

    _convert(source, tmp_path / "result", dtype, notes=notes)

    [note] = notes.notes
    assert note.endswith("held a part of another conversion: deleted")
    assert _beside(tmp_path / "result") == [tmp_path / "result.partial-backup"]
    _convert(source, tmp_path / "fresh", dtype)
    assert _contents(tmp_path / "result") == _contents(tmp_path / "fresh")


@pytest.mark.slow
def test_conversion_killed_at_random_moments_gives_the_same_bytes(tmp_path: Path, conversions: Conversions) -> None:
    write_checkpoint(tmp_path / "source", ModelConfig(4000, 6, 256, 2, 4, 1024, 32, (0,)))
    code, error, undisturbed_s = conversions.run(tmp_path / "source", tmp_path / "undisturbed")
    assert code == 0, error
    delays = random.Random(0)
    num_kills = 0

    for attempt in range(60):
        destination = tmp_path / f"{attempt}"
        delay_s = delays.uniform(0, undisturbed_s)
        if conversions.run(tmp_path / "source", destination, kill_after_s=delay_s)[0] == 0:
            continue  # it was quicker than the undisturbed run
        num_kills += 1
        assert not destination.exists() or _contents(destination) == _contents(tmp_path / "undisturbed")
        conversions.run(tmp_path / "source", destination)
        assert _contents(destination) == _contents(tmp_path / "undisturbed")
        assert not _beside(destination)
        shutil.rmtree(destination)
        if num_kills == 10:
            return
    pytest.fail(f"only {num_kills} kills hit a running conversion")


@pytest.mark.slow
@pytest.mark.parametrize("overwrite", [False, True])
def test_conversion_killed_at_any_step_leaves_old_or_new_and_resumes(
    tmp_path: Path, conversions: Conversions, overwrite: bool
) -> None:
    source, destination, old = tmp_path / "source", tmp_path / "result", tmp_path / "old"
    write_checkpoint(source, TINY)
    write_checkpoint(tmp_path / "other", TINY, seed=1)
    assert conversions.run(source, tmp_path / "new", kill_at_step=1_000_000)[0] == 0
    assert conversions.run(tmp_path / "other", old, kill_at_step=1_000_000)[0] == 0
    wanted = _contents(tmp_path / "new")
    whole = [wanted, _contents(old)]

    for step in itertools.count(1, 1 if overwrite else 3):
        shutil.rmtree(destination, ignore_errors=True)
        if overwrite:
            shutil.copytree(old, destination)
        code, error, _ = conversions.run(source, destination, overwrite=overwrite, kill_at_step=step)
        if code == 0:
            break
        assert code == -9, error
        assert not destination.exists() or _contents(destination) in whole
        if overwrite and not destination.exists():
            assert _contents(tmp_path / "result.partial-replaced") == whole[1]
            assert "exists already" in conversions.run(source, destination)[1]
            assert _contents(destination) == whole[1]

        code, error, _ = conversions.run(source, destination, overwrite=overwrite, kill_at_step=1_000_000)

        # Killed after it was done: there is nothing left to do but to say so.
        assert code == 0 or "exists already" in error
        assert _contents(destination) == wanted
        assert not _beside(destination)
    assert step > 60


# Two processes


@pytest.mark.parametrize("overwrite", [False, True])
def test_process_that_finishes_first_publishes_and_the_other_stops_in_one_line(
    source: Path, tmp_path: Path, overwrite: bool
) -> None:
    _convert(source, tmp_path / "undisturbed")
    if overwrite:
        _convert(source, tmp_path / "result", "float16")
    second = Meanwhile(lambda: _convert(source, tmp_path / "result", overwrite=overwrite))

    with pytest.raises(ConversionError, match="another process has written") as error:
        _convert(source, tmp_path / "result", overwrite=overwrite, notes=second)

    assert "\n" not in str(error.value)
    assert _contents(tmp_path / "result") == _contents(tmp_path / "undisturbed")
    assert not _beside(tmp_path / "result")


def test_process_uses_what_another_has_finished_before_it_ended(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _convert(source, tmp_path / "undisturbed")
    second = Meanwhile(lambda: _begin(monkeypatch, source, tmp_path / "result"))

    _convert(source, tmp_path / "result", notes=second)

    assert _contents(tmp_path / "result") == _contents(tmp_path / "undisturbed")
    assert not _beside(tmp_path / "result")


def test_conversion_to_another_dtype_stops_the_earlier_one(source: Path, tmp_path: Path) -> None:
    second = Meanwhile(lambda: _convert(source, tmp_path / "result", "float16"))

    with pytest.raises(ConversionError, match="another process has written"):
        _convert(source, tmp_path / "result", "bfloat16", notes=second)

    assert read_model_config(tmp_path / "result").dtype == "float16"
    check_checkpoint(tmp_path / "result", read_model_config(tmp_path / "result"))
    assert not _beside(tmp_path / "result")


def test_destination_that_appears_meanwhile_is_left_alone_and_the_files_are_kept(source: Path, tmp_path: Path) -> None:
    notes = Notes()

    with pytest.raises(ConversionError, match="another process has written"):
        _convert(source, tmp_path / "result", notes=Meanwhile(lambda: shutil.copytree(source, tmp_path / "result")))
    assert _contents(tmp_path / "result") == _contents(source)

    _convert(source, tmp_path / "result", overwrite=True, notes=notes)
    assert notes.notes[0].startswith("resuming: 9 of 9 files are finished")


@pytest.mark.slow
def test_two_processes_at_once_give_one_whole_result(tmp_path: Path, conversions: Conversions) -> None:
    source = tmp_path / "source"
    write_checkpoint(source, CONFIG)
    assert conversions.run(source, tmp_path / "undisturbed", kill_at_step=1_000_000)[0] == 0

    with Conversions() as others, ThreadPoolExecutor(2) as pool:
        for attempt in range(10):
            destination = tmp_path / f"{attempt}"
            both = [pool.submit(c.run, source, destination, kill_at_step=1_000_000) for c in (conversions, others)]
            ends = [run.result()[:2] for run in both]
            assert (0, "") in ends
            assert all(code == 0 or "another process" in error or "exists already" in error for code, error in ends)
            assert _contents(destination) == _contents(tmp_path / "undisturbed")


# Full disks


def test_too_little_space_is_said_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9000, 8000, 1000))

    with pytest.raises(ConversionError, match=r"needs \d+\.?\d* kB more, and its disk has 1 kB free"):
        _convert(source, tmp_path / "result")
    assert list(tmp_path.iterdir()) == [source]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB."""
    directory = tmp_path / "disk"
    directory.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", directory], check=False).returncode:
        pytest.skip("file systems may not be mounted here")
    yield directory
    subprocess.run(["umount", directory], check=True)


def test_disk_that_fills_up_on_the_way_leaves_source_and_destination_and_resumes(
    source: Path, tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _convert(source, tmp_path / "undisturbed")
    (small_disk / "result").mkdir()
    (small_disk / "result" / "config.json").write_text("earlier")
    before = _contents(source)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 10**9))
        with pytest.raises(ConversionError, match=r"make room.*finished is kept") as error:
            _convert(source, small_disk / "result", overwrite=True)
    assert "No space left on device" in str(error.value)
    assert "\n" not in str(error.value)
    assert _contents(source) == before
    assert _contents(small_disk / "result") == {"config.json": b"earlier"}
    assert all(path.is_dir() for path in _beside(small_disk / "result"))
    with pytest.raises(ConversionError, match=r"needs .* more"):
        _convert(source, small_disk / "result", overwrite=True)

    subprocess.run(["mount", "-o", "remount,size=1m", small_disk], check=True)
    notes = Notes()
    _convert(source, small_disk / "result", overwrite=True, notes=notes)

    assert notes.notes[0].startswith("resuming: ")
    assert _contents(small_disk / "result") == _contents(tmp_path / "undisturbed")


def test_limit_on_the_size_of_files_is_told_like_a_full_disk(
    source: Path, tmp_path: Path, conversions: Conversions
) -> None:
    code, error, _ = conversions.run(source, tmp_path / "result", max_file_bytes=4000)

    assert code == 1
    assert "File too large" in error
    assert "run it again" in error
    assert not (tmp_path / "result").exists()


def test_directory_that_may_not_be_written_is_one_line(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(ConversionError, match="could not be written") as error:
        _convert(source, tmp_path / "file" / "result")
    assert "\n" not in str(error.value)


# Memory


def _peak_bytes(source: Path, destination: Path) -> int:
    code = (
        "import sys; from gptj_dist.cli import app; from tests.memory import peak_bytes;"
        "app(['convert', *sys.argv[1:], '--dtype', 'bfloat16'], standalone_mode=False); print(peak_bytes())"
    )
    command = [sys.executable, "-c", code, str(source), str(destination)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_memory_is_that_of_one_tensor_however_large_the_checkpoint(tmp_path: Path) -> None:
    # What grows with a model is the largest tensor, in the new dtype, alone: 826 MB of GPT-J-6B in float32.
    large = ModelConfig(4000, 6, 1024, 8, 64, 4096, 32, (0,))
    write_checkpoint(tmp_path / "small", CONFIG)
    write_checkpoint(tmp_path / "large", large)
    source_bytes = (tmp_path / "large" / "model.safetensors").stat().st_size
    largest_tensor_bytes = 4096 * 1024 * 2

    growth = _peak_bytes(tmp_path / "large", tmp_path / "b") - _peak_bytes(tmp_path / "small", tmp_path / "a")

    assert growth < largest_tensor_bytes + STAGING_BYTES + 20e6 < source_bytes / 4


# The command


def test_command_says_where_the_result_lies_and_how_to_serve_it(source: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "result"), "--dtype", "bfloat16"])

    assert done.exit_code == 0, done.output
    summary, serve = done.stdout.splitlines()
    assert summary.startswith(f"{tmp_path / 'result'}: ")
    assert "10 files, bfloat16" in summary
    assert serve == f"gptj-dist serve {tmp_path / 'result'}"
    assert done.stderr.splitlines()


def test_interrupted_command_says_in_one_line_that_it_resumes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _stop_after(monkeypatch, 3, KeyboardInterrupt())

    done = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "result")])

    assert done.exit_code == 130
    assert done.stderr.splitlines()[-1] == "gptj-dist: interrupted; running it again resumes"
    assert not (tmp_path / "result").exists()


def test_command_refuses_the_destination_before_it_downloads(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptj_dist.checkpoint.hub.fetch_weights", lambda *_: pytest.fail("downloads"))

    done = CliRunner().invoke(app, ["convert", str(source), str(source)])

    assert isinstance(done.exception, GPTJDistError)
