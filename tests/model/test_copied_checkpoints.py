"""A copy with a stage's parts alone is read as the original is, in every form that checkpoints have."""

from __future__ import annotations

from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import torch

from gptj_dist.checkpoint.index import expected_tensors, read_model_config, stored_bits
from gptj_dist.checkpoint.loader import StageTensors
from gptj_dist.checkpoint.local_copy import LocalCopy
from gptj_dist.checkpoint.manifest import read_manifest, stage_spans, version_of
from gptj_dist.checkpoint.spans import num_bytes
from gptj_dist.config import LayerRange, ModelConfig
from tests.fuzzing.models import write_models
from tests.layout_files import CASES, write_case
from tests.unit.test_local_copy import DirectorySource

DTYPES = {None: torch.float32, 8: torch.int8, 4: torch.uint8}
FUZZED = ("safetensors", "shards", "zip", "plain zip", "bin shards", "int8", "gptq", "ggml")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_models(root)
    return root


def tensors_of(directory: Path, config: ModelConfig, layers: LayerRange) -> dict[str, torch.Tensor]:
    """What a stage reads."""
    read = {}
    with StageTensors(directory, config, layers) as tensors:
        for name, shape in expected_tensors(config, layers).items():
            read[name] = torch.empty(shape, dtype=DTYPES[stored_bits(config, name)])
            tensors.read(name, read[name])
    return read


def check(directory: Path, root: Path) -> None:
    """Copies the parts of each of two stages, and reads both the copy and the original."""
    config, manifest = read_model_config(directory), read_manifest(directory)
    for stage in (0, 1):
        layers = LayerRange(stage, 2, stage, stage + 1)
        place = root / str(stage)
        place.mkdir(parents=True)
        with closing(LocalCopy(place, directory.name, version_of(directory))) as copy:
            fetched = copy.fill(DirectorySource(directory), partial(stage_spans, config=config, layers=layers))
            assert read_model_config(copy.directory) == config
            there, here = tensors_of(copy.directory, config, layers), tensors_of(directory, config, layers)
            assert all(torch.equal(there[name], here[name]) for name in here)
        tensor_bytes = sum(map(num_bytes, stage_spans(directory, config, layers).values()))
        assert fetched == tensor_bytes + sum(num_bytes(file.plain) for file in manifest.files)
        assert fetched < sum(file.size_bytes for file in manifest.files)


@pytest.mark.parametrize("form", FUZZED)
def test_each_form_of_checkpoint(models: Path, tmp_path: Path, form: str) -> None:
    check(models / form, tmp_path / "copies")


@pytest.mark.parametrize("case", CASES)
def test_each_layout_of_quantised_weights(tmp_path: Path, case: str) -> None:
    write_case(tmp_path / "model", CASES[case])
    check(tmp_path / "model", tmp_path / "copies")
