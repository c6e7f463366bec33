"""What the result of a conversion consists of: its files, their tensors, and the config."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gptj_dist import __version__
from gptj_dist.checkpoint.files import (
    CONFIG_FILE,
    GENERATION_FILE,
    QUANTIZE_FILES,
    SAFETENSORS,
    TOKENIZER_FILES,
    WEIGHT_FORMS,
)
from gptj_dist.checkpoint.gptq_form import CONFIG as GPTQ_CONFIG
from gptj_dist.checkpoint.gptq_form import gptq_layout, quantize_config
from gptj_dist.checkpoint.headers import DTYPE_CODES, TensorHeader, read_json
from gptj_dist.checkpoint.index import (
    WTE,
    CheckpointIndex,
    expected_tensors,
    read_model_config,
    stage_headers,
    stored_bits,
    stored_dtypes,
)
from gptj_dist.checkpoint.writer import CODE_OF, Layout, encode_header, encode_index, layout_bytes, shard_names
from gptj_dist.config import DTypeName, LayerRange, ModelConfig
from gptj_dist.errors import ConfigurationError
from gptj_dist.quantization import INT4_GROUP, QUANT_METHOD, Bits, Quantization, scale_name

_TEXTS = (GENERATION_FILE, *TOKENIZER_FILES)
"""Files that are copied as they are."""


@dataclass(frozen=True, slots=True)
class ConversionPlan:
    """All that the result consists of, its checksums excepted.

    Args:
        files: name -> the tensors that it holds, or its bytes.
        identity: of source and result; with the same one, the same bytes are written.
        config: of the source.
        result: of the result, which may have other bits.
    """

    source: Path
    config: ModelConfig
    result: ModelConfig
    dtype: DTypeName
    files: Mapping[str, Layout | bytes]
    identity: Mapping[str, Any]

    @property
    def num_bytes(self) -> int:
        """The size of all files."""
        return sum(map(file_bytes, self.files.values()))

    def has_source_changed(self) -> bool:
        """Whether files of the source are no longer those that the plan was drawn from."""
        return _identity(self.source, self.dtype, self.identity["bits"], self.identity["as_gptq"]) != self.identity


def draw_plan(source: Path, dtype: DTypeName | None, bits: Bits | None, as_gptq: bool) -> ConversionPlan:
    """Reads the headers of the source. The arguments are those of `convert_checkpoint`.

    Raises:
        ConfigurationError: the matrices do not suit the bits, or have other ones already.
        CheckpointError: the source is broken, or not a GPT-J.
    """
    config = read_model_config(source)
    is_foreign = config.quantization is not None and config.quantization.is_foreign
    if is_foreign:  # it is read as numbers
        config = replace(config, quantization=None)
    headers = stage_headers(CheckpointIndex(source), config, LayerRange.whole(config.num_layers))
    plain = [header for name, header in headers.items() if not _is_quantized(config, name)]
    dtype = dtype or _common_dtype(plain) or config.dtype
    result = _quantized_config(source, config, bits, as_gptq)
    weights = _layouts(result, CODE_OF[dtype])
    if as_gptq:
        weights = {file: gptq_layout(layout) for file, layout in weights.items()}
    texts = {
        SAFETENSORS.index: encode_index(weights),
        CONFIG_FILE: _config_json(source, dtype, bits, is_foreign, as_gptq),
        **({QUANTIZE_FILES[0]: quantize_config()} if as_gptq else {}),
        **{name: (source / name).read_bytes() for name in _TEXTS if (source / name).is_file()},
    }
    return ConversionPlan(source, config, result, dtype, {**weights, **texts}, _identity(source, dtype, bits, as_gptq))


def _quantized_config(source: Path, config: ModelConfig, bits: Bits | None, as_gptq: bool) -> ModelConfig:
    """The config of the result.

    Raises:
        ConfigurationError: the source has other bits already, or does not suit them.
    """
    if bits is None:
        return config
    wanted = replace(Quantization.of_stages([config.num_layers], [bits]), is_stored=True)
    if as_gptq:
        wanted = replace(wanted, embedding_bits=None, head_bits=None)
    if config.quantization not in (None, wanted):
        raise ConfigurationError(f"{source} is quantised already: convert the checkpoint that it was made of")
    return config.quantized(wanted)


def _is_quantized(config: ModelConfig, name: str) -> bool:
    """Whether a tensor is quantised, or the scales of one that is."""
    return any(stored_bits(config, name.removesuffix(suffix)) is not None for suffix in ("", scale_name("")))


def _layouts(config: ModelConfig, code: str) -> dict[str, Layout]:
    """File -> its tensors: those of a pipeline whose first and last stages have no layers, and the others one each."""
    num_files = config.num_layers + 2
    bounds = [0, *range(config.num_layers + 1), config.num_layers]
    layouts: dict[str, Layout] = {}
    for i, file in enumerate(shard_names(SAFETENSORS.single, num_files)):
        layers = LayerRange(i, num_files, bounds[i], bounds[i + 1])
        shapes, codes = expected_tensors(config, layers), stored_dtypes(config, layers, code)
        # Tied embeddings are both the first stage's and the last's.
        shared = {WTE, scale_name(WTE)} if i else set()
        layouts[file] = {name: (codes[name], shape) for name, shape in shapes.items() if name not in shared}
    return layouts


def _config_json(source: Path, dtype: DTypeName, bits: Bits | None, is_foreign: bool, as_gptq: bool) -> bytes:
    fields = read_json(source / CONFIG_FILE)
    fields.pop("torch_dtype", None)
    if is_foreign:
        for name in ("quantization_config", "eight_bit"):
            fields.pop(name, None)
    if bits is not None:
        group = INT4_GROUP if bits == 4 else None
        own = {"quant_method": QUANT_METHOD, "bits": bits, "group_size": group}
        fields["quantization_config"] = GPTQ_CONFIG if as_gptq else own
    return json.dumps({**fields, "dtype": dtype}, indent=2).encode() + b"\n"


def _common_dtype(headers: Iterable[TensorHeader]) -> DTypeName | None:
    codes = {header.dtype for header in headers}
    return DTYPE_CODES.get(codes.pop()) if len(codes) == 1 else None


def _identity(source: Path, dtype: DTypeName, bits: Bits | None, as_gptq: bool) -> dict[str, Any]:
    """What the bytes of the result follow from; of a hub model, the path names the commit."""
    index = CheckpointIndex(source)
    others = [CONFIG_FILE, *QUANTIZE_FILES, *_TEXTS, *(form.index for form in WEIGHT_FORMS)]
    names = index.files(index.file_of) + [name for name in others if (source / name).is_file()]
    stats = {name: (source / name).stat() for name in names}
    return {
        "version": __version__,
        "source": str(source),
        "dtype": dtype,
        "bits": bits,
        "as_gptq": as_gptq,
        "files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()],
    }


def file_bytes(content: Layout | bytes) -> int:
    """The size of a file of the plan."""
    return len(content) if isinstance(content, bytes) else len(encode_header(content)) + layout_bytes(content)
