"""The name of a server's weights: another model, other files or other types have another one."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from gptj_dist.checkpoint.hub import DEMO, resolve_model
from gptj_dist.config import PipelineConfig
from gptj_dist.serving.weights import weights_of


@pytest.fixture
def copied(tmp_path: Path) -> PipelineConfig:
    """A model in a directory."""
    return PipelineConfig(str(shutil.copytree(resolve_model(DEMO, None), tmp_path / "model")))


def test_what_changes_the_text_changes_the_name(copied: PipelineConfig, tmp_path: Path) -> None:
    shutil.copytree(copied.model, tmp_path / "same times")
    hub = PipelineConfig("some/model", revision="1" * 40)
    configs = [
        copied,
        replace(copied, model=str(tmp_path / "same times")),
        replace(copied, dtype="float32"),
        replace(copied, dtype="bfloat16", wire_dtype="int8"),
        replace(copied, quantize="int8"),
        PipelineConfig(DEMO),
        hub,
        replace(hub, revision="2" * 40),
    ]
    assert len(set(map(weights_of, configs))) == len(configs)


def test_how_a_model_is_cut_and_placed_does_not(copied: PipelineConfig) -> None:
    other = replace(copied, stages=2, device="cpu", max_batch_size=3, prefix_cache=False, max_model_len=100)
    assert weights_of(other) == weights_of(copied)


def test_files_that_are_edited_in_place_change_it(copied: PipelineConfig) -> None:
    before = weights_of(copied)
    weights = next(Path(copied.model).glob("*.safetensors"))
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
    assert weights_of(copied) != before
