"""What a request asks to be done to its logits before they are sampled.

First tokens are ruled out, then biases are added, then the penalties are taken, as in vLLM.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gptj_dist.params import SamplingControls


def apply_controls(row: Tensor, controls: SamplingControls, history: Sequence[int], may_end: bool) -> None:
    """Changes one row of logits, float32 [vocab_size].

    Args:
        history: the request's tokens so far; only looked at where the controls need it.
        may_end: whether tokens that end the request may come.
    """
    if controls.allowed_token_ids is not None:
        allowed = _ids(controls.allowed_token_ids, row)
        kept = row[allowed]
        row.fill_(-math.inf)
        row[allowed] = kept
    banned = [*_completing(controls.bad_token_ids, history), *(() if may_end else controls.early_ids)]
    if banned:
        row[_ids(banned, row)] = -math.inf
    for token_id, bias in controls.logit_bias:
        row[token_id] += bias
    if controls.repetition_penalty != 1:
        seen = _ids(sorted(set(history)), row)
        logits, penalty = row[seen], controls.repetition_penalty
        row[seen] = torch.where(logits > 0, logits / penalty, logits * penalty)
    if controls.frequency_penalty or controls.presence_penalty:
        generated, counts = torch.unique(_ids(history[controls.num_prompt_tokens :], row), return_counts=True)
        row[generated] -= controls.frequency_penalty * counts + controls.presence_penalty


def _completing(runs: Sequence[Sequence[int]], history: Sequence[int]) -> list[int]:
    """The last tokens of those runs whose other tokens have just come."""
    return [run[-1] for run in runs if list(run[:-1]) == list(history[len(history) - len(run) + 1 :])]


def _ids(token_ids: Sequence[int], row: Tensor) -> Tensor:
    return torch.tensor(token_ids, dtype=torch.int64, device=row.device)
