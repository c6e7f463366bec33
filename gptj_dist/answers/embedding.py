"""The answer to a request for embeddings: vectors of the inputs' hidden states, in OpenAI's shape."""

from __future__ import annotations

import array
import base64
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import TypeVar

from gptj_dist.answers.json_writing import json_bytes
from gptj_dist.answers.merge import merge
from gptj_dist.answers.schema.embeddings import EmbeddingRequest
from gptj_dist.answers.work import Work
from gptj_dist.engine.mailbox import Delta
from gptj_dist.json_types import JsonObject

T = TypeVar("T")

BYTES_PER_US = 16
"""Bytes of float32 numbers that are written in a microsecond."""


class EmbeddingAnswer:
    """A request that was understood and can be served. Nothing is computed before `whole` or `body` is called.

    Args:
        open_streams: starts the computation, a stream for each input.
        num_prompt_tokens: of all inputs.
        work: runs what takes CPU time.

    Attributes:
        most_tokens, num_tokens: none are generated.
    """

    def __init__(
        self,
        request: EmbeddingRequest,
        model: str,
        open_streams: Callable[[], Sequence[AsyncGenerator[Delta, None]]],
        num_prompt_tokens: int,
        work: Work,
    ) -> None:
        self._request = request
        self._model = model
        self._open_streams = open_streams
        self.num_prompt_tokens = num_prompt_tokens
        self._work = work
        self.most_tokens = self.num_tokens = 0

    async def whole(self) -> JsonObject:
        """The response. Raises the error that the request failed with; the other inputs are then cancelled."""
        return await self._written(lambda document: document)

    async def body(self) -> bytes:
        """The response as JSON. Raises as `whole`."""
        return await self._written(json_bytes)

    async def _written(self, write: Callable[[JsonObject], T]) -> T:
        async with aclosing(merge(self._open_streams())) as deltas:
            vector_of = {index: delta.embedding async for index, delta in deltas if delta.embedding is not None}
        vectors = [vector_of[index] for index in sorted(vector_of)]
        cost = sum(map(len, vectors)) // BYTES_PER_US
        return await self._work.run(cost, lambda: write(self._document(vectors)))

    def _document(self, vectors: Sequence[bytes]) -> JsonObject:
        data = [
            {"object": "embedding", "index": index, "embedding": self._encoded(vector)}
            for index, vector in enumerate(vectors)
        ]
        totals = {"prompt_tokens": self.num_prompt_tokens, "total_tokens": self.num_prompt_tokens}
        return {"object": "list", "data": data, "model": self._model, "usage": totals}

    def _encoded(self, vector: bytes) -> str | list[float]:
        """A vector of float32 numbers in the encoding of the request."""
        if self._request.encoding_format == "base64":
            return base64.b64encode(vector).decode()
        return array.array("f", vector).tolist()
