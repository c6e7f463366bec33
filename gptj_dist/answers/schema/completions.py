"""The body of `POST /v1/completions`."""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

from gptj_dist.answers.schema.base import NON_EMPTY, PROMPT_FORMS, Integer, TokenIds, one_of
from gptj_dist.answers.schema.sampling import ChoiceFields
from gptj_dist.errors import InvalidRequestError

PromptField: TypeAlias = Annotated[
    str | Annotated[list[str], NON_EMPTY] | TokenIds | Annotated[list[TokenIds], NON_EMPTY], one_of(PROMPT_FORMS)
]
MAX_BEST_OF = 128


class CompletionRequest(ChoiceFields):
    """A text to be continued, or several.

    Args:
        prompt: a text, several, token ids, or several lists of them; an empty text stands for end of text.
        max_tokens: the most tokens to generate; left out, the checkpoint's `max_new_tokens`, or 16.
        add_special_tokens: begin and end texts with the tokens that the checkpoint asks for, if it does.
        best_of: completions to sample, of which the `n` with the highest mean log probability are returned; with
            `use_beam_search` the number of beams.
        echo: begin the text with the prompt, and its log probabilities with the prompt's.
    """

    prompt: PromptField
    max_tokens: Integer = 16
    add_special_tokens: bool = True
    best_of: Integer | None = None
    echo: bool = False
    logprobs: Integer | None = None
    prompt_logprobs: Integer | None = None

    @property
    def num_sampled(self) -> int:
        return self.n if self.best_of is None else self.best_of

    @property
    def num_completions(self) -> int:
        return len(self.prompts()) * self.num_sampled

    @property
    def most_tokens(self) -> int | None:
        """The most tokens to generate; None if the request leaves them out."""
        return self.max_tokens if "max_tokens" in self.model_fields_set else None

    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one, each text or token ids."""
        return list_prompts(self.prompt)

    def own_params(self) -> dict[str, Any]:
        asked = (self.prompt_logprobs, self.logprobs if self.echo else None)
        picks_best = self.num_streams > self.n
        return {
            "max_tokens": self.max_tokens,
            "best_of": self.best_of if self.use_beam_search else None,
            "logprobs": 0 if picks_best and self.logprobs is None else self.logprobs,
            "prompt_logprobs": max((number for number in asked if number is not None), default=None),
        }

    def check(self) -> None:
        super().check()
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise InvalidRequestError(
                "max_tokens must be at least 1, unless echo or prompt_logprobs ask for the prompt", "max_tokens"
            )
        self.sampling_params()
        if not self.n <= self.num_sampled <= MAX_BEST_OF:
            raise InvalidRequestError(f"best_of must be from n ({self.n}) to {MAX_BEST_OF}", "best_of")
        if self.num_sampled > self.n and self.stream:
            raise InvalidRequestError("best_of cannot be more than n in a stream: the best is known last", "best_of")


def list_prompts(prompt: PromptField) -> list[str | list[int]]:
    """The prompts one by one, each text or token ids."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)
