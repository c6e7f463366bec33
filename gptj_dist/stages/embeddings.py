"""Makes embeddings: pools hidden states over a request's prompt, chunk by chunk, on the stage that has the layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptj_dist.config import LayerRange
from gptj_dist.engine.plan import Chunk, Embedding, NewRequest
from gptj_dist.model.inputs import Span
from gptj_dist.params import PoolingKind


@dataclass(slots=True)
class _Pool:
    """One request's.

    Args:
        depth: which hidden states, as in `Pooling.layer`.
        pooled: float64 [d_model] of the rows so far: chunks add up to the same float32 however they are cut.
    """

    kind: PoolingKind
    depth: int
    pooled: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Takes in the hidden states [rows, d_model] of the next tokens."""
        if self.kind == "last" or self.pooled is None:
            self.pooled = rows[-1].double() if self.kind == "last" else rows.double().sum(0)
        else:
            self.pooled += rows.double().sum(0)

    def embedding(self, num_tokens: int) -> bytes:
        """The vector, float32, after so many tokens."""
        assert self.pooled is not None, "a request has tokens"
        vector = self.pooled if self.kind == "last" else self.pooled / num_tokens
        return vector.float().cpu().view(torch.uint8).numpy().tobytes()


class EmbeddingPools:
    """Those of all requests whose layer is on one stage; of others it takes no notice.

    Args:
        num_layers: of the whole model.
    """

    def __init__(self, layers: LayerRange, num_layers: int) -> None:
        self._layers = layers
        self._num_layers = num_layers
        self._pools: dict[int, _Pool] = {}

    def meet(self, request: NewRequest) -> None:
        """A request that may ask for an embedding; it begins with its first token."""
        pooling = request.params.pooling
        if pooling is None:
            return
        depth = self._num_layers if pooling.layer is None else pooling.layer
        if self._layers.start < depth <= self._layers.stop or (depth == 0 and self._layers.is_first):
            self._pools[request.request_id] = _Pool(pooling.kind, depth)

    def forget(self, request_id: int) -> None:
        """Whether or not anything is known of it."""
        self._pools.pop(request_id, None)

    def spans_by_depth(self, spans: Sequence[Span]) -> dict[int, list[Span]]:
        """The rows to be taken in, by the depth at which they are."""
        wanted: defaultdict[int, list[Span]] = defaultdict(list)
        for span in spans:
            if (pool := self._pools.get(span.request_id)) is not None:
                wanted[pool.depth].append(span)
        return wanted

    def add(self, request_id: int, rows: Tensor) -> None:
        """Takes in the hidden states [rows, d_model] of a request's next tokens."""
        self._pools[request_id].add(rows)

    def complete(self, chunks: Sequence[Chunk]) -> tuple[Embedding, ...]:
        """The embeddings of requests whose last chunks these are."""
        return tuple(
            Embedding(chunk.request_id, self._pools[chunk.request_id].embedding(chunk.start + len(chunk.token_ids)))
            for chunk in chunks
            if chunk.ends_embedding and chunk.request_id in self._pools
        )
