"""Measures what a beam search costs, compared with as many sampled completions of the same prompts.

    python -m benchmarks.beams deep

`deep` is a directory that `gptj-dist synth deep deep` makes. Both complete random prompts in one process, in turn:
`seconds` are medians of a round, `cost` is the median of the ratios, beams over samples. `--cases` are numbers of
prompts at once. The last line on standard output is one JSON document.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from dataclasses import replace

from benchmarks.figures import machine, print_document
from gptj_dist import LLM, SamplingParams
from gptj_dist.checkpoint.hub import resolve_model
from gptj_dist.checkpoint.index import read_model_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory, or demo")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--stages", type=int, default=1)
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--cases", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    vocab_size = read_model_config(resolve_model(args.model)).vocab_size
    params = SamplingParams(args.output_len, n=args.width, ignore_eos=True, seed=0)
    with LLM(args.model, dtype=args.dtype, stages=args.stages, prefix_cache=False) as llm:
        cases = {}
        for num_prompts in args.cases:
            chooser = random.Random(num_prompts)
            prompts = [[chooser.randrange(vocab_size) for _ in range(args.prompt_len)] for _ in range(num_prompts)]
            cases[str(num_prompts)] = compare(llm, prompts, params, args.rounds)
    asked = {
        name: vars(args)[name] for name in ("model", "dtype", "stages", "width", "prompt_len", "output_len", "rounds")
    }
    print_document("beams", {"machine": machine(), **asked, "cases": cases})


def compare(llm: LLM, prompts: list[list[int]], params: SamplingParams, num_rounds: int) -> dict[str, object]:
    """Seconds for all prompts, sampled and by beams, after a round that warms both up."""
    both = (params, replace(params, use_beam_search=True))
    pairs = [[_seconds(llm, prompts, one) for one in both] for _ in range(num_rounds + 1)][1:]
    sampled, beams = (statistics.median(seconds) for seconds in zip(*pairs, strict=True))
    cost = statistics.median(of_beams / of_samples for of_samples, of_beams in pairs)
    return {"seconds": {"sampled": sampled, "beams": beams}, "cost": cost}


def _seconds(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> float:
    begin_s = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - begin_s


if __name__ == "__main__":
    main()
