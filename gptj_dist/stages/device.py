"""Describes the device that a stage runs on: name, memory, cores, and the types that it computes fast."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import torch

from gptj_dist.config import DeviceChoice, DeviceKind, DTypeName
from gptj_dist.errors import ConfigurationError
from gptj_dist.model.arithmetic import kernels, vectors
from gptj_dist.stages.blueprint import DeviceReport
from gptj_dist.stages.container import free_memory_bytes, memory_limit_bytes
from gptj_dist.stages.cores import available_cores

_CPU_BF16_FLAGS = ("avx512_bf16", "amx_bf16")


def open_device(kind: DeviceKind) -> torch.device:
    """Return the torch device of a stage. Ray shows a stage only its own GPU, so that is number 0.

    Raises:
        ConfigurationError: `kind` is cuda and torch finds no GPU.
    """
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(f"device is cuda, but torch {torch.__version__} sees no GPU on {socket.gethostname()}")
    return torch.device("cuda", 0) if kind == "cuda" else torch.device("cpu")


def local_device(choice: DeviceChoice) -> tuple[DeviceKind, torch.device]:
    """Return this machine's device for stages that share one process; `auto` takes a GPU if torch finds one.

    Raises:
        ConfigurationError: `choice` is cuda and torch finds no GPU.
    """
    kind: DeviceKind = ("cuda" if torch.cuda.is_available() else "cpu") if choice == "auto" else choice
    return kind, open_device(kind)


def describe_device(device: torch.device) -> DeviceReport:
    """Describe the device. bfloat16 is fast from compute capability 8.0 on, and on CPUs with AVX-512 BF16 or AMX."""
    fast: list[DTypeName] = ["float32"]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, pool = properties.name, str(properties.uuid)
        fast += ["float16", "bfloat16"] if properties.major >= 8 else ["float16"]
    else:
        name = pool = "cpu"
        flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        fast += ["bfloat16"] if any(flag in flags for flag in _CPU_BF16_FLAGS) else []
    return DeviceReport(
        name=name,
        memory_pool=f"{socket.gethostname()}/{pool}",
        num_cores=available_cores(),
        total_bytes=total_bytes(device),
        fast_dtypes=tuple(fast),
        kernels=kernels(device),
        vectors=vectors(device),
    )


def free_bytes(device: torch.device) -> int:
    """Memory that could be allocated now, in bytes; on a CPU the lesser of the machine's and the container's."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    machine = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            machine = int(line.split()[1]) * 1024
    container = free_memory_bytes()
    return machine if container is None else min(machine, container)


def total_bytes(device: torch.device) -> int:
    """All memory of the device, in bytes; on a CPU the lesser of the machine's and the container's."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    container = memory_limit_bytes()
    return machine if container is None else min(machine, container)
