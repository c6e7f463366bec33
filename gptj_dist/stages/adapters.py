"""The adapters that a stage holds. Those that a request names and that are not there are read when it arrives."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gptj_dist.checkpoint.adapter_formats import open_fitting
from gptj_dist.checkpoint.adapter_loader import read_tensor
from gptj_dist.checkpoint.adapters import AdapterPart, bias_name, weight_name
from gptj_dist.checkpoint.index import plain_tensors
from gptj_dist.config import LayerRange, ModelConfig
from gptj_dist.errors import CheckpointError
from gptj_dist.logs import values
from gptj_dist.model.adapters import (
    Adapter,
    Change,
    Changes,
    DoraChange,
    LowRankChange,
    LowRankEmbedding,
    RowAdapter,
    Spot,
    VectorChange,
    is_native,
)
from gptj_dist.model.weight_changes import EmbeddingChange, WeightChange
from gptj_dist.params import AdapterChoice, AdapterSource

logger = logging.getLogger(__name__)

MAX_KEPT_BYTES = 2 << 30
"""Of the adapters of a stage. Beyond it, those that were used least recently are dropped."""

_Parts = Sequence[tuple[AdapterPart, tuple[Tensor | None, ...]]]
"""Parts, and the tensors a, b, vector, DoRA's gain and difference of weights of each."""


@dataclass(frozen=True, slots=True)
class AdaptedRows:
    """Rows of a micro-batch that are consecutive tokens of one request.

    Args:
        start: position of the first token in its sequence.
    """

    rows: range
    start: int
    adapters: Sequence[AdapterChoice]


@dataclass(slots=True)
class _Held:
    """An adapter as it was read, and after its first use as it is computed with.

    Args:
        parts: empty once `adapters` are made.
        adapters: what it is at the first positions of a sequence, one after another, and last at all others.
    """

    num_bytes: int
    parts: _Parts
    adapters: tuple[Adapter, ...] = ()


class StageAdapters:
    """Reads adapters on any thread, and gives them to the thread that computes.

    Args:
        config: the model's.
        layers: the stage's.
        read_weight: fills a tensor with the checkpoint's tensor of that name.
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: LayerRange,
        dtype: torch.dtype,
        device: torch.device,
        read_weight: Callable[[str, Tensor], None],
    ) -> None:
        self._read_weight = read_weight
        self._config = config
        self._layers = layers
        self._dtype = dtype
        self._device = device
        self._lock = threading.Lock()
        self._held: OrderedDict[AdapterSource, _Held] = OrderedDict()

    def load(self, source: AdapterSource) -> None:
        """Reads this stage's parts of an adapter, unless it is there. May be called on any thread.

        Raises:
            CheckpointError: it cannot be read, does not fit, or has been changed since it was named.
        """
        self._hold(source)

    @property
    def layers(self) -> LayerRange:
        """The stage's."""
        return self._layers

    @property
    def sources(self) -> list[AdapterSource]:
        """Of the adapters that are held."""
        with self._lock:
            return list(self._held)

    def narrow(self, layers: LayerRange) -> None:
        """The stage has only these of its layers from now on. Parts of the others are held, and not used."""
        self._layers = layers

    def changes(self, adapted: Iterable[AdaptedRows], num_rows: int) -> Changes | None:
        """The changes of a micro-batch; None if no row has an adapter. For the thread that computes."""
        row_adapters = [each for rows in adapted for each in self._row_adapters(rows)]
        return Changes(row_adapters, num_rows, self._dtype, self._device) if row_adapters else None

    def _row_adapters(self, adapted: AdaptedRows) -> Iterator[RowAdapter]:
        """Of a request: rows at which one of its adapters is special one by one, and the others together."""
        adapters = [(choice, self._get(choice.source)) for choice in adapted.adapters if choice.source is not None]
        num_special = max((len(by_position) - 1 for _, by_position in adapters), default=0) - adapted.start
        for rows in _pieces(adapted.rows, num_special):
            position = adapted.start + rows.start - adapted.rows.start
            for choice, by_position in adapters:
                assert choice.source is not None
                index = min(position, len(by_position) - 1)
                key = (choice.name, choice.source.version, str(index))
                yield RowAdapter(rows, key, by_position[index], choice.strength)

    def _get(self, source: AdapterSource) -> tuple[Adapter, ...]:
        """As in `_Held`. An adapter that cannot be read makes its rows NaN, which ends their requests and no others."""
        try:
            held = self._hold(source)
        except CheckpointError as error:
            logger.error("adapter cannot be read", extra=values(path=source.path, error=str(error)))
            nan = torch.full((self._config.d_model,), torch.nan, dtype=self._dtype, device=self._device)
            return (self._adapter({}, {("hidden", self._layers.stop - 1): (VectorChange(nan),)}),)
        if not held.adapters:
            num_special = 1 + max((part.position for part, _ in held.parts if part.position is not None), default=-1)
            held.adapters = tuple(
                self._made([each for each in held.parts if each[0].position in (None, position)])
                for position in (*range(num_special), None)
            )
            held.parts = ()
        return held.adapters

    def _hold(self, source: AdapterSource) -> _Held:
        """Reads an adapter unless it is there, and drops others if there are too many."""
        with self._lock:
            if source in self._held:
                self._held.move_to_end(source)
                return self._held[source]
        stored = open_fitting(Path(source.path), self._config)
        if stored.source() != source:
            raise CheckpointError(f"the adapter {source.path} has been changed since it was loaded: load it again")
        parts = tuple((part, self._tensors(part)) for part in stored.parts if part.is_on(self._layers))
        num_bytes = sum(header.num_bytes for part, _ in parts for header in part.tensors)
        with self._lock:
            held = self._held.setdefault(source, _Held(num_bytes, parts))
            while len(self._held) > 1 and sum(each.num_bytes for each in self._held.values()) > MAX_KEPT_BYTES:
                self._held.popitem(last=False)
        return held

    def _tensors(self, part: AdapterPart) -> tuple[Tensor | None, ...]:
        a, b, vector, magnitude, weight = (
            None if header is None else read_tensor(header)
            for header in (part.a, part.b, part.vector, part.magnitude, part.weight)
        )
        if part.replaces_bias:
            vector = self._difference(bias_name(part), vector, None)
        if weight is not None:
            weight = self._difference(weight_name(part, self._config), weight, part.token_ids)
        gain = None
        if magnitude is not None and a is not None and b is not None:
            if weight is not None:
                raise CheckpointError(f"{part.name} has a new weight and DoRA, which is not supported")
            whole = torch.empty(b.shape[0], a.shape[1])
            self._read_weight(weight_name(part, self._config), whole)
            whole.addmm_(b.float(), a.float(), alpha=part.scale)
            gain = magnitude.float() / torch.linalg.vector_norm(whole, dim=1)
        return a, b, vector, gain, weight

    def _difference(self, name: str, new: Tensor | None, rows: Sequence[int] | None) -> Tensor | None:
        """What a new tensor, or zero, has more than the checkpoint's of that name; None if it has nothing more.

        Args:
            rows: of the checkpoint's tensor that the new one has; None for all.
        """
        old = torch.empty(plain_tensors(self._config, self._layers)[name])
        self._read_weight(name, old)
        if rows is not None:
            old = old[list(rows)]
        difference = old.neg_() if new is None else old.neg_().add_(new)
        return difference.to(self._dtype) if difference.any() else None

    def _made(self, parts: _Parts) -> Adapter:
        low_ranks: dict[Spot, tuple[Tensor, Tensor]] = {}
        others: dict[Spot, list[Change]] = defaultdict(list)
        for part, tensors in parts:
            spot = part.place, part.layer
            a, b, vector, gain, weight = (
                None if tensor is None else tensor.to(self._device, self._dtype).contiguous() for tensor in tensors
            )
            if vector is not None:
                others[spot].append(VectorChange(vector * part.scale))
            elif weight is not None and part.place == "wte":
                others[spot].append(EmbeddingChange(weight, part.token_ids, self._config.vocab_size))
            elif weight is not None:
                others[spot].append(WeightChange(weight))
            elif a is None or b is None:
                continue
            elif part.place == "wte":
                others[spot].append(LowRankEmbedding(a, b, part.scale))
            elif gain is not None:
                others[spot].append(DoraChange(LowRankChange(a, b, part.scale), gain))
            elif is_native(self._dtype, self._device) and spot not in low_ranks:
                low_ranks[spot] = (a, b * part.scale)
            else:
                others[spot].append(LowRankChange(a, b, part.scale))
        return self._adapter(low_ranks, others)

    def _adapter(
        self, low_ranks: Mapping[Spot, tuple[Tensor, Tensor]], others: Mapping[Spot, Sequence[Change]]
    ) -> Adapter:
        return Adapter(low_ranks, others, self._config.num_layers, self._dtype)


def _pieces(rows: range, num_single: int) -> list[range]:
    """The first rows one by one, and the others together."""
    middle = min(rows.start + max(num_single, 0), rows.stop)
    pieces = [range(row, row + 1) for row in range(rows.start, middle)]
    return [*pieces, range(middle, rows.stop)] if middle < rows.stop else pieces
