"""How many bits the weights of each part of a model have. Stdlib only."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from gptj_dist.errors import ConfigurationError

Bits = Literal[4, 8]

INT4_GROUP = 64
"""Columns of a matrix of 4 bits that share a scale."""

QUANT_METHOD = "gptj-dist"
"""What `config.json` says of a checkpoint whose weights we quantised."""

MAX_LOW_BIT_ROWS = 64
"""Rows of a step up to which a GPU multiplies with the bits. For more, it makes numbers of them in its memory first."""

WHOLE_ROW = -1
"""The group of columns that share a scale, where that is a whole row."""

AUTO = "auto"
"""What leaves the choice of the bits to `plan --devices`."""

NONE = "none"
"""What makes numbers of the model's type of weights that another tool has quantised."""

BITS_OF: Mapping[str, Bits] = {"int4": 4, "int8": 8}


@dataclass(frozen=True, slots=True)
class Quantization:
    """The bits of a model's matrices; None for those that stay in the type of the model.

    `lm_head` and the embedding have 8 bits where the layers beside them have 4: they cost more quality than bytes.

    Args:
        layer_bits: of each layer.
        is_stored: the checkpoint holds the weights so. Else they are made so while they load.
        group: columns that share a scale in a checkpoint of another tool, or `WHOLE_ROW`; None for `default_group`.
        has_offsets: each group has an offset too.
        is_foreign: another tool wrote the checkpoint. Its weights can be made others while they load.
    """

    layer_bits: tuple[Bits | None, ...]
    embedding_bits: Bits | None
    head_bits: Bits | None
    is_stored: bool = False
    group: int | None = None
    has_offsets: bool = False
    is_foreign: bool = False

    @classmethod
    def of_stages(cls, num_layers: Sequence[int], bits: Sequence[Bits | None]) -> Quantization:
        """Of a model cut into stages.

        Args:
            num_layers: of each stage.
            bits: of each stage.
        """
        layers = [stage_bits for count, stage_bits in zip(num_layers, bits, strict=True) for _ in range(count)]
        return cls(tuple(layers), None if bits[0] is None else 8, None if bits[-1] is None else 8)

    def group_of(self, columns: int, bits: Bits) -> int:
        """Columns that share a scale in a matrix of that width."""
        if self.group is None:
            return default_group(columns, bits)
        return columns if self.group == WHOLE_ROW else self.group

    def name(self, start: int, stop: int) -> str | None:
        """The bits of the layers [start, stop), such as `int4`; None if they have the type of the model."""
        names = {f"int{bits}" if bits else "" for bits in self.layer_bits[start:stop]} - {""}
        return " and ".join(sorted(names)) or None


def weights_text(quantized: str | None, dtype: str) -> str:
    """`int4 in bfloat16`: the bits of the weights, and the type that they are multiplied in."""
    return dtype if quantized is None else f"{quantized} in {dtype}"


def scale_name(name: str) -> str:
    """The name of the scales in a checkpoint, by the name of the quantised matrix."""
    return f"{name}_scale"


def offset_name(name: str) -> str:
    """The name that the offsets of a quantised matrix are read by."""
    return f"{name}_offset"


def default_group(columns: int, bits: Bits) -> int:
    """Columns that share a scale: those of a whole row for 8 bits."""
    return columns if bits == 8 else INT4_GROUP


def parse_quantize(text: str) -> dict[range | None, Bits]:
    """Reads `int4`, or `0-1:int8,2:int4`: the bits of stages; None stands for all of them.

    Raises:
        ConfigurationError: it says something else.
    """
    if text in BITS_OF:
        return {None: BITS_OF[text]}
    bits_of: dict[range | None, Bits] = {}
    for part in text.split(","):
        found = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?:(\w{1,20})", part.strip())
        if found is None or found[3] not in BITS_OF:
            if "fp8" in part:
                raise ConfigurationError("quantize: fp8 is not served; int8 has as many bits, and loses less")
            raise ConfigurationError(
                f"quantize takes int8, int4, or the bits of stages, such as 0-1:int8,2:int4, not {text[:80]!r}"
            )
        first, last = int(found[1]), int(found[2] or found[1])
        stages = range(first, last + 1)
        if not stages or any(set(stages) & set(other or ()) for other in bits_of):
            raise ConfigurationError(
                f"quantize {text[:80]!r} names a stage twice, or a range that ends before it begins"
            )
        bits_of[stages] = BITS_OF[found[3]]
    return bits_of


def stage_bits(text: str, num_stages: int) -> tuple[Bits | None, ...]:
    """The bits of each stage; None for stages that the text does not name.

    Raises:
        ConfigurationError: as `parse_quantize`, or it names a stage that is not there.
    """
    bits: list[Bits | None] = [None] * num_stages
    for stages, value in parse_quantize(text).items():
        for stage in range(num_stages) if stages is None else stages:
            if stage >= num_stages:
                raise ConfigurationError(f"quantize names stage {stage}, but there are {num_stages}, from 0")
            bits[stage] = value
    return tuple(bits)
