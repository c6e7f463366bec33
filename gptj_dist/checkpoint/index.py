"""Says what a checkpoint holds, and whether that is the GPT-J of its `config.json`, from JSON and file headers alone.

Reads safetensors headers itself (8 bytes of little-endian length, then JSON:
https://github.com/huggingface/safetensors), because byte ranges are needed that the library does not tell. Knows
neither torch nor the hub, and reads no weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptj_dist.config import DTYPE_BYTES, DTypeName, LayerRange, ModelConfig
from gptj_dist.errors import CheckpointError

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

WTE = "transformer.wte.weight"
LM_HEAD_WEIGHT = "lm_head.weight"
LM_HEAD_BIAS = "lm_head.bias"

DTYPE_CODES: Mapping[str, DTypeName] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""The dtypes that weights may have, by their names in safetensors headers."""

NO_PICKLES = (
    "pickles (.bin) are not read yet, safetensors are needed "
    "(EleutherAI/gpt-j-6b has them at revision refs/pr/40, not at main)"
)

_LEGACY_BUFFERS = (".attn.bias", ".attn.masked_bias", ".embed_positions")
"""Ends of the names of causal masks and rotary tables, which old versions of transformers saved with the weights."""

_MAX_LISTED = 8
_MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """Where a tensor lies and what it is.

    Args:
        path: the safetensors file.
        dtype: as safetensors spells it, a key of `DTYPE_CODES` for weights.
        offset_bytes: from the start of the file.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int
    num_bytes: int


class CheckpointIndex:
    """Which file of a directory holds which tensor: of one `model.safetensors`, or of the files its index names.

    With an index, no other file is opened before `headers`, so a machine needs only the files that it asks about.

    Attributes:
        file_of: tensor name -> name of its file in the directory.

    Raises:
        CheckpointError: no safetensors in the directory, or a broken file.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.file_of = _file_of_each_tensor(directory)

    def files(self, names: Iterable[str]) -> list[str]:
        """The files that hold these tensors; names that the checkpoint lacks are passed over."""
        return sorted({self.file_of[name] for name in names if name in self.file_of})

    def headers(self, names: Iterable[str]) -> dict[str, TensorHeader]:
        """What those of these tensors are that the files really hold, by name. Opens only their files.

        Raises:
            CheckpointError: a file is missing, truncated or corrupt.
        """
        wanted = set(names)
        files = self.files(wanted)
        if missing := [file for file in files if not (self.directory / file).is_file()]:
            raise CheckpointError(f"{self.directory} lacks {_listing(missing)}, which {INDEX_FILE} names")
        return {
            name: header
            for file in files
            for name, header in _read_header(self.directory / file).items()
            if name in wanted and self.file_of.get(name) == file
        }


def read_model_config(directory: Path) -> ModelConfig:
    """Reads the directory's `config.json`.

    Raises:
        CheckpointError: it is missing, is not JSON, or does not describe a GPT-J.
    """
    return ModelConfig.from_hf(_read_json(directory / CONFIG_FILE))


def expected_tensors(config: ModelConfig, layers: LayerRange) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a stage's tensors, first to last; `Linear` weights are (outputs, inputs).

    With tied embeddings the last stage, too, has `transformer.wte.weight`, in place of `lm_head.weight`.
    """
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

    Legacy buffers are passed over. A tied checkpoint may lack `lm_head.bias`, which is zero then.

    Raises:
        CheckpointError: names every tensor that is missing, unexpected, of another shape or of an unreadable dtype.
    """
    index = CheckpointIndex(directory)
    check_tensors(directory, config, LayerRange(0, 1, 0, config.num_layers), index.headers(index.file_of))


def check_tensors(directory: Path, config: ModelConfig, layers: LayerRange, found: Mapping[str, TensorHeader]) -> None:
    """Checks that `found` are the tensors of a stage, as `check_checkpoint` does for all layers.

    Raises:
        CheckpointError: they are not.
    """
    expected = expected_tensors(config, layers)
    optional = {LM_HEAD_BIAS} if config.has_tied_embeddings else set()
    present = [(name, found[name], shape) for name, shape in expected.items() if name in found]
    problems = {
        "missing": [name for name in expected if name not in found and name not in optional],
        "unexpected": [name for name in found if name not in expected and not name.endswith(_LEGACY_BUFFERS)],
        "misshapen": [
            f"{name} is {list(header.shape)}, not {list(shape)}"
            for name, header, shape in present
            if header.shape != shape
        ],
        "unreadable": [f"{name} is {header.dtype}" for name, header, _ in present if header.dtype not in DTYPE_CODES],
    }
    if text := "; ".join(f"{problem}: {_listing(names)}" for problem, names in problems.items() if names):
        raise CheckpointError(f"{directory} does not hold the model of its {CONFIG_FILE}: {text}")


def _layer_tensors(config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    d_model, d_ff = config.d_model, config.d_ff
    shapes: dict[str, tuple[int, ...]] = {"ln_1.weight": (d_model,), "ln_1.bias": (d_model,)}
    shapes |= {f"attn.{projection}_proj.weight": (d_model, d_model) for projection in ("q", "k", "v", "out")}
    shapes |= {"mlp.fc_in.weight": (d_ff, d_model), "mlp.fc_in.bias": (d_ff,)}
    shapes |= {"mlp.fc_out.weight": (d_model, d_ff), "mlp.fc_out.bias": (d_model,)}
    return {f"transformer.h.{layer}.{name}": shape for name, shape in shapes.items()}


def _file_of_each_tensor(directory: Path) -> dict[str, str]:
    if (directory / SINGLE_FILE).is_file():
        return dict.fromkeys(_read_header(directory / SINGLE_FILE), SINGLE_FILE)
    index_path = directory / INDEX_FILE
    if not index_path.is_file():
        has_pickles = any(directory.glob("*.bin"))
        reason = NO_PICKLES if has_pickles else f"there is neither {SINGLE_FILE} nor {INDEX_FILE}"
        raise CheckpointError(f"no weights to read in {directory}: {reason}")
    weight_map = _read_json(index_path).get("weight_map")
    # A file name with a folder in it could lead anywhere on this machine.
    if not isinstance(weight_map, dict) or any(
        not isinstance(file, str) or Path(file).name != file for file in weight_map.values()
    ):
        raise CheckpointError(f"{index_path} has no weight_map from tensor names to file names")
    return weight_map


def _read_header(path: Path) -> dict[str, TensorHeader]:
    """The tensors of a safetensors file.

    Raises:
        CheckpointError: the header is broken, or describes more or fewer bytes than the file has.
    """
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            data_start = 8 + header_bytes
            if data_start > size_bytes or header_bytes > _MAX_HEADER_BYTES:
                raise CheckpointError(f"{path} is truncated, or not a safetensors file")
            header_json = file.read(header_bytes)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    try:
        tensors = {
            name: _parse_entry(path, data_start, entry)
            for name, entry in json.loads(header_json).items()
            if name != "__metadata__"
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} has a corrupt header: {error!r}") from error
    described_bytes = max((t.offset_bytes + t.num_bytes for t in tensors.values()), default=data_start)
    if described_bytes != size_bytes:
        raise CheckpointError(
            f"{path} is truncated or corrupt: its header describes {described_bytes} bytes, it has {size_bytes}"
        )
    return tensors


def _parse_entry(path: Path, data_start: int, entry: Mapping[str, Any]) -> TensorHeader:
    begin, end = map(int, entry["data_offsets"])
    shape = tuple(map(int, entry["shape"]))
    dtype = str(entry["dtype"])
    if not 0 <= begin <= end:
        raise ValueError(f"data_offsets {begin}, {end}")
    if dtype in DTYPE_CODES and math.prod(shape) * DTYPE_BYTES[DTYPE_CODES[dtype]] != end - begin:
        raise ValueError(f"{end - begin} bytes for {dtype} {list(shape)}")
    return TensorHeader(path, dtype, shape, data_start + begin, end - begin)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return content


def _listing(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(names[:_MAX_LISTED]) + more
