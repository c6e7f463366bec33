"""Limits that a request is checked against before it is queued, so that none waits that can never be served."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gptj_dist.errors import InvalidRequestError, RequestTooLongError, excerpt
from gptj_dist.params import SamplingParams
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
    """

    rules: TokenRules
    max_model_len: int
    kv_tokens: int
    num_layers: int

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
        check_fits_cache(len(prompt_ids), params.max_tokens, self.kv_tokens)

    def check_vocabulary(self, name: str, token_ids: Sequence[int]) -> None:
        """Raises InvalidRequestError if a token is not in the vocabulary; `name` is the field that holds the tokens."""
        wrong = next((token_id for token_id in token_ids if not 0 <= token_id < self.rules.vocab_size), None)
        if wrong is not None:
            raise InvalidRequestError(
                f"{name} holds token id {excerpt(wrong)}, the vocabulary ends at {self.rules.vocab_size - 1}", name
            )


def check_fits_cache(num_prompt_tokens: int, max_tokens: int, kv_tokens: int) -> None:
    """Raises RequestTooLongError if a request of this size does not fit the KV cache even when it runs alone."""
    num_tokens = num_prompt_tokens + max(max_tokens, 1) - 1  # the last one is never computed
    if num_tokens > kv_tokens:
        raise RequestTooLongError(
            f"the prompt's {num_prompt_tokens} tokens and max_tokens {max_tokens} need room for {num_tokens} tokens, "
            f"but the KV cache holds {kv_tokens} in all",
            "max_tokens",
        )
