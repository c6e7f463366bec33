"""With the prefix cache every logit has the bits that it has without, in any cut, while blocks come and go."""

from __future__ import annotations

import pytest

from tests.model.prefix_walk import compare
from tests.model.test_exact import Model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def demo() -> Model:
    return Model("demo")


@pytest.mark.parametrize(("num_requests", "layers", "max_chunk_tokens"), [(40, (28,), None), (60, (9, 10, 9), 23)])
def test_a_walk_has_the_same_bits(
    demo: Model, num_requests: int, layers: tuple[int, ...], max_chunk_tokens: int | None
) -> None:
    run = compare(demo, num_requests, seed=len(layers), layers=layers, max_chunk_tokens=max_chunk_tokens)
    assert run.num_cached_tokens > 500
    assert run.num_evicted_blocks > 50
    assert run.num_preemptions > 0
