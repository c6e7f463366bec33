"""Names the kernels and instructions that a float32 result depends on. Stages with equal names compute equal bits."""

from __future__ import annotations

import torch

from gptj_dist.model.native.library import load_library


def kernels(device: torch.device) -> str:
    """The kernels of attention on a device, such as `compiled attention`."""
    if device.type == "cuda":
        return "Triton attention"
    library = load_library()
    if library is None:
        return "torch's attention, as there is no compiled one"
    return "compiled attention" if library.has_fused() else "compiled attention without fused multiply-add"


def vectors(device: torch.device) -> str:
    """The version of torch and the instructions that it multiplies with, such as `torch 2.13.0 with AVX512`."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        instructions = f"compute capability {major}.{minor}"
    else:
        instructions = torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__.partition('+')[0]} with {instructions}"
