"""Runs many requests whose prompts begin alike, with the prefix cache and without, and compares all logits bit by bit.

python -m tests.model.prefix_walk --requests 2000
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

from gptj_dist.config import ModelConfig
from gptj_dist.params import SamplingParams
from tests.model.test_exact import Model, Run, Work
from tests.model.walks import require_same_bits, walk_arguments

NUM_BLOCKS = 40
"""Few, so that cached blocks are evicted and requests preempted."""

MAX_BATCH_SIZE = 8
NUM_BEGINNINGS = 6
LONGEST_BEGINNING = 200


def make_works(config: ModelConfig, num_requests: int, seed: int) -> dict[int, Work]:
    """Requests that share beginnings of up to 200 tokens; some go on where an earlier one began to."""
    chooser = random.Random(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(chooser.randrange(config.vocab_size) for _ in range(count))

    beginnings = [tokens(LONGEST_BEGINNING) for _ in range(NUM_BEGINNINGS)]
    works = {}
    for id_ in range(num_requests):
        beginning = chooser.choice(beginnings)[: chooser.choice((0, 15, 16, 17, 48, 100, LONGEST_BEGINNING))]
        params = SamplingParams(chooser.randrange(1, 24), temperature=chooser.choice((0.0, 1.0)), seed=id_)
        works[id_] = Work(beginning + tokens(chooser.randrange(1, 40)), params)
    return works


def compare(model: Model, num_requests: int, seed: int, layers: Sequence[int], max_chunk_tokens: int | None) -> Run:
    """The run with the cache. Raises AssertionError if any token or bit differs without it."""
    works = make_works(model.config, num_requests, seed)

    def run(keeps_prefixes: bool) -> Run:
        return model.run(
            works,
            layers=layers,
            max_chunk_tokens=max_chunk_tokens,
            num_blocks=NUM_BLOCKS,
            max_batch_size=MAX_BATCH_SIZE,
            keeps_prefixes=keeps_prefixes,
        )

    cached, plain = run(True), run(False)
    require_same_bits(cached, plain)
    assert cached.logits.keys() == plain.logits.keys()
    return cached


def main() -> None:
    args = walk_arguments(__doc__, num_requests=2000)
    run = compare(Model("demo"), args.requests, args.seed, (14, 14), None)
    figures = {
        "requests": args.requests,
        "compared_rows": len(run.logits),
        "cached_tokens": run.num_cached_tokens,
        "evicted_blocks": run.num_evicted_blocks,
        "preemptions": run.num_preemptions,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
