"""Fetches and reads the parts of a model that a stage has: its layers, one more layer, its parts of adapters."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from gptj_dist.checkpoint.loader import StageTensors
from gptj_dist.config import DTypeName, LayerRange, ModelConfig
from gptj_dist.model.gptj import StageModel
from gptj_dist.model.kv_cache import has_blocks
from gptj_dist.model.layers import Layer
from gptj_dist.model.native.library import load_library
from gptj_dist.planning.cost import weight_bytes
from gptj_dist.stages.adapters import StageAdapters
from gptj_dist.stages.blueprint import StageReport, StageSpec, quantized_name
from gptj_dist.stages.device import describe_device, free_bytes
from gptj_dist.stages.files import ModelFiles
from gptj_dist.stages.load_progress import LoadProgress


def read_stage(
    spec: StageSpec,
    files: ModelFiles,
    dtype: torch.dtype,
    device: torch.device,
    on_progress: Callable[[LoadProgress], None],
) -> StageModel:
    """Fetches, reads and packs a stage's weights.

    Args:
        on_progress: called at every step.

    Raises:
        CheckpointError: tensors of the stage are missing, or the hub denies access to them.
    """
    files.fetch(spec.config, spec.layers, on_progress)
    if device.type == "cpu":
        on_progress(LoadProgress("preparing code for this CPU"))
        load_library()
    with StageTensors(files.directory(), spec.config, spec.layers) as tensors, torch.inference_mode():
        model = StageModel(
            spec.config,
            spec.layers,
            tensors.read,
            dtype,
            device,
            lambda num_layers: on_progress(_loaded(num_layers, spec.layers, tensors)),
        )
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of the memory in which matrices were quantised
    return model


def read_layer(spec: StageSpec, files: ModelFiles, model: StageModel, index: int) -> Layer:
    """Fetches, reads and packs one more layer, given by its number in the model. Any thread may call it.

    Raises:
        CheckpointError: tensors of the layer are missing, or the hub denies access to them.
    """
    alone = LayerRange(1, 3, index, index + 1)  # neither first nor last: without embedding and head
    files.fetch(spec.config, alone, lambda _: None)
    with StageTensors(files.directory(), spec.config, alone) as tensors, torch.inference_mode():
        return model.read_layer(tensors.read, index)


def new_adapters(
    spec: StageSpec, files: ModelFiles, dtype: torch.dtype, device: torch.device, layers: LayerRange
) -> StageAdapters:
    """No adapters yet, of a stage with these layers, which have been fetched."""
    read = partial(_read_weight, files.directory(), spec.config, layers)
    return StageAdapters(spec.config, layers, dtype, device, read)


def stage_report(spec: StageSpec, dtype: DTypeName, kept_as: torch.dtype, device: torch.device) -> StageReport:
    """The report of a stage that has read its weights.

    Args:
        kept_as: the type of keys and values.
    """
    return StageReport(
        layers=spec.layers,
        device=describe_device(device),
        kind=spec.device,
        dtype=dtype,
        weight_bytes=weight_bytes(spec.config, spec.layers, dtype),
        free_bytes=free_bytes(device),
        kv_bytes_per_token=2 * spec.layers.num_layers * spec.config.d_model * kept_as.itemsize,
        pid=os.getpid(),
        has_blocks=has_blocks(device),
        quantized=quantized_name(spec.config, spec.layers),
    )


def _loaded(num_layers: int, layers: LayerRange, tensors: StageTensors) -> LoadProgress:
    return LoadProgress(f"{num_layers}/{layers.num_layers} layers", tensors.num_read_bytes, tensors.num_bytes)


def _read_weight(directory: Path, config: ModelConfig, layers: LayerRange, name: str, out: Tensor) -> None:
    if config.quantization is not None and config.quantization.is_foreign:  # it can be read as numbers
        config = replace(config, quantization=None)
    with StageTensors(directory, config, layers) as tensors:
        tensors.read(name, out)
