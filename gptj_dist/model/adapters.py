"""Adapters: changes of a model that some rows of a micro-batch have and others do not.

A row's result has the same bits whatever other rows there are, with adapters or without: each adapter is multiplied
with its own rows, by products that have this property, and rows without one are computed as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from gptj_dist.model.inputs import to_device
from gptj_dist.model.linear import Linear, make_linear

Place = Literal["norm", "q", "k", "v", "out", "fc_in", "fc_out", "hidden", "wte", "final", "lm_head"]
"""What a change is added to: the output of a layer's LayerNorm, the result of a layer's product, a layer's output, the
embedding, the output of the last LayerNorm, the logits."""

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


@dataclass(frozen=True, slots=True)
class Adapter:
    """The changes of one adapter on one stage."""

    changes: Mapping[Spot, Sequence[Change]]


@dataclass(frozen=True, slots=True)
class _Group:
    """The rows that have one adapter.

    Args:
        rows: int64 [n], ascending; None for all rows of the micro-batch.
        strengths: [n, 1]; None if all are 1.
    """

    adapter: Adapter
    rows: Tensor | None
    strengths: Tensor | None


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


@dataclass(slots=True)
class Changes:
    """The adapters of a micro-batch's rows.

    Args:
        num_rows: of the micro-batch.
    """

    groups: tuple[_Group, ...]
    num_rows: int
    _unions: dict[tuple[int, ...], Tensor | None] = field(default_factory=dict)

    @classmethod
    def of(cls, row_adapters: Iterable[RowAdapter], num_rows: int, dtype: torch.dtype, device: torch.device) -> Changes:
        """The changes of rows, which may have several adapters each or none."""
        by_key: dict[tuple[str, ...], list[RowAdapter]] = {}
        for each in row_adapters:
            by_key.setdefault(each.key, []).append(each)
        groups = []
        for _, members in sorted(by_key.items()):
            indices = [row for member in members for row in member.rows]
            strengths = [member.strength for member in members for _ in member.rows]
            rows = None if len(indices) == num_rows else to_device(torch.tensor(indices), device)
            scales = None
            if any(strength != 1 for strength in strengths):
                scales = to_device(torch.tensor(strengths, dtype=dtype)[:, None], device)
            groups.append(_Group(members[0].adapter, rows, scales))
        return cls(tuple(groups), num_rows)

    def add(self, place: Place, layer: int | None, x: Tensor, y: Tensor, product: Product) -> None:
        """Adds to the results y [rows, out_features] what the adapters change at a spot.

        Args:
            x: the inputs of all rows.
            product: see `Change`.
        """
        for group in self.groups:
            for change in group.adapter.changes.get((place, layer), ()):
                delta = change(x if group.rows is None else x.index_select(0, group.rows), product)
                if group.strengths is not None:
                    delta = delta * group.strengths
                if group.rows is None:
                    y += delta
                else:
                    y.index_add_(0, group.rows, delta)

    def inner(self, layer: int, normed: Tensor, fc_in: Linear) -> Tensor:
        """GELU of `fc_in` and its changes, which come before GELU: [rows, d_model] -> [rows, d_ff]."""
        changed = tuple(i for i, group in enumerate(self.groups) if ("fc_in", layer) in group.adapter.changes)
        if not changed:
            return fc_in.gelu(normed)
        inner = fc_in(normed)
        self.add("fc_in", layer, normed, inner, fc_in)
        _gelu_(inner)
        if changed not in self._unions:
            self._unions[changed] = self._union(changed)
        if (rows := self._unions[changed]) is not None:
            others, changed_inner = fc_in.gelu(normed), inner.index_select(0, rows)
            inner = others.index_copy_(0, rows, changed_inner)
        return inner

    def _union(self, groups: Sequence[int]) -> Tensor | None:
        """The rows of these groups; None for all rows."""
        parts = [self.groups[index].rows for index in groups]
        if any(part is None for part in parts):
            return None
        rows = torch.unique(torch.cat([part for part in parts if part is not None]))
        return None if len(rows) == self.num_rows else rows


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

    def add(self, place: Place, x: Tensor, y: Tensor, product: Product) -> None:
        """As `Changes.add`."""
        self.changes.add(place, self.layer, x, y, product)

    def inner(self, normed: Tensor, fc_in: Linear) -> Tensor:
        """As `Changes.inner`."""
        return self.changes.inner(self.layer, normed, fc_in)
