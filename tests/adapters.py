"""Small adapters in PEFT's layout, and the weights that they stand for when they are merged."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptj_dist.checkpoint.adapter_formats import open_fitting
from gptj_dist.checkpoint.hub import resolve_model
from gptj_dist.checkpoint.index import read_model_config
from gptj_dist.config import ModelConfig
from gptj_dist.params import AdapterChoice

ALL_TARGETS = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj", "mlp.fc_in", "mlp.fc_out")


def widths(target: str, config: ModelConfig) -> tuple[int, int]:
    """Inputs and outputs of a product."""
    inputs = config.d_ff if target.endswith("fc_out") else config.d_model
    return inputs, config.d_ff if target.endswith("fc_in") else config.d_model


def write_lora(
    directory: Path,
    config: ModelConfig,
    targets: Sequence[str] = ("attn.q_proj", "attn.v_proj"),
    rank: int = 4,
    seed: int = 0,
    layers: Sequence[int] | None = None,
    size: float = 0.1,
    **fields: Any,
) -> Path:
    """Writes a random adapter as PEFT does; `fields` are those of its config.

    Args:
        size: of the changes, compared with their inputs.
    """
    directory.mkdir(parents=True, exist_ok=True)
    noise = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for layer in range(config.num_layers) if layers is None else layers:
        for target in targets:
            inputs, outputs = widths(target, config)
            name = f"base_model.model.transformer.h.{layer}.{target}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, inputs, generator=noise) * inputs**-0.5
            tensors[f"{name}.lora_B.weight"] = torch.randn(outputs, rank, generator=noise) * size * rank**-0.5
            if fields.get("use_dora"):
                tensors[f"{name}.lora_magnitude_vector"] = 0.5 + torch.rand(outputs, generator=noise)
    config_fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "EleutherAI/gpt-j-6B",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": [target.rpartition(".")[2] for target in targets],
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "inference_mode": True,
    } | fields
    (directory / "adapter_config.json").write_text(json.dumps(config_fields))
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


def write_control_vector(path: Path, directions: Mapping[int, Tensor]) -> Path:
    """Writes a control vector as repeng does."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    fields = [
        text("general.architecture") + struct.pack("<I", 8) + text("controlvector"),
        text("controlvector.model_hint") + struct.pack("<I", 8) + text("gptj"),
        text("controlvector.layer_count") + struct.pack("<II", 4, len(directions)),
    ]
    data, entries = b"", []
    for layer, vector in directions.items():
        entries.append(text(f"direction.{layer}") + struct.pack("<IQIQ", 1, len(vector), 0, len(data)))
        data += vector.numpy().tobytes()
    head = b"GGUF" + struct.pack("<IQQ", 3, len(entries), len(fields)) + b"".join(fields + entries)
    path.write_bytes(head + b"\0" * (-len(head) % 32) + data)
    return path


def chosen(path: Path, config: ModelConfig, name: str | None = None, strength: float = 1.0) -> AdapterChoice:
    """An adapter as a request names it, with its source."""
    return AdapterChoice(name or path.name, strength, open_fitting(path, config).source())


def merge(base: Path, destination: Path, adapters: Sequence[tuple[Path, float]]) -> Path:
    """Writes the model with adapters added to its weights, each with a factor of its B @ A."""
    added: dict[str, Tensor] = {}
    for path, factor in adapters:
        changes = load_file(path / "adapter_model.safetensors")
        for name, a in changes.items():
            if name.endswith(".lora_A.weight"):
                module = name.removesuffix(".lora_A.weight")
                weight = f"{module.removeprefix('base_model.model.')}.weight"
                change = factor * (changes[f"{module}.lora_B.weight"].double() @ a.double())
                added[weight] = added.get(weight, 0.0) + change
    return add_to(base, destination, added)


def add_to(base: Path, destination: Path, added: Mapping[str, Tensor]) -> Path:
    """Writes the model with these added to its tensors."""
    destination.mkdir()
    for file in base.iterdir():
        if file.suffix != ".safetensors":
            (destination / file.name).write_bytes(file.read_bytes())
    [weights] = base.glob("*.safetensors")
    tensors = load_file(weights)
    for name, change in added.items():
        tensors[name] = (tensors[name].double() + change).float()
    save_file(tensors, destination / weights.name)
    return destination


def model_config(model: str) -> ModelConfig:
    """The config of a model."""
    return read_model_config(resolve_model(model))
