"""Recognises the layout of a checkpoint's quantised weights, by JSON, file names and the headers of GGML files."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from gptj_dist.checkpoint.files import QUANTIZE_FILES
from gptj_dist.checkpoint.headers import printable, read_json
from gptj_dist.checkpoint.layouts.awq import AwqLayout
from gptj_dist.checkpoint.layouts.base import GroupedLayout, Layout
from gptj_dist.checkpoint.layouts.bitsandbytes import CodeBookLayout, RowInt8Layout
from gptj_dist.checkpoint.layouts.compressed import CompressedLayout
from gptj_dist.checkpoint.layouts.ggml import GgmlLayout
from gptj_dist.checkpoint.layouts.ggml_file import is_ggml, read_ggml
from gptj_dist.checkpoint.layouts.gptq import ORDERED, GptqLayout
from gptj_dist.errors import CheckpointError
from gptj_dist.quantization import QUANT_METHOD, WHOLE_ROW, Bits

_ORIGINAL = "use the original checkpoint, with --quantize int8 or int4"

_GPTQ_NAME = re.compile(r"(?:^|[-_.])(\d)bits?(?:[-_](\d{1,5})g)?(?=[-_.])")
"""What a file name says that GPTQ-for-LLaMa wrote: bits and group."""

_GGML_SUFFIXES = (".bin", ".ggml", ".ggjt")
_MAX_GROUP = 1 << 20


def other_weights(directory: Path) -> str | None:
    """The one file of weights that has a name of its own, as GPTQ and GGML files have; None if there is none.

    Raises:
        CheckpointError: there are several, such as one for each number of bits.
    """
    try:
        paths = sorted(path for path in directory.iterdir() if path.is_file())
    except OSError:
        return None
    found = [
        path.name for path in paths if is_gptq_name(path.name) or (path.suffix in _GGML_SUFFIXES and is_ggml_file(path))
    ]
    if len(found) > 1:
        raise CheckpointError(
            f"{directory} holds several models, {', '.join(map(printable, found[:8]))}: leave one of them there"
        )
    return found[0] if found else None


def layout_of(directory: Path, fields: Mapping[str, Any], file: str | None, widths: Collection[int]) -> Layout | None:
    """The layout of the quantised weights; None if they are not quantised, or by gptj-dist.

    Args:
        fields: of `config.json`.
        file: the one file of weights, if it has a name of its own.
        widths: columns of the model's matrices.

    Raises:
        CheckpointError: they are quantised in a way that is not read.
    """
    layout = _layout(directory, fields, file)
    if isinstance(layout, GroupedLayout):
        layout.choose_fate(widths)
    return layout


def _layout(directory: Path, fields: Mapping[str, Any], file: str | None) -> Layout | None:
    method = fields.get("quantization_config")
    if isinstance(method, dict) and method.get("quant_method") != QUANT_METHOD:
        return _by_config(method)
    for name in QUANTIZE_FILES:
        if (directory / name).is_file():
            method = read_json(directory / name)
            return _gptq(method) if name == QUANTIZE_FILES[0] else _awq(method)
    if fields.get("eight_bit") is True:
        return CodeBookLayout()
    if file is None:
        return None
    if is_gptq_name(file):
        return _by_name(file)
    if not is_ggml_file(directory / file):
        return None
    with (directory / file).open("rb") as opened:
        content = read_ggml(directory / file, opened)
    codes = set(content.types.values())
    if len(codes) > 1:
        raise CheckpointError(f"{directory / file} has matrices of several types of GGML: {_ORIGINAL}")
    has = [any(name.endswith(f"{part}.weight") for name in content.types) for part in ("wte", "lm_head")]
    return GgmlLayout(codes.pop(), content.version, *has) if codes else None


def _by_config(method: Mapping[str, Any]) -> Layout:
    name = str(method.get("quant_method", "bitsandbytes" if "load_in_8bit" in method else "")).lower()
    packing = str(method.get("packing_format") or method.get("backend") or "")
    if name.endswith("auto-round"):
        name = "awq" if "awq" in packing else "gptq" if "gptq" in packing else f"AutoRound in its form {packing}"
    if name == "gptq":
        return _gptq(method)
    if name == "awq":
        return _awq(method)
    if name == "compressed-tensors":
        return _compressed(method)
    if name == "bitsandbytes":
        if method.get("load_in_8bit") is True:
            return RowInt8Layout()
        raise CheckpointError(f"the weights are bitsandbytes' 4 bits, which gptj-dist does not read: {_ORIGINAL}")
    raise CheckpointError(f"the weights are quantised by {printable(name)}, which gptj-dist does not read: {_ORIGINAL}")


def _gptq(method: Mapping[str, Any]) -> Layout:
    if method.get("desc_act") is True:
        raise CheckpointError(f"the checkpoint {ORDERED}")
    form = str(method.get("checkpoint_format") or "gptq")
    if form not in ("gptq", "gptq_v2") or method.get("dynamic") or method.get("is_marlin_format"):
        raise CheckpointError(f"this form of GPTQ, {printable(form)}, is not read by gptj-dist: {_ORIGINAL}")
    return GptqLayout(
        _bits("GPTQ", method.get("bits")),
        _group(method.get("group_size", WHOLE_ROW)),
        is_symmetric=method.get("sym") is True,
        zero_shift=1 if form == "gptq" else 0,
        has_head=method.get("lm_head") is True,
    )


def _awq(method: Mapping[str, Any]) -> Layout:
    if method.get("bits", method.get("w_bit", 4)) != 4 or str(method.get("version", "gemm")).lower() != "gemm":
        raise CheckpointError(f"of AWQ, gptj-dist reads 4 bits in the form gemm alone: {_ORIGINAL}")
    group = _group(method.get("group_size", method.get("q_group_size", 128)))
    return AwqLayout(group, has_zeros=method.get("zero_point", not method.get("sym", False)) is True)


def _compressed(method: Mapping[str, Any]) -> Layout:
    groups = method.get("config_groups")
    scheme = next(iter(groups.values())) if isinstance(groups, dict) and len(groups) == 1 else None
    weights = scheme.get("weights") if isinstance(scheme, dict) else None
    is_read = (
        isinstance(weights, dict)
        and method.get("format") == "pack-quantized"
        and weights.get("type", "int") == "int"
        and weights.get("strategy") in ("group", "channel")
    )
    if not isinstance(weights, dict) or not is_read:
        raise CheckpointError(
            f"of compressed-tensors, gptj-dist reads pack-quantized with one scheme for all layers alone: {_ORIGINAL}"
        )
    if weights.get("actorder") not in (None, False, "static", "weight"):
        raise CheckpointError(f"the checkpoint {ORDERED}")
    group = weights.get("group_size") if weights["strategy"] == "group" else WHOLE_ROW
    ignored = method.get("ignore")
    return CompressedLayout(
        _bits("compressed-tensors", weights.get("num_bits")),
        _group(group),
        has_zeros=weights.get("symmetric") is False,
        has_head=not isinstance(ignored, list) or "lm_head" not in ignored,
    )


def _by_name(file: str) -> Layout:
    found = _GPTQ_NAME.search(file)
    assert found is not None
    return GptqLayout(_bits("GPTQ", int(found[1])), _group(int(found[2]) if found[2] else WHOLE_ROW))


def _bits(method: str, bits: object) -> Bits:
    if bits == 4:
        return 4
    if bits == 8:
        return 8
    raise CheckpointError(f"{method} of {printable(str(bits))} bits is not read, only of 4 and 8: {_ORIGINAL}")


def _group(group: object) -> int:
    if group is None or group == WHOLE_ROW:
        return WHOLE_ROW
    if type(group) is not int or not 2 <= group <= _MAX_GROUP or group % 2:
        raise CheckpointError(f"the quantised weights have groups of {printable(str(group))} columns: {_ORIGINAL}")
    return group


def is_gptq_name(name: str) -> bool:
    """Whether a file has such a name as GPTQ-for-LLaMa gave it, with its bits."""
    return name.endswith((".safetensors", ".pt")) and _GPTQ_NAME.search(name) is not None


def is_ggml_file(path: Path) -> bool:
    """Whether a file begins as GGML's do."""
    try:
        with path.open("rb") as file:
            return is_ggml(file)
    except OSError:
        return False
