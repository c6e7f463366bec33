"""Which tokens of a checkpoint may be sampled, and which ones end a text. Stdlib only."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from gptj_dist.errors import InvalidRequestError
from gptj_dist.params import SamplingParams


@dataclass(frozen=True, slots=True)
class TokenRules:
    """A checkpoint's rules for its tokens. What a request asks for is added to them.

    Args:
        vocab_size: rows of the embedding; ids are below this.
        eos_token_ids: tokens that end a text.
        spare_ids: rows that stand for no text. They are sampled only where the request or `eos_token_ids` names them.
        suppressed_ids: tokens that are never sampled.
        first_suppressed_ids: tokens that no completion begins with.
        bad_words: runs of two or more tokens; the last of a run is never sampled right after the others.
    """

    vocab_size: int
    eos_token_ids: tuple[int, ...] = ()
    spare_ids: tuple[int, ...] = ()
    suppressed_ids: tuple[int, ...] = ()
    first_suppressed_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()

    def ending_ids(self, params: SamplingParams) -> tuple[int, ...]:
        """Tokens that end the request, and so must not come within its `min_tokens`."""
        return (*self.eos_token_ids, *params.stop_token_ids)

    def check(self, params: SamplingParams) -> None:
        """Refuses a request for which every token is ruled out from the beginning.

        Raises:
            InvalidRequestError: it is such a request.
        """
        if params.max_tokens == 0:
            return
        banned = {*self.suppressed_ids, *self.first_suppressed_ids}
        banned.update(run[0] for run in params.bad_words if len(run) == 1)
        if params.min_tokens:
            banned.update(self.ending_ids(params))
        if params.allowed_token_ids is not None:
            is_any_left = not banned.issuperset(params.allowed_token_ids)
        else:
            is_any_left = self._is_any_left(banned, params)
        if not is_any_left:
            asked = {
                "allowed_token_ids": params.allowed_token_ids,
                "bad_words": params.bad_words,
                "min_tokens": params.min_tokens,
            }
            names = [name for name, value in asked.items() if value]
            reason = " and ".join(names) or "the checkpoint's rules"
            raise InvalidRequestError(f"{reason} leave no token that may be sampled", names[0] if names else None)

    def _is_any_left(self, banned: Collection[int], params: SamplingParams) -> bool:
        if len(banned) + len(self.spare_ids) < self.vocab_size:
            return True
        named = {*self.eos_token_ids, *params.stop_token_ids, *(token_id for token_id, _ in params.logit_bias)}
        spare = set(self.spare_ids) - named
        return any(token_id not in banned and token_id not in spare for token_id in range(self.vocab_size))
