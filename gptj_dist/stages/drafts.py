"""Decides which drafts of a micro-batch are accepted. Knows no model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from gptj_dist.engine.plan import Chunk
from gptj_dist.params import TokenLogprobs


def accept(
    chunks: Sequence[Chunk], token_ids: list[int], logprobs: tuple[TokenLogprobs | None, ...]
) -> tuple[list[int], tuple[TokenLogprobs | None, ...], tuple[int, ...]]:
    """Accepts the drafts that are what was sampled in their place. What was sampled after other drafts is dropped.

    Args:
        chunks: those whose rows were sampled.
        token_ids: sampled after the last token of each chunk, and after each of its drafts.
        logprobs: one for each of `token_ids`, or empty.

    Returns:
        `Result.token_ids`, `Result.logprobs` and `Result.num_accepted`.
    """
    if not any(chunk.num_drafts for chunk in chunks):
        return token_ids, logprobs, ()
    kept: list[int] = []
    num_accepted: list[int] = []
    row = 0
    for chunk in chunks:
        drafts = chunk.drafts
        is_equal = [draft == token for draft, token in zip(drafts, token_ids[row : row + len(drafts)], strict=True)]
        num_equal = sum(takewhile(bool, is_equal))
        kept += range(row, row + num_equal + 1)
        num_accepted += [num_equal] if drafts else []
        row += 1 + len(drafts)
    return [token_ids[row] for row in kept], tuple(logprobs[row] for row in kept if logprobs), tuple(num_accepted)
