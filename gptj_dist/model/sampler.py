"""Picks tokens from logits. The noise is a function of (request, position) alone, so a request samples the same tokens
whoever shares its batch, however the layers are cut, and after a restart. Knows no text.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """How one row is sampled.

    Args:
        temperature: 0 is greedy.
        top_p, top_k, min_p: as in `SamplingParams`.
        noise_key: 64 bits of the request.
        position: where the sampled token will stand in its sequence.
        may_end: whether end of text may be sampled.
    """

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    noise_key: int
    position: int
    may_end: bool


class Sampler:
    """Samples rows of logits.

    Args:
        unsampled_ids: tokens that are never sampled, such as rows of the embedding without a tokenizer entry.
        eos_token_id: the token that ends a text.
    """

    def __init__(self, unsampled_ids: Sequence[int], eos_token_id: int, device: torch.device) -> None:
        self._unsampled_ids = torch.tensor(unsampled_ids, dtype=torch.int64, device=device)
        self._eos_token_id = eos_token_id

    def __call__(self, logits: Tensor, specs: Sequence[SampleSpec]) -> list[int]:
        """One token for each row of float32 [rows, vocab_size]; the logits are overwritten."""
        logits.index_fill_(1, self._unsampled_ids, -math.inf)
        for row, spec in zip(logits, specs, strict=True):
            if not spec.may_end:
                row[self._eos_token_id] = -math.inf
        tokens: list[int] = logits.argmax(dim=-1).tolist()
        for index, spec in enumerate(specs):
            if spec.temperature > 0:
                tokens[index] = _sample_row(logits[index], spec)
        return tokens


def uniform_noise(noise_key: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits, from a counter: no state is kept anywhere."""
    message = noise_key.to_bytes(8, "little") + position.to_bytes(8, "little")
    digest = hashlib.blake2b(message, digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def _sample_row(logits: Tensor, spec: SampleSpec) -> int:
    """Inverts the cumulative distribution of the tokens kept."""
    scaled = (logits - logits.max()).double() / spec.temperature  # never overflows: the likeliest token is at 0
    probabilities, token_ids = _keep(torch.softmax(scaled, dim=-1), spec)
    cumulative = probabilities.cumsum(0)
    total = cumulative[-1:]
    drawn = torch.searchsorted(cumulative, uniform_noise(spec.noise_key, spec.position) * total, right=True)
    last = torch.searchsorted(cumulative, total)  # rounding must not carry the draw past the last possible token
    index = int(torch.minimum(drawn, last))
    return index if token_ids is None else int(token_ids[index])


def _keep(probabilities: Tensor, spec: SampleSpec) -> tuple[Tensor, Tensor | None]:
    """The probabilities that pass top_k, top_p and min_p, and their tokens' ids: None for all of them, in order.

    At least the likeliest token passes.
    """
    token_ids = None
    if spec.top_k > 0:
        probabilities, token_ids = torch.topk(probabilities, min(spec.top_k, len(probabilities)))
    elif spec.top_p < 1:
        probabilities, token_ids = torch.sort(probabilities, descending=True, stable=True)
    if spec.top_p < 1:
        cumulative = probabilities.cumsum(0)
        num_kept = int((cumulative < spec.top_p * cumulative[-1]).sum()) + 1
        probabilities = probabilities[:num_kept]
    if spec.min_p > 0:
        probabilities = probabilities.where(probabilities >= spec.min_p * probabilities.max(), 0)
    return probabilities, token_ids
