"""Changes by adapters that hold new weights: the product with what these have more than the old ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gptj_dist.model.adapters import Product
from gptj_dist.model.linear import make_linear


class WeightChange:
    """`x @ difference.T`, for a difference [out_features, in_features] of any rank."""

    def __init__(self, difference: Tensor) -> None:
        self._linear = make_linear(difference, None)

    def __call__(self, x: Tensor, _product: Product, /) -> Tensor:
        return self._linear(x)


class EmbeddingChange:
    """Rows that are added to those of the embedding, where x are token ids [rows].

    Args:
        difference: [len(token_ids), d_model].
        token_ids: None for all of the vocabulary.
    """

    def __init__(self, difference: Tensor, token_ids: Sequence[int] | None, vocab_size: int) -> None:
        self._table = difference
        self._row_of: Tensor | None = None
        if token_ids is not None:
            num_rows = len(token_ids)
            self._table = torch.cat((difference, torch.zeros_like(difference[:1])))
            self._row_of = torch.full((vocab_size,), num_rows, device=difference.device)
            self._row_of[list(token_ids)] = torch.arange(num_rows, device=difference.device)

    def __call__(self, x: Tensor, _product: Product, /) -> Tensor:
        return self._table[x if self._row_of is None else self._row_of[x]]
