"""Reports what a checkpoint holds and what is unusual about it, from JSON and file headers alone. Stdlib only."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gptj_dist.checkpoint.files import CONFIG_FILE, GENERATION_FILE, SAFETENSORS, TOKENIZER_FILES, WEIGHT_FORMS
from gptj_dist.checkpoint.headers import STORED_DTYPES, TensorHeader, listing, printable, read_json
from gptj_dist.checkpoint.index import (
    LEGACY_BUFFERS,
    CheckpointIndex,
    canonical_name,
    expected_tensors,
    extra_tensors,
    read_layout,
    read_model_config,
    read_stored_header,
    stage_headers,
)
from gptj_dist.checkpoint.layouts.detect import is_ggml_file
from gptj_dist.config import LayerRange, ModelConfig
from gptj_dist.generation import unapplied_fields
from gptj_dist.sizes import bytes_text

_WEIGHT_SUFFIXES = {
    ".bin", ".safetensors", ".msgpack", ".h5", ".pt", ".pth", ".ckpt", ".onnx", ".ot", ".gguf", ".npz",
}  # fmt: skip
"""Of files that hold some model's weights, in forms that are read or not."""

_MAX_LISTED = 3

_DTYPE_NAMES = {**STORED_DTYPES, "I8": "int8", "U8": "int4"}
_FOREIGN_DTYPE_NAMES = {**STORED_DTYPES, **dict.fromkeys(("I8", "U8", "I32", "I64"), "quantised")}


@dataclass(frozen=True, slots=True)
class Inspection:
    """What the headers of a checkpoint say.

    Args:
        file_bytes: name -> size of each file of weights that is read.
        bytes_of_dtype: dtype -> bytes of the weights of that dtype, largest first.
        layer_bytes: of each layer, as stored.
        head_bytes: of the final LayerNorm and the head; without the embedding, if that is tied to it.
        oddities: what is unusual, a line each.
        is_ggml: the file of weights is one of GGML.
    """

    config: ModelConfig
    file_bytes: Mapping[str, int]
    num_parameters: int
    bytes_of_dtype: Mapping[str, int]
    embedding_bytes: int
    layer_bytes: Sequence[int]
    head_bytes: int
    oddities: Sequence[str]
    is_ggml: bool

    @property
    def form(self) -> str:
        """Of the files of weights."""
        if all(name.endswith(".safetensors") for name in self.file_bytes):
            return "safetensors"
        return "GGML" if self.is_ggml else "PyTorch's pickle"

    @property
    def num_bytes(self) -> int:
        """Of all files of weights."""
        return sum(self.file_bytes.values())


def inspect_checkpoint(directory: Path) -> Inspection:
    """Looks at a whole checkpoint.

    Raises:
        CheckpointError: it is broken, or not a GPT-J.
    """
    config = read_model_config(directory)
    index = CheckpointIndex(directory)
    whole = LayerRange.whole(config.num_layers)
    weights, layout = stage_headers(index, config, whole), read_layout(directory, config)
    unquantized = expected_tensors(replace(config, quantization=None), whole)
    stored = {file: read_stored_header(directory / file) for file in index.files(index.file_of)}
    layers = [_weight_bytes(weights, [f"transformer.h.{layer}."]) for layer in range(config.num_layers)]
    return Inspection(
        config=config,
        file_bytes={file: (directory / file).stat().st_size for file in stored},
        num_parameters=sum(
            math.prod(shape)
            for name, shape in unquantized.items()
            if name in weights or (layout is not None and layout.covers(name))
        ),
        bytes_of_dtype=_bytes_of_dtype(weights.values(), _DTYPE_NAMES if layout is None else _FOREIGN_DTYPE_NAMES),
        embedding_bytes=_weight_bytes(weights, ["transformer.wte."]),
        layer_bytes=layers,
        head_bytes=_weight_bytes(weights, ["transformer.ln_f.", "lm_head."]),
        oddities=[
            *([] if layout is None else [f"{layout.title}: {layout.fate}"]),
            *_odd_names(stored),
            *_extras(index, config),
            *_odd_dtypes(
                directory, {n: h for n, h in weights.items() if n in unquantized and h.dtype in STORED_DTYPES}
            ),
            *_odd_places(stored),
            *_odd_files(directory, stored),
        ],
        is_ggml=any(is_ggml_file(directory / file) for file in stored),
    )


def missing_files(directory: Path) -> list[str]:
    """The missing weight files of a checkpoint that was downloaded only in part."""
    if not any((directory / name).exists() for form in WEIGHT_FORMS for name in (form.single, form.index)):
        return [SAFETENSORS.single]
    index = CheckpointIndex(directory)
    return [file for file in index.files(index.file_of) if not (directory / file).exists()]


def _odd_names(stored: Mapping[str, Mapping[str, TensorHeader]]) -> Iterator[str]:
    headers = {name: header for tensors in stored.values() for name, header in tensors.items()}
    buffers = {name: header for name, header in headers.items() if name.endswith(LEGACY_BUFFERS)}
    if buffers:
        size = bytes_text(sum(header.num_bytes for header in buffers.values()))
        yield f"masks of old versions of transformers, {size}, which are passed over: {listing(buffers, _MAX_LISTED)}"
    if renamed := [name for name in headers if canonical_name(name) != name]:
        shown = [f"{name} as {canonical_name(name)}" for name in renamed]
        yield f"names that are not GPT-J's own are read as if they were: {listing(shown, _MAX_LISTED)}"


def _extras(index: CheckpointIndex, config: ModelConfig) -> Iterator[str]:
    if extras := extra_tensors(index, config):
        yield f"tensors that GPT-J does not have, which are skipped: {listing(extras, _MAX_LISTED)}"


def odd_generation(directory: Path, config: ModelConfig) -> Iterator[str]:
    """What is unusual about how the checkpoint wants texts to be made; looks at JSON alone."""
    path = directory / GENERATION_FILE
    file = GENERATION_FILE if path.exists() else CONFIG_FILE
    if unapplied := unapplied_fields(read_json(directory / file)):
        yield f"{file} asks for what is not applied: {listing(unapplied, _MAX_LISTED)}"
    if not config.eos_token_ids:
        yield "no eos_token_id: texts end at max_tokens, stop strings and stop tokens alone"


def _odd_dtypes(directory: Path, weights: Mapping[str, TensorHeader]) -> Iterator[str]:
    names_of: dict[str, list[str]] = {}
    for name, header in weights.items():
        names_of.setdefault(STORED_DTYPES[header.dtype], []).append(name)
    usual = max(names_of, key=lambda dtype: len(names_of[dtype]))
    for dtype in sorted(names_of.keys() - {usual}):
        yield f"{dtype}, where most are {usual}: {listing(names_of[dtype], _MAX_LISTED)}"
    fields = read_json(directory / CONFIG_FILE)
    said = str(fields.get("dtype") or fields.get("torch_dtype") or "").removeprefix("torch.")
    if not said:
        yield f"{CONFIG_FILE} does not name the dtype: that of the embedding is used"
    elif said not in names_of:
        yield f"{CONFIG_FILE} says {printable(said)}, the weights are {' and '.join(sorted(names_of))}"


def _odd_places(stored: Mapping[str, Mapping[str, TensorHeader]]) -> Iterator[str]:
    """Of tensors in their files."""
    strided = [name for tensors in stored.values() for name, header in tensors.items() if header.strides is not None]
    if strided:
        yield f"not contiguous, so that loading takes longer and more memory: {listing(strided, _MAX_LISTED)}"
    shared = [f"{first} with {second}" for tensors in stored.values() for first, second in _sharing(tensors)]
    if shared:
        yield f"sharing their bytes: {listing(shared, _MAX_LISTED)}"


def _sharing(tensors: Mapping[str, TensorHeader]) -> list[tuple[str, str]]:
    """Neighbours that overlap; tensors with strides may lie between each other without sharing anything."""
    contiguous = [(t.offset_bytes, t.num_bytes, name) for name, t in tensors.items() if t.strides is None]
    neighbours = itertools.pairwise(sorted(place for place in contiguous if place[1]))
    return [(a, b) for (begin, num_bytes, a), (next_begin, _, b) in neighbours if next_begin < begin + num_bytes]


def _odd_files(directory: Path, read: Iterable[str]) -> Iterator[str]:
    indexes = {form.index for form in WEIGHT_FORMS}
    unused = {
        path.name: path.stat().st_size
        for path in sorted(directory.iterdir())
        if path.suffix in _WEIGHT_SUFFIXES and path.is_file() and path.name not in {*read, *indexes}
    }
    if unused:
        yield f"not read, {bytes_text(sum(unused.values()))} in all: {listing(unused, _MAX_LISTED)}"
    if not any((directory / name).exists() for name in TOKENIZER_FILES):
        yield "no tokenizer: it can be converted, but not served"


def _bytes_of_dtype(weights: Iterable[TensorHeader], names: Mapping[str, str]) -> dict[str, int]:
    counter: Counter[str] = Counter()
    for header in weights:
        counter[names[header.dtype]] += header.num_bytes
    return dict(counter.most_common())


def _weight_bytes(weights: Mapping[str, TensorHeader], beginnings: Sequence[str]) -> int:
    return sum(header.num_bytes for name, header in weights.items() if name.startswith(tuple(beginnings)))
