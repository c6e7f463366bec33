"""The fields that completions and chat share: how text is sampled, where it ends, how it is sent."""

from __future__ import annotations

from typing import ClassVar, TypeAlias

from gptj_dist.answers.schema.base import Body, Ids, Neutral, Strings
from gptj_dist.errors import InvalidRequestError
from gptj_dist.params import SamplingParams

Stop: TypeAlias = str | Strings
MAX_TIMEOUT_S = 86_400.0

NEUTRAL_FIELDS: Neutral = {
    # GPT-J's tokenizer has no tokens to add, so both values ask for the same.
    "add_special_tokens": (True, False),
    "cache_salt": (),
    "ec_transfer_params": (),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_whitespace_pattern": (),
    "kv_transfer_params": (),
    "length_penalty": (1,),
    "logits_processors": (),
    "logprob_token_ids": (),
    "prompt_embeds": (),
    "repetition_detection": (),
    "request_id": (),
    "response_format": ({"type": "text"},),
    "return_token_offsets": (False,),
    "return_tokens_as_token_ids": (False,),
    "session_id": (),
    "spaces_between_special_tokens": (True,),
    "stream_interval": (),
    "structured_outputs": (),
    "thinking_token_budget": (),
    "truncation_side": (),
    "use_beam_search": (False,),
    "vllm_xargs": (),
    "watermarking": (False,),
}


class StreamOptions(Body):
    """Options of a streamed response.

    Args:
        include_usage: tell the numbers of tokens in a last event of its own.
    """

    neutral: ClassVar[Neutral] = {"continuous_usage_stats": (False,), "include_obfuscation": (False,)}

    include_usage: bool = False


class SamplingFields(Body):
    """What completions and chat have in common; names and meanings are those of `SamplingParams` where it has them.

    Args:
        model: one of the names in `GET /v1/models`; null takes the model that there is.
        stream: send the text as it is made, as server-sent events.
        stream_options: only with `stream`.
        user: goes to the log and changes nothing, as at OpenAI.
        bad_words: texts that are not generated, at the beginning of a text and within it.
        logit_bias: token ids, as strings, and numbers from -100 to 100 that are added to their logits.
        truncate_prompt_tokens: keep so many of the prompt's last tokens; -1 as many as fit beside the output.
        return_token_ids: give the ids of prompt and output with each choice.
        timeout_s: seconds, more than 0, after which the request is given up and answered with an error.
    """

    parts: ClassVar = {"stream_options": StreamOptions}

    model: str | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: Stop = []
    n: int = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    ignore_eos: bool = False
    min_tokens: int = 0
    logit_bias: dict[str, float] = {}
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop_token_ids: Ids = []
    include_stop_str_in_output: bool = False
    bad_words: Strings = []
    allowed_token_ids: Ids | None = None
    skip_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    return_token_ids: bool = False
    timeout_s: float | None = None
    priority: int = 0

    @property
    def num_sampled(self) -> int:
        """Completions of each prompt that are computed."""
        return self.n

    @property
    def is_usage_streamed(self) -> bool:
        """Whether chunks carry a `usage` field and a last chunk its numbers."""
        return self.stream_options is not None and self.stream_options.include_usage

    def check(self) -> None:
        """Raises InvalidRequestError if fields contradict each other or a value is out of its range."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options may be given only when stream is true", "stream_options")
        if self.truncate_prompt_tokens is not None and (
            self.truncate_prompt_tokens < -1 or self.truncate_prompt_tokens == 0
        ):
            raise InvalidRequestError("truncate_prompt_tokens must be at least 1, or -1", "truncate_prompt_tokens")
        if not all(word.strip() for word in self.bad_words):
            raise InvalidRequestError("bad_words must not hold an empty word", "bad_words")
        if self.timeout_s is not None and not 0 < self.timeout_s <= MAX_TIMEOUT_S:
            raise InvalidRequestError(f"timeout_s must be above 0 and at most {MAX_TIMEOUT_S:.0f}", "timeout_s")

    def _sampling_params(
        self,
        max_tokens: int,
        logprobs: int | None,
        prompt_logprobs: int | None,
        bad_words: tuple[tuple[int, ...], ...],
    ) -> SamplingParams:
        """The shared fields, and those that completions and chat have in other words.

        Raises:
            InvalidRequestError: a value is out of its range.
        """
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            seed=self.seed,
            n=self.n,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            stop_token_ids=tuple(self.stop_token_ids),
            include_stop_str_in_output=self.include_stop_str_in_output,
            skip_special_tokens=self.skip_special_tokens,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=tuple((_token_id(text), bias) for text, bias in self.logit_bias.items()),
            allowed_token_ids=None if self.allowed_token_ids is None else tuple(self.allowed_token_ids),
            bad_words=bad_words,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            priority=self.priority,
        )


def _token_id(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise InvalidRequestError(
            f"logit_bias must map token ids to numbers; {text!r:.80} is no token id", "logit_bias"
        )
    return int(text)
