"""What the planner knows of a device: the figures of known ones, and how people describe their own. Stdlib only.

Published figures are never reached, so those of GPUs are scaled by a stated efficiency. A measured device
(`operate.calibration`) measures its own figures and needs none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, cast

from gptj_dist.config import DeviceKind, DTypeName, refuse_unknown_keys
from gptj_dist.errors import ConfigurationError, one_line

GPU_BANDWIDTH_EFFICIENCY = 0.72
"""Part of a GPU's published bandwidth that decoding reaches: 0.9, which an H200 reads at (4.3 of 4.8 TB/s measured),
times 0.8, which a very good engine keeps of that."""

GPU_FLOPS_EFFICIENCY = 0.5
"""Part of a GPU's published FLOP/s that prefill reaches. An assumption: nothing was measured."""

GPU_LAYER_LAUNCHES_US = 80.0
"""Launching a layer's kernels at 5 us each. An assumption as well."""

DEFAULT_LINK_GB_S = 1.25
"""10 Gbit/s Ethernet."""

DEFAULT_LINK_LATENCY_US = 150.0
"""One hop: 95 us through ZeroMQ on one machine (a ring of four took 378), and some for a switch."""


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """One device, as fast as it is in practice.

    Args:
        memory_bytes: all of it.
        bandwidth_bytes_s, kv_bandwidth_bytes_s: at which it reads weights, and cached keys and values.
        flops, float32_flops: of matrix products, a second, in 16 bit and in float32.
        attention_flops: of attention's products, softmax included.
        row_elements_s: of rows of `d_model` that norm, rotation, GELU and cache write get through in a layer.
        step_overhead_s, layer_overhead_s: fixed cost of a step, and of each layer in it.
        link_bytes_s, link_latency_s: of the way from and to other stages.
        fast_dtypes: types that it is good at.
    """

    name: str
    kind: DeviceKind
    memory_bytes: float
    bandwidth_bytes_s: float
    kv_bandwidth_bytes_s: float
    flops: float
    float32_flops: float
    attention_flops: float
    row_elements_s: float = math.inf
    step_overhead_s: float = 0.0
    layer_overhead_s: float = 0.0
    link_bytes_s: float = DEFAULT_LINK_GB_S * 1e9
    link_latency_s: float = DEFAULT_LINK_LATENCY_US * 1e-6
    fast_dtypes: tuple[DTypeName, ...] = ("float32", "float16", "bfloat16")


def _gpu(
    name: str, memory_gb: float, bandwidth_gb_s: float, tflops: float, float32_tflops: float, has_bfloat16: bool = True
) -> DeviceSpec:
    """A GPU by its published figures: dense 16-bit FLOP/s of the tensor cores, float32 ones without them."""
    bandwidth = bandwidth_gb_s * 1e9 * GPU_BANDWIDTH_EFFICIENCY
    flops = tflops * 1e12 * GPU_FLOPS_EFFICIENCY
    return DeviceSpec(
        name=name,
        kind="cuda",
        memory_bytes=memory_gb * 1e9,
        bandwidth_bytes_s=bandwidth,
        kv_bandwidth_bytes_s=bandwidth,
        flops=flops,
        float32_flops=float32_tflops * 1e12 * GPU_FLOPS_EFFICIENCY,
        attention_flops=flops,
        layer_overhead_s=GPU_LAYER_LAUNCHES_US * 1e-6,
        fast_dtypes=("float32", "float16", "bfloat16") if has_bfloat16 else ("float32", "float16"),
    )


_CPU = DeviceSpec(
    name="cpu",
    kind="cpu",
    memory_bytes=24e9,
    bandwidth_bytes_s=50e9,
    kv_bandwidth_bytes_s=36e9,
    flops=1010e9,
    float32_flops=470e9,
    attention_flops=260e9,
    row_elements_s=330e6,
    layer_overhead_s=75e-6,
    fast_dtypes=("float32", "bfloat16"),
)
"""Two cores of an AMD EPYC with AVX-512 BF16, as `gptj-dist plan --check` measured it."""

KNOWN_DEVICES: Mapping[str, DeviceSpec] = MappingProxyType(
    {
        device.name: device
        for device in (
            _gpu("h200", 141, 4800, 989, 67),
            _gpu("h100", 80, 3350, 989, 67),
            _gpu("a100-80", 80, 2039, 312, 19.5),
            _gpu("a100-40", 40, 1555, 312, 19.5),
            _gpu("v100", 16, 900, 125, 15.7, has_bfloat16=False),
            _gpu("l40s", 48, 864, 362, 91.6),
            _gpu("a10g", 24, 600, 70, 31.5),
            _gpu("l4", 24, 300, 121, 30.3),
            _gpu("t4", 16, 320, 65, 8.1, has_bfloat16=False),
            _gpu("rtx-4090", 24, 1008, 165, 82.6),
            _gpu("rtx-3090", 24, 936, 71, 35.6),
            _gpu("rtx-3060", 12, 360, 51, 12.7),
            _CPU,
        )
    }
)
"""By name. GPUs: the makers' data sheets, times the efficiencies above."""

_ALIASES = MappingProxyType({"a100-80g": "a100-80", "a100-80gb": "a100-80", "a100-40g": "a100-40", "a100": "a100-40"})
"""Other names of known devices, those of Ray's accelerator types among them. An A100 of unknown size is a small one."""

_MAKERS = ("nvidia-", "tesla-", "geforce-")
MAX_DEVICES = 256

_UNITS: Mapping[str, tuple[tuple[str, ...], float]] = MappingProxyType(
    {
        "memory_gb": (("memory_bytes",), 1e9),
        "bandwidth_gb_s": (("bandwidth_bytes_s", "kv_bandwidth_bytes_s"), 1e9),
        "tflops": (("flops", "attention_flops"), 1e12),
        "float32_tflops": (("float32_flops",), 1e12),
        "step_overhead_us": (("step_overhead_s",), 1e-6),
        "layer_overhead_us": (("layer_overhead_s",), 1e-6),
        "link_gb_s": (("link_bytes_s",), 1e9),
        "link_latency_us": (("link_latency_s",), 1e-6),
    }
)
"""A key of a description: the fields that it sets, and its unit in theirs."""

_MAY_BE_ZERO = ("step_overhead_us", "layer_overhead_us", "link_latency_us")
_LINK_KEYS = ("link_gb_s", "link_latency_us")
_OWN_FIGURES = ("kind", "memory_gb", "bandwidth_gb_s", "tflops")
"""What a device with an unknown name must bring."""


def parse_devices(description: object) -> tuple[DeviceSpec, ...]:
    """Devices from a parsed description, in its order.

    Args:
        description: `{"devices": [...]}`, optionally with `link_gb_s` and `link_latency_us` for all of them. A device
            is a known name, or a mapping: `name`, `count`, and figures, which replace the known ones. Given figures
            are used as they are, without an efficiency.

    Raises:
        ConfigurationError: says which device and which key is wrong, and the nearest that is right.
    """
    if not isinstance(description, Mapping) or not isinstance(description.get("devices"), list):
        raise ConfigurationError("a description of devices has a list named 'devices', of names or mappings")
    refuse_unknown_keys(map(str, description), ("devices", *_LINK_KEYS))
    links = {key: value for key, value in description.items() if key in _LINK_KEYS}
    devices = [
        device
        for index, entry in enumerate(description["devices"])
        for device in _parse_entry(entry, links, f"devices[{index}]")
    ]
    if not devices:
        raise ConfigurationError("the list 'devices' is empty")
    if len(devices) > MAX_DEVICES:
        raise ConfigurationError(f"the list 'devices' may describe {MAX_DEVICES} devices, got {len(devices)}")
    return tuple(devices)


def known_device(name: str) -> DeviceSpec:
    """The figures of a known device. Case, spaces and the maker's name do not matter.

    Raises:
        ConfigurationError: the name is not known; the message has the nearest one.
    """
    canonical = _canonical_name(name)
    try:
        refuse_unknown_keys([canonical], KNOWN_DEVICES)
    except ConfigurationError as error:
        reason = str(error).partition(": ")[2]
        raise ConfigurationError(
            f"no figures are known for device {name!r:.80}: {reason}; or give its own: {', '.join(_OWN_FIGURES)}"
        ) from None
    return KNOWN_DEVICES[canonical]


def gpus_of_node(resources: Mapping[str, float]) -> list[DeviceSpec]:
    """The GPUs of a node by the resources that Ray reports of it.

    Raises:
        ConfigurationError: their type is not reported, or has no known figures.
    """
    count = int(resources.get("GPU", 0))
    types = [key.partition(":")[2].lower() for key in resources if key.startswith("accelerator_type:")]
    if count and not types:
        raise ConfigurationError("a node has GPUs, but Ray does not say of which type: write a file for --devices")
    return [known_device(types[0])] * count if count else []


def _canonical_name(name: str) -> str:
    canonical = "-".join(name.lower().replace("_", " ").replace("-", " ").split())
    for maker in _MAKERS:
        canonical = canonical.removeprefix(maker)
    return _ALIASES.get(canonical, canonical)


def _parse_entry(entry: object, links: Mapping[str, Any], where: str) -> list[DeviceSpec]:
    if isinstance(entry, str):
        entry = {"name": entry}
    if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
        raise ConfigurationError(f"{where} must be a known name, or a mapping with a name")
    try:
        refuse_unknown_keys(map(str, entry), ("name", "count", "kind", *_UNITS))
    except ConfigurationError as error:
        raise ConfigurationError(f"{where} ({one_line(entry['name'])[:80]}): {error}") from None
    count = entry.get("count", 1)
    if type(count) is not int or not 1 <= count <= MAX_DEVICES:
        raise ConfigurationError(f"{where}: count must be a whole number from 1 to {MAX_DEVICES}, got {count!r:.80}")
    return [_with_figures(_base(entry, where), {**links, **entry}, where)] * count


def _base(entry: Mapping[str, Any], where: str) -> DeviceSpec:
    """The known device of that name; else a device without figures, all of which the entry gives."""
    kind = entry.get("kind")
    if isinstance(kind, str):
        kind = kind.lower()
    if kind not in (None, "cpu", "cuda"):
        raise ConfigurationError(f"{where}: kind must be cpu or cuda, got {kind!r:.80}")
    if _canonical_name(entry["name"]) in KNOWN_DEVICES or any(key not in entry for key in _OWN_FIGURES):
        known = known_device(entry["name"])
        if kind not in (None, known.kind):
            raise ConfigurationError(f"{where}: {known.name} is of kind {known.kind}, not {kind}")
        return known
    # Without a figure for float32, what tensor cores do is no guide; an eighth is between known devices.
    float32_flops = _number(entry, "tflops", where) * 1e12 / (8 if kind == "cuda" else 2)
    blank = _gpu(entry["name"], 0, 0, 0, 0) if kind == "cuda" else replace(_CPU, name=entry["name"])
    return replace(blank, kind=cast(DeviceKind, kind), float32_flops=float32_flops)


def _with_figures(device: DeviceSpec, entry: Mapping[str, Any], where: str) -> DeviceSpec:
    changes: dict[str, Any] = {}
    for key, (fields, unit) in _UNITS.items():
        if key in entry:
            changes |= dict.fromkeys(fields, _number(entry, key, where) * unit)
    return replace(device, **changes)


def _number(entry: Mapping[str, Any], key: str, where: str) -> float:
    value = entry[key]
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or value < 0 or (value == 0 and key not in _MAY_BE_ZERO):
        raise ConfigurationError(f"{where}: {key} must be a positive number, got {value!r:.80}")
    return float(value)
