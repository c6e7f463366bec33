"""Runs many mixed requests with drafts and without, and compares all tokens and logits bit by bit.

python -m tests.model.draft_walk --requests 500
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

from gptj_dist.config import ModelConfig
from gptj_dist.engine.drafts import MAX_DRAFTS
from gptj_dist.params import SamplingParams
from tests.model.test_exact import Model, Run, Work
from tests.model.walks import require_same_bits, walk_arguments

NUM_BLOCKS = 19
"""Few, so that cached blocks are evicted and requests preempted."""

MAX_BATCH_SIZE = 6


def make_works(config: ModelConfig, num_requests: int, seed: int) -> dict[int, Work]:
    """Requests whose text repeats itself: few tokens are allowed, or the prompt does. Every control is among them."""
    chooser = random.Random(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(chooser.randrange(config.vocab_size) for _ in range(count))

    works: dict[int, Work] = {}
    for id_ in range(num_requests):
        if works and chooser.random() < 0.2:  # comes again, and greedily with the same text
            works[id_] = chooser.choice(list(works.values()))
            continue
        pattern = tokens(chooser.randrange(1, 12))
        allowed = tuple(sorted({*pattern, *tokens(2)}))
        max_tokens = chooser.randrange(1, 60)
        controls = chooser.choice(
            (
                {},
                {"repetition_penalty": 1.1, "presence_penalty": 0.2},
                {"frequency_penalty": 0.3, "logprobs": 2},
                {"bad_words": (pattern[:2],), "logit_bias": ((pattern[0], 1.5),)},
                {"min_tokens": min(5, max_tokens), "stop_token_ids": (pattern[-1],)},
            )
        )
        params = SamplingParams(
            max_tokens,
            temperature=chooser.choice((0.0, 0.0, 0.1, 1.0)),
            seed=id_,
            allowed_token_ids=chooser.choice((None, allowed)),
            top_k=chooser.choice((0, 3)),
            ignore_eos=chooser.random() < 0.5,
            **controls,
        )
        works[id_] = Work(pattern * chooser.randrange(1, 8), params)
    return works


def compare(model: Model, num_requests: int, seed: int, layers: Sequence[int], max_chunk_tokens: int | None) -> Run:
    """The run with drafts. Raises AssertionError if any token or bit differs without them."""
    works = make_works(model.config, num_requests, seed)

    def run(max_drafts: int) -> Run:
        return model.run(
            works,
            layers=layers,
            max_chunk_tokens=max_chunk_tokens,
            num_blocks=NUM_BLOCKS,
            max_batch_size=MAX_BATCH_SIZE,
            max_drafts=max_drafts,
        )

    drafted, plain = run(MAX_DRAFTS), run(0)
    require_same_bits(drafted, plain)
    return drafted


def main() -> None:
    args = walk_arguments(__doc__, num_requests=500)
    run = compare(Model("demo"), args.requests, args.seed, (14, 14), None)
    figures = {
        "requests": args.requests,
        "tokens": sum(map(len, run.token_ids.values())),
        "accepted_drafts": run.num_accepted,
        "preemptions": run.num_preemptions,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
