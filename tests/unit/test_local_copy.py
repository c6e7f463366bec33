"""A node's copy of a model has exactly the parts that were asked for, whatever happens while they are fetched."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from gptj_dist.checkpoint import local_copy
from gptj_dist.checkpoint.copy_record import CopyRecord
from gptj_dist.checkpoint.hub import DEMO, resolve_model
from gptj_dist.checkpoint.index import CheckpointIndex, read_model_config, stage_headers
from gptj_dist.checkpoint.local_copy import LocalCopy, SourceLostError
from gptj_dist.checkpoint.manifest import (
    Manifest,
    ModelFile,
    is_same_model,
    read_manifest,
    sample,
    stage_spans,
    version_of,
)
from gptj_dist.checkpoint.pieces import Piece, PieceReader
from gptj_dist.checkpoint.spans import Span, merged, num_bytes, without
from gptj_dist.config import LayerRange
from gptj_dist.errors import CheckpointError

CONFIG = read_model_config(resolve_model(DEMO))
SECOND = LayerRange(1, 2, CONFIG.num_layers // 2, CONFIG.num_layers)
FIRST = LayerRange(0, 2, 0, CONFIG.num_layers // 2)


def wanted(layers: LayerRange) -> Callable[[Path], dict[str, list[Span]]]:
    return lambda directory: stage_spans(directory, CONFIG, layers)


@dataclass
class DirectorySource:
    """Reads a directory of this machine.

    Args:
        spoil: what becomes of the n-th piece; it may raise.
    """

    path: Path
    spoil: Callable[[int, bytes], bytes] = lambda _, data: data
    name: str = "10.0.0.1"
    asked: list[Piece] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.directory = str(self.path)

    def manifest(self) -> Manifest:
        return read_manifest(self.path)

    def read(self, pieces: Sequence[Piece]) -> Generator[bytes, None, None]:
        with PieceReader(self.path, [file.name for file in self.manifest().files]) as reader:
            for piece in pieces:
                data = bytes(reader.read(piece))
                self.asked.append(piece)
                yield self.spoil(len(self.asked), data)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(resolve_model(DEMO), tmp_path / "fine-tuned"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "models"
    path.mkdir()
    return path


@contextmanager
def opened(root: Path, model: Path) -> Iterator[LocalCopy]:
    copy = LocalCopy(root, model.name, version_of(model))
    try:
        yield copy
    finally:
        copy.close()


def same_tensors(copy: Path, original: Path, layers: LayerRange) -> bool:
    headers = [stage_headers(CheckpointIndex(place), CONFIG, layers) for place in (copy, original)]
    assert headers[0].keys() == headers[1].keys()
    return all(content(headers[0][name]) == content(headers[1][name]) for name in headers[0])


def content(header: object) -> bytes:
    from gptj_dist.checkpoint.headers import TensorHeader

    assert isinstance(header, TensorHeader)
    with header.path.open("rb") as file:
        return os.pread(file.fileno(), header.num_bytes, header.offset_bytes)


def test_a_copy_has_the_stages_tensors_and_no_others(root: Path, model: Path) -> None:
    source = DirectorySource(model)
    with opened(root, model) as copy:
        fetched = copy.fill(source, wanted(SECOND))
        assert copy.directory.name == "fine-tuned"
        assert same_tensors(copy.directory, model, SECOND)
        assert not same_tensors(copy.directory, model, FIRST)
        assert (copy.directory / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
        files = {file.name: file for file in read_manifest(model).files}
        needed = sum(num_bytes(file.plain) for file in files.values())
        needed += sum(map(num_bytes, stage_spans(model, CONFIG, SECOND).values()))
        assert fetched == needed == sum(piece.num_bytes for piece in source.asked)
        weights = copy.directory / "model.safetensors"
        assert weights.stat().st_size == files[weights.name].size_bytes
        assert weights.stat().st_blocks * 512 < 0.8 * weights.stat().st_size


def test_what_is_there_is_not_fetched_again_by_another_process_with_other_layers(root: Path, model: Path) -> None:
    source = DirectorySource(model)
    with opened(root, model) as one, opened(root, model) as other:
        one.fill(source, wanted(SECOND))
        assert one.fill(source, wanted(SECOND)) == 0
        other.fill(source, wanted(LayerRange(0, 1, 0, CONFIG.num_layers)))
        assert other.directory == one.directory
    assert sum(piece.num_bytes for piece in source.asked) == sum(file.size_bytes for file in read_manifest(model).files)
    for file in read_manifest(model).files:
        assert (one.directory / file.name).read_bytes() == (model / file.name).read_bytes()


def test_two_processes_that_fill_at_once_fetch_everything_once(root: Path, model: Path) -> None:
    entered, waits, go_on = threading.Event(), threading.Event(), threading.Event()

    def slowly(_: int, data: bytes) -> bytes:
        entered.set()
        assert go_on.wait(60)
        return data

    def note(_: int, all_bytes: int) -> None:
        if not all_bytes:
            waits.set()

    source = DirectorySource(model, slowly)
    with opened(root, model) as one, opened(root, model) as other:
        threads = [threading.Thread(target=one.fill, args=(source, wanted(SECOND)))]
        threads[0].start()
        assert entered.wait(60)
        threads.append(threading.Thread(target=other.fill, args=(source, wanted(SECOND), note)))
        threads[1].start()
        assert waits.wait(60)
        go_on.set()
        for thread in threads:
            thread.join(60)
    assert len(source.asked) == len(set(source.asked))
    assert same_tensors(one.directory, model, SECOND)


def test_a_source_that_dies_is_asked_again_for_what_is_missing(root: Path, model: Path) -> None:
    def dies_twice(number: int, data: bytes) -> bytes:
        if number in (2, 5):
            raise SourceLostError("it died")
        return data

    source = DirectorySource(model, dies_twice)
    with opened(root, model) as copy:
        copy.fill(source, wanted(SECOND))
        assert same_tensors(copy.directory, model, SECOND)
    twice = [piece for piece in source.asked if source.asked.count(piece) > 1]
    assert len(set(twice)) == 2  # those in whose places it died


def test_a_source_that_is_lost_for_good_ends_in_one_error_and_the_next_attempt_goes_on(root: Path, model: Path) -> None:
    def dies(number: int, data: bytes) -> bytes:
        if number > 3:
            raise SourceLostError("the node has died")
        return data

    source = DirectorySource(model, dies)
    with opened(root, model) as copy:
        with pytest.raises(CheckpointError, match=r"cannot get .*fine-tuned from 10\.0\.0\.1: the node has died"):
            copy.fill(source, wanted(SECOND))
        kept = source.asked[:3]
        back = DirectorySource(model)
        copy.fill(back, wanted(SECOND))
        assert not set(kept) & set(back.asked)
        assert same_tensors(copy.directory, model, SECOND)


@pytest.mark.parametrize("spoil", [lambda _, data: data[:-1], lambda number, data: data if number != 4 else b""])
def test_a_piece_that_is_cut_short_is_never_part_of_the_copy(
    root: Path, model: Path, spoil: Callable[[int, bytes], bytes]
) -> None:
    source = DirectorySource(model, lambda number, data: spoil(number, data) if number < 6 else data)
    with opened(root, model) as copy:
        try:
            copy.fill(source, wanted(SECOND))
        except CheckpointError:
            copy.fill(source, wanted(SECOND))
        assert same_tensors(copy.directory, model, SECOND)


def test_a_process_that_is_killed_leaves_only_recorded_parts(root: Path, model: Path) -> None:
    """It is killed in the middle of the tensors, after the other bytes were recorded."""
    program = (
        "import os, signal\nfrom pathlib import Path\nimport tests.unit.test_local_copy as t\n"
        f"root, model = Path({str(root)!r}), Path({str(model)!r})\n"
        "n = sum(1 for f in t.read_manifest(model).files for s in f.plain)\n"
        "die = lambda number, data: os.kill(os.getpid(), signal.SIGKILL) if number > n + 1 else data\n"
        "copy = t.LocalCopy(root, model.name, t.version_of(model))\n"
        "copy.fill(t.DirectorySource(model, die), t.wanted(t.SECOND))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -9, done.stderr
    source = DirectorySource(model)
    with opened(root, model) as copy:
        copy.fill(source, wanted(SECOND))
        assert same_tensors(copy.directory, model, SECOND)
    tensor_bytes = sum(map(num_bytes, stage_spans(model, CONFIG, SECOND).values()))
    assert sum(piece.num_bytes for piece in source.asked) == tensor_bytes


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_error_and_leaves_nothing(
    root: Path, model: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def full(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    with opened(root, model) as copy:
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(CheckpointError, match=r"^the disk of .*models is full: .* are free.*XDG_CACHE_HOME"):
            copy.fill(DirectorySource(model), wanted(SECOND))
        assert not copy.directory.exists()
        monkeypatch.undo()
        copy.fill(DirectorySource(model), wanted(SECOND))
        assert same_tensors(copy.directory, model, SECOND)


@dataclass(frozen=True)
class _Usage:
    free: int


def test_room_is_made_by_copies_that_nobody_uses_and_refused_before_anything_is_fetched(
    root: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others: list[Path] = []
    for name in ("old", "used"):
        other = Path(shutil.copytree(model, tmp_path / name))
        os.utime(other / "config.json", ns=(1, len(others)))
        others.append(other)
    with opened(root, others[0]) as old:
        old.fill(DirectorySource(others[0]))
    with opened(root, others[1]) as used, opened(root, model) as copy:
        used.fill(DirectorySource(others[1]))
        full = local_copy.SPARE_BYTES + 1000

        def usage(_: object) -> _Usage:
            return _Usage(10**12 if not old.directory.exists() else full)

        monkeypatch.setattr(shutil, "disk_usage", usage)
        copy.fill(DirectorySource(model))
        assert not old.directory.exists()
        assert used.directory.exists()
        monkeypatch.setattr(shutil, "disk_usage", lambda _: _Usage(full))
        source = DirectorySource(model)
        with pytest.raises(CheckpointError, match=r"is full: .* of the model's files are to go there; .* are free"):
            copy.fill(source, wanted(SECOND))
        assert source.asked == []
        assert used.directory.exists()


def test_a_later_version_of_the_same_directory_replaces_the_earlier_one(root: Path, model: Path) -> None:
    with opened(root, model) as before:
        before.fill(DirectorySource(model))
        os.utime(model / "model.safetensors", ns=(5, 5))
        with opened(root, model) as after:
            after.fill(DirectorySource(model))
            assert before.directory.exists()  # in use
    os.utime(model / "model.safetensors", ns=(6, 6))
    with opened(root, model) as newest:
        newest.fill(DirectorySource(model))
        assert [path.name for path in root.iterdir()] == [version_of(model)]


def test_files_that_change_meanwhile_are_refused_and_nothing_of_them_is_kept(root: Path, model: Path) -> None:
    with opened(root, model) as copy:
        os.utime(model / "config.json", ns=(5, 5))
        with pytest.raises(CheckpointError, match="have changed since the server started: restart it"):
            copy.fill(DirectorySource(model))

    def changes(number: int, data: bytes) -> bytes:
        if number == 6:  # the bytes of no tensor have been recorded
            raise CheckpointError("they have changed")
        return data

    with opened(root, model) as copy:
        with pytest.raises(CheckpointError, match="they have changed"):
            copy.fill(DirectorySource(model, changes), wanted(SECOND))
        source = DirectorySource(model)
        copy.fill(source)
        plain = sum(num_bytes(file.plain) for file in read_manifest(model).files)
        assert sum(piece.num_bytes for piece in source.asked) == plain


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/b", "..", "", "a\0b"])
def test_a_manifest_cannot_name_files_elsewhere(root: Path, model: Path, tmp_path: Path, name: str) -> None:
    class Evil(DirectorySource):
        def manifest(self) -> Manifest:
            files = (ModelFile(name, 3, ((0, 3),)),)
            return replace(super().manifest(), files=files)

    with opened(root, model) as copy, pytest.raises(CheckpointError, match="cannot be called"):
        copy.fill(Evil(model))
    assert not list(tmp_path.rglob("evil"))


def test_a_link_in_a_copy_is_not_written_through(root: Path, model: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    with opened(root, model) as copy:
        copy.fill(DirectorySource(model))
        (copy.directory / "model.safetensors").unlink()
        (copy.directory / "model.safetensors").symlink_to(victim)
        with pytest.raises(CheckpointError, match="cannot keep the model's files"):
            copy.fill(DirectorySource(model), wanted(SECOND))
    assert victim.read_text() == "precious"


def test_only_files_of_the_model_are_read_and_pipes_are_not_waited_for(model: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("abc")
    os.mkfifo(model / "vocab.json")
    (model / "merges.txt").symlink_to(model / "config.json")  # as the hub's cache has them
    with PieceReader(model, ["config.json", "vocab.json", "merges.txt"]) as reader:
        assert bytes(reader.read(Piece("merges.txt", 0, 1))) == b"{"
        for name in ("../secret", str(tmp_path / "secret"), "tokenizer.json"):
            with pytest.raises(PermissionError, match="no file of the model"):
                reader.read(Piece(name, 0, 3))
        with pytest.raises(PermissionError, match="no ordinary file"):
            reader.read(Piece("vocab.json", 0, 3))


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"files": 3}', '{"origin": "x", "files": [["a", 1, [[0, "b"]]]], "parts": {}}']
)
def test_a_broken_record_is_as_none(root: Path, model: Path, content: str) -> None:
    with opened(root, model) as copy:
        copy.fill(DirectorySource(model), wanted(SECOND))
        (copy.directory.parent / "parts.json").write_text(content)
        assert CopyRecord.read(copy.directory.parent, copy.directory) is None
        copy.fill(DirectorySource(model), wanted(SECOND))
        assert same_tensors(copy.directory, model, SECOND)


def test_a_file_that_was_cut_off_in_the_copy_is_fetched_again(root: Path, model: Path) -> None:
    with opened(root, model) as copy:
        copy.fill(DirectorySource(model), wanted(SECOND))
        os.truncate(copy.directory / "model.safetensors", 1000)
        copy.fill(DirectorySource(model), wanted(SECOND))
        assert same_tensors(copy.directory, model, SECOND)


def test_a_version_follows_times_and_sizes_and_a_sample_what_is_in_the_files(model: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(model, tmp_path / "copied", copy_function=shutil.copy))  # without times
    os.utime(copied / "config.json", ns=(5, 5))
    assert version_of(copied) != version_of(model)
    assert sample(copied) == sample(model)
    header = next(iter(stage_headers(CheckpointIndex(copied), CONFIG, SECOND).values()))
    with (copied / "model.safetensors").open("r+b") as file:
        file.seek(header.offset_bytes)
        file.write(b"\1\2\3\4")
    assert sample(copied) != sample(model)


def test_a_node_uses_its_own_directory_only_if_it_holds_the_same_model(model: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(model, tmp_path / "copied", copy_function=shutil.copy))
    os.utime(copied / "config.json", ns=(5, 5))
    assert is_same_model(model, version_of(model), lambda: pytest.fail("the version tells")) is True
    assert is_same_model(copied, version_of(model), lambda: sample(model)) is True
    assert is_same_model(copied, version_of(model), lambda: "another") is False
    assert is_same_model(tmp_path / "gone", version_of(model), lambda: sample(model)) is None
    os.truncate(copied / "model.safetensors", 30_000)
    assert is_same_model(copied, version_of(model), lambda: sample(model)) is None


def test_spans_are_sets_of_bytes() -> None:
    spans = [(0, 3), (10, 20), (3, 5), (19, 22), (30, 30)]
    assert merged(spans) == [(0, 5), (10, 22)]
    for others in ([], [(0, 100)], [(1, 2), (4, 11), (12, 13), (21, 40)], [(5, 10)], [(0, 1), (0, 4)]):
        left = {byte for begin, end in without(spans, others) for byte in range(begin, end)}
        taken = {byte for begin, end in others for byte in range(begin, end)}
        assert left == {byte for begin, end in spans for byte in range(begin, end)} - taken
        assert without(spans, others) == merged(without(spans, others))
    assert num_bytes(merged(spans)) == 17


def test_a_record_names_the_files_and_their_parts(root: Path, model: Path) -> None:
    with opened(root, model) as copy:
        copy.fill(DirectorySource(model), wanted(SECOND))
        record = json.loads((copy.directory.parent / "parts.json").read_text())
    assert record["origin"] == str(model)
    plain = {file.name: list(file.plain) for file in read_manifest(model).files}
    tensors = stage_spans(model, CONFIG, SECOND)
    for name, spans in record["parts"].items():
        assert [tuple(span) for span in spans] == merged([*plain[name], *tensors.get(name, [])])
