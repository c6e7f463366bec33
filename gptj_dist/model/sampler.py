"""Samples tokens from logits. Knows no text.

The noise depends only on the request and the position. So a request gets the same tokens whatever else is in its
micro-batch, however the layers are cut into stages, and after a restart.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptj_dist.model.controls import apply_controls, completing
from gptj_dist.model.inputs import to_device
from gptj_dist.model.logprobs import token_logprobs
from gptj_dist.params import BROKEN_TOKEN, COMPLETE_TOKEN, NO_TOKEN, Continuation, SamplingParams, TokenLogprobs
from gptj_dist.token_rules import TokenRules

CPU_ROWS_AT_ONCE = 2
"""Rows of a kind that a CPU samples together; more do not fit its cache (50,400 tokens, 32 rows on two cores: 5.0 ms
one by one, 3.2 ms two by two, 8.1 ms four by four)."""


GROUP_SIZE = 64
"""Tokens of which only the likeliest is looked at, while the likeliest of all are searched for."""


@dataclass(frozen=True, slots=True)
class GrammarMask:
    """What a request's grammar allows at a position.

    Args:
        banned: bool [vocab_size], on the CPU.
        is_complete: whether the text may end before this position.
    """

    banned: Tensor
    is_complete: bool


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """How one row is sampled.

    Args:
        params: the request's.
        noise_key: 64 bits of the request.
        position: where the sampled token will stand in its sequence.
        num_prompt_tokens: positions below this belong to the prompt.
        history: the request's tokens so far; only controls read it.
        mask: by the request's grammar; None without one.
    """

    params: SamplingParams
    noise_key: int
    position: int
    num_prompt_tokens: int = 0
    history: Sequence[int] = ()
    mask: GrammarMask | None = None

    @property
    def may_end(self) -> bool:
        """Whether the request may end at this position."""
        return self.position >= self.num_prompt_tokens + self.params.min_tokens


class Sampler:
    """Samples rows of logits. Rows of a kind are computed together; each gets the token that it would get alone.

    Args:
        rules: the model's, for its tokens.
    """

    def __init__(self, rules: TokenRules, device: torch.device) -> None:
        self._rules = rules
        self._spare_ids = frozenset(rules.spare_ids).difference(rules.eos_token_ids, rules.suppressed_ids)
        masked_ids = sorted({*self._spare_ids, *rules.suppressed_ids})
        self._masked_ids = torch.tensor(masked_ids, dtype=torch.int64, device=device)
        self._device = device
        self._rows_at_once = CPU_ROWS_AT_ONCE if device.type == "cpu" else sys.maxsize

    def sample_with_logprobs(
        self, logits: Tensor, specs: Sequence[SampleSpec]
    ) -> tuple[list[int], tuple[TokenLogprobs | None, ...]]:
        """As `draw`, and the log probabilities that specs request: one for each row, or empty if none requests any."""
        num_top = {row: num for row, spec in enumerate(specs) if (num := spec.params.logprobs) is not None}
        if not num_top:
            return self.draw(logits, specs).tolist(), ()
        untouched = logits[to_device(torch.tensor(list(num_top)), self._device)]
        tokens: list[int] = self.draw(logits, specs).tolist()
        logprobs = token_logprobs(untouched, [max(tokens[row], 0) for row in num_top], list(num_top.values()))
        by_row = {row: token for row, token in zip(num_top, logprobs, strict=True) if tokens[row] >= 0}
        return tokens, tuple(by_row.get(row) for row in range(len(specs)))

    def draw(self, logits: Tensor, specs: Sequence[SampleSpec]) -> Tensor:
        """One token for each row of float32 [rows, vocab_size]: int64 [rows]. The logits are overwritten.

        The token is `BROKEN_TOKEN` for rows with a NaN; for rows in which every token is banned it is `COMPLETE_TOKEN`
        if the text may end by its grammar, else `NO_TOKEN`. The tokens stay on the device, and the host does not wait
        for them.
        """
        self._control(logits, specs)
        tokens = _likeliest(logits)
        largest = logits.gather(1, tokens[:, None]).squeeze(1)
        for rows in _group_by_kind(specs, self._rows_at_once):
            places = to_device(torch.tensor(rows), self._device)
            tokens[places] = self._sample_kind(logits[places], [specs[row] for row in rows])
        no_tokens = [COMPLETE_TOKEN if spec.mask is not None and spec.mask.is_complete else NO_TOKEN for spec in specs]
        no_token = to_device(torch.tensor(no_tokens), self._device)
        return tokens.where(largest > -math.inf, torch.where(largest.isnan(), BROKEN_TOKEN, no_token))

    def continuations(self, logits: Tensor, specs: Sequence[SampleSpec]) -> list[tuple[Continuation, ...]]:
        """How the beam of each row of float32 [rows, vocab_size] may go on, as `BeamSearch.step` takes it.

        As in transformers, penalties, biases and bans change log probabilities. None for rows with a NaN.
        """
        logprobs = torch.log_softmax(logits, dim=-1)
        self._control(logprobs, specs)
        found = []
        for row, (scores, spec) in enumerate(zip(logprobs.unbind(), specs, strict=True)):
            params = spec.params
            ending = sorted({*params.stop_token_ids, *(() if params.ignore_eos else self._rules.eos_token_ids)})
            places = to_device(torch.tensor(ending, dtype=torch.int64), self._device)
            best = [(token_id, score) for token_id, score in zip(ending, scores[places].tolist(), strict=True)]
            scores[places] = -math.inf
            best += likeliest(scores, params.num_beams)
            best = [pair for pair in best if pair[1] > -math.inf]
            best.sort(key=lambda pair: (-pair[1], pair[0]))
            shown: Sequence[TokenLogprobs | None] = [None] * len(best)
            if params.logprobs is not None and best:
                ids = [token_id for token_id, _ in best]
                shown = token_logprobs(logits[row].expand(len(ids), -1), ids, [params.logprobs] * len(ids))
            found.append(tuple(Continuation(*pair, one) for pair, one in zip(best, shown, strict=True)))
        return found

    def _control(self, scores: Tensor, specs: Sequence[SampleSpec]) -> None:
        """Changes logits, or log probabilities, as requests and the model's rules ask for."""
        each_row = scores.unbind()
        spares = [self._named_spares(row, spec.params) for row, spec in zip(each_row, specs, strict=True)]
        scores.index_fill_(1, self._masked_ids, -math.inf)
        for row, spec, spare in zip(each_row, specs, spares, strict=True):
            if spare is not None:
                row[spare[0]] = spare[1]
            if spec.mask is not None:
                row.masked_fill_(to_device(spec.mask.banned, self._device), -math.inf)
            apply_controls(row, spec.params, spec.history, spec.num_prompt_tokens, self._banned_ids(spec))

    def _named_spares(self, row: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor] | None:
        """The spare tokens that a request names, and their logits; None for none."""
        if not params.stop_token_ids and not params.logit_bias and params.allowed_token_ids is None:
            return None
        named = {*params.stop_token_ids, *(params.allowed_token_ids or ()), *(id for id, _ in params.logit_bias)}
        if not (spares := sorted(named & self._spare_ids)):
            return None
        places = to_device(torch.tensor(spares), self._device)
        return places, row[places]

    def _banned_ids(self, spec: SampleSpec) -> tuple[int, ...]:
        """Tokens banned at the position by the model's rules or by the minimum number of tokens."""
        rules = self._rules
        return (
            *(() if spec.may_end else rules.ending_ids(spec.params)),
            *(rules.first_suppressed_ids if spec.position == spec.num_prompt_tokens else ()),
            *completing(rules.bad_words, spec.history),
        )

    def _sample_kind(self, logits: Tensor, specs: Sequence[SampleSpec]) -> Tensor:
        """Tokens for rows of one kind."""
        settings = [spec.params for spec in specs]
        noises = [uniform_noise(spec.noise_key, spec.position) for spec in specs]
        numbers = [(p.temperature, p.top_p, p.min_p, noise) for p, noise in zip(settings, noises, strict=True)]
        columns = to_device(torch.tensor(numbers, dtype=torch.float64), self._device)
        temperature, top_p, min_p, noise = columns[:, :, None].unbind(1)
        # The largest is 0, so this never overflows.
        scaled = (logits - logits.amax(dim=-1, keepdim=True)).double() / temperature
        probabilities = torch.softmax(scaled, dim=-1)
        if any(params.min_p > 0 for params in settings):
            is_likely = probabilities >= min_p * probabilities.amax(dim=-1, keepdim=True)
            probabilities = probabilities.where(is_likely, 0)
        probabilities, token_ids = _sort(probabilities, settings[0])
        if any(params.top_p < 1 for params in settings):
            probabilities = _keep_top_p(probabilities, top_p)
        places = _invert(probabilities, noise)
        return (places if token_ids is None else token_ids.gather(1, places)).squeeze(1)


def _likeliest(logits: Tensor) -> Tensor:
    """The index of each row's largest number, or of a NaN, int64 [rows]. NumPy takes a tenth of the time on a CPU."""
    return torch.from_numpy(logits.numpy().argmax(axis=-1)) if logits.is_cpu else logits.argmax(dim=-1)


def likeliest(scores: Tensor, number: int) -> list[tuple[int, float]]:
    """The tokens with the `number` highest scores of [vocab_size], and with the same scores as the last; in any order.

    `topk` over a whole vocabulary takes ten times as long as this: the highest score of each group of tokens shows how
    high a score must be.
    """
    num_groups = scores.numel() // GROUP_SIZE
    if num_groups < number:
        return list(enumerate(scores.tolist()))
    highest = scores[: num_groups * GROUP_SIZE].view(num_groups, GROUP_SIZE).amax(dim=1)
    least = torch.topk(highest, number).values[-1]
    ids = (scores >= least).nonzero().squeeze(1)
    return list(zip(ids.tolist(), scores[ids].tolist(), strict=True))


def uniform_noise(noise_key: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits: a hash of its arguments, without any state."""
    message = noise_key.to_bytes(8, "little") + position.to_bytes(8, "little")
    digest = hashlib.blake2b(message, digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def _group_by_kind(specs: Sequence[SampleSpec], most_rows: int) -> Iterator[list[int]]:
    """Groups the rows that are not greedy by how their tokens are sorted: the order of equal ones depends on it."""
    kinds = defaultdict(list)
    for row, spec in enumerate(specs):
        params = spec.params
        if not params.is_greedy:
            kinds[params.top_k, params.top_k <= 0 and params.top_p < 1].append(row)
    for rows in kinds.values():
        for first in range(0, len(rows), most_rows):
            yield rows[first : first + most_rows]


def _sort(probabilities: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor | None]:
    """The `top_k` largest probabilities, or with `top_p` all of them, in descending order, and their tokens' ids.

    Without either, all probabilities in their own order, which is much cheaper, and None.
    """
    if params.top_k > 0:
        return torch.topk(probabilities, min(params.top_k, probabilities.shape[1]))
    if params.top_p < 1:
        return torch.sort(probabilities, descending=True, stable=True)
    return probabilities, None


def _keep_top_p(probabilities: Tensor, top_p: Tensor) -> Tensor:
    """Keeps the first of each row's descending probabilities that reach `top_p` [rows, 1] of their sum."""
    cumulative = probabilities.cumsum(-1)
    num_kept = (cumulative < top_p * cumulative[:, -1:]).sum(dim=-1, keepdim=True) + 1
    return probabilities.where(torch.arange(probabilities.shape[1], device=top_p.device) < num_kept, 0)


def _invert(probabilities: Tensor, noise: Tensor) -> Tensor:
    """The index at which the cumulative distribution exceeds the noise [rows, 1] times its total; int64 [rows, 1].

    A valid index even in a row of NaN.
    """
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1:].contiguous()
    drawn = torch.searchsorted(cumulative, noise * total, right=True)
    # Rounding must not move the draw past the last token with a probability.
    last = torch.searchsorted(cumulative, total)
    return torch.minimum(drawn, last).clamp_(max=probabilities.shape[1] - 1)
