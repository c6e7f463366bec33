"""How one completion is to be sampled. Validated here once, trusted everywhere else. Stdlib only."""

from __future__ import annotations

from dataclasses import dataclass

from gptj_dist.errors import InvalidRequestError

MAX_STOP_STRINGS = 16
MAX_SEED = 2**63
MAX_TOP_K = 2**31


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling settings of a request; the names and meanings are those of OpenAI's and vLLM's APIs.

    Args:
        max_tokens: the most tokens to generate, 1 or more.
        temperature: 0 is greedy; larger is more random.
        top_p: keep the smallest set of tokens whose probability reaches this, in (0, 1].
        top_k: keep the k likeliest tokens; 0 or -1 keeps all.
        min_p: drop tokens less likely than this fraction of the likeliest one, in [0, 1].
        seed: makes sampling repeatable; None draws a fresh one for each request.
        n: completions of the prompt, 1 or more.
        stop: strings that end the text; they are not part of it.
        min_tokens: tokens before which neither end of text nor a stop string can end the request.
        ignore_eos: go on past the end-of-text token.

    Raises:
        InvalidRequestError: a value is out of its range; `param` names it.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _check(self.max_tokens >= 1, "max_tokens", "must be at least 1", self.max_tokens)
        _check(0 <= self.temperature <= 100, "temperature", "must be from 0 to 100", self.temperature)
        _check(0 < self.top_p <= 1, "top_p", "must be in (0, 1]", self.top_p)
        _check(-1 <= self.top_k <= MAX_TOP_K, "top_k", f"must be from -1 (all tokens, as 0) to {MAX_TOP_K}", self.top_k)
        _check(0 <= self.min_p <= 1, "min_p", "must be in [0, 1]", self.min_p)
        _check(1 <= self.n <= 128, "n", "must be from 1 to 128", self.n)
        _check(self.seed is None or -MAX_SEED <= self.seed < MAX_SEED, "seed", "must fit in 64 bits", self.seed)
        _check(
            0 <= self.min_tokens <= self.max_tokens,
            "min_tokens",
            f"must be from 0 to max_tokens ({self.max_tokens})",
            self.min_tokens,
        )
        _check(len(self.stop) <= MAX_STOP_STRINGS, "stop", f"takes at most {MAX_STOP_STRINGS} strings", len(self.stop))
        _check(not isinstance(self.stop, str), "stop", "must be a tuple of strings", self.stop)
        _check(all(self.stop), "stop", "must not hold an empty string", self.stop)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0


def _check(is_valid: bool, param: str, rule: str, value: object) -> None:
    if not is_valid:
        raise InvalidRequestError(f"{param} {rule}, got {value!r}", param)
