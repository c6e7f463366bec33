"""Measures what the prefix cache gains where prompts begin alike, and what it costs where they do not.

    python -m benchmarks.prefix_cache deep

`deep` is a directory that `gptj-dist synth deep deep` makes. Gain: `gptj-dist serve MODEL` answers random prompts of
`--prompt-len` tokens, each twice in a row, with one output token; `first_token_ms` are medians of the first and the
second time, and `speed` is the median of their ratios. Cost: 64 random prompts of 128 tokens with 32 output tokens in
one process, without the cache and with it in turn; `throughput` is the median of the ratios of tokens per second, with
over without. The last line on standard output is one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from contextlib import ExitStack

from benchmarks.figures import machine, print_document
from benchmarks.servers import started
from benchmarks.sse_client import completion_body, stream_completion
from gptj_dist import LLM, SamplingParams
from gptj_dist.checkpoint.hub import resolve_model
from gptj_dist.checkpoint.index import read_model_config

NUM_PROMPTS, PROMPT_LEN, OUTPUT_LEN = 64, 128, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompt-len", type=int, default=1024)
    parser.add_argument("--prompts", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    vocab_size = read_model_config(resolve_model(args.model)).vocab_size
    figures = {
        "gain": gain(args.model, args.dtype, vocab_size, args.prompt_len, args.prompts),
        "cost": cost(args.model, args.dtype, vocab_size, args.rounds),
    }
    print_document(
        "prefix_cache", {"machine": machine(), "model": args.model, "prompt_len": args.prompt_len, **figures}
    )


def gain(model: str, dtype: str, vocab_size: int, prompt_len: int, num_prompts: int) -> dict[str, object]:
    """Times to the first token of prompts that come twice."""
    prompts = _random_prompts(vocab_size, num_prompts + 1, prompt_len)
    with started(model, ["--dtype", dtype]) as (base, _):
        pairs = asyncio.run(_ask_twice(base, model, prompts))[1:]  # the first request warms the server up
    return {
        "first_token_ms": {
            "first": 1000 * statistics.median(first for first, _ in pairs),
            "again": 1000 * statistics.median(again for _, again in pairs),
        },
        "speed": statistics.median(first / again for first, again in pairs),
    }


async def _ask_twice(base: str, model: str, prompts: list[list[int]]) -> list[tuple[float, float]]:
    async def first_token_s(prompt: list[int]) -> float:
        record = await stream_completion(base, completion_body(model, prompt, 1), len(prompt))
        if record.error is not None:
            raise SystemExit(f"a request failed: {record.error}")
        return record.frame_s[0] - record.begin_s

    return [(await first_token_s(prompt), await first_token_s(prompt)) for prompt in prompts]


def cost(model: str, dtype: str, vocab_size: int, num_rounds: int) -> dict[str, object]:
    """Tokens per second of prompts that have nothing in common, without the cache and with it."""
    params = SamplingParams(OUTPUT_LEN, temperature=0, ignore_eos=True)
    speeds: list[tuple[float, float]] = []
    with ExitStack() as stack:
        without, with_cache = (
            stack.enter_context(LLM(model, dtype=dtype, prefix_cache=is_on, kv_cache_gb=1.0)) for is_on in (False, True)
        )
        for number in range(num_rounds + 1):
            prompts = _random_prompts(vocab_size, NUM_PROMPTS, PROMPT_LEN, seed=number)
            speeds.append((_tokens_per_s(without, prompts, params), _tokens_per_s(with_cache, prompts, params)))
    del speeds[0]  # which warmed both up
    return {
        "tokens_per_s": {
            "without": statistics.median(one for one, _ in speeds),
            "with": statistics.median(other for _, other in speeds),
        },
        "throughput": statistics.median(other / one for one, other in speeds),
    }


def _tokens_per_s(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> float:
    begin_s = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return len(prompts) * OUTPUT_LEN / (time.perf_counter() - begin_s)


def _random_prompts(vocab_size: int, count: int, length: int, seed: int = 0) -> list[list[int]]:
    chooser = random.Random(seed)
    return [[chooser.randrange(vocab_size) for _ in range(length)] for _ in range(count)]


if __name__ == "__main__":
    main()
