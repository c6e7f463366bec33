"""Looks at the device that a stage was placed on: its name, its free memory, what it is good at."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Literal

import torch

from gptj_dist.config import DeviceKind, DTypeName
from gptj_dist.errors import ConfigurationError
from gptj_dist.stages.blueprint import DeviceReport

_CPU_BF16_FLAGS = ("avx512_bf16", "amx_bf16")
_CGROUP = Path("/sys/fs/cgroup")


def open_device(kind: DeviceKind) -> torch.device:
    """The torch device of a stage. Ray shows a stage only the GPU it was given, so that is number 0.

    Raises:
        ConfigurationError: a GPU is wanted where torch sees none.
    """
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(f"device is cuda, but torch {torch.__version__} sees no GPU on {socket.gethostname()}")
    return torch.device("cuda", 0) if kind == "cuda" else torch.device("cpu")


def local_device(choice: Literal["auto", "cpu", "cuda"]) -> tuple[DeviceKind, torch.device]:
    """This machine's device for stages that share one process.

    Raises:
        ConfigurationError: as `open_device`.
    """
    kind: DeviceKind = ("cuda" if torch.cuda.is_available() else "cpu") if choice == "auto" else choice
    return kind, open_device(kind)


def describe_device(device: torch.device) -> DeviceReport:
    """What the device is and is good at: bfloat16 wants compute capability 8.0, or AVX-512 BF16 or AMX on a CPU."""
    host, num_cores = socket.gethostname(), len(os.sched_getaffinity(0))
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        fast: tuple[DTypeName, ...] = ("float32", "float16")
        return DeviceReport(
            name=properties.name,
            memory_pool=f"{host}/{properties.uuid}",
            num_cores=num_cores,
            total_bytes=total_bytes(device),
            fast_dtypes=(*fast, "bfloat16") if properties.major >= 8 else fast,
        )
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    is_bf16_fast = any(flag in flags for flag in _CPU_BF16_FLAGS)
    fast = ("float32", "bfloat16") if is_bf16_fast else ("float32",)
    return DeviceReport("cpu", f"{host}/cpu", num_cores, total_bytes(device), fast)


def free_bytes(device: torch.device) -> int:
    """Memory that could be allocated now; on a CPU the least of the machine's and the container's."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    machine = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            machine = int(line.split()[1]) * 1024
    return min(machine, _container_free_bytes(machine))


def total_bytes(device: torch.device) -> int:
    """All memory of the device; on a CPU the lesser of the machine's and the container's."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _CGROUP / "memory.max"
    text = limit.read_text().strip() if limit.exists() else "max"
    return machine if text == "max" else min(machine, int(text))


def _container_free_bytes(otherwise: int) -> int:
    """What the cgroup's limit leaves, page cache not counted as used; `otherwise` where there is no limit."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except OSError:
        return otherwise
    return otherwise if limit == "max" else int(limit) - used + int(stat["inactive_file"])
