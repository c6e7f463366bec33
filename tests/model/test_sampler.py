"""Sampling: the right tokens, with the right chances, from noise that depends on request and position alone."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from gptj_dist.model.sampler import Sampler, SampleSpec, uniform_noise
from gptj_dist.params import BROKEN_TOKEN, SamplingParams
from gptj_dist.token_rules import TokenRules

CPU = torch.device("cpu")
EOS = 3
PLAIN = SampleSpec(SamplingParams(), noise_key=1, position=0)
GREEDY = replace(PLAIN, params=SamplingParams(temperature=0))
NUM_DRAWS = 4000
MANY_DRAWS = 20_000
FALSE_ALARM = 1e-3
"""How often a right sampler fails a check of its chances; with fixed keys and positions it is decided once for all."""


NEVER_ENDS = {"max_tokens": 10**6, "min_tokens": 10**6}


def _with(spec: SampleSpec, **settings: Any) -> SampleSpec:
    return replace(spec, params=replace(spec.params, **settings))


def _logits(*values: float) -> Tensor:
    return torch.tensor([values])


def _random_logits(num_rows: int, vocab_size: int, seed: int = 0, std: float = 2.0) -> Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * std


def _sample(logits: Tensor, *specs: SampleSpec, unsampled_ids: tuple[int, ...] = ()) -> list[int]:
    rules = TokenRules(logits.shape[1], (EOS,), spare_ids=unsampled_ids)
    tokens: list[int] = Sampler(rules, CPU).draw(logits.clone(), specs).tolist()
    return tokens


def _draw(
    row: Tensor, spec: SampleSpec, unsampled_ids: tuple[int, ...] = (), num_draws: int = NUM_DRAWS
) -> Counter[int]:
    """How often each token comes at positions 0, 1, 2 ..."""
    specs = [replace(spec, position=position) for position in range(num_draws)]
    return Counter(_sample(row.expand(num_draws, -1), *specs, unsampled_ids=unsampled_ids))


def _kept_by_brute_force(row: Tensor, spec: SampleSpec) -> dict[int, float]:
    """The tokens that may come, and their chances: min_p first, then top_k, then top_p of what is left. No ties."""
    params = spec.params
    chances = dict(enumerate(torch.softmax(row.double() / params.temperature, 0).tolist()))
    order = sorted(chances, key=lambda token: -chances[token])
    order = [token for token in order if chances[token] >= params.min_p * chances[order[0]]]
    if params.top_k > 0:
        order = order[: params.top_k]
    total, reached = sum(chances[token] for token in order), 0.0
    kept: list[int] = []
    for token in order:
        if kept and reached >= params.top_p * total:
            break
        kept.append(token)
        reached += chances[token]
    total = sum(chances[token] for token in kept)
    return {token: chances[token] / total for token in kept}


def _odds(counts: Counter[int], chances: dict[int, float]) -> float:
    """How likely counts at least as far from the chances are (Pearson's chi-square test; rare tokens are one class)."""
    num_draws = counts.total()
    rare = {token for token, chance in chances.items() if chance * num_draws < 5}
    expected = {token: chance * num_draws for token, chance in chances.items() if token not in rare}
    drawn = {token: counts[token] for token in expected}
    if rare:
        expected[-1], drawn[-1] = num_draws - sum(expected.values()), num_draws - sum(drawn.values())
    squares = sum((drawn[token] - number) ** 2 / number for token, number in expected.items())
    half_freedom = torch.tensor(max(len(expected) - 1, 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half_freedom, torch.tensor(squares / 2, dtype=torch.float64)))


# Greedy


def test_greedy_takes_the_likeliest() -> None:
    logits = _random_logits(20, 50)
    assert _sample(logits, *[GREEDY] * 20) == logits.argmax(dim=1).tolist()
    assert _sample(logits, *[_with(PLAIN, top_p=0, top_k=5, min_p=0.1)] * 20) == logits.argmax(dim=1).tolist()


@pytest.mark.parametrize("vocab_size", [4, 33, 50400])
def test_greedy_takes_the_first_of_equals(vocab_size: int) -> None:
    logits = torch.zeros(3, vocab_size)
    logits[1, 2:] = 1
    logits[2, -1] = 1
    assert _sample(logits, GREEDY, GREEDY, GREEDY) == [0, 2, vocab_size - 1]


# Chances


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_tokens_come_as_often_as_softmax_says(temperature: float) -> None:
    row = _random_logits(1, 12, seed=1)[0]
    chances = dict(enumerate(torch.softmax(row.double() / temperature, 0).tolist()))
    assert _odds(_draw(row, _with(PLAIN, temperature=temperature), num_draws=MANY_DRAWS), chances) > FALSE_ALARM


@pytest.mark.parametrize("wrong", [0.9, 1.1])
def test_a_temperature_that_is_a_tenth_off_would_be_noticed(wrong: float) -> None:
    row = _random_logits(1, 12, seed=1)[0]
    chances = dict(enumerate(torch.softmax(row.double(), 0).tolist()))
    counts = _draw(row, _with(PLAIN, temperature=wrong), num_draws=MANY_DRAWS)
    assert _odds(counts, chances) < FALSE_ALARM / 100


@pytest.mark.parametrize("key", [0, 7, 2**64 - 1])
def test_noise_is_even_over_positions_and_over_keys(key: int) -> None:
    over_positions = [uniform_noise(key, position) for position in range(NUM_DRAWS)]
    over_keys = [uniform_noise((key + other) % 2**64, 5) for other in range(NUM_DRAWS)]
    for noise in (over_positions, over_keys):
        assert all(0 <= number < 1 for number in noise)
        assert _odds(Counter(int(number * 20) for number in noise), dict.fromkeys(range(20), 1 / 20)) > FALSE_ALARM
        pairs = Counter(int(a * 5) * 5 + int(b * 5) for a, b in zip(noise[::2], noise[1::2], strict=True))
        assert _odds(pairs, dict.fromkeys(range(25), 1 / 25)) > FALSE_ALARM  # neighbours know nothing of each other


# top_k, top_p, min_p


KEEPING = [
    _with(PLAIN, top_k=1),
    _with(PLAIN, top_k=3),
    _with(PLAIN, top_k=1000),
    _with(PLAIN, top_p=0.5),
    _with(PLAIN, top_p=0.9),
    _with(PLAIN, top_p=1e-9),
    _with(PLAIN, min_p=0.2),
    _with(PLAIN, min_p=1.0),
    _with(PLAIN, temperature=2.0, top_k=5, top_p=0.8),
    _with(PLAIN, temperature=0.5, top_k=8, min_p=0.05),
    _with(PLAIN, temperature=3.0, top_p=0.9, min_p=0.3),
    _with(PLAIN, temperature=1.5, top_k=6, top_p=0.95, min_p=0.1),
]


def _spec_id(spec: SampleSpec) -> str:
    params = spec.params
    return f"t{params.temperature}-k{params.top_k}-p{params.top_p}-min{params.min_p}"


@pytest.mark.parametrize("spec", KEEPING, ids=_spec_id)
@pytest.mark.parametrize("seed", [0, 1])
def test_exactly_the_right_tokens_are_kept(spec: SampleSpec, seed: int) -> None:
    row = _random_logits(1, 10, seed, std=1.0)[0]
    chances = _kept_by_brute_force(row, spec)
    counts = _draw(row, spec)
    assert counts.keys() <= chances.keys()
    assert counts.keys() >= {token for token, chance in chances.items() if chance * NUM_DRAWS > 10}
    assert _odds(counts, chances) > FALSE_ALARM


@pytest.mark.parametrize("spec", KEEPING, ids=_spec_id)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_right_tokens_are_those_of_transformers(spec: SampleSpec, seed: int) -> None:
    params, row = spec.params, _random_logits(1, 10, seed, std=1.0)
    warpers = [
        TemperatureLogitsWarper(params.temperature),
        MinPLogitsWarper(params.min_p),
        *([TopKLogitsWarper(params.top_k)] if params.top_k > 0 else []),
        TopPLogitsWarper(params.top_p),
    ]
    for warper in warpers:
        row = warper(torch.zeros(1, 1, dtype=torch.int64), row)
    chances = {token: chance for token, chance in enumerate(torch.softmax(row[0].double(), 0).tolist()) if chance > 0}
    assert _kept_by_brute_force(_random_logits(1, 10, seed, std=1.0)[0], spec) == pytest.approx(chances)


def test_top_p_keeps_as_few_as_reach_it() -> None:
    row = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    for top_p, expected in ((0.49, {0}), (0.51, {0, 1}), (0.74, {0, 1}), (0.76, {0, 1, 2}), (0.99, {0, 1, 2, 3})):
        assert _draw(row, _with(PLAIN, top_p=top_p)).keys() == expected


def test_a_filter_that_keeps_everything_changes_nothing() -> None:
    row = _random_logits(1, 10)[0]
    assert _draw(row, _with(PLAIN, top_k=10)) == _draw(row, _with(PLAIN, top_p=1 - 1e-12))
    assert _draw(row, _with(PLAIN, min_p=1e-12)) == _draw(row, PLAIN)


# Tokens that must not come


def test_masked_tokens_never_come() -> None:
    masked = (0, 4, 9)
    row = torch.tensor([9.0, 1.0, 0.0, 0.5, 9.0, 1.0, 1.5, 0.0, 0.0, 9.0])
    assert _sample(row[None], GREEDY, unsampled_ids=masked) == [6]
    for spec in (PLAIN, _with(PLAIN, temperature=100.0), _with(PLAIN, top_k=10), _with(PLAIN, top_p=0.99)):
        counts = _draw(row, spec, unsampled_ids=masked)
        assert counts.keys() == {1, 2, 3, 5, 6, 7, 8}


@pytest.mark.parametrize("spec", [PLAIN, _with(PLAIN, top_k=5), _with(PLAIN, top_p=0.999), GREEDY])
def test_end_of_text_comes_only_where_it_may(spec: SampleSpec) -> None:
    row = torch.tensor([0.0, 0.0, 0.0, 3.0, 0.0])
    assert EOS not in _draw(row, _with(spec, **NEVER_ENDS))
    assert EOS in _draw(row, spec)


def test_one_request_that_may_not_end_keeps_no_other_from_ending() -> None:
    logits = _logits(0.0, 0.0, 1.0, 9.0).expand(2, -1)
    assert _sample(logits, _with(GREEDY, **NEVER_ENDS), GREEDY) == [2, EOS]


# What the noise depends on


def test_the_same_key_and_position_draw_the_same_token_in_any_company() -> None:
    logits = _random_logits(30, 500)
    specs = [replace(_with(PLAIN, temperature=0.5 + i / 10), noise_key=i * 2**55, position=3 * i) for i in range(30)]
    specs[::3] = [_with(spec, top_p=0.9) for spec in specs[::3]]
    specs[::4] = [_with(spec, top_k=20, min_p=0.01) for spec in specs[::4]]
    specs[7] = GREEDY
    together = _sample(logits, *specs)
    assert [_sample(logits[i : i + 1], spec)[0] for i, spec in enumerate(specs)] == together
    assert _sample(logits.flip(0), *reversed(specs)) == together[::-1]


def test_neighbours_with_other_filters_change_no_order_of_ties() -> None:
    """16-bit logits have many equal ones."""
    logits = _random_logits(12, 700, std=0.3).bfloat16().float()
    top_ks, top_ps = (0, 3, 40, 0, 3, 699), (1.0, 0.9)
    specs = [
        replace(_with(PLAIN, top_k=top_ks[i % 6], top_p=top_ps[i % 2], min_p=0.1 * (i % 3)), noise_key=i)
        for i in range(12)
    ]
    assert [_sample(logits[i : i + 1], spec)[0] for i, spec in enumerate(specs)] == _sample(logits, *specs)


def test_other_keys_and_other_positions_draw_other_tokens() -> None:
    row = torch.zeros(1000)
    drawn = [_sample(row[None], replace(PLAIN, noise_key=key, position=p))[0] for key in range(10) for p in range(10)]
    assert len(set(drawn)) > 80


def test_noise_does_not_change_with_versions() -> None:
    """Texts of a seed are promised to stay: this is the one set of numbers that must never be updated."""
    assert uniform_noise(0, 0) == 0.0564663990004608
    assert uniform_noise(2**64 - 1, 2047) == 0.6279683211943144


def test_no_noise_draws_outside_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = _random_logits(1, 100)
    for noise in (0.0, 1 - 2**-53):
        monkeypatch.setattr("gptj_dist.model.sampler.uniform_noise", lambda *_, noise=noise: noise)
        for spec in (PLAIN, _with(PLAIN, top_k=7), _with(PLAIN, top_p=0.5), _with(PLAIN, min_p=0.3)):
            token = _sample(logits, spec, unsampled_ids=(0, 99))[0]
            assert token in set(range(1, 99)) & _kept_by_brute_force(_masked(logits[0]), spec).keys()


def _masked(row: Tensor) -> Tensor:
    row = row.clone()
    row[[0, 99]] = -math.inf
    return row


# Extremes


@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-307, 1e-300, 1e-30, 1e-6])
@pytest.mark.parametrize("spec", [PLAIN, _with(PLAIN, top_k=2), _with(PLAIN, top_p=0.9), _with(PLAIN, min_p=0.1)])
def test_a_temperature_near_zero_takes_the_likeliest(spec: SampleSpec, temperature: float) -> None:
    for values in ((1.0, 50.0, 3.0, -2.0), (-400.0, -300.0, -500.0, -301.0), (0.0, 1e-3, -1e-3, 0.0)):
        assert _sample(_logits(*values), _with(spec, temperature=temperature)) == [1]


def test_a_high_temperature_makes_all_tokens_nearly_even() -> None:
    counts = _draw(torch.tensor([1.0, 5.0, 3.0, -2.0]), _with(PLAIN, temperature=100.0))
    assert max(counts.values()) < 1.3 * min(counts.values())


@pytest.mark.parametrize("spec", [PLAIN, _with(PLAIN, temperature=100.0), _with(PLAIN, top_k=2), GREEDY])
def test_huge_logits_are_no_trouble(spec: SampleSpec) -> None:
    assert _sample(_logits(-3e38, 3e38, -3e38, 0.0), spec) == [1]


@pytest.mark.parametrize("spec", [PLAIN, _with(PLAIN, top_k=2), _with(PLAIN, top_p=0.5), GREEDY])
@pytest.mark.parametrize("where", [slice(None), 7])
def test_a_broken_row_is_noticed_and_harms_no_other(spec: SampleSpec, where: slice | int) -> None:
    logits = _random_logits(2, 40)
    logits[0, where] = math.nan
    broken, whole = _sample(logits, spec, PLAIN)
    assert broken == BROKEN_TOKEN
    assert whole == _sample(logits[1:], PLAIN)[0]


@pytest.mark.parametrize("spec", [_with(PLAIN, top_k=3), _with(PLAIN, top_p=0.4), _with(PLAIN, min_p=0.5)])
def test_ties_are_settled_the_same_way_every_time(spec: SampleSpec) -> None:
    logits = torch.zeros(1, 300)
    specs = [replace(spec, position=position) for position in range(20)]
    first = [_sample(logits, spec)[0] for spec in specs]
    assert _sample(logits.expand(20, -1), *specs) == first
    assert len(set(first)) > 1
