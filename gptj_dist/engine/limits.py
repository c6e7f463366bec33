"""Limits that a request is checked against before it is queued, so that none waits that can never be served."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from gptj_dist.config import BLOCK_SIZE_TOKENS
from gptj_dist.errors import InvalidRequestError, RequestTooLongError, excerpt
from gptj_dist.params import BEAM_DEFAULTS, SamplingParams
from gptj_dist.sizes import ceil_div
from gptj_dist.token_rules import TokenRules

MAX_LISTED_TOKENS = 1024
"""Token ids in each of a request's lists: the lists go to every stage."""


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Limits of one pipeline.

    Args:
        rules: the model's, for its tokens.
        max_model_len: the most tokens of prompt and output together.
        kv_tokens: tokens that the KV cache holds.
        num_layers: layers of the whole model.
        max_batch_size: the most requests that run at once.
    """

    rules: TokenRules
    max_model_len: int
    kv_tokens: int
    num_layers: int
    max_batch_size: int = sys.maxsize

    def check(self, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        """Raises InvalidRequestError, or RequestTooLongError, if the request cannot be served."""
        if not prompt_ids:
            raise InvalidRequestError("prompt has no tokens: GPT-J continues a text, so give it at least one", "prompt")
        self.check_vocabulary("prompt", prompt_ids)
        if len(prompt_ids) + params.max_tokens > self.max_model_len:
            raise RequestTooLongError(
                f"the prompt's {len(prompt_ids)} tokens and max_tokens {params.max_tokens} together exceed the context "
                f"window of {self.max_model_len} tokens",
                "max_tokens" if len(prompt_ids) < self.max_model_len else "prompt",
            )
        for name, token_ids in params.listed_token_ids.items():
            if len(token_ids) > MAX_LISTED_TOKENS:
                raise InvalidRequestError(f"{name} holds {len(token_ids)} tokens, at most {MAX_LISTED_TOKENS}", name)
            self.check_vocabulary(name, token_ids)
        self.rules.check(params)
        layer = None if params.pooling is None else params.pooling.layer
        if layer is not None and not 0 <= layer <= self.num_layers:
            raise InvalidRequestError(f"layer must be from 0 to {self.num_layers}, got {excerpt(layer)}", "layer")
        for name, default in () if params.use_beam_search else BEAM_DEFAULTS.items():
            if vars(params)[name] != default:
                raise InvalidRequestError(f"{name} needs use_beam_search, got {excerpt(vars(params)[name])}", name)
        if params.num_beams > self.max_batch_size:
            raise InvalidRequestError(
                f"a beam search has at most {self.max_batch_size} beams here, got {params.num_beams}", "n"
            )
        check_fits_cache(prompt_ids, params, self.kv_tokens)

    def check_vocabulary(self, name: str, token_ids: Sequence[int]) -> None:
        """Raises InvalidRequestError if a token is not in the vocabulary; `name` is the field that holds the tokens."""
        wrong = next((token_id for token_id in token_ids if not 0 <= token_id < self.rules.vocab_size), None)
        if wrong is not None:
            raise InvalidRequestError(
                f"{name} holds token id {excerpt(wrong)}, the vocabulary ends at {self.rules.vocab_size - 1}", name
            )


def check_fits_cache(
    prompt_ids: Sequence[int],
    params: SamplingParams,
    kv_tokens: int,
    block_size: int = BLOCK_SIZE_TOKENS,
    can_share_blocks: bool = True,
) -> None:
    """Raises RequestTooLongError if a request does not fit the KV cache even when it runs alone.

    Args:
        kv_tokens: tokens that the KV cache holds, in blocks of `block_size`.
        can_share_blocks: whether the beams of a search share blocks.
    """
    num_tokens = len(prompt_ids) + max(params.max_tokens, 1) - 1  # the last one is never computed
    if params.num_beams > 1:
        num_shared = len(prompt_ids) // block_size if can_share_blocks else 0
        num_own = ceil_div(num_tokens, block_size) - num_shared
        num_tokens = block_size * (num_shared + params.num_beams * num_own)
    if num_tokens > kv_tokens:
        beams = f" in {params.num_beams} beams" if params.num_beams > 1 else ""
        raise RequestTooLongError(
            f"the prompt's {len(prompt_ids)} tokens and max_tokens {params.max_tokens}{beams} need room for "
            f"{num_tokens} tokens, but the KV cache holds {kv_tokens} in all",
            "max_tokens",
        )
