"""Finds a checkpoint's tensors and checks them against its `config.json`, from JSON and file headers alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from gptj_dist.checkpoint.files import CONFIG_FILE, GENERATION_FILE, WEIGHT_FORMS
from gptj_dist.checkpoint.foreign import kind_of_directory
from gptj_dist.checkpoint.headers import (
    DTYPE_CODES,
    STORED_DTYPES,
    TensorHeader,
    listing,
    read_json,
    read_safetensors,
)
from gptj_dist.checkpoint.layouts.base import Layout, Part
from gptj_dist.checkpoint.layouts.detect import layout_of, other_weights
from gptj_dist.checkpoint.layouts.ggml_file import is_ggml, read_ggml
from gptj_dist.checkpoint.torch_file import is_torch_file, read_torch_file
from gptj_dist.config import DTypeName, LayerRange, ModelConfig
from gptj_dist.errors import CheckpointError
from gptj_dist.file_kinds import kind_of_file
from gptj_dist.quantization import Bits, offset_name, scale_name

T = TypeVar("T")

WTE = "transformer.wte.weight"
LM_HEAD_WEIGHT = "lm_head.weight"
LM_HEAD_BIAS = "lm_head.bias"

LEGACY_BUFFERS = (".attn.bias", ".attn.masked_bias", ".embed_positions")
"""Ends of the names of causal masks and rotary tables, which old versions of transformers saved with the weights."""

_PREFIX = "transformer."
_UNPREFIXED = ("wte.", "h.", "ln_f.")
"""How names begin in a checkpoint that was saved from the model without its head."""

_WRAPPER = re.compile(
    r"(?<![^.])(?:module|model|base_model|pretrained_model|_orig_mod|_forward_module|_fsdp_wrapped_module"
    r"|_checkpoint_wrapped_module)\."
)
"""Parts of names that come from what a model was wrapped in when it was saved: DataParallel, torch.compile, FSDP, PEFT,
Lightning, TRL. No name of GPT-J has such a part."""

_ADAPTER = re.compile(r"\.(?:lora_[A-Za-z]+|base_layer|ia3_\w+|oft_\w+|hada_\w+|original_module)(?:\.|$)")
"""A part of the names of tensors that PEFT keeps beside the weights which they change."""

_MATRIX = re.compile(r"transformer\.h\.(\d{1,9})\.(?:attn|mlp)\.\w+\.weight")
"""The names of a layer's matrices."""

QUANTIZED_DTYPES: Mapping[Bits, str] = {8: "I8", 4: "U8"}
"""The dtypes of quantised matrices, by their names in safetensors headers. A byte of 4 bits holds two columns."""

_BUFFER_BYTES = 512
"""Headers are read in whole or in a few bytes here and there: reading ahead would be reading what is not needed."""


class CheckpointIndex:
    """Which file of a directory holds which tensor: of a single file of weights, or of the files that an index names.

    Reads safetensors if there are any, else PyTorch's pickles. Tensor names are those of a whole GPT-J.

    With an index, weight files are opened only by `headers`, so a machine needs only the files that it asks for.

    Attributes:
        file_of: tensor name -> name of its file in the directory.

    Raises:
        CheckpointError: no weights in the directory, a broken file, or adapters that are not merged into the weights.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.file_of = _file_of_each_tensor(directory)
        if adapters := [name for name in self.file_of if _ADAPTER.search(name)]:
            raise CheckpointError(
                f"{directory} holds an adapter that is not merged into the weights ({listing(adapters[:2])}): "
                "merge it with peft's merge_and_unload() and save the result"
            )

    def files(self, names: Iterable[str]) -> list[str]:
        """The files that hold these tensors; names that the checkpoint lacks are passed over."""
        return sorted({self.file_of[name] for name in names if name in self.file_of})

    def headers(self, names: Iterable[str]) -> dict[str, TensorHeader]:
        """The headers of those tensors that the files really hold, by name. Opens only their files.

        Raises:
            CheckpointError: a file is missing, truncated or corrupt.
        """
        wanted = set(names)
        files = self.files(wanted)
        if missing := [file for file in files if not _is_file(self.directory / file)]:
            raise CheckpointError(f"{self.directory} lacks {listing(missing)}, which its index names")
        return {
            name: header
            for file in files
            for name, header in read_header(self.directory / file).items()
            if name in wanted and self.file_of.get(name) == file
        }


def read_model_config(directory: Path) -> ModelConfig:
    """Reads the directory's `config.json`, and its `generation_config.json` if there is one.

    If they do not name the dtype, takes that of the weights, if the weights are there.

    Raises:
        CheckpointError: `config.json` is missing, one is not JSON, or they do not describe a GPT-J.
    """
    if not (directory / CONFIG_FILE).exists() and (kind := kind_of_directory(directory)):
        raise CheckpointError(f"{directory} has no {CONFIG_FILE}; it holds {kind}")
    fields = read_json(directory / CONFIG_FILE)
    if fields.get("dtype") is None and fields.get("torch_dtype") is None:
        fields["dtype"] = _dtype_of_weights(directory)
    generation = directory / GENERATION_FILE
    config = ModelConfig.from_hf(fields, read_json(generation) if generation.exists() else None)
    layout = read_layout(directory, config)
    if layout is None:
        return config
    found = layout.quantization(config.num_layers)
    return replace(
        config, quantization=replace(found, head_bits=found.embedding_bits) if config.has_tied_embeddings else found
    )


def read_layout(directory: Path, config: ModelConfig) -> Layout | None:
    """The layout of weights that another tool has quantised; None if they are not.

    Raises:
        CheckpointError: they are quantised in a way that is not read.
    """
    if not (directory / CONFIG_FILE).is_file():
        return None
    singles = (form.single for form in WEIGHT_FORMS if (directory / form.single).is_file())
    has_index = any((directory / form.index).is_file() for form in WEIGHT_FORMS)
    file = next(singles, None) or (None if has_index else other_weights(directory))
    return layout_of(directory, read_json(directory / CONFIG_FILE), file, {config.d_model, config.d_ff})


def expected_tensors(config: ModelConfig, layers: LayerRange) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a stage's tensors, first to last; `Linear` weights are (outputs, inputs).

    With tied embeddings the last stage, too, has `transformer.wte.weight`, in place of `lm_head.weight`. A matrix that
    is stored quantised has the shape of its bytes, and other tensors beside it, of scales and maybe offsets.
    """
    tensors: dict[str, tuple[int, ...]] = {}
    for name, shape in plain_tensors(config, layers).items():
        bits = stored_bits(config, name)
        if bits is None:
            tensors[name] = shape
            continue
        rows, columns = shape
        tensors[name] = (rows, columns * bits // 8)
        assert config.quantization is not None
        num_groups = columns // config.quantization.group_of(columns, bits)
        tensors[scale_name(name)] = (rows, num_groups)
        if config.quantization.has_offsets:
            tensors[offset_name(name)] = (rows, num_groups)
    return tensors


def stored_bits(config: ModelConfig, name: str) -> Bits | None:
    """The bits of a tensor that the checkpoint holds quantised; None for any other."""
    quantization = config.quantization
    if quantization is None or not quantization.is_stored:
        return None
    if name == WTE:
        return quantization.embedding_bits
    if name == LM_HEAD_WEIGHT:
        return quantization.head_bits
    found = _MATRIX.fullmatch(name)
    return None if found is None else quantization.layer_bits[int(found[1])]


def stored_dtypes(config: ModelConfig, layers: LayerRange, code: str) -> dict[str, str]:
    """The dtypes of `expected_tensors`, by their names in safetensors headers.

    Args:
        code: of what is not quantised.
    """
    codes: dict[str, str] = {}
    for name in plain_tensors(config, layers):
        bits = stored_bits(config, name)
        codes[name] = code if bits is None else QUANTIZED_DTYPES[bits]
        if bits is not None:
            codes[scale_name(name)] = "BF16" if bits == 4 else "F32"
    return codes


def file_tensors(config: ModelConfig, layers: LayerRange, layout: Layout | None) -> dict[str, Part]:
    """The tensors that files must hold for a stage, by their names there.

    They are those of `expected_tensors`, except for matrices that another tool has quantised. A tied checkpoint may
    lack `lm_head.bias`, which is zero then.
    """
    parts: list[Part] = []
    for name, shape in (expected_tensors if layout is None else plain_tensors)(config, layers).items():
        if layout is not None and layout.covers(name):
            parts += layout.parts(name, *shape).values()
        else:
            bits = stored_bits(config, name) if layout is None else None
            dtypes = STORED_DTYPES if bits is None else (QUANTIZED_DTYPES[bits],)
            parts.append(Part(name, shape, dtypes, name == LM_HEAD_BIAS and config.has_tied_embeddings))
    return {part.name: part for part in parts}


def plain_tensors(config: ModelConfig, layers: LayerRange) -> dict[str, tuple[int, ...]]:
    """As `expected_tensors`, of a checkpoint in which nothing is quantised."""
    tensors: dict[str, tuple[int, ...]] = {}
    if layers.is_first:
        tensors[WTE] = (config.vocab_size, config.d_model)
    for layer in range(layers.start, layers.stop):
        tensors |= _layer_tensors(config, layer)
    if layers.is_last:
        tensors["transformer.ln_f.weight"] = tensors["transformer.ln_f.bias"] = (config.d_model,)
        tensors[WTE if config.has_tied_embeddings else LM_HEAD_WEIGHT] = (config.vocab_size, config.d_model)
        tensors[LM_HEAD_BIAS] = (config.vocab_size,)
    return tensors


def check_checkpoint(directory: Path, config: ModelConfig) -> None:
    """Checks that the files hold the whole model, by their headers alone.

    Raises:
        CheckpointError: as `stage_headers`.
    """
    stage_headers(CheckpointIndex(directory), config, LayerRange.whole(config.num_layers))


def stage_headers(index: CheckpointIndex, config: ModelConfig, layers: LayerRange) -> dict[str, TensorHeader]:
    """The headers of the files' tensors that a stage is read from, by name.

    Raises:
        CheckpointError: names every tensor that is missing, of another shape or of an unreadable dtype; or the
            checkpoint has more layers than `config`.
    """
    expected = file_tensors(config, layers, read_layout(index.directory, config))
    found = index.headers(expected)
    present = [(found[name], part) for name, part in expected.items() if name in found]
    problems = {
        "missing": [name for name, part in expected.items() if name not in found and not part.is_optional],
        f"beyond n_layer {config.num_layers}": [name for name in index.file_of if _is_beyond(name, config)],
        "misshapen": [
            f"{part.name} is {list(header.shape)}, not {list(part.shape)}"
            for header, part in present
            if header.shape != part.shape
        ],
        "unreadable": [f"{part.name} is {header.dtype}" for header, part in present if header.dtype not in part.dtypes],
    }
    if text := "; ".join(f"{problem}: {listing(names)}" for problem, names in problems.items() if names):
        raise CheckpointError(f"{index.directory} does not hold the model of its {CONFIG_FILE}: {text}")
    return found


def extra_tensors(index: CheckpointIndex, config: ModelConfig) -> list[str]:
    """Names of tensors that GPT-J does not have, such as those of a value head; they are not read.

    Without legacy buffers, and the second name of tied embeddings, which pickles hold under both.
    """
    known = file_tensors(config, LayerRange.whole(config.num_layers), read_layout(index.directory, config)).keys()
    second_name = {LM_HEAD_WEIGHT} if config.has_tied_embeddings else set()
    return [name for name in index.file_of if name not in known | second_name and not name.endswith(LEGACY_BUFFERS)]


def _is_beyond(name: str, config: ModelConfig) -> bool:
    """Whether a tensor belongs to a layer that the config does not count; without it the text would be another."""
    layer = re.match(r"transformer\.h\.(\d{1,9})\.", name)
    return layer is not None and int(layer[1]) >= config.num_layers and not name.endswith(LEGACY_BUFFERS)


def _layer_tensors(config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    d_model, d_ff = config.d_model, config.d_ff
    shapes: dict[str, tuple[int, ...]] = {"ln_1.weight": (d_model,), "ln_1.bias": (d_model,)}
    shapes |= {f"attn.{projection}_proj.weight": (d_model, d_model) for projection in ("q", "k", "v", "out")}
    shapes |= {"mlp.fc_in.weight": (d_ff, d_model), "mlp.fc_in.bias": (d_ff,)}
    shapes |= {"mlp.fc_out.weight": (d_model, d_ff), "mlp.fc_out.bias": (d_model,)}
    return {f"transformer.h.{layer}.{name}": shape for name, shape in shapes.items()}


def read_header(path: Path) -> dict[str, TensorHeader]:
    """The tensors of a file of weights, by the names of a whole GPT-J.

    Raises:
        CheckpointError: as `read_stored_header`, or it holds a tensor under both its names.
    """
    return _by_canonical_name(path, read_stored_header(path))


def read_stored_header(path: Path) -> dict[str, TensorHeader]:
    """The tensors of a file of weights, by the names that they are stored under.

    Raises:
        CheckpointError: it cannot be read, is truncated or corrupt, or would run code if it were unpickled.
    """
    try:
        with path.open("rb", buffering=_BUFFER_BYTES) as file:
            if is_ggml(file):
                return dict(read_ggml(path, file).tensors)
            is_pickled = is_torch_file(file) or path.suffix == ".bin"
            return (read_torch_file if is_pickled else read_safetensors)(path, file)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except CheckpointError as error:
        if kind := kind_of_file(path):
            raise CheckpointError(f"{path} is {kind}") from error
        raise


def _by_canonical_name(path: Path, stored: Mapping[str, T]) -> dict[str, T]:
    canonical = {canonical_name(name): value for name, value in stored.items()}
    if len(canonical) < len(stored):
        raise CheckpointError(f"{path} holds tensors twice, under names that differ in a prefix such as {_PREFIX!r}")
    return canonical


def canonical_name(name: str) -> str:
    """A tensor's name in a whole GPT-J: without wrappers' parts, and with the prefix that a headless model lacks."""
    name = _WRAPPER.sub("", name)
    return _PREFIX + name if name.startswith(_UNPREFIXED) else name


def _file_of_each_tensor(directory: Path) -> dict[str, str]:
    for form in WEIGHT_FORMS:
        if (directory / form.single).is_file():
            return dict.fromkeys(read_header(directory / form.single), form.single)
        if (directory / form.index).is_file():
            return _read_weight_map(directory / form.index)
    if file := other_weights(directory):
        return dict.fromkeys(read_header(directory / file), file)
    names = ", ".join(name for form in WEIGHT_FORMS for name in (form.single, form.index))
    kind = kind_of_directory(directory)
    held = f"; it holds {kind}" if kind else ""
    raise CheckpointError(f"no weights to read in {directory}: it has none of {names}{held}")


def _dtype_of_weights(directory: Path) -> DTypeName:
    try:
        embedding = CheckpointIndex(directory).headers([WTE])[WTE]
    except (CheckpointError, KeyError):  # not downloaded yet; or broken, which reading the weights reports
        return "float32"
    return DTYPE_CODES.get(embedding.dtype, "float32")


def _read_weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    # A file name with a folder in it could lead anywhere on this machine.
    if not isinstance(weight_map, dict) or any(
        not isinstance(file, str) or Path(file).name != file for file in weight_map.values()
    ):
        raise CheckpointError(f"{path} has no weight_map from tensor names to file names")
    return _by_canonical_name(path, weight_map)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # such as a name that is too long
        return False
