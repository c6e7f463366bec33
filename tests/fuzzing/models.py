"""A tiny GPT-J in every form that can be read, and the places to damage in each file."""

from __future__ import annotations

import io
import json
import pickletools
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

import tokenizers
import torch
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, pre_tokenizers

from gptj_dist.checkpoint.synthetic import write_checkpoint
from gptj_dist.config import ModelConfig
from gptj_dist.model.quantized import quantize
from gptj_dist.quantization import scale_name
from tests.fuzzing.forgeries import forge_safetensors, forge_torch_file
from tests.fuzzing.mutations import Target, damage
from tests.layout_files import CASES, Case, gptq, write_case

CONFIG = ModelConfig(8, 2, 8, 2, 4, 16, 8, (0,))
_GPTQ = {"bits": 4, "group_size": 8, "desc_act": False, "sym": False, "quant_method": "gptq"}
_SHARD_BYTES = 1500

Spoil = Callable[[Random], bytes]


@dataclass(frozen=True)
class Victim:
    """A file of a complete checkpoint, and how to damage it.

    Args:
        good: its content.
        spoil: returns damaged content.
        weight: relative frequency of the file in random choices.
    """

    path: Path
    good: bytes
    spoil: Spoil
    weight: int


def write_models(root: Path) -> list[Victim]:
    """Writes the model in all forms below `root`, each into its own directory."""
    whole, sharded = root / "safetensors", root / "shards"
    write_checkpoint(whole, CONFIG)
    write_checkpoint(sharded, CONFIG, max_shard_bytes=_SHARD_BYTES)
    state = load_file(whole / "model.safetensors")
    masks = {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 8, 8).bool() for layer in range(2)}
    turned = {name: t.T.contiguous().T if t.dim() == 2 else t for name, t in state.items()}
    for form, content in (("zip", {**turned, **masks}), ("plain zip", state)):
        (root / form).mkdir()
        (root / form / "config.json").write_bytes((whole / "config.json").read_bytes())
        torch.save(content, root / form / "pytorch_model.bin")
    _write_pickled_shards(root / "bin shards", state, (whole / "config.json").read_bytes())
    _write_quantized(root / "int8", state, (whole / "config.json").read_bytes())
    write_case(root / "gptq", Case(gptq(4, 8), {"quantization_config": _GPTQ}), CONFIG)
    write_case(root / "ggml", CASES["GGML f16"], CONFIG)
    write_tokenizers(root / "tokenizer", root / "vocabulary")
    return [_victim(path) for path in sorted(root.rglob("*")) if path.is_file()] + [
        Victim(whole / "model.safetensors", (whole / "model.safetensors").read_bytes(), _forger(forge_safetensors), 30),
        *(
            Victim(root / form / "pytorch_model.bin", (root / form / "pytorch_model.bin").read_bytes(), forge, 40)
            for form, forge in (("plain zip", _forger(forge_torch_file)),)
        ),
    ]


def _forger(forge: Callable[[ModelConfig, Random], bytes]) -> Spoil:
    return partial(forge, CONFIG)


def _write_pickled_shards(directory: Path, state: dict[str, torch.Tensor], config: bytes) -> None:
    directory.mkdir()
    (directory / "config.json").write_bytes(config)
    names = sorted(state)
    parts = {"a.bin": names[:12], "b.bin": names[12:]}
    for file, part in parts.items():
        torch.save({name: state[name] for name in part}, directory / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _write_quantized(directory: Path, state: dict[str, torch.Tensor], config: bytes) -> None:
    """The model in 8 bits, as `convert` writes it."""
    directory.mkdir()
    stored = {"quant_method": "gptj-dist", "bits": 8, "group_size": None}
    (directory / "config.json").write_text(json.dumps({**json.loads(config), "quantization_config": stored}))
    matrices = {name: quantize(tensor, 8) for name, tensor in state.items() if tensor.dim() == 2}
    values = {name: matrix.values for name, matrix in matrices.items()}
    scales = {scale_name(name): matrix.scales for name, matrix in matrices.items()}
    save_file({**state, **values, **scales}, directory / "model.safetensors")


def write_tokenizers(whole: Path, parts: Path) -> None:
    """Writes a tokenizer as `tokenizer.json` into one directory, and as a vocabulary and merges into another."""
    vocab = {name: id for id, name in enumerate(["a", "b", "c", "Ġ", "ab", "abc", "<|endoftext|>"])}
    bpe = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b"), ("ab", "c")]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(["<|endoftext|>"])
    whole.mkdir()
    parts.mkdir()
    bpe.save(str(whole / "tokenizer.json"), pretty=False)
    (parts / "vocab.json").write_text(json.dumps(vocab))
    (parts / "merges.txt").write_text("#version: 0.2\na b\nab c\n")
    (parts / "added_tokens.json").write_text('{"<|extratoken_1|>": 7, "<|extratoken_2|>": 8}')
    (parts / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|endoftext|>"}, "pad_token": "[PAD]"}')
    token = {"content": "[PAD]", "lstrip": True, "rstrip": False, "single_word": False, "special": True}
    config = {
        "added_tokens_decoder": {"7": token},
        "pad_token": "[PAD]",
        "add_prefix_space": True,
        "add_bos_token": True,
    }
    (whole / "tokenizer_config.json").write_text(json.dumps(config))


def _victim(path: Path) -> Victim:
    data = path.read_bytes()
    if data.startswith(b"PK"):
        target = _zip_target(data)
    elif path.suffix == ".safetensors":
        header_bytes = int.from_bytes(data[:8], "little")
        target = Target(data, [(0, 8), (8, header_bytes)], fields=[(0, 8)], is_text=True)
    else:
        target = Target(data, [(0, len(data))], is_text=path.suffix == ".json")
    weight = {".bin": 30, ".safetensors": 12}.get(path.suffix, 6)
    return Victim(path, data, partial(damage, target), weight)


def _zip_target(data: bytes) -> Target:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries, directory = archive.infolist(), archive.start_dir
    fields, at = (
        [(len(data) - offset, width) for offset, width in ((14, 2), (12, 2), (10, 4), (6, 4), (2, 2))],
        directory,
    )
    for _ in entries:
        fields += [
            (at + offset, width) for offset, width in ((8, 2), (10, 2), (20, 4), (24, 4), (28, 2), (30, 2), (42, 4))
        ]
        at += 46 + sum(struct.unpack("<3H", data[at + 28 : at + 34]))
    fields += [(entry.header_offset + offset, 2) for entry in entries for offset in (26, 28)]
    start, size = next(
        (entry.header_offset + 30 + sum(struct.unpack_from("<2H", data, entry.header_offset + 26)), entry.file_size)
        for entry in entries
        if entry.filename.endswith("data.pkl")
    )
    opcodes, lengths = _instructions(data, start)
    return Target(data, [(start, size), (directory, len(data) - directory), (0, 64)], fields + lengths, opcodes)


def _instructions(data: bytes, start: int) -> tuple[list[int], list[tuple[int, int]]]:
    """Offsets of a pickle's instructions; offsets and widths of the numbers and lengths after some of them."""
    widths = {"BINUNICODE": 4, "BININT": 4, "BININT1": 1, "BININT2": 2, "BINPUT": 1, "BINGET": 1, "LONG1": 1}
    found = [(opcode.name, start + at) for opcode, _, at in pickletools.genops(data[start:]) if at is not None]
    return [at for _, at in found], [(at + 1, widths[name]) for name, at in found if name in widths]
