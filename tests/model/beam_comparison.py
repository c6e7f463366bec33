"""Compares beam searches with those of transformers in float32: the texts, their order and their scores.

python -m tests.model.beam_comparison --prompts 300
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import GPTJForCausalLM

from gptj_dist.answers.local import running_engine
from gptj_dist.checkpoint.hub import DEMO, resolve_model
from gptj_dist.checkpoint.synthetic import write_checkpoint
from gptj_dist.config import ModelConfig, PipelineConfig
from gptj_dist.engine.async_engine import AsyncEngine
from gptj_dist.engine.record import new_records
from gptj_dist.params import SamplingParams
from gptj_dist.stages.local import start_local

CONFIG = ModelConfig(4096, 4, 48, 4, 6, 96, 128, (0,))
INIT_STD = 0.35
"""With much smaller weights all tokens are about as likely."""

ENDING_IDS = tuple(range(0, CONFIG.vocab_size, 12))
LENGTHS = (1, 2, 7, 15, 16, 17, 31, 40)
"""Tokens of the prompts."""

MAX_SCORE_ERROR = 1e-5
"""Relative. Both sum up float32 log probabilities, whose last bits differ."""

EARLY_STOPPING: tuple[bool | Literal["never"], ...] = (True, False, "never")

SETTINGS = [
    SamplingParams(
        max_tokens=24,
        min_tokens=2,
        n=4,
        use_beam_search=True,
        stop_token_ids=ENDING_IDS[1:],
        length_penalty=length_penalty,
        early_stopping=early_stopping,
    )
    for length_penalty, early_stopping in product((0.0, 0.5, 1.0, 2.0), EARLY_STOPPING)
]

Search = tuple[tuple[int, ...], SamplingParams]
"""A prompt and how it is continued."""

Texts = list[tuple[tuple[int, ...], float]]
"""Tokens and scores, the best first."""


def write_model(directory: Path) -> Path:
    """A small model whose texts end, some sooner and some later."""
    write_checkpoint(directory, CONFIG, seed=1, init_std=INIT_STD)
    shutil.copy(resolve_model(DEMO) / "tokenizer.json", directory)
    return directory


def make_prompts(number: int) -> list[tuple[int, ...]]:
    chooser = random.Random(number)
    return [tuple(chooser.choices(range(CONFIG.vocab_size), k=LENGTHS[i % len(LENGTHS)])) for i in range(number)]


def reference(model: Path) -> Any:
    """The model in transformers."""
    return GPTJForCausalLM.from_pretrained(model, dtype=torch.float32)


def theirs(model: Any, prompts: Sequence[tuple[int, ...]], params: SamplingParams) -> dict[Search, Texts]:
    """What transformers finds; prompts of a length at once, as it would have to pad others."""
    found: dict[Search, Texts] = {}
    for length in {len(prompt) for prompt in prompts}:
        several = [prompt for prompt in prompts if len(prompt) == length]
        output = model.generate(
            torch.tensor(several),
            attention_mask=torch.ones(len(several), length, dtype=torch.int64),
            num_beams=params.num_beams,
            num_return_sequences=params.n,
            max_new_tokens=params.max_tokens,
            min_new_tokens=params.min_tokens,
            length_penalty=params.length_penalty,
            early_stopping=params.early_stopping,
            repetition_penalty=params.repetition_penalty,
            eos_token_id=list(ENDING_IDS),
            pad_token_id=0,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
        rows = [ended(row[length:]) for row in output.sequences.tolist()]
        texts = list(zip(rows, output.sequences_scores.tolist(), strict=True))
        found |= {(prompt, params): texts[i * params.n : (i + 1) * params.n] for i, prompt in enumerate(several)}
    return found


def ended(token_ids: Sequence[int]) -> tuple[int, ...]:
    """A text without what fills up its row."""
    stop = next((place for place, token_id in enumerate(token_ids, 1) if token_id in ENDING_IDS), len(token_ids))
    return tuple(token_ids[:stop])


async def _ours(config: PipelineConfig, searches: Iterable[Search]) -> dict[Search, Texts]:
    pipeline, executor = start_local(config)
    async with running_engine(pipeline, executor) as engine:
        return dict(await asyncio.gather(*(_search(engine, search) for search in searches)))


async def _search(engine: AsyncEngine, search: Search) -> tuple[Search, Texts]:
    [stream] = engine.generate_all(new_records(*search, 1))
    [delta] = [delta async for delta in stream]
    return search, [(beam.token_ids, beam.score) for beam in delta.beams[: search[1].n]]


def ours(model: Path, searches: Iterable[Search], **settings: Any) -> dict[Search, Texts]:
    """What our engine finds with these settings of its pipeline; all searches at once."""
    config = PipelineConfig(str(model), device="cpu", dtype="float32", **settings)
    return asyncio.run(_ours(config, searches))


def differences(one: dict[Search, Texts], other: dict[Search, Texts]) -> list[Search]:
    """Searches whose texts differ, or their order or their scores."""
    return [search for search, texts in one.items() if not _are_alike(texts, other[search])]


def _are_alike(one: Texts, other: Texts) -> bool:
    if [tokens for tokens, _ in one] != [tokens for tokens, _ in other]:
        return False
    return all(
        math.isclose(score, scored, rel_tol=MAX_SCORE_ERROR) for (_, score), (_, scored) in zip(one, other, strict=True)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 4])
    options = parser.parse_args()
    prompts, totals = make_prompts(options.prompts), {}
    with tempfile.TemporaryDirectory() as directory:
        model = write_model(Path(directory))
        expected: dict[Search, Texts] = {}
        transformer = reference(model)
        for params in SETTINGS:
            expected |= theirs(transformer, prompts, params)
        for num_stages in options.stages:
            different = differences(expected, ours(model, expected, stages=num_stages))
            for prompt, params in different[:5]:
                print(f"differs: {prompt}, {params.length_penalty}, {params.early_stopping}")
            totals[num_stages] = len(different)
    lengths = [len(tokens) for texts in expected.values() for tokens, _ in texts]
    print(
        json.dumps(
            {
                "searches": len(expected),
                "different_by_stages": totals,
                "mean_length": sum(lengths) / len(lengths),
                "shorter_share": sum(length < SETTINGS[0].max_tokens for length in lengths) / len(lengths),
            }
        )
    )
    if any(totals.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
