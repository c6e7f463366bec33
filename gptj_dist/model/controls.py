"""The changes that a request asks for in its logits before they are sampled.

First tokens are ruled out, then biases are added, then penalties are taken, as in vLLM.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gptj_dist.params import SamplingParams


def apply_controls(
    row: Tensor, params: SamplingParams, history: Sequence[int], num_prompt_tokens: int, banned_ids: Sequence[int] = ()
) -> None:
    """Changes one row of logits, float32 [vocab_size]. A request without controls costs some comparisons.

    Args:
        history: the request's tokens so far, those of the prompt first.
        num_prompt_tokens: penalties for presence and frequency count the tokens from here on.
        banned_ids: tokens that must not come at this position.
    """
    if params.allowed_token_ids is not None:
        allowed = _ids(params.allowed_token_ids, row)
        kept = row[allowed]
        row.fill_(-math.inf)
        row[allowed] = kept
    if params.bad_words:
        banned_ids = (*banned_ids, *completing(params.bad_words, history))
    if banned_ids:
        row[_ids(banned_ids, row)] = -math.inf
    for token_id, bias in params.logit_bias:
        row[token_id] += bias
    if params.repetition_penalty != 1:
        begin = max(0, len(history) - params.repetition_penalty_range) if params.repetition_penalty_range > 0 else 0
        seen = _ids(sorted(set(history[begin:])), row)
        logits, penalty = row[seen], params.repetition_penalty
        row[seen] = torch.where(logits > 0, logits / penalty, logits * penalty)
    if params.frequency_penalty or params.presence_penalty:
        generated, counts = torch.unique(_ids(history[num_prompt_tokens:], row), return_counts=True)
        row[generated] -= params.frequency_penalty * counts + params.presence_penalty


def completing(runs: Sequence[Sequence[int]], history: Sequence[int]) -> list[int]:
    """The last tokens of the runs whose other tokens end the history."""
    return [run[-1] for run in runs if list(run[:-1]) == list(history[len(history) - len(run) + 1 :])]


def _ids(token_ids: Sequence[int], row: Tensor) -> Tensor:
    return torch.tensor(token_ids, dtype=torch.int64, device=row.device)
