"""Beam searches find what transformers finds. `beam_comparison` compares more of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gptj_dist.model import kv_cache
from tests.model.beam_comparison import (
    SETTINGS,
    Search,
    Texts,
    differences,
    make_prompts,
    ours,
    reference,
    theirs,
    write_model,
)

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = [prompt for prompt in make_prompts(24) if len(prompt) in (7, 31)]
PENALISED = replace(SETTINGS[0], repetition_penalty=1.4, min_tokens=9, max_tokens=20, n=2, best_of=5)
"""A penalty divides probabilities, but multiplies their logarithms, which are less than 0."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(model: Path) -> dict[Search, Texts]:
    """What transformers finds."""
    transformer, found = reference(model), dict[Search, Texts]()
    for params in (*SETTINGS, PENALISED):
        found |= theirs(transformer, PROMPTS, params)
    return found


@pytest.mark.parametrize(
    ("settings", "one_of"),
    [
        ({"stages": 1}, 1),
        ({"stages": 2, "max_chunk_tokens": 5, "prefix_cache": False}, 2),
        ({"stages": 4, "max_batch_size": 9}, 3),
    ],
    ids=str,
)
def test_texts_their_order_and_scores_are_those_of_transformers(
    model: Path, expected: dict[Search, Texts], settings: dict[str, Any], one_of: int
) -> None:
    some = dict(list(expected.items())[::one_of])
    assert differences(some, ours(model, some, **settings)) == []


def test_settings_make_a_difference(expected: dict[Search, Texts]) -> None:
    """So the comparison fails if one of them has no effect."""
    several = [tuple(expected[prompt, params] for prompt in PROMPTS) for params in SETTINGS]
    assert len({str(texts) for texts in several}) >= 8
    lengths = {len(tokens) for texts in expected.values() for tokens, _ in texts}
    assert len(lengths) > 10


def test_without_a_compiler_whole_regions_are_copied(
    model: Path, expected: dict[Search, Texts], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_cache, "load_library", lambda: None)
    some = {search: texts for search, texts in expected.items() if search[1] in (SETTINGS[0], PENALISED)}
    assert differences(some, ours(model, some, stages=2)) == []
