"""The record of a request: all that is needed to go on with it, in any engine. Plain data."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gptj_dist.params import SamplingParams


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One completion of a prompt, or its embedding, as far as it has come.

    Everything else follows from it. Noise depends on the key and the position alone. Log probabilities of the prompt
    are returned with the first token, so a record with tokens does not return them again.

    Args:
        prompt_ids: one or more.
        params: its parameters; a record is one completion, whatever `params.n` is.
        noise_key: 64 bits that determine all of its sampling noise.
        log_id: its name in logs; None for one that is neither logged nor counted.
        token_ids: generated so far.
        num_moves: pipelines that were lost while they served the request.
        key: name of the client's key where several keys share the server.
        prediction_ids: what its client expects to be generated.
        is_resumed: whether its client asked for the rest after its connection broke.
        session: what its client calls the conversation or task that it belongs to.
        weights: that `token_ids` were generated with; empty if there are none.

    Raises:
        ValueError: the completion has all its tokens.
    """

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    noise_key: int
    log_id: str | None = None
    token_ids: tuple[int, ...] = ()
    num_moves: int = 0
    key: str | None = None
    is_resumed: bool = False
    prediction_ids: tuple[int, ...] = ()
    session: str | None = None
    weights: str = ""

    def __post_init__(self) -> None:
        if self.token_ids and len(self.token_ids) >= self.params.max_tokens:
            raise ValueError(f"a record has {len(self.token_ids)} of {self.params.max_tokens} tokens: nothing is left")

    @property
    def is_accepted(self) -> bool:
        """Whether a pipeline had accepted it before: it is not refused, and goes before new requests."""
        return self.is_resumed or self.num_moves > 0

    def resumed(self, token_ids: Sequence[int], weights: str) -> RequestRecord:
        """The record of a request that goes on after these tokens, at another connection."""
        return replace(self, token_ids=tuple(token_ids), weights=weights, is_resumed=True)

    def moved(self, new_token_ids: Sequence[int], weights: str) -> RequestRecord:
        """The record after the loss of a pipeline, which had generated these tokens."""
        token_ids = (*self.token_ids, *new_token_ids)
        return replace(self, token_ids=token_ids, weights=weights or self.weights, num_moves=self.num_moves + 1)


def new_records(
    prompt_ids: Sequence[int],
    params: SamplingParams,
    num_choices: int,
    log_id: str | None = None,
    prediction_ids: tuple[int, ...] = (),
) -> list[RequestRecord]:
    """Records of completions of one prompt, which have not begun. A beam search is one, whatever it finds."""
    prompt = tuple(prompt_ids)
    num_choices = 1 if params.use_beam_search else num_choices
    return [
        RequestRecord(prompt, params, noise_key(params.seed, choice), log_id, prediction_ids=prediction_ids)
        for choice in range(num_choices)
    ]


def noise_key(seed: int | None, choice: int) -> int:
    """64 bits that determine a completion's sampling noise; random ones without a seed."""
    if seed is None:
        return secrets.randbits(64)
    message = (seed % 2**64).to_bytes(8, "little") + choice.to_bytes(8, "little")
    digest = hashlib.blake2b(message, digest_size=8)
    return int.from_bytes(digest.digest(), "little")
