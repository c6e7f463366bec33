"""With drafts every token and logit has the bits that it has without, in any cut, while requests come and go."""

from __future__ import annotations

import pytest

from tests.model.draft_walk import compare
from tests.model.test_exact import Model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def demo() -> Model:
    return Model("demo")


@pytest.mark.parametrize(("num_requests", "layers", "max_chunk_tokens"), [(24, (28,), None), (24, (12, 16), 23)])
def test_a_walk_has_the_same_bits(
    demo: Model, num_requests: int, layers: tuple[int, ...], max_chunk_tokens: int | None
) -> None:
    run = compare(demo, num_requests, seed=len(layers), layers=layers, max_chunk_tokens=max_chunk_tokens)
    assert run.num_accepted > 20
    assert run.num_preemptions > 0
