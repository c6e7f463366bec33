"""Reads LoRA adapters in the layout of PEFT: `adapter_config.json` beside one file of tensors. Stdlib only."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptj_dist.checkpoint.adapters import AdapterPart, Place, StoredAdapter
from gptj_dist.checkpoint.headers import TensorHeader, listing, printable, read_json
from gptj_dist.checkpoint.index import read_stored_header
from gptj_dist.errors import CheckpointError, excerpt

CONFIG_FILE = "adapter_config.json"
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")

_HONOURED = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_bias", "use_dora"}

_WITHOUT_EFFECT = {
    # Which tensors there are says the same.
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    # Training, and the names of things.
    "auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "megatron_core", "peft_type",
    "peft_version", "revision", "runtime_config", "task_type",
    # Of merged weights in Conv1D layers, which GPT-J has not; of versions before 2023: merging, fused q, k and v.
    "fan_in_fan_out", "merge_weights",
    # Only with what is refused.
    "eva_config", "qalora_group_size",
}  # fmt: skip

_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base model as it is. Others change it, and would have to change it here.
"""

_MODULE = re.compile(
    r"(?:^|\.)transformer\.(?:h\.(?P<layer>\d{1,4})\.(?:attn\.(?P<proj>q|k|v|out)_proj|mlp\.(?P<mlp>fc_in|fc_out))|wte)$"
    r"|(?:^|\.)lm_head$"
)
_TENSOR = re.compile(
    r"^(?P<module>.*?)\.(?P<kind>lora_embedding_A|lora_embedding_B|lora_A|lora_B|lora_magnitude_vector)"
    r"(?:\.(?!weight$|bias$)\w+)?(?:\.(?P<end>weight|bias))?$"
)

_MAX_PATTERNS, _MAX_PATTERN_CHARS, _MAX_MODULE_CHARS = 1024, 200, 200
_SLOW_PATTERN = re.compile(r"\)[*+?{]|(?:[*+?{].*){3}", re.DOTALL)
"""Patterns that may take for ever: repeated groups, and more than two repetitions."""


def is_peft(path: Path) -> bool:
    """Whether a path is a directory in this layout."""
    return (path / CONFIG_FILE).is_file()


def read_peft(directory: Path) -> StoredAdapter:
    """The adapter in a directory.

    Raises:
        CheckpointError: files are missing or broken, a field of the config changes the arithmetic in a way that is not
            supported, or a tensor is at no place of a GPT-J.
    """
    config = read_json(directory / CONFIG_FILE)
    _require_supported(directory, config)
    path = next((directory / name for name in WEIGHT_FILES if (directory / name).is_file()), None)
    if path is None:
        raise CheckpointError(f"{directory} has neither {WEIGHT_FILES[0]} nor {WEIGHT_FILES[1]}")
    base = config.get("base_model_name_or_path")
    parts = _parts(path, config)
    files = (directory / CONFIG_FILE, path)
    return StoredAdapter(directory, "LoRA", base if isinstance(base, str) else None, parts, files)


def _require_supported(directory: Path, config: Mapping[str, Any]) -> None:
    where = directory / CONFIG_FILE
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{where}: peft_type is {excerpt(config.get('peft_type'))}, only 'LORA' is served")
    for name, value in config.items():
        if name in _HONOURED or name in _WITHOUT_EFFECT:
            continue
        is_plain = value in _PLAIN_INITS if name == "init_lora_weights" else value == "none" or _is_empty(value)
        if not is_plain:
            raise CheckpointError(f"{where}: {printable(name)} is {excerpt(value)}, which is not supported")


def _is_empty(value: object) -> bool:
    """Whether a value turns its field off; an object does that whose values all do."""
    return not value or (isinstance(value, dict) and all(map(_is_empty, value.values())))


def _parts(path: Path, config: Mapping[str, Any]) -> tuple[AdapterPart, ...]:
    modules: dict[str, dict[str, TensorHeader]] = {}
    unknown = []
    for name, header in read_stored_header(path).items():
        found = _TENSOR.match(name)
        is_short = found is not None and len(found["module"]) <= _MAX_MODULE_CHARS
        if found is None or not is_short or _MODULE.search(found["module"]) is None:
            unknown.append(name)
            continue
        kind = found["kind"].removeprefix("lora_").removeprefix("embedding_")
        modules.setdefault(found["module"], {})["bias" if found["end"] == "bias" else kind] = header
    if unknown:
        raise CheckpointError(f"{path} holds tensors that change no known place of a GPT-J: {listing(unknown)}")
    if not modules:
        raise CheckpointError(f"{path} holds no tensors")
    return tuple(part for module, tensors in modules.items() for part in _module_parts(path, module, tensors, config))


def _module_parts(
    path: Path, module: str, tensors: Mapping[str, TensorHeader], config: Mapping[str, Any]
) -> list[AdapterPart]:
    found = _MODULE.search(module)
    assert found is not None, "it has matched before"
    a, b, bias, magnitude = (tensors.get(kind) for kind in ("A", "B", "bias", "magnitude_vector"))
    if a is None or b is None:
        raise CheckpointError(f"{path}: {printable(module)} lacks {'lora_A' if a is None else 'lora_B'}")
    layer = None if found["layer"] is None else int(found["layer"])
    place: Place = found["proj"] or found["mlp"] or ("lm_head" if module.endswith("lm_head") else "wte")  # type: ignore[assignment]
    if (magnitude is not None) != bool(config.get("use_dora")) or (magnitude is not None and place == "wte"):
        raise CheckpointError(f"{path}: {printable(module)} and use_dora contradict each other, or it is an embedding")
    rank = _number(config, "rank_pattern", "r", module)
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != rank:
        raise CheckpointError(
            f"{path}: {printable(module)} has lora_A {list(a.shape)} and lora_B {list(b.shape)}, and {CONFIG_FILE} "
            f"says rank {rank:g}"
        )
    alpha = _number(config, "alpha_pattern", "lora_alpha", module)
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    parts = [AdapterPart(place, layer, module, scale, a, b, magnitude=magnitude)]
    if bias is not None:
        parts.append(AdapterPart(place, layer, f"{module} bias", scale, vector=bias))
    return parts


def _number(config: Mapping[str, Any], patterns: str, default: str, module: str) -> float:
    """The rank or alpha of a module: that of the first pattern that fits the end of its name, else the default."""
    by_pattern = config.get(patterns) or {}
    if not isinstance(by_pattern, dict) or len(by_pattern) > _MAX_PATTERNS:
        raise CheckpointError(f"{CONFIG_FILE}: {patterns} must be an object of at most {_MAX_PATTERNS} patterns")
    value = config.get(default)
    for pattern, of_pattern in by_pattern.items():
        if len(pattern) > _MAX_PATTERN_CHARS or _SLOW_PATTERN.search(pattern):
            raise CheckpointError(f"{CONFIG_FILE}: {patterns} has a pattern that may take too long: {excerpt(pattern)}")
        try:
            fits = re.match(rf"(?:.*\.)?(?:{pattern})$", module)
        except re.error as error:
            raise CheckpointError(f"{CONFIG_FILE}: {patterns} has the pattern {excerpt(pattern)}: {error}") from None
        if fits:
            value = of_pattern
            break
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise CheckpointError(f"{CONFIG_FILE}: {default} of {printable(module)} must be positive, got {excerpt(value)}")
    return value
