"""Runs MLPerf's GPT-J task, summaries by beam search, under its own load generator.

    python -m benchmarks.mlperf MODEL --dataset cnn_eval.json --scenario Server --user-conf user.conf
    python -m benchmarks.mlperf MODEL --dataset cnn_eval.json --accuracy

It needs `pip install mlcommons-loadgen`, and for `--accuracy` `rouge-score`. The task: beams of 4, from 30 to 128
tokens, `early_stopping`, prompts cut at 1,919 tokens. `--dataset` is MLPerf's file of `instruction`, `input` and
`output`; without it prompts are random tokens, which have no references. Without `--user-conf` a run takes MLPerf's 10
minutes; `benchmarks/mlperf_short.conf` is for a try with the demo. LoadGen's logs go to `--logs`; whether the run is
valid, and LoadGen's figures, are in the JSON document on the last line of standard output. With `--accuracy` it has
ROUGE in place of speeds.
"""

from __future__ import annotations

import argparse
import json
import random
from array import array
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.figures import machine, print_document
from gptj_dist import LLM, SamplingParams
from gptj_dist.llm.outputs import Completion

MOST_PROMPT_TOKENS, NUM_BEAMS, LEAST_TOKENS, MOST_TOKENS = 1919, 4, 30, 128
PARAMS = SamplingParams(
    MOST_TOKENS, min_tokens=LEAST_TOKENS, best_of=NUM_BEAMS, use_beam_search=True, early_stopping=True
)
PROMPT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ROUGES = ("rouge1", "rouge2", "rougeL")


class Task:
    """The system under test.

    Args:
        prompts: token ids.
        loadgen: the module of the load generator.
    """

    def __init__(self, llm: LLM, prompts: Sequence[list[int]], loadgen: Any) -> None:
        self._llm = llm
        self._prompts = prompts
        self._loadgen = loadgen
        # As many threads as searches fit the batch twice, so that there are always some in the queue.
        num_threads = max(1, 2 * llm.pipeline.limits().max_batch_size // NUM_BEAMS)
        self._threads = ThreadPoolExecutor(num_threads)
        self.texts: dict[int, str] = {}
        self.error: Exception | None = None

    def issue(self, samples: Sequence[Any]) -> None:
        """Begins to answer. LoadGen calls it."""
        for sample in samples:
            self._threads.submit(self._answer, sample.id, sample.index)

    def _answer(self, query_id: int, index: int) -> None:
        token_ids: tuple[int, ...] = ()
        try:
            completion = self._complete(self._prompts[index])
            self.texts[index], token_ids = completion.text, completion.token_ids
        except Exception as error:  # without an answer LoadGen would wait for ever
            self.error = error
        data = array("q", token_ids)
        address, _ = data.buffer_info()
        size = data.itemsize * len(data)
        response = self._loadgen.QuerySampleResponse(query_id, address, size, len(token_ids))
        self._loadgen.QuerySamplesComplete([response])

    def _complete(self, prompt: list[int]) -> Completion:
        [output] = self._llm.beam_search([prompt], PARAMS, use_tqdm=False)
        return output.completions[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory, or demo")
    parser.add_argument("--dataset", type=Path)
    parser.add_argument("--scenario", choices=["Offline", "Server"], default="Offline")
    parser.add_argument("--accuracy", action="store_true", help="answer every prompt once, and compare the texts")
    parser.add_argument("--user-conf", type=Path, help="in place of MLPerf's settings")
    parser.add_argument("--logs", type=Path, default=Path("mlperf-logs"))
    parser.add_argument("--stages", type=int, default=1)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-batch-size", type=int, default=32)
    parser.add_argument("--samples", type=int, help="the most prompts of the dataset; without it 64 random ones")
    args = parser.parse_args()
    entries = None if args.dataset is None else json.loads(args.dataset.read_text())[: args.samples]
    with LLM(args.model, stages=args.stages, dtype=args.dtype, max_batch_size=args.max_batch_size) as llm:
        prompts = random_prompts(llm, args.samples or 64) if entries is None else [encode(llm, one) for one in entries]
        task = run(llm, prompts, args)
    if task.error is not None:
        raise SystemExit(f"a prompt was not answered: {task.error}")
    figures: dict[str, Any] = summary((args.logs / "mlperf_log_summary.txt").read_text())
    if args.accuracy:
        figures = {} if entries is None else rouge([(task.texts[i], one["output"]) for i, one in enumerate(entries)])
    asked = {name: vars(args)[name] for name in ("model", "scenario", "accuracy", "stages", "dtype", "max_batch_size")}
    print_document("mlperf", {"machine": machine(), **asked, "prompts": len(prompts), **figures})


def encode(llm: LLM, entry: Mapping[str, str]) -> list[int]:
    """The tokens of an entry of the dataset, cut at the end."""
    return llm.tokenizer.encode(PROMPT.format(**entry))[: most_prompt_tokens(llm)]


def random_prompts(llm: LLM, number: int) -> list[list[int]]:
    chooser = random.Random(0)
    limits = llm.pipeline.limits()
    lengths = [chooser.randint(1, most_prompt_tokens(llm)) for _ in range(number)]
    return [[chooser.randrange(limits.rules.vocab_size) for _ in range(length)] for length in lengths]


def most_prompt_tokens(llm: LLM) -> int:
    return min(MOST_PROMPT_TOKENS, llm.pipeline.limits().max_model_len - MOST_TOKENS)


def run(llm: LLM, prompts: Sequence[list[int]], args: argparse.Namespace) -> Task:
    """One run of LoadGen."""
    import mlperf_loadgen as loadgen

    settings, logs = loadgen.TestSettings(), loadgen.LogSettings()
    settings.scenario = getattr(loadgen.TestScenario, args.scenario)
    settings.mode = loadgen.TestMode.AccuracyOnly if args.accuracy else loadgen.TestMode.PerformanceOnly
    if args.user_conf is not None:
        settings.FromConfig(str(args.user_conf), "gptj", args.scenario, 1)
    settings.performance_sample_count_override = len(prompts)
    args.logs.mkdir(parents=True, exist_ok=True)
    logs.log_output.outdir = str(args.logs)
    task = Task(llm, prompts, loadgen)
    system = loadgen.ConstructSUT(task.issue, lambda: None)
    library = loadgen.ConstructQSL(len(prompts), len(prompts), lambda _: None, lambda _: None)
    loadgen.StartTestWithLogSettings(system, library, settings, logs, "")
    loadgen.DestroyQSL(library)
    loadgen.DestroySUT(system)
    return task


def summary(text: str) -> dict[str, Any]:
    """LoadGen's figures, up to its settings, by their names."""
    results = text.partition("Test Parameters Used")[0]
    pairs = [line.split(":", 1) for line in results.splitlines() if ":" in line]
    return {"results": {name.strip(): value.strip() for name, value in pairs}, "is_valid": "Result is : VALID" in text}


def rouge(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Mean F-measures in percent, as MLPerf computes them.

    Args:
        pairs: texts with their references.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(ROUGES, use_stemmer=True)
    scores = [scorer.score(reference.strip(), text.strip()) for text, reference in pairs]
    return {name: 100 * fmean(score[name].fmeasure for score in scores) for name in ROUGES}


if __name__ == "__main__":
    main()
