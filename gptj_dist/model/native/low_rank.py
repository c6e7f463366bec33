"""Sums of low-rank products, with matrices of its own for each row, by the compiled library. For CPUs."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from gptj_dist.model.native.library import Adapted, LowRank
from gptj_dist.model.native.operands import address_of
from gptj_dist.model.native.product import in_panels

TILE_ROWS = 4
"""Rows with the same matrices that are computed together."""

INPUTS = 32
"""Rows of `a` are padded to a multiple."""

MISFIT = 2
"""The library's answer to matrices of other widths."""


class LowRankTable:
    """Matrices of `(x @ a.T) @ b.T` for some of a number of places.

    Args:
        matrices: by place, a [r, in_features] and b [out_features, r] on the CPU; b is copied, in the library's order.
        dtype: of the matrices, float32 or bfloat16.

    Raises:
        TypeError: a matrix is of another type, or on a GPU.
        ValueError: the shapes of two matrices do not fit each other.
        IndexError: there is no such place.
    """

    def __init__(self, matrices: Mapping[int, tuple[Tensor, Tensor]], num_places: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.places = (LowRank * num_places)()
        self._read_by_library = []
        for place, (a, b) in matrices.items():
            (rank, depth), num_columns = a.shape, len(b)
            address_of("a", a.contiguous(), dtype, (rank, depth))
            address_of("b", b.contiguous(), dtype, (num_columns, rank))
            kept = functional.pad(a, (0, -depth % INPUTS)).contiguous(), in_panels(b)
            self._read_by_library.append(kept)
            self.places[place] = LowRank(rank, depth, num_columns, *(tensor.data_ptr() for tensor in kept))


class LowRankRows:
    """The rows of a micro-batch that have matrices. A row is in one group, whose rows have the same matrices.

    The result of a row has the same bits whatever rows are beside it.

    Args:
        groups: a table, the rows that have it, and their strengths.
        num_rows: of the micro-batch.

    Raises:
        IndexError: the micro-batch does not have such a row, or a row is in two groups.
        ValueError: the tables are of different types or lengths.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        groups: Sequence[tuple[LowRankTable, Sequence[int], Sequence[float]]],
        num_rows: int,
    ) -> None:
        tables = [table for table, _, _ in groups]
        kinds = {(table.dtype, len(table.places)) for table in tables}
        if len(kinds) != 1:
            raise ValueError(f"tables must be of one type and length, got {kinds}")
        [(self._dtype, self._num_places)] = kinds
        rows = [row for _, own, _ in groups for row in own]
        strengths = [
            strength for _, own, own_strengths in groups for _, strength in zip(own, own_strengths, strict=True)
        ]
        if not all(0 <= row < num_rows for row in rows) or len(set(rows)) < len(rows):
            raise IndexError(f"each row must be one of {num_rows} and in one group, got {rows}")
        tiles, first = [], 0
        for index, (_, own, _) in enumerate(groups):
            stop = first + len(own)
            tiles += [(index, at, min(TILE_ROWS, stop - at)) for at in range(first, stop, TILE_ROWS)]
            first = stop
        tensors = (torch.tensor(tiles), torch.tensor(rows), torch.tensor(strengths))
        addresses = (ctypes.c_void_p * len(tables))(*[ctypes.addressof(table.places) for table in tables])
        # Kept alive, because the library reads them by their addresses.
        self._read_by_library = (tables, tensors, addresses)
        self._adapted = Adapted(num_tiles=len(tiles), num_groups=len(groups), tables=ctypes.addressof(addresses))
        self._adapted.tiles, self._adapted.rows, self._adapted.strengths = (tensor.data_ptr() for tensor in tensors)
        is_float = self._dtype == torch.float32
        self._add = library.add_low_rank_float32 if is_float else library.add_low_rank_bfloat16
        self._num_rows = num_rows

    def add(self, first_place: int, num_places: int, x: Tensor, y: Tensor) -> None:
        """Adds the products, times the strengths, to y.

        Args:
            x: [rows, in_features], of the tables' type.
            y: [rows, num_places * out_features], of the same type. May be x.

        Raises:
            TypeError: a tensor is of another type or on a GPU.
            ValueError: a tensor has another shape, or gaps within a row; rows may lie apart.
            IndexError: the tables do not have these places.
            MemoryError: there is no memory for the library's scratch space.
        """
        if not 0 <= first_place <= first_place + num_places <= self._num_places:
            raise IndexError(f"places must be among {self._num_places}, got {num_places} from {first_place} on")
        adapted, (depth, num_outputs) = self._adapted, (x.shape[1], y.shape[1])
        adapted.num_places, adapted.depth, adapted.num_columns = num_places, depth, num_outputs // num_places
        adapted.x_stride, adapted.y_stride = x.stride(0), y.stride(0)
        x_address = address_of("x", x, self._dtype, (self._num_rows, depth))
        y_address = address_of("y", y, self._dtype, (self._num_rows, num_outputs))
        failed = self._add(adapted, first_place, x_address, y_address, torch.get_num_threads())
        if failed == MISFIT:
            raise ValueError(f"x and y must have the widths of the matrices, got {depth} and {adapted.num_columns}")
        if failed:
            raise MemoryError(f"no memory for low-rank products of {self._num_rows} rows")
