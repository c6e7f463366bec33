"""Adapters: changes of a model that some rows of a micro-batch have and others do not.

A row's result has the same bits whatever other rows there are, with adapters or without: each adapter is multiplied
with its own rows, by products that have this property, and rows without one are computed as ever. On a CPU one call of
the compiled library adds the low-rank changes of all rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from gptj_dist.model.inputs import to_device
from gptj_dist.model.linear import Linear, make_linear
from gptj_dist.model.native.library import load_library
from gptj_dist.model.native.low_rank import LowRankRows, LowRankTable
from gptj_dist.model.native.product import ELEMENTS

Place = Literal["norm", "q", "k", "v", "out", "fc_in", "fc_out", "hidden", "wte", "final", "lm_head"]
"""What a change is added to: the output of a layer's LayerNorm, the result of a layer's product, a layer's output, the
embedding, the output of the last LayerNorm, the logits."""

_PLACES = get_args(Place)

Spot = tuple[Place, int | None]
"""A place, and the layer if it is in one."""


Product = Callable[[Tensor], Tensor]
"""From inputs to results, [rows, in_features] -> [rows, out_features]."""


class Change(Protocol):
    """What an adapter adds at one spot."""

    def __call__(self, x: Tensor, product: Product, /) -> Tensor:
        """What is added to the results of the inputs x: [rows, in_features] -> [rows, out_features].

        Args:
            product: the unchanged one of the spot, with its bias.
        """


class LowRankChange:
    """`(x @ a.T) @ b.T * scale`; Hu et al. 2021.

    Args:
        a: [r, in_features], of the model's type and on its device.
        b: [out_features, r].
    """

    def __init__(self, a: Tensor, b: Tensor, scale: float) -> None:
        self._a = make_linear(a, None)
        self._b = make_linear(b * scale, None)

    def __call__(self, x: Tensor, _product: Product, /) -> Tensor:
        return self._b(self._a(x))


class DoraChange:
    """Of DoRA, Liu et al. 2024: the rows of weight and low-rank change together are scaled.

    Args:
        change: the low-rank one.
        gain: [out_features], what each row is multiplied with.
    """

    def __init__(self, change: LowRankChange, gain: Tensor) -> None:
        self._change = change
        self._gain = gain
        self._bias: Tensor | None = None

    def __call__(self, x: Tensor, product: Product) -> Tensor:
        if self._bias is None:
            self._bias = product(torch.zeros_like(x[:1]))
        unchanged = product(x) - self._bias
        return (self._gain - 1) * unchanged + self._gain * self._change(x, product)


class LowRankEmbedding:
    """As `LowRankChange`, where x are token ids [rows], and `a` is [r, vocab_size]."""

    def __init__(self, a: Tensor, b: Tensor, scale: float) -> None:
        self._table = a.t().contiguous()
        self._b = make_linear(b * scale, None)

    def __call__(self, x: Tensor, _product: Product, /) -> Tensor:
        return self._b(self._table[x])


class VectorChange:
    """A vector [out_features], whatever x is."""

    def __init__(self, vector: Tensor) -> None:
        self._vector = vector

    def __call__(self, x: Tensor, _product: Product, /) -> Tensor:
        return self._vector.expand(len(x), -1)


class Adapter:
    """The changes of one adapter on one stage.

    Args:
        low_ranks: matrices a and b times the scale, which the compiled library multiplies.
        others: are added after them.
        num_layers: of the model.
    """

    def __init__(
        self,
        low_ranks: Mapping[Spot, tuple[Tensor, Tensor]],
        others: Mapping[Spot, Sequence[Change]],
        num_layers: int,
        dtype: torch.dtype,
    ) -> None:
        matrices = {_index(spot): pair for spot, pair in low_ranks.items()}
        self.table = LowRankTable(matrices, len(_PLACES) * num_layers, dtype)
        self.low_rank_spots = frozenset(low_ranks)
        self.others = others

    def has(self, spot: Spot) -> bool:
        """Whether the adapter changes the spot."""
        return spot in self.low_rank_spots or spot in self.others


def _index(spot: Spot) -> int:
    """Where a spot is in the tables of low-rank matrices: q, k and v of a layer one after the other."""
    place, layer = spot
    return len(_PLACES) * (layer or 0) + _PLACES.index(place)


@dataclass(frozen=True, slots=True)
class RowAdapter:
    """Consecutive rows that have an adapter.

    Args:
        key: the order in which a row's adapters are added, the same in all micro-batches.
    """

    rows: range
    key: tuple[str, ...]
    adapter: Adapter
    strength: float


@dataclass(frozen=True)
class _Group:
    """Rows that have one adapter: those of `members`, in their order."""

    members: Sequence[RowAdapter]
    num_rows: int
    dtype: torch.dtype
    device: torch.device

    @property
    def adapter(self) -> Adapter:
        """The members' own."""
        return self.members[0].adapter

    @property
    def indices(self) -> list[int]:
        """The rows."""
        return [row for member in self.members for row in member.rows]

    @property
    def scales(self) -> list[float]:
        """The rows' strengths."""
        return [member.strength for member in self.members for _ in member.rows]

    @cached_property
    def rows(self) -> Tensor | None:
        """The rows, int64 [n]; None for all rows of the micro-batch."""
        indices = self.indices
        return None if len(indices) == self.num_rows else to_device(torch.tensor(indices), self.device)

    @cached_property
    def strengths(self) -> Tensor | None:
        """[n, 1]; None if all are 1."""
        if all(member.strength == 1 for member in self.members):
            return None
        return to_device(torch.tensor(self.scales, dtype=self.dtype)[:, None], self.device)


class Changes:
    """The adapters of a micro-batch's rows, which may have several each or none.

    The rows' first adapters are added first, in the order of their keys, then their second ones, and so on.

    Args:
        row_adapters: of ranges that are equal or have no row in common.
        num_rows: of the micro-batch.
    """

    def __init__(
        self, row_adapters: Iterable[RowAdapter], num_rows: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._num_rows = num_rows
        self._unions: dict[tuple[int, ...], Tensor | None] = {}
        num_before = Counter[int]()
        rounds: dict[int, dict[tuple[str, ...], list[RowAdapter]]] = {}
        for each in sorted(row_adapters, key=lambda each: each.key):
            rounds.setdefault(num_before[each.rows.start], {}).setdefault(each.key, []).append(each)
            num_before[each.rows.start] += 1
        library = load_library() if is_native(dtype, device) else None
        self._rounds: list[tuple[list[_Group], LowRankRows | None]] = []
        for by_key in rounds.values():
            groups = [_Group(members, num_rows, dtype, device) for members in by_key.values()]
            tables = [(group.adapter.table, group.indices, group.scales) for group in groups]
            self._rounds.append((groups, None if library is None else LowRankRows(library, tables, num_rows)))
        self._groups = [group for groups, _ in self._rounds for group in groups]
        self._low_rank_spots = set[Spot]().union(*(group.adapter.low_rank_spots for group in self._groups))
        self._other_spots = set[Spot]().union(*(group.adapter.others for group in self._groups))

    def add(self, places: Sequence[Place], layer: int | None, x: Tensor, y: Tensor, product: Product) -> None:
        """Adds to the results y [rows, places * out_features] what the adapters change at places, side by side in y.

        Args:
            places: neighbours in `Place`.
            x: the inputs of all rows.
            product: see `Change`; of all places.
        """
        spots = [(place, layer) for place in places]
        has_low_ranks, has_others = (not some.isdisjoint(spots) for some in (self._low_rank_spots, self._other_spots))
        if not has_low_ranks and not has_others:
            return
        for groups, rows in self._rounds:
            if rows is not None and has_low_ranks:
                rows.add(_index(spots[0]), len(spots), x, y)
            for group in groups if has_others else ():
                for index, spot in enumerate(spots):
                    for change in group.adapter.others.get(spot, ()):
                        _add(change, group, x, y, product, index, len(spots))

    def inner(self, layer: int, normed: Tensor, fc_in: Linear) -> Tensor:
        """GELU of `fc_in` and its changes, which come before GELU: [rows, d_model] -> [rows, d_ff]."""
        spot: Spot = ("fc_in", layer)
        if spot not in self._low_rank_spots and spot not in self._other_spots:
            return fc_in.gelu(normed)
        changed = tuple(i for i, group in enumerate(self._groups) if group.adapter.has(spot))
        inner = fc_in(normed)
        self.add(("fc_in",), layer, normed, inner, fc_in)
        _gelu_(inner)
        if changed not in self._unions:
            self._unions[changed] = self._union(changed)
        if (rows := self._unions[changed]) is not None:
            others, changed_inner = fc_in.gelu(normed), inner.index_select(0, rows)
            inner = others.index_copy_(0, rows, changed_inner)
        return inner

    def _union(self, groups: Sequence[int]) -> Tensor | None:
        """The rows of these groups; None for all rows."""
        parts = [self._groups[index].rows for index in groups]
        if any(part is None for part in parts):
            return None
        rows = torch.unique(torch.cat([part for part in parts if part is not None]))
        return None if len(rows) == self._num_rows else rows


def _add(change: Change, group: _Group, x: Tensor, y: Tensor, product: Product, index: int, num_places: int) -> None:
    """Adds a change of some rows at one of the places that lie side by side in y."""
    width = y.shape[1] // num_places
    columns = slice(index * width, (index + 1) * width)
    delta = change(x if group.rows is None else x.index_select(0, group.rows), lambda x: product(x)[:, columns])
    if group.strengths is not None:
        delta = delta * group.strengths
    if group.rows is None:
        y[:, columns] += delta
    else:
        y[:, columns].index_add_(0, group.rows, delta)


def is_native(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the compiled library adds low-rank changes of this type on this device."""
    return device.type == "cpu" and dtype in ELEMENTS and load_library() is not None


def unchanged(x: Tensor) -> Tensor:
    """The product of a spot that has none."""
    return x


def _gelu_(inner: Tensor) -> None:
    """GELU in place. In float32 on a CPU row by row: torch computes the last elements of its threads' parts otherwise
    than the rest, so that in a whole matrix the bits of a row would depend on where it lies.
    """
    is_exact = inner.dtype == torch.float32 and inner.device.type == "cpu"
    for part in inner.unbind() if is_exact else (inner,):
        torch.ops.aten.gelu.out(part, approximate="tanh", out=part)


@dataclass(frozen=True, slots=True)
class LayerChanges:
    """The changes of one layer."""

    changes: Changes
    layer: int

    def add(self, places: Sequence[Place], x: Tensor, y: Tensor, product: Product) -> None:
        """As `Changes.add`."""
        self.changes.add(places, self.layer, x, y, product)

    def inner(self, normed: Tensor, fc_in: Linear) -> Tensor:
        """As `Changes.inner`."""
        return self.changes.inner(self.layer, normed, fc_in)
