"""Reads LoRA adapters in the layout of PEFT: `adapter_config.json` beside one file of tensors. Stdlib only."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gptj_dist.checkpoint.adapters import AdapterPart, Place, StoredAdapter
from gptj_dist.checkpoint.headers import TensorHeader, listing, printable, read_json
from gptj_dist.checkpoint.index import read_stored_header
from gptj_dist.errors import CheckpointError, excerpt

CONFIG_FILE = "adapter_config.json"
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")

_HONOURED = {
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_bias", "use_dora", "modules_to_save",
    "trainable_token_indices",
}  # fmt: skip

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

_VALUES: Mapping[str, Sequence[Any]] = {
    # Others change the base model, and would have to change it here.
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),
    "bias": ("none", "all", "lora_only"),
}
"""Values of fields of which only some are honoured, beside those that turn a field off."""

_MODULE = re.compile(
    r"(?:^|\.)(?:transformer\.(?:h\.(?P<layer>\d{1,4})\."
    r"(?:attn\.(?P<proj>q|k|v|out)_proj|mlp\.(?P<mlp>fc_in|fc_out)|ln_1)|wte|ln_f)|lm_head)$"
)
_PLACES: Mapping[str, Place] = {"wte": "wte", "lm_head": "lm_head", "ln_1": "norm", "ln_f": "final"}
"""By the ends of modules' names, those that are no layer's matrix."""
_WITH_BIAS: Sequence[Place] = ("fc_in", "fc_out", "lm_head", "norm", "final")

_TENSOR = re.compile(
    r"^(?P<module>.*?)\.(?:"
    r"(?P<kind>lora_embedding_A|lora_embedding_B|lora_A|lora_B|lora_magnitude_vector)"
    r"(?:\.(?!weight$|bias$)\w+)?(?:\.(?P<end>weight|bias))?"
    r"|(?:(?:base_layer|modules_to_save)\.)?(?:default\.)?(?P<whole>weight|bias)"
    r"|token_adapter\.(?P<rows>trainable_tokens_delta)(?:\.default)?"
    r")$"
)
_WHOLE = {"weight", "bias", "rows"}
"""Kinds of tensors that replace the model's."""
_UNUSED = ".original_module."
"""In the names of tensors of the base model that `modules_to_save` has replaced."""

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
        if not _is_empty(value) and value not in _VALUES.get(name, ("none",)):
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
        if _UNUSED in name:
            continue
        if found is None or not is_short or _MODULE.search(found["module"]) is None:
            unknown.append(name)
            continue
        modules.setdefault(found["module"], {})[_kind(found)] = header
    if unknown:
        raise CheckpointError(f"{path} holds tensors that change no known place of a GPT-J: {listing(unknown)}")
    if not modules:
        raise CheckpointError(f"{path} holds no tensors")
    _require_replaced(path, modules, config)
    return tuple(part for module, tensors in modules.items() for part in _module_parts(path, module, tensors, config))


def _kind(found: re.Match[str]) -> str:
    """What a tensor is to its module: of LoRA A, B, "B bias" or magnitude_vector, or one of `_WHOLE`."""
    if found["kind"] is None:
        return "rows" if found["whole"] is None else found["whole"]
    kind: str = found["kind"].removeprefix("lora_").removeprefix("embedding_")
    return f"{kind} bias" if found["end"] == "bias" else kind


def _require_replaced(path: Path, modules: Mapping[str, Mapping[str, TensorHeader]], config: Mapping[str, Any]) -> None:
    """Checks that what `modules_to_save` and `trainable_token_indices` name is there."""
    names = config.get("modules_to_save") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{CONFIG_FILE}: modules_to_save must be a list of names, got {excerpt(names)}")
    replaced = [f".{module}" for module, tensors in modules.items() if tensors.keys() & {"weight", "bias"}]
    for name in names:
        if not any(module.endswith(f".{name}") for module in replaced):
            raise CheckpointError(f"{path} has no tensor of {excerpt(name)}, which modules_to_save names")
    if config.get("trainable_token_indices") and not any("rows" in tensors for tensors in modules.values()):
        raise CheckpointError(f"{path} has no rows of tokens, which trainable_token_indices names")


def _module_parts(
    path: Path, module: str, tensors: Mapping[str, TensorHeader], config: Mapping[str, Any]
) -> list[AdapterPart]:
    found = _MODULE.search(module)
    assert found is not None, "it has matched before"
    layer = None if found["layer"] is None else int(found["layer"])
    place: Place = found["proj"] or found["mlp"] or _PLACES[module.rpartition(".")[2]]  # type: ignore[assignment]
    parts = _low_rank_parts(path, place, layer, module, tensors, config) if tensors.keys() - _WHOLE else []
    if (weight := tensors.get("weight")) is not None:
        if place in ("norm", "final"):
            raise CheckpointError(f"{path}: a new weight of a LayerNorm ({printable(module)}) is not supported")
        if "magnitude_vector" in tensors:
            parts[0] = replace(parts[0], weight=weight)
        else:
            parts.append(AdapterPart(place, layer, f"{module} weight", 1.0, weight=weight))
    if (rows := tensors.get("rows")) is not None:
        if place != "wte":
            raise CheckpointError(
                f"{path}: trainable_token_indices of {printable(module)} is not supported, only of wte"
            )
        token_ids = _token_ids(config)
        parts.append(AdapterPart(place, layer, f"{module} rows", 1.0, weight=rows, token_ids=token_ids))
    if (bias := tensors.get("bias")) is not None:
        if place not in _WITH_BIAS:
            raise CheckpointError(f"{path} has a bias for {printable(module)}, which has none in a GPT-J")
        parts.append(AdapterPart(place, layer, f"{module} bias", 1.0, vector=bias, replaces_bias=True))
    return parts


def _token_ids(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Those whose rows of the embedding are new."""
    listed = config.get("trainable_token_indices")
    if isinstance(listed, dict) and len(listed) == 1:
        [listed] = listed.values()
    token_ids = tuple(listed) if isinstance(listed, list) else ()
    are_ids = bool(token_ids) and all(type(token_id) is int and token_id >= 0 for token_id in token_ids)
    if not are_ids or len(set(token_ids)) < len(token_ids):
        raise CheckpointError(
            f"{CONFIG_FILE}: trainable_token_indices must list token ids, each once, of wte alone, "
            f"got {excerpt(config.get('trainable_token_indices'))}"
        )
    return token_ids


def _low_rank_parts(
    path: Path,
    place: Place,
    layer: int | None,
    module: str,
    tensors: Mapping[str, TensorHeader],
    config: Mapping[str, Any],
) -> list[AdapterPart]:
    a, b, bias, magnitude = (tensors.get(kind) for kind in ("A", "B", "B bias", "magnitude_vector"))
    if a is None or b is None:
        raise CheckpointError(f"{path}: {printable(module)} lacks {'lora_A' if a is None else 'lora_B'}")
    if place in ("norm", "final"):
        raise CheckpointError(f"{path}: {printable(module)} is a LayerNorm, which has no LoRA")
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
