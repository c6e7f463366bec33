"""Has a model write JSON by many schemas, and measures what structured output costs.

    python -m benchmarks.structured_output demo --schemas 500
    python -m benchmarks.structured_output deep --schemas 0

All in one process. Schemas: each is completed once at temperature 1; every text that ended by itself is parsed and
checked by `jsonschema`, formats too. `num_wrong` must be 0. Grammars that are refused are counted.

Costs, in turn with and without a grammar that the model cannot end: the time to the first token of one request
(`first_token_later_ms`, the median over rounds, once compiled), and the tokens per second of 32 requests at once
(`speed`, with over without). The last line on standard output is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import jsonschema

from benchmarks.figures import machine, print_document
from benchmarks.schemas import schema
from gptj_dist import LLM, Grammar, SamplingParams
from gptj_dist.engine.request import FinishReason
from gptj_dist.errors import InvalidRequestError

PROMPT = "The captain wrote this down in JSON:"
BATCH = 32
INPUT_LEN = 16
OUTPUT_LEN = 64
ENDLESS = Grammar.json({"type": "array", "items": {"type": "object"}, "minItems": 1000})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="demo, or a directory")
    parser.add_argument("--schemas", type=int, default=500)
    parser.add_argument("--max-tokens", type=int, default=300)
    parser.add_argument("--stages", type=int, default=1)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    with LLM(args.model, dtype=args.dtype, stages=args.stages) as llm:
        figures = {
            "schemas": fill_in(llm, args.schemas, args.max_tokens),
            "first_token_later_ms": first_token_later_ms(llm, args.rounds),
            "speed": speed(llm, args.rounds),
        }
    print_document("structured_output", {"machine": machine(), "model": args.model, "stages": args.stages, **figures})


def fill_in(llm: LLM, num_schemas: int, max_tokens: int) -> dict[str, Any]:
    """Numbers of texts that ended, that were cut, that are wrong, and of schemas that were refused."""
    params: dict[int, SamplingParams] = {}
    refused: Counter[str] = Counter()
    for number in range(num_schemas):
        grammar = Grammar.json(schema(number))
        try:
            llm.tokenizer.grammars.check(grammar)
        except InvalidRequestError as error:
            refused[str(error)] += 1
        else:
            params[number] = SamplingParams(max_tokens, seed=number, structured_outputs=grammar)
    outputs = llm.generate([PROMPT] * len(params), list(params.values()), use_tqdm=False) if params else []
    reasons: Counter[str] = Counter()
    wrong: list[str] = []
    for number, output in zip(params, outputs, strict=True):
        [completion] = output.completions
        reasons[completion.finish_reason] += 1
        if completion.finish_reason == FinishReason.STOP and (problem := problem_of(number, completion.text)):
            wrong.append(f"schema {number}: {problem}")
    return {
        "num_by_finish_reason": dict(reasons),
        "num_wrong": len(wrong),
        "wrong": wrong[:5],
        "refused": dict(refused),
    }


def problem_of(number: int, text: str) -> str:
    """What is wrong with a text for a schema; empty if nothing is."""
    try:
        checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
        jsonschema.Draft202012Validator(schema(number), format_checker=checker).validate(json.loads(text))
    except (ValueError, jsonschema.ValidationError) as error:
        return f"{text[:100]!r}: {str(error).splitlines()[0]}"
    return ""


def first_token_later_ms(llm: LLM, num_rounds: int) -> float:
    """How much later the first token comes with a grammar."""
    plain = SamplingParams(1, temperature=0)
    with_grammar = replace(plain, structured_outputs=ENDLESS)

    def seconds(params: SamplingParams, first: int) -> float:
        begin_s = time.perf_counter()
        llm.generate([list(range(first, first + INPUT_LEN))], params, use_tqdm=False)
        return time.perf_counter() - begin_s

    seconds(plain, 0), seconds(with_grammar, 0)
    rounds = [(seconds(plain, i), seconds(with_grammar, i)) for i in range(1, 4 * num_rounds + 1)]
    return 1000 * statistics.median(other - one for one, other in rounds)


def speed(llm: LLM, num_rounds: int) -> float:
    """The rate of many requests with a grammar, divided by that without."""
    prompts = [list(range(first, first + INPUT_LEN)) for first in range(BATCH)]
    plain = SamplingParams(OUTPUT_LEN, seed=1, ignore_eos=True)
    with_grammar = replace(plain, structured_outputs=ENDLESS)

    def seconds(params: SamplingParams) -> float:
        begin_s = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert {len(output.completions[0].token_ids) for output in outputs} == {OUTPUT_LEN}
        return time.perf_counter() - begin_s

    seconds(plain), seconds(with_grammar)
    rounds = [(seconds(plain), seconds(with_grammar)) for _ in range(num_rounds)]
    return statistics.median(one / other for one, other in rounds)


if __name__ == "__main__":
    main()
