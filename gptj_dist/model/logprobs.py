"""Log probabilities of tokens, from the model's own logits. Knows no requests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gptj_dist.params import TokenLogprobs


def token_logprobs(logits: Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprobs]:
    """The log probabilities of one token in each row, and of the likeliest tokens.

    Args:
        logits: float32 [rows, vocab_size].
        token_ids: one token for each row.
        num_top: for each row, the number of likeliest tokens to return.
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    own = logprobs.gather(1, torch.tensor(token_ids, device=logits.device)[:, None])
    ranks = 1 + (logprobs > own).sum(dim=-1)
    most = min(max(num_top), logits.shape[1])
    top, top_ids = torch.topk(logprobs, most) if most else (logprobs[:, :0], logprobs[:, :0])
    return [
        TokenLogprobs(token_id, logprob, rank, tuple(zip(ids[:number], values[:number], strict=True)))
        for token_id, (logprob,), rank, ids, values, number in zip(
            token_ids, own.tolist(), ranks.tolist(), top_ids.tolist(), top.tolist(), num_top, strict=True
        )
    ]
