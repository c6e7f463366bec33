"""Measures what guessing the next tokens gains on text that repeats itself, and what it costs on text that does not.

    python -m benchmarks.speculation deep
    python -m benchmarks.speculation deep --stages 4 --link-ms 10 --cases loops quote edit lists
    python -m benchmarks.speculation deep --cases few-32 random-32 --output-len 64

`deep` is a directory that `gptj-dist synth deep deep` makes. One pipeline in this process continues prompts without
drafts and with them in turn; `speed` is the median of the ratios of tokens per second, with over without, and `equal`
the share of texts that are the same. Each case is one request at a time:

    loops       greedy text, which falls into loops where weights are random
    prediction  greedy text, with a `prediction` that differs from it in 3 % of the tokens
    again       greedy text that the pipeline has just written for another request
    random      temperature 1: no two tokens come again
    few         temperature 1 over 10 tokens: whatever comes has come before, and says nothing of what follows
    quote       the prompt is a passage of this repository's documents, and the text repeats 97 % of its tokens
    edit        the same of a module of this repository
    code        the text goes on with a module of this repository
    lists       the text goes on with a list of JSON records, each of other values
    *-32        32 requests at once

A random model writes no prose, code or lists: their tokens replace those that it samples, and are what it computes
next. `--link-ms` delays every plan as if each edge from coordinator over the stages and back took this
time. The last line on standard output is one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

from benchmarks.figures import machine, print_document, print_row
from gptj_dist.checkpoint.hub import resolve_model
from gptj_dist.config import PipelineConfig
from gptj_dist.engine.async_engine import AsyncEngine
from gptj_dist.engine.plan import Plan, Result
from gptj_dist.engine.record import RequestRecord
from gptj_dist.engine.scheduler import Scheduler
from gptj_dist.params import SamplingParams
from gptj_dist.stages.blueprint import LoadedPipeline
from gptj_dist.stages.local import LocalExecutor, load_local
from gptj_dist.stages.runner import StageRunner
from gptj_dist.text.tokenizer import Tokenizer

SAMPLED = ("loops", "prediction", "again", "random", "few")
FILES = {
    "quote": ("docs/*.md", "docs/decisions/*.md"),
    "edit": ("gptj_dist/engine/*.py", "gptj_dist/serving/*.py", "gptj_dist/model/*.py"),
    "code": ("gptj_dist/engine/*.py", "gptj_dist/serving/*.py", "gptj_dist/model/*.py"),
}
CASES = tuple(f"{kind}{batch}" for batch in ("", "-32") for kind in (*SAMPLED, *FILES, "lists"))
NAMES = ("Ada", "Bohr", "Curie", "Darwin", "Euler", "Fermi", "Gauss", "Hopper", "Jansky", "Kepler")
TOWNS = ("Berlin", "London", "Paris", "Rome", "Vienna", "Warsaw")
PROMPT_LEN = 64
FILE_PROMPT_LEN = 256
CHANGED_SHARE = 0.03
FEW = tuple(range(1000, 1010))
ROOT = Path(__file__).parent.parent

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
    async with _running(args) as contest:
        print_row(["case", "speed", "equal", "tokens/step"])
        for case in args.cases:
            figures[case] = await _case(case, contest, random.Random(case), args)
            print_row([case, *figures[case].values()])
    return figures


class Stages:
    """An executor whose results arrive later, with the tokens of texts in place of those that were sampled.

    Attributes:
        texts: by the noise key of their requests; what is sampled for others is left as it is.
    """

    def __init__(self, executor: LocalExecutor, delay_s: float) -> None:
        self.texts: dict[int, Text] = {}
        self._executor = executor
        self._delay_s = delay_s
        self._plans: list[Plan] = []
        self._written: dict[int, tuple[int, Text]] = {}  # by request: the length of the prompt, and the text

    def submit(self, plan: Plan) -> None:
        for new in plan.new_requests:
            if new.noise_key in self.texts:
                self._written[new.request_id] = new.num_prompt_tokens, self.texts[new.noise_key]
        self._plans.append(plan)
        self._executor.submit(plan)

    async def receive(self) -> Result:
        result = await self._executor.receive()
        await asyncio.sleep(self._delay_s)
        plan = self._plans.pop(0)
        return self._replaced(plan, result) if self.texts else result

    def _replaced(self, plan: Plan, result: Result) -> Result:
        token_ids: list[int] = []
        num_accepted: list[int] = []
        for chunk in (chunk for chunk in plan.chunks if chunk.samples):
            num_prompt_tokens, text = self._written[chunk.request_id]
            rest = text[chunk.start + chunk.num_known - num_prompt_tokens :]
            is_equal = [draft == token_id for draft, token_id in zip(chunk.drafts, rest, strict=False)]
            num_equal = sum(takewhile(bool, is_equal))
            token_ids += rest[: num_equal + 1]
            num_accepted += [num_equal] if chunk.drafts else []
        return replace(result, token_ids=tuple(token_ids), num_accepted=tuple(num_accepted))


@dataclass(frozen=True, slots=True)
class Work:
    """Requests that run at once.

    Args:
        texts: what is written in place of what is sampled; empty if nothing is.
    """

    prompts: Sequence[Text]
    params: SamplingParams
    predictions: Sequence[Text]
    texts: Sequence[Text] = ()


@dataclass(frozen=True, slots=True)
class Contest:
    """A running pipeline, and its two schedulers."""

    pipeline: LoadedPipeline
    engine: AsyncEngine
    stages: Stages
    thread: ThreadPoolExecutor
    runners: Sequence[StageRunner]
    without: Scheduler
    drafting: Scheduler
    tokenizer: Tokenizer

    async def texts(self, scheduler: Scheduler, work: Work) -> tuple[list[Text], float]:
        """The texts of all requests, and the seconds that they took."""
        if self.engine.scheduler is not scheduler:
            for runner in self.runners:
                await asyncio.wrap_future(self.thread.submit(runner.reset, runner.layers))
            self.engine.resume(scheduler, self.stages, self.pipeline.limits())
        self.stages.texts = dict(enumerate(work.texts))

        async def text(number: int) -> Text:
            record = RequestRecord(work.prompts[number], work.params, number, prediction_ids=work.predictions[number])
            [stream] = self.engine.generate_all([record])
            return tuple([token_id async for delta in stream for token_id in delta.token_ids])

        begin_s = time.perf_counter()
        texts = await asyncio.gather(*map(text, range(len(work.prompts))))
        return list(texts), time.perf_counter() - begin_s


@asynccontextmanager
async def _running(args: argparse.Namespace) -> AsyncIterator[Contest]:
    config = PipelineConfig(args.model, stages=args.stages, dtype=args.dtype, kv_cache_gb=1.0)
    thread = ThreadPoolExecutor(1, thread_name_prefix="stages")
    pipeline, runners = thread.submit(load_local, config).result()
    executor = LocalExecutor(runners, thread)
    stages = Stages(executor, (args.stages + 1) * args.link_ms / 1000)
    silent = replace(pipeline, blueprint=replace(pipeline.blueprint, config=replace(config, speculation=False)))
    without, drafting = silent.make_scheduler(), pipeline.make_scheduler()
    engine = AsyncEngine(without, stages, pipeline.limits())
    running = asyncio.create_task(engine.run())
    tokenizer = Tokenizer.load(resolve_model(args.model, None))
    try:
        yield Contest(pipeline, engine, stages, thread, runners, without, drafting, tokenizer)
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
        executor.close()


async def _case(name: str, contest: Contest, chooser: random.Random, args: argparse.Namespace) -> dict[str, float]:
    kind, _, batch = name.partition("-")
    ratios, num_equal, num_texts, num_tokens, num_decodes = [], 0, 0, 0, 0
    for number in range(args.rounds + 1):  # the first warms up
        work = _work(kind, int(batch or 1), number, contest, chooser, args.output_len)
        is_drafting_first = not number % 2 and kind != "prediction"  # which needs the text
        taken: dict[bool, tuple[list[Text], float]] = {}
        for drafts in (is_drafting_first, not is_drafting_first):
            if drafts and kind == "prediction":
                predictions = [_changed(text, chooser, contest) for text in taken[False][0]]
                work = replace(work, predictions=predictions)
            scheduler = contest.drafting if drafts else contest.without
            if kind == "again":
                await contest.texts(scheduler, work)
            records = contest.engine.stats.records()
            first = records[-1].number + 1 if records else 0
            taken[drafts] = await contest.texts(scheduler, work)
            if drafts and number:
                steps = [record for record in contest.engine.stats.records(first) if record.num_decodes]
                num_tokens += sum(step.num_sampled_tokens for step in steps)
                num_decodes += sum(step.num_decodes for step in steps)
        if number:
            ratios.append(taken[False][1] / taken[True][1])
            num_equal += sum(map(tuple.__eq__, taken[True][0], taken[False][0]))
            num_texts += len(work.prompts)
    return {
        "speed": statistics.median(ratios),
        "equal": num_equal / num_texts,
        "tokens_per_step": num_tokens / num_decodes,
    }


def _work(kind: str, num_requests: int, number: int, contest: Contest, chooser: random.Random, length: int) -> Work:
    params = SamplingParams(
        length,
        temperature=1.0 if kind in ("random", "few") else 0.0,
        seed=number,
        ignore_eos=True,
        allowed_token_ids=FEW if kind == "few" else None,
    )
    no_predictions: list[Text] = [()] * num_requests
    if kind in SAMPLED:
        vocab_size = _vocab_size(contest)
        prompts = [tuple(chooser.randrange(vocab_size) for _ in range(PROMPT_LEN)) for _ in range(num_requests)]
        return Work(prompts, params, no_predictions)
    passages = [_passage(kind, contest.tokenizer, chooser, FILE_PROMPT_LEN + length) for _ in range(num_requests)]
    if kind in ("quote", "edit"):
        texts = [_changed(passage[:length], chooser, contest) for passage in passages]
        return Work([passage[:length] for passage in passages], params, no_predictions, texts)
    texts = [passage[-length:] for passage in passages]
    return Work([passage[:-length] for passage in passages], params, no_predictions, texts)


def _passage(kind: str, tokenizer: Tokenizer, chooser: random.Random, length: int) -> Text:
    """Consecutive tokens of a text of this kind."""
    while True:
        content = _records(chooser) if kind == "lists" else _content(FILES[kind], chooser)
        first = chooser.randrange(len(content))
        token_ids = tokenizer.encode(content[first : first + 12 * length])[:length]
        if len(token_ids) == length:
            return tuple(token_ids)


def _content(patterns: Sequence[str], chooser: random.Random) -> str:
    return chooser.choice(sorted(path for pattern in patterns for path in ROOT.glob(pattern))).read_text()


def _records(chooser: random.Random) -> str:
    records = (
        {
            "id": chooser.randrange(10_000),
            "name": chooser.choice(NAMES),
            "town": chooser.choice(TOWNS),
            "is_open": chooser.random() < 0.5,
            "amount": chooser.randrange(10**5) / 100,
        }
        for _ in range(200)
    )
    return "\n".join(json.dumps(record) for record in records)


def _vocab_size(contest: Contest) -> int:
    return min(50_000, contest.pipeline.blueprint.model.vocab_size)


def _changed(text: Text, chooser: random.Random, contest: Contest) -> Text:
    vocab_size = _vocab_size(contest)
    return tuple(chooser.randrange(vocab_size) if chooser.random() < CHANGED_SHARE else token_id for token_id in text)


if __name__ == "__main__":
    main()
