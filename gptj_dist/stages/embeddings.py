"""Computes embeddings: pools the hidden states of a prompt chunk by chunk, on the stage with the requested layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gptj_dist.config import LayerRange
from gptj_dist.engine.plan import Chunk, Embedding, NewRequest
from gptj_dist.model.inputs import Span
from gptj_dist.params import PoolingKind


@dataclass(slots=True)
class _Pool:
    """The pool of one request.

    Args:
        depth: which hidden states, as in `Pooling.layer`.
        pooled: float64 [d_model], pooled over the rows so far. float64 gives the same float32 for every chunking.
    """

    kind: PoolingKind
    depth: int
    pooled: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Adds the hidden states [rows, d_model] of the next tokens."""
        if self.kind == "last" or self.pooled is None:
            self.pooled = rows[-1].double() if self.kind == "last" else rows.double().sum(0)
        else:
            self.pooled += rows.double().sum(0)

    def embedding(self, num_tokens: int) -> bytes:
        """The bytes of the float32 vector, after `num_tokens` tokens."""
        assert self.pooled is not None, "a request has tokens"
        vector = self.pooled if self.kind == "last" else self.pooled / num_tokens
        return vector.float().cpu().view(torch.uint8).numpy().tobytes()


class MovedPool(NamedTuple):
    """A pool on its way to another stage.

    Args:
        pooled: float64 [d_model]; None before the first rows.
    """

    request_id: int
    kind: PoolingKind
    depth: int
    pooled: list[float] | None


class EmbeddingPools:
    """The pools of all requests whose layer is on this stage. Ignores other requests.

    Args:
        layers: the stage's layers.
        num_layers: layers of the whole model.
    """

    def __init__(self, layers: LayerRange, num_layers: int) -> None:
        self._layers = layers
        self._num_layers = num_layers
        self._pools: dict[int, _Pool] = {}

    def register(self, request: NewRequest) -> None:
        """Registers a new request. Makes a pool if the request asks for an embedding of a layer on this stage."""
        pooling = request.params.pooling
        if pooling is None:
            return
        depth = self._num_layers if pooling.layer is None else pooling.layer
        if self._has(depth):
            self._pools[request.request_id] = _Pool(pooling.kind, depth)

    def move_to(self, layers: LayerRange, taken: Iterable[MovedPool], device: torch.device) -> list[MovedPool]:
        """The stage has these layers from now on, and the pools of those that it did not have.

        Returns:
            The pools of layers that it no longer has.
        """
        self._layers = layers
        left = [
            MovedPool(id_, pool.kind, pool.depth, None if pool.pooled is None else pool.pooled.tolist())
            for id_, pool in self._pools.items()
            if not self._has(pool.depth)
        ]
        for moved in left:
            del self._pools[moved.request_id]
        for id_, kind, depth, pooled in taken:
            on_device = None if pooled is None else torch.tensor(pooled, dtype=torch.float64, device=device)
            self._pools[id_] = _Pool(kind, depth, on_device)
        return left

    def release(self, request_id: int) -> None:
        """Drops the request's pool, if it has one."""
        self._pools.pop(request_id, None)

    def spans_by_depth(self, spans: Sequence[Span]) -> dict[int, list[Span]]:
        """Spans of the rows to pool, by the depth at which they are pooled."""
        wanted: defaultdict[int, list[Span]] = defaultdict(list)
        for span in spans:
            if (pool := self._pools.get(span.request_id)) is not None:
                wanted[pool.depth].append(span)
        return wanted

    def add(self, request_id: int, rows: Tensor) -> None:
        """Adds the hidden states [rows, d_model] of a request's next tokens."""
        self._pools[request_id].add(rows)

    def complete(self, chunks: Sequence[Chunk]) -> tuple[Embedding, ...]:
        """The embeddings of the requests that these chunks complete."""
        return tuple(
            Embedding(chunk.request_id, self._pools[chunk.request_id].embedding(chunk.start + len(chunk.token_ids)))
            for chunk in chunks
            if chunk.ends_embedding and chunk.request_id in self._pools
        )

    def _has(self, depth: int) -> bool:
        return self._layers.start < depth <= self._layers.stop or (depth == 0 and self._layers.is_first)
