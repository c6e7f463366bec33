"""Compiles all kernels for heads of 256 as `paged_attention` launches them. The GPU need not be present.

    python -m tests.model.compile_kernels 90:bf16 75:fp16

Arguments are compute capabilities and types. Prints a JSON list for each. Needs Triton without its interpreter, so it
runs in a separate process.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gptj_dist.model import kernels
from gptj_dist.model.low_bit_kernels import multiply_low_bit
from gptj_dist.model.low_bit_triton import COLUMNS
from gptj_dist.model.paged_attention import Grain

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
NUMBERS = dict.fromkeys(("row_stride", "table_width", "num_rows", "num_columns", "depth"), "i32") | {"scale": "fp32"}
FLOAT32 = {"queries", "cos", "sin", "split_sums", "split_weights", "scales", "offsets"}
HEADS = {"HEADS": 16, "DIM": 256, "WIDTH": 256}
TRITONS_WARPS, TRITONS_STAGES = 4, 3
"""Triton's defaults."""


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel with its compile-time constants and options."""

    kernel: Any
    constants: dict[str, int]
    num_warps: int = TRITONS_WARPS
    num_stages: int = TRITONS_STAGES

    def compile(self, capability: int, dtype: str) -> dict[str, Any]:
        """The kernel's name, its shared memory in bytes, and whether it multiplies on tensor cores."""
        names = self.kernel.arg_names
        types = {name: self._type_of(name, dtype) for name in names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name][0] in "*i"}
        constants = {(names.index(name),): value for name, value in self.constants.items()}
        source = ASTSource(fn=self.kernel, signature=types, constexprs=constants, attrs=aligned)
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        return {
            "name": self.kernel.__name__,
            "shared_bytes": compiled.metadata.shared,
            "has_tensor_cores": "mma" in compiled.asm["ptx"],
        }

    def _type_of(self, name: str, dtype: str) -> str:
        if name in self.constants:
            return "constexpr"
        if name == "values" and "BITS" in self.constants:
            return "*i8" if self.constants["BITS"] == 8 else "*u8"
        if name in {"heads", "keys", "values", "out", "x", "bias"}:
            return f"*{dtype}"
        return NUMBERS.get(name, "*fp32" if name in FLOAT32 else "*i32")


def launches(grain: Grain) -> list[Launch]:
    """The launches of all kernels: of `attend_row` with and without splits, of products of one row and of many."""
    row = {**HEADS, "BLOCK": 16, "TILE": grain.lone_tile_keys}
    tile = {**HEADS, "BLOCK": 16, "ROWS": grain.tile_rows, "TILE": grain.tile_keys}
    product = {"HAS_OFFSETS": 0, "HAS_BIAS": 1, "COLUMNS": COLUMNS}
    return [
        *(
            Launch(multiply_low_bit, {**product, "BITS": bits, "TILES": 1, "TILE": tile, "ROWS": rows})
            for bits, tile in ((8, 128), (4, 64))
            for rows in (1, 64)
        ),
        Launch(kernels.store_heads, {**HEADS, "PAIRS": 32, "BLOCK": 16}, num_warps=1),
        Launch(kernels.attend_row, {**row, "SPLITS": 1}),
        Launch(kernels.attend_row, {**row, "SPLITS": 32}),
        Launch(kernels.join_splits, {**HEADS, "SPLITS": 32}),
        Launch(kernels.attend_tile, tile, grain.tile_warps, grain.tile_stages),
    ]


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        number, _, name = argument.partition(":")
        capability = int(number)
        grain = Grain.of_gpu(132, capability // 10, DTYPES[name], 256)
        print(json.dumps([launch.compile(capability, name) for launch in launches(grain)]))
