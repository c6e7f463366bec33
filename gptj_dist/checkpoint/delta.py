"""Makes an adapter of an edited checkpoint: what its layers' matrices have more than those of the base."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from gptj_dist.checkpoint.edits import WEIGHT_NAME
from gptj_dist.checkpoint.headers import listing
from gptj_dist.checkpoint.index import expected_tensors, read_model_config
from gptj_dist.checkpoint.loader import TORCH_DTYPES, StageTensors
from gptj_dist.checkpoint.writer import CODE_OF, write_safetensors
from gptj_dist.config import DTypeName, LayerRange
from gptj_dist.errors import CheckpointError, ConversionError

MAX_RANK = 512
"""Of a change. One of a higher rank is no edit: it takes as much memory as the matrix."""

PRECISION: Mapping[DTypeName, float] = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""The relative error of a number."""

NOISE = 2.0
"""How far the singular values of a change must be above those that rounding explains."""


def write_delta(base: Path, edited: Path, destination: Path) -> dict[str, int]:
    """Writes the difference of two checkpoints as edits; returns the rank of each changed weight.

    A change has as many columns as it has singular values above what rounding to the checkpoints' type can cause.

    Args:
        destination: a safetensors file, which must not exist.

    Raises:
        CheckpointError: the checkpoints are not of one model, differ in other tensors, are equal, or differ by more
            than edits do.
        ConversionError: the file cannot be written.
    """
    config = read_model_config(base)
    layers = LayerRange.whole(config.num_layers)
    if expected_tensors(config, layers) != expected_tensors(other := read_model_config(edited), layers):
        raise CheckpointError(f"{edited} has other layers or widths than {base}")
    dtype = max(config.dtype, other.dtype, key=PRECISION.__getitem__)
    coarse = TORCH_DTYPES[CODE_OF[dtype]]
    changes: dict[str, tuple[Tensor, Tensor]] = {}
    with StageTensors(base, config, layers) as before, StageTensors(edited, other, layers) as after:
        for name, shape in expected_tensors(config, layers).items():
            old, new = torch.empty(shape), torch.empty(shape)
            before.read(name, old)
            after.read(name, new)
            if torch.equal(old.to(coarse), new.to(coarse)):
                continue
            if re.fullmatch(WEIGHT_NAME, name) is None:
                raise CheckpointError(f"{edited} differs from {base} in {listing([name])}, which no edit changes")
            changes[name] = _factors(name, old, new, PRECISION[dtype])
    if not changes:
        raise CheckpointError(f"{edited} and {base} have the same weights")
    _write(destination, changes)
    return {name: left.shape[1] for name, (left, _) in changes.items()}


def _factors(name: str, old: Tensor, new: Tensor, precision: float) -> tuple[Tensor, Tensor]:
    """`left` [inputs, rank] and `right` [outputs, rank] of a change."""
    rows, columns = old.shape
    most = min(MAX_RANK + 1, rows, columns)
    torch.manual_seed(0)  # the factorisation is randomised
    u, s, v = torch.svd_lowrank(new - old, q=most, niter=4)
    noise = NOISE * precision * float(old.square().mean().sqrt()) * (math.sqrt(rows) + math.sqrt(columns))
    rank = int((s > noise).sum())
    if rank > MAX_RANK:
        raise CheckpointError(f"{name} differs by a matrix of a rank above {MAX_RANK}: that is no edit")
    rank = max(rank, 1)
    return (v[:, :rank] * s[:rank]).contiguous(), u[:, :rank].contiguous()


def _write(destination: Path, changes: dict[str, tuple[Tensor, Tensor]]) -> None:
    tensors = {
        f"{name}.{side}": t for name, two in changes.items() for side, t in zip(("left", "right"), two, strict=True)
    }
    layout = {name: ("F32", tuple(tensor.shape)) for name, tensor in tensors.items()}
    try:
        with destination.open("xb") as file:
            write_safetensors(file, layout, tensors.values())
    except FileExistsError:
        raise ConversionError(f"{destination} exists already") from None
    except OSError as error:
        raise ConversionError(f"{destination} cannot be written: {error.strerror or error}") from error
