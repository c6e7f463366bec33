"""An adapter as it is stored: the places of a model that it changes, and where its tensors lie. Loads no numbers.

Every reader turns its format into the same parts. What a reader does not understand it refuses by name: an adapter of
which something is left out would be another one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from gptj_dist.checkpoint.headers import STORED_DTYPES, TensorHeader, listing
from gptj_dist.checkpoint.index import LM_HEAD_BIAS, LM_HEAD_WEIGHT, WTE
from gptj_dist.config import LayerRange, ModelConfig
from gptj_dist.errors import CheckpointError
from gptj_dist.params import AdapterSource

Place: TypeAlias = Literal["norm", "q", "k", "v", "out", "fc_in", "fc_out", "hidden", "wte", "final", "lm_head"]

_HASHED_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class AdapterPart:
    """A change of one place: two low-rank matrices, a vector, or a matrix in place of the model's.

    Args:
        place: see `model.adapters.Place`.
        layer: None for a place that is in no layer.
        name: of its tensors, as they are stored.
        scale: multiplies the change.
        a, b: [r, inputs] and [outputs, r]; None for a vector.
        vector: [outputs]; None for matrices.
        replaces_bias: whether the model's bias is taken away. The vector, if there is one, is the new bias then.
        magnitude: [outputs], of DoRA: the norms that the rows of weight and change together are given.
        weight: the new one, of the shape of the model's. With DoRA it must be the model's.
        token_ids: whose rows of the embedding `weight` holds; None for all.
        position: of the only token of a sequence that is changed; None for all.
    """

    place: Place
    layer: int | None
    name: str
    scale: float
    a: TensorHeader | None = None
    b: TensorHeader | None = None
    vector: TensorHeader | None = None
    replaces_bias: bool = False
    magnitude: TensorHeader | None = None
    weight: TensorHeader | None = None
    token_ids: tuple[int, ...] | None = None
    position: int | None = None

    def is_on(self, layers: LayerRange) -> bool:
        """Whether a stage has the place."""
        if self.layer is not None:
            return layers.start <= self.layer < layers.stop
        return layers.is_first if self.place == "wte" else layers.is_last

    @property
    def tensors(self) -> list[TensorHeader]:
        """Those that it has."""
        return [header for header in (self.a, self.b, self.vector, self.magnitude, self.weight) if header is not None]


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """The parts of an adapter, and the files that they are read from.

    Args:
        form: such as `LoRA`.
        base: name of the model that it was made for, if that is known.
        files: whose contents make the adapter what it is.
    """

    path: Path
    form: str
    base: str | None
    parts: tuple[AdapterPart, ...]
    files: tuple[Path, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(header.num_bytes for part in self.parts for header in part.tensors)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks of its matrices, ascending, each once."""
        return tuple(sorted({part.a.shape[0] for part in self.parts if part.a is not None}))

    def source(self) -> AdapterSource:
        """The adapter as it is now. Reads its files. Raises CheckpointError."""
        digest = hashlib.blake2b(digest_size=16)
        try:
            for path in self.files:
                with path.open("rb") as file:
                    while data := file.read(_HASHED_BYTES):
                        digest.update(data)
        except OSError as error:
            raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}") from error
        return AdapterSource(str(self.path), digest.hexdigest())


def check_adapter(adapter: StoredAdapter, config: ModelConfig) -> None:
    """Checks that the adapter fits the model.

    Raises:
        CheckpointError: names every tensor of another shape or of an unreadable dtype, or of a layer that is not there.
    """
    problems: Mapping[str, list[str]] = {
        "misshapen": [],
        "unreadable": [],
        f"beyond n_layer {config.num_layers}": [],
        "rows of other tokens, or of tied embeddings": [],
    }
    misshapen, unreadable, beyond, stray = problems.values()
    for part in adapter.parts:
        if part.layer is not None and part.layer >= config.num_layers:
            beyond.append(part.name)
            continue
        num_inputs, num_outputs = _widths(part.place, config)
        weight_shape = (num_outputs, num_inputs)
        if part.place == "wte":
            weight_shape = (num_inputs if part.token_ids is None else len(part.token_ids), num_outputs)
        if part.token_ids and (config.has_tied_embeddings or max(part.token_ids) >= config.vocab_size):
            stray.append(part.name)
        for label, header, wanted in (
            ("A", part.a, None if part.a is None else (part.a.shape[0], num_inputs)),
            ("B", part.b, None if part.a is None else (num_outputs, part.a.shape[0])),
            ("", part.vector, (num_outputs,)),
            ("magnitude", part.magnitude, (num_outputs,)),
            ("", part.weight, weight_shape),
        ):
            if header is None or wanted is None:
                continue
            if header.shape != wanted:
                misshapen.append(f"{part.name} {label} is {list(header.shape)}, not {list(wanted)}".replace("  ", " "))
            if header.dtype not in STORED_DTYPES:
                unreadable.append(f"{part.name} {label} is {header.dtype}".replace("  ", " "))
    if text := "; ".join(f"{problem}: {listing(names)}" for problem, names in problems.items() if names):
        raise CheckpointError(f"the adapter {adapter.path} does not fit the model: {text}")


def weight_name(part: AdapterPart, config: ModelConfig) -> str:
    """The checkpoint's name of the weight that a part changes."""
    if part.layer is None:
        return WTE if part.place == "wte" or config.has_tied_embeddings else LM_HEAD_WEIGHT
    module = f"mlp.{part.place}" if part.place.startswith("fc") else f"attn.{part.place}_proj"
    return f"transformer.h.{part.layer}.{module}.weight"


def bias_name(part: AdapterPart) -> str:
    """The checkpoint's name of the bias that a part replaces."""
    if part.layer is None:
        return LM_HEAD_BIAS if part.place == "lm_head" else "transformer.ln_f.bias"
    return f"transformer.h.{part.layer}.{'ln_1' if part.place == 'norm' else f'mlp.{part.place}'}.bias"


def _widths(place: Place, config: ModelConfig) -> tuple[int, int]:
    """Numbers of inputs and outputs of a place."""
    d_model = config.d_model
    inputs = {"fc_out": config.d_ff, "wte": config.vocab_size}.get(place, d_model)
    return inputs, {"fc_in": config.d_ff, "lm_head": config.vocab_size}.get(place, d_model)
