"""Measures what guessing the next tokens gains on text that repeats itself, and what it costs on text that does not.

    python -m benchmarks.speculation deep
    python -m benchmarks.speculation deep --stages 4 --link-ms 10 --cases loops quote

`deep` is a directory that `gptj-dist synth deep deep` makes. Random prompts of 64 tokens are continued in this process,
without drafts and with them in turn; `speed` is the median of the ratios of tokens per second, with over without, and
`equal` the share of texts that are the same. Tokens are always the model's own:

    loops    greedy text, which falls into loops where weights are random
    quote    greedy text, with a `prediction` that differs from it in 3 % of the tokens
    random   temperature 1: no two tokens come again
    few      temperature 1 over 10 tokens: whatever comes has come before, and says nothing of what follows
    *-32     the same with 32 requests at once

`--link-ms` delays every plan as if each edge from coordinator over the stages and back took this time. The last line on
standard output is one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass

from benchmarks.figures import machine, print_document, print_row
from gptj_dist.config import PipelineConfig
from gptj_dist.engine.async_engine import AsyncEngine
from gptj_dist.engine.plan import Plan, Result
from gptj_dist.engine.record import new_records
from gptj_dist.params import SamplingParams
from gptj_dist.stages.local import LocalExecutor, start_local

CASES = ("loops", "quote", "random", "few", "loops-32", "random-32", "few-32")
PROMPT_LEN = 64
CHANGED_SHARE = 0.03
FEW = tuple(range(1000, 1010))

Text = tuple[int, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--link-ms", type=float, default=0.0)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--output-len", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    figures = asyncio.run(measured(args))
    fields = {"model": args.model, "dtype": args.dtype, "stages": args.stages, "link_ms": args.link_ms}
    print_document("speculation", {"machine": machine(), **fields, "cases": figures})


async def measured(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    figures = {}
    async with AsyncExitStack() as stack:
        without, drafting = [
            await stack.enter_async_context(_running(args, speculation)) for speculation in (False, True)
        ]
        vocab_size = min(50_000, without.vocab_size)
        print_row(["case", "speed", "equal", "tokens/step"])
        for case in args.cases:
            figures[case] = await _case(case, without, drafting, random.Random(case), vocab_size, args)
            print_row([case, *figures[case].values()])
    return figures


class DelayedExecutor:
    """An executor whose results arrive later."""

    def __init__(self, executor: LocalExecutor, delay_s: float) -> None:
        self._executor = executor
        self._delay_s = delay_s

    def submit(self, plan: Plan) -> None:
        self._executor.submit(plan)

    async def receive(self) -> Result:
        result = await self._executor.receive()
        await asyncio.sleep(self._delay_s)
        return result


@dataclass(frozen=True, slots=True)
class Contender:
    """A running pipeline."""

    engine: AsyncEngine
    vocab_size: int

    async def texts(
        self, prompts: Sequence[Text], params: SamplingParams, predictions: Sequence[Text]
    ) -> tuple[list[Text], float]:
        """The texts of all prompts at once, and the seconds that they took."""

        async def text(prompt: Text, prediction: Text) -> Text:
            [stream] = self.engine.generate_all(new_records(prompt, params, 1, None, prediction))
            return tuple([token_id async for delta in stream for token_id in delta.token_ids])

        begin_s = time.perf_counter()
        texts = await asyncio.gather(*map(text, prompts, predictions))
        return list(texts), time.perf_counter() - begin_s


@asynccontextmanager
async def _running(args: argparse.Namespace, speculation: bool) -> AsyncIterator[Contender]:
    config = PipelineConfig(
        args.model,
        stages=args.stages,
        dtype=args.dtype,
        kv_cache_gb=1.0,
        prefix_cache=False,
        speculation=speculation,
    )
    pipeline, executor = start_local(config)
    delayed = DelayedExecutor(executor, (args.stages + 1) * args.link_ms / 1000)
    engine = AsyncEngine(pipeline.make_scheduler(), delayed, pipeline.limits())
    running = asyncio.create_task(engine.run())
    try:
        yield Contender(engine, pipeline.blueprint.model.vocab_size)
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
        executor.close()


async def _case(
    name: str,
    without: Contender,
    drafting: Contender,
    chooser: random.Random,
    vocab_size: int,
    args: argparse.Namespace,
) -> dict[str, float]:
    kind, _, batch = name.partition("-")
    is_greedy = kind in ("loops", "quote")
    ratios, num_equal, num_texts = [], 0, 0
    records = drafting.engine.stats.records()
    first_step = records[-1].number + 1 if records else 0
    for number in range(args.rounds + 1):  # the first warms up
        prompts = [tuple(chooser.randrange(vocab_size) for _ in range(PROMPT_LEN)) for _ in range(int(batch or 1))]
        params = SamplingParams(
            args.output_len,
            temperature=0.0 if is_greedy else 1.0,
            seed=number,
            ignore_eos=True,
            allowed_token_ids=FEW if kind == "few" else None,
        )
        predictions: list[Text] = [()] * len(prompts)
        if number % 2 or kind == "quote":  # which needs the text
            expected, without_s = await without.texts(prompts, params, predictions)
            if kind == "quote":
                predictions = [_changed(text, chooser, vocab_size) for text in expected]
            texts, drafting_s = await drafting.texts(prompts, params, predictions)
        else:
            texts, drafting_s = await drafting.texts(prompts, params, predictions)
            expected, without_s = await without.texts(prompts, params, predictions)
        if number:
            ratios.append(without_s / drafting_s)
            num_equal += sum(map(tuple.__eq__, texts, expected))
            num_texts += len(texts)
    steps = [record for record in drafting.engine.stats.records(first_step) if record.num_decodes]
    return {
        "speed": statistics.median(ratios),
        "equal": num_equal / num_texts,
        "tokens_per_step": sum(step.num_sampled_tokens for step in steps) / sum(step.num_decodes for step in steps),
    }


def _changed(text: Text, chooser: random.Random, vocab_size: int) -> Text:
    return tuple(chooser.randrange(vocab_size) if chooser.random() < CHANGED_SHARE else token_id for token_id in text)


if __name__ == "__main__":
    main()
