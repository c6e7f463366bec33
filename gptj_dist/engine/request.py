"""One sequence to be continued, as the scheduler sees it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from gptj_dist.engine.plan import NewRequest, PromptLogprobs
from gptj_dist.params import SamplingControls, SamplingParams, TokenLogprobs


class FinishReason(StrEnum):
    """Why a request ended, in OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"
    CONTENT_FILTER = "content_filter"


@dataclass(slots=True, eq=False)
class Request:
    """A request and how far it has got.

    Args:
        request_id: unique, and larger for a later arrival.
        prompt_ids: one or more tokens.
        params: how to sample; `params.n` is for the caller, this is one completion.
        noise_key: 64 bits that determine all of the request's sampling noise.
        log_id: what logs call it; None for one that is neither logged nor counted.

    Attributes:
        token_ids: the prompt and what was generated so far.
        num_computed: tokens whose keys and values are computed, or will be by plans in flight.
        blocks: KV blocks held, in order of position.
        is_running: it is one of those that plans are made of, not waiting.
        is_awaiting_token: a plan in flight samples the request's next token.
        prompt_logprobs: of the prompt's tokens from the second on, where they are asked for.
    """

    request_id: int
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    noise_key: int
    log_id: str | None = None
    token_ids: list[int] = field(init=False)
    num_computed: int = field(init=False, default=0)
    blocks: list[int] = field(init=False, default_factory=list)
    is_running: bool = field(init=False, default=False)
    is_awaiting_token: bool = field(init=False, default=False)
    prompt_logprobs: list[TokenLogprobs] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_uncomputed(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.prompt_ids)

    def append(self, token_id: int, eos_token_id: int) -> FinishReason | None:
        """Takes a sampled token; returns the reason if the request ends with it."""
        self.is_awaiting_token = False
        if self.params.max_tokens == 0:
            return FinishReason.LENGTH
        self.token_ids.append(token_id)
        if token_id in self.params.stop_token_ids or (token_id == eos_token_id and not self.params.ignore_eos):
            return FinishReason.STOP
        return FinishReason.LENGTH if self.num_output_tokens == self.params.max_tokens else None

    def learn(self, told: PromptLogprobs) -> None:
        """Takes log probabilities of its prompt; those known before a preemption come again."""
        self.prompt_logprobs += told.tokens[len(self.prompt_logprobs) + 1 - told.start :]

    def next_prompt_id(self, stop: int) -> int | None:
        """The prompt's token at `stop`, if its log probability is asked for."""
        is_told = self.params.prompt_logprobs is not None and stop < len(self.prompt_ids)
        return self.prompt_ids[stop] if is_told else None

    def introduction(self) -> NewRequest:
        """The request as the stages are told of it."""
        return NewRequest(
            request_id=self.request_id,
            temperature=self.params.temperature,
            top_p=self.params.top_p,
            top_k=self.params.top_k,
            min_p=self.params.min_p,
            noise_key=self.noise_key,
            min_position=len(self.prompt_ids) + self.params.min_tokens,
            controls=self._controls(),
            log_id=self.log_id,
        )

    def _controls(self) -> SamplingControls | None:
        params = self.params
        controls = SamplingControls(
            num_prompt_tokens=len(self.prompt_ids),
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            repetition_penalty=params.repetition_penalty,
            logit_bias=params.logit_bias,
            allowed_token_ids=params.allowed_token_ids,
            bad_token_ids=params.bad_token_ids,
            early_ids=params.stop_token_ids if params.min_tokens else (),
            logprobs=params.logprobs,
            prompt_logprobs=params.prompt_logprobs,
        )
        is_usual = controls == SamplingControls(len(self.prompt_ids), 0.0, 0.0, 1.0, (), None, (), (), None, None)
        return None if is_usual else controls
