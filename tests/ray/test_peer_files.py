"""The files of a model travel between processes of Ray, whatever happens to the one that sends them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from gptj_dist.checkpoint.hub import DEMO, resolve_model
from gptj_dist.checkpoint.index import read_model_config
from gptj_dist.checkpoint.local_copy import LocalCopy
from gptj_dist.checkpoint.manifest import stage_spans, version_of
from gptj_dist.checkpoint.spans import num_bytes
from gptj_dist.checkpoint.synthetic import write_checkpoint
from gptj_dist.config import LayerRange, PipelineConfig
from gptj_dist.errors import CheckpointError
from gptj_dist.stages.files import FileSource
from gptj_dist.stages.peer_files import PeerSource, files_here, share_files
from tests.http.server import local_ray

pytestmark = pytest.mark.ray

HOST = "127.0.0.1"
CONFIG = replace(read_model_config(resolve_model(DEMO)), num_layers=3, d_model=1024, d_ff=4096, num_heads=16)
LAYERS = LayerRange(1, 3, 1, 2)
"""Of 50 MB, more than is under way at once."""


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with local_ray():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    write_checkpoint(directory, CONFIG, dtype="float32")
    return directory


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "models"
    path.mkdir()
    return path


def peer(directory: Path, node_id: str | None = None) -> PeerSource:
    node_id = node_id or ray.get_runtime_context().get_node_id()
    return PeerSource(FileSource(node_id, "10.0.0.1", str(directory), version_of(directory)), HOST)


def senders() -> Sequence[int]:
    """The processes that send files."""
    return [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/cmdline") if is_sender(path)]


def is_sender(path: Path) -> bool:
    try:
        return path.read_bytes().startswith(b"ray::FileServer")
    except OSError:
        return False


def test_a_sender_that_is_killed_is_replaced_and_what_has_arrived_is_kept(model: Path, root: Path) -> None:
    killed: list[int] = []

    def kill_one(done: int, all_bytes: int) -> None:
        if not killed and done > all_bytes // 10 and all_bytes > 10**7:
            killed.extend(senders())
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    with closing(LocalCopy(root, "model", version_of(model))) as copy:
        source = peer(model)
        before = copy.fill(source)
        fetched = copy.fill(source, lambda directory: stage_spans(directory, CONFIG, LAYERS), kill_one)
        (file, spans), *others = stage_spans(model, CONFIG, LAYERS).items()
        assert not others
        assert len(killed) == 1
        assert 0 < before < 10**6
        assert fetched == num_bytes(spans) > 4 * 10**7
        with (copy.directory / file).open("rb") as there, (model / file).open("rb") as here:
            for begin, end in spans:
                parts = [os.pread(each.fileno(), end - begin, begin) for each in (there, here)]
                assert parts[0] == parts[1]
    assert senders() == [] or set(senders()) != set(killed)


def test_a_node_that_is_gone_is_an_error_that_names_it(model: Path, root: Path) -> None:
    copy, message = LocalCopy(root, "model", version_of(model)), r"cannot get .* from 10\.0\.0\.1: the process"
    with closing(copy), pytest.raises(CheckpointError, match=message):
        copy.fill(peer(model, "ab" * 28))


def test_files_that_have_changed_are_refused_by_the_node_that_has_them(model: Path, root: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    changed.mkdir()
    for file in model.iterdir():
        os.link(file, changed / file.name)
    (changed / "config.json").unlink()
    (changed / "config.json").write_bytes((model / "config.json").read_bytes())
    with closing(LocalCopy(root, "model", version_of(changed))) as copy:
        source = peer(changed)
        os.utime(changed / "config.json", ns=(5, 5))
        with pytest.raises(CheckpointError, match="have changed since the server started: restart it"):
            copy.fill(source)


def test_a_directory_is_shared_unless_told_otherwise_and_a_hub_model_if_told_so(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloads: list[LayerRange] = []
    module = "gptj_dist.stages.peer_files"
    in_cache = {"owner/name": model, str(model): model}
    monkeypatch.setattr(f"{module}.resolve_model", lambda name, _: in_cache[name])
    monkeypatch.setattr(f"{module}.fetch_weights", lambda _, __, layers, ___: downloads.append(layers))
    shared = share_files(PipelineConfig(str(model)))
    assert shared == FileSource(
        ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address(), str(model), version_of(model)
    )
    assert share_files(PipelineConfig(str(model), peer_files=False)) is None
    assert share_files(PipelineConfig("owner/name")) is None
    assert downloads == []
    assert share_files(PipelineConfig("owner/name", peer_files=True)) == shared
    assert downloads == [LayerRange.whole(CONFIG.num_layers)]
    assert share_files(PipelineConfig(DEMO, peer_files=True)) is None


def test_the_node_with_the_files_reads_them_where_they_are(model: Path) -> None:
    config = PipelineConfig("owner/name", revision="main", peer_files=True)
    source = FileSource(ray.get_runtime_context().get_node_id(), HOST, str(model), "any")
    there, files = files_here(config, source, HOST)
    assert (there.model, there.revision) == (str(model), None)
    assert files is not None
    files.fetch(CONFIG, LAYERS, lambda progress: pytest.fail(f"{progress}"))
    assert files_here(config, None, HOST) == (config, None)
