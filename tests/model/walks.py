"""What random walks of many requests share: their arguments, and the comparison of two runs."""

from __future__ import annotations

import argparse

import torch

from tests.model.test_exact import Run


def walk_arguments(description: str | None, num_requests: int) -> argparse.Namespace:
    """The command line: `requests`, by default `num_requests`, and `seed`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=num_requests)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def require_same_bits(run: Run, plain: Run) -> None:
    """Raises AssertionError unless both have the same tokens, and `run` has all rows of `plain`, bit by bit."""
    assert run.token_ids == plain.token_ids
    assert run.logits.keys() >= plain.logits.keys()
    different = [key for key, row in plain.logits.items() if not torch.equal(row, run.logits[key])]
    assert not different, f"logits of (request, position) differ: {different[:10]}"
