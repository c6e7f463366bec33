"""Random checkpoints in the layouts of other tools, and what their bits stand for by a few lines for each layout.

The readers here follow the tools' own, a step at a time, and share nothing with `gptj_dist`.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from gptj_dist.checkpoint.index import WTE, plain_tensors
from gptj_dist.checkpoint.synthetic import hf_config
from gptj_dist.config import LayerRange, ModelConfig
from gptj_dist.text.vocabulary import write_tokenizer

CONFIG = ModelConfig(
    vocab_size=264, num_layers=2, d_model=64, num_heads=2, rotary_dim=8, d_ff=192, context_length=64,
    eos_token_ids=(263,), bos_token_id=263,
)  # fmt: skip
STD = 0.08

Made = tuple[dict[str, Tensor], Tensor]
"""The tensors that a matrix becomes in a file, and the numbers that they stand for."""

Maker = Callable[[str, int, int], Made]
"""Makes a matrix, by the name of its weight, rows and columns."""


@dataclass(frozen=True)
class Case:
    """A layout.

    Args:
        make: a matrix.
        fields: of `config.json`.
        file: of the weights.
        texts: other files.
        is_whole: the embedding and the head are quantised too.
        is_kept: our weights have the same bits.
    """

    make: Maker
    fields: Mapping[str, Any] = field(default_factory=dict)
    file: str = "model.safetensors"
    texts: Mapping[str, Any] = field(default_factory=dict)
    is_whole: bool = False
    is_kept: bool = True


def write_case(directory: Path, case: Case, config: ModelConfig = CONFIG) -> dict[str, Tensor]:
    """Writes a checkpoint and returns its numbers, float32, by name."""
    torch.manual_seed(5)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(hf_config(config) | dict(case.fields)))
    for name, content in case.texts.items():
        (directory / name).write_text(json.dumps(content))
    if config.vocab_size == CONFIG.vocab_size:
        write_tokenizer(directory, config.vocab_size)
    stored: dict[str, Tensor] = {}
    numbers = {}
    for name, shape in plain_tensors(config, LayerRange.whole(config.num_layers)).items():
        is_matrix = len(shape) == 2 and (case.is_whole or name not in (WTE, "lm_head.weight"))
        tensors, numbers[name] = case.make(name, *shape) if is_matrix else _plain(name, shape)
        stored |= tensors
    write_weights(directory / case.file, stored)
    return numbers


def write_weights(path: Path, tensors: dict[str, Tensor]) -> None:
    """In the form that the name of the file says."""
    if "ggml" in path.name or "ggjt" in path.name:
        path.write_bytes(ggml_bytes(tensors, path.stem))
    elif path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    else:
        torch.save(tensors, path)


def _plain(name: str, shape: tuple[int, ...]) -> Made:
    values = torch.randn(shape) * STD + (1 if ".ln_" in name and name.endswith("weight") else 0)
    return {name: values}, values


# GPTQ, AWQ and compressed-tensors: words of codes


def _random_groups(rows: int, columns: int, bits: int, group: int, zeros: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [rows, columns], zeros and scales [rows, groups]."""
    num_groups = math.ceil(columns / group)
    codes = torch.randint(0, 1 << bits, (rows, columns))
    middle = 1 << (bits - 1)
    points = torch.randint(1, 1 << bits, (rows, num_groups)) if zeros else torch.full((rows, num_groups), middle)
    scales = (torch.rand(rows, num_groups) + 0.5) * 4 * STD / (1 << bits)
    return codes, points, scales.half()


def _words(codes: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Codes [n, m] -> int32 [n, m * bits / 32], as the tools' loops pack them."""
    per_word = 32 // bits
    out = torch.zeros(len(codes), codes.shape[1] // per_word, dtype=torch.int64)
    for i in range(per_word):
        out |= codes[:, (order or range(per_word))[i] :: per_word] << (bits * i)
    return (out - ((out >> 31) << 32)).to(torch.int32)


def _codes(words: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """The inverse of `_words`."""
    per_word = 32 // bits
    out = torch.zeros(len(words), words.shape[1] * per_word, dtype=torch.int64)
    for i in range(per_word):
        out[:, (order or range(per_word))[i] :: per_word] = (words.long() >> (bits * i)) & ((1 << bits) - 1)
    return out


def gptq(bits: int, group: int | None, zeros: bool = True, shift: int = 1, g_idx: bool = True) -> Maker:
    """Args: shift: what files of this version add to a zero when they are read."""

    def make(name: str, rows: int, columns: int) -> Made:
        size = group or columns
        codes, points, scales = _random_groups(rows, columns, bits, size, zeros)
        group_of = torch.arange(columns) // size
        beginning = name.removesuffix("weight")
        tensors = {
            f"{beginning}qweight": _words(codes, bits).t(),
            f"{beginning}qzeros": _words(points.t() - shift, bits),
            f"{beginning}scales": scales.t(),
            f"{beginning}g_idx": group_of.int(),
        }
        numbers = read_gptq(tensors, name, bits, size, shift)
        if not g_idx:
            del tensors[f"{beginning}g_idx"]
        return tensors, numbers

    return make


def read_gptq(tensors: Mapping[str, Tensor], name: str, bits: int, group: int, shift: int = 1) -> Tensor:
    """As AutoGPTQ's plain forward does it."""
    words, zeros, scales = (tensors[name.removesuffix("weight") + part] for part in ("qweight", "qzeros", "scales"))
    weight = _codes(words.t(), bits).t()
    group_of = torch.arange(len(weight)) // group
    return (scales.float()[group_of] * (weight - (_codes(zeros, bits) + shift)[group_of])).t()


def awq(group: int, zeros: bool = True) -> Maker:
    order = (0, 2, 4, 6, 1, 3, 5, 7)

    def make(name: str, rows: int, columns: int) -> Made:
        codes, points, scales = _random_groups(rows, columns, 4, group, zeros)
        beginning = name.removesuffix("weight")
        tensors = {
            f"{beginning}qweight": _words(codes.t(), 4, order),
            f"{beginning}qzeros": _words(points.t(), 4, order),
            f"{beginning}scales": scales.t(),
        }
        weight, zero = (_codes(tensors[f"{beginning}{part}"], 4, order) for part in ("qweight", "qzeros"))
        group_of = torch.arange(columns) // group
        return tensors, ((weight - zero[group_of]) * scales.t().float()[group_of]).t()

    return make


def compressed(bits: int, group: int | None, zeros: bool = False) -> Maker:
    def make(name: str, rows: int, columns: int) -> Made:
        size = group or columns
        codes, points, scales = _random_groups(rows, columns, bits, size, zeros)
        tensors = {
            f"{name}_packed": _words(codes, bits),
            f"{name}_scale": scales.bfloat16(),
            f"{name}_shape": torch.tensor([rows, columns]),
        }
        if zeros:
            tensors[f"{name}_zero_point"] = _words(points.t(), bits).t()
        half, group_of = 1 << (bits - 1), torch.arange(columns) // size
        zero = _codes(tensors[f"{name}_zero_point"].t(), bits).t() - half if zeros else torch.zeros_like(points)
        weight = _codes(tensors[f"{name}_packed"], bits) - half
        return tensors, (weight - zero[:, group_of]) * scales.bfloat16().float()[:, group_of]

    return make


# bitsandbytes


def code_book(name: str, rows: int, columns: int) -> Made:
    """That of 2021: `dequantize_blockwise` of bitsandbytes, with blocks of 4096 numbers."""
    indices = torch.randint(0, 256, (rows, columns)).to(torch.uint8)
    book = torch.linspace(-1, 1, 256).pow(3)
    factors = torch.rand(math.ceil(rows * columns / 4096)) * STD + STD
    beginning = name.removesuffix("weight")
    flat = book[indices.flatten().long()] * factors.repeat_interleave(4096)[: rows * columns]
    return {name: indices, f"{beginning}absmax": factors, f"{beginning}code": book}, flat.view(rows, columns)


def row_int8(name: str, rows: int, columns: int) -> Made:
    """That of transformers' `load_in_8bit`."""
    weight = torch.randint(-127, 128, (rows, columns)).to(torch.int8)
    largest = torch.rand(rows) * STD + STD
    beginning = name.removesuffix("weight")
    tensors = {name: weight, f"{beginning}SCB": largest, f"{beginning}weight_format": torch.tensor(0).to(torch.uint8)}
    return tensors, weight.float() * largest[:, None] / 127


# GGML


_FORMS = {"f16": 1, "q40": 2, "q41": 3, "q50": 6, "q51": 7, "q80": 8}


class Blocks(Tensor):
    """Bytes of blocks, which a file says the shape of numbers about."""

    code: int
    columns: int


def ggml(form: str, version: int) -> Maker:
    """Args: form: a key of `_FORMS`; version: of the blocks."""

    def make(name: str, rows: int, columns: int) -> Made:
        if form == "f16":
            values = (torch.randn(rows, columns) * STD).half()
            return {name: values}, values.float()
        blocks = [_block(form, version) for _ in range(rows * columns // 32)]
        data = torch.frombuffer(bytearray(b"".join(block for block, _ in blocks)), dtype=torch.uint8)
        stored = data.view(rows, -1).as_subclass(Blocks)
        stored.code, stored.columns = _FORMS[form], columns
        return {name: stored}, torch.tensor([number for _, part in blocks for number in part]).view(rows, columns)

    return make


def _block(form: str, version: int) -> tuple[bytes, list[float]]:
    """32 numbers, as `dequantize_row_*` of ggml computes them."""
    short = version == 2 or form in ("q50", "q51")
    scale, least = (torch.rand(2) * 0.02).half().tolist()
    floats = struct.pack("<2e" if short else "<2f", scale, least)
    floats = floats if form in ("q41", "q51") else floats[: len(floats) // 2]
    if form == "q80":
        numbers = torch.randint(-127, 128, (32,)).tolist()
        return floats + struct.pack("32b", *numbers), [scale * n for n in numbers]
    data = torch.randint(0, 256, (16,)).tolist()
    fifths = int(torch.randint(0, 1 << 32, (1,)))
    if version == 0:
        codes = [half for byte in data for half in (byte & 15, byte >> 4)]
    else:
        codes = [byte & 15 for byte in data] + [byte >> 4 for byte in data]
    middle = b""
    if form in ("q50", "q51"):
        codes = [code | (fifths >> j & 1) << 4 for j, code in enumerate(codes)]
        middle = struct.pack("<I", fifths)
    zero = {"q40": 8, "q50": 16}.get(form, 0)
    return floats + middle + bytes(data), [(c - zero) * scale + (0 if zero else least) for c in codes]


def ggml_bytes(tensors: Mapping[str, Tensor], stem: str) -> bytes:
    """A file: its stem ends with the version of its blocks, and names its container."""
    version, aligned = int(stem[-1]), "ggjt" in stem
    code = max((tensor.code for tensor in tensors.values() if isinstance(tensor, Blocks)), default=1)
    out = bytearray(b"tjgg" + struct.pack("<i", version + 1) if aligned else b"lmgg")
    out += struct.pack("<7i", CONFIG.vocab_size, 64, CONFIG.d_model, 2, 2, 8, code + 1000 * version)
    out += struct.pack("<i", CONFIG.vocab_size)
    for token in range(CONFIG.vocab_size):
        word = f"w{token}".encode()
        out += struct.pack("<i", len(word)) + word + (struct.pack("<f", 0.0) if aligned else b"")
    for name, tensor in tensors.items():
        shape, kind = list(tensor.shape), 1 if tensor.dtype == torch.float16 else 0
        if isinstance(tensor, Blocks):
            shape, kind = [len(tensor), tensor.columns], tensor.code
        out += struct.pack("<3i", len(shape), len(name), kind) + struct.pack(f"<{len(shape)}i", *reversed(shape))
        out += name.encode()
        out += bytes(-len(out) % 32) if aligned else b""
        out += tensor.as_subclass(Tensor).contiguous().numpy().tobytes()
    return bytes(out)


_AUTO_GPTQ = {"bits": 4, "group_size": 32, "desc_act": False, "sym": False, "quant_method": "gptq"}
_COMPRESSED: dict[str, Any] = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}


def _scheme(**changes: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": _COMPRESSED | changes}}
    return {
        "quantization_config": {
            "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
            "config_groups": groups,
        }
    }  # fmt: skip


CASES: Mapping[str, Case] = {
    "GPTQ": Case(gptq(4, 32), {"quantization_config": _AUTO_GPTQ}),
    "GPTQ of 8 bits": Case(gptq(8, 32), {"quantization_config": _AUTO_GPTQ | {"bits": 8}}),
    "GPTQ without zeros": Case(gptq(4, 64, zeros=False), texts={
        "quantize_config.json": {"bits": 4, "group_size": 64, "desc_act": False, "sym": True}}),
    "GPTQ, rows": Case(gptq(4, None), {"quantization_config": _AUTO_GPTQ | {"group_size": -1}}),
    "GPTQ, version 2": Case(
        gptq(4, 32, shift=0), {"quantization_config": _AUTO_GPTQ | {"checkpoint_format": "gptq_v2"}}),
    "GPTQ, odd groups": Case(
        gptq(4, 128), {"quantization_config": _AUTO_GPTQ | {"group_size": 128}}, is_kept=False),
    "GPTQ-for-LLaMa": Case(gptq(4, 64, g_idx=False), file="pygmalion-6b-4bit-64g.safetensors"),
    "GPTQ-for-LLaMa, pickled": Case(gptq(4, None, g_idx=False), file="gpt-j-6b-4bit.pt"),
    "AutoRound": Case(gptq(4, 32, zeros=False), {"quantization_config": _AUTO_GPTQ | {
        "quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "sym": True}}),
    "AWQ": Case(awq(32), {"quantization_config": {
        "quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}}),
    "AWQ without zeros": Case(awq(64, zeros=False), texts={
        "quant_config.json": {"w_bit": 4, "q_group_size": 64, "zero_point": False, "version": "GEMM"}}),
    "compressed-tensors": Case(compressed(4, 32), _scheme()),
    "compressed-tensors, zeros": Case(compressed(4, 64, True), _scheme(group_size=64, symmetric=False)),
    "compressed-tensors, rows of 8 bits": Case(
        compressed(8, None), _scheme(num_bits=8, strategy="channel", group_size=None)),
    "bitsandbytes of 2021": Case(
        code_book, {"eight_bit": True}, "pytorch_model.bin", is_whole=True, is_kept=False),
    "load_in_8bit": Case(row_int8, {"quantization_config": {"load_in_8bit": True, "llm_int8_threshold": 6.0}}),
    "GGML f16": Case(ggml("f16", 0), file="ggml-model-f16-0.bin", is_whole=True),
    "GGML q4_0": Case(ggml("q40", 0), file="ggml-model-q4_0-0.bin", is_whole=True),
    "GGML q4_0, version 1": Case(ggml("q40", 1), file="ggml-model-q4_0-1.bin", is_whole=True),
    "GGML q4_0, ggjt": Case(ggml("q40", 2), file="gpt-j-q4_0-ggjt-2.bin", is_whole=True),
    "GGML q4_1": Case(ggml("q41", 2), file="ggml-model-q4_1-2.bin", is_whole=True),
    "GGML q5_0": Case(ggml("q50", 2), file="ggml-model-q5_0-2.bin", is_whole=True),
    "GGML q5_1, ggjt": Case(ggml("q51", 2), file="gpt-j-q5_1-ggjt-2.bin", is_whole=True),
    "GGML q8_0": Case(ggml("q80", 2), file="ggml-model-q8_0-2.bin", is_whole=True),
}  # fmt: skip
