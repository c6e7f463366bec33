"""lm-eval gets the same numbers from a server as from transformers on the same checkpoint.

It comes with the extra `eval`, because of its size; without it these tests are skipped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from gptj_dist.checkpoint.hub import resolve_model
from tests.http.server import Server, serving

lm_eval: Any = pytest.importorskip("lm_eval")
tasks: Any = pytest.importorskip("lm_eval.tasks")

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]

MODEL = str(resolve_model("demo"))
TEXT = (resolve_model("demo") / "heldout.txt").read_text("utf-8")
NUM_DOCUMENTS = 12
TASKS = {
    "last_words": """
output_type: loglikelihood
doc_to_text: "{{begin}}"
doc_to_target: " {{end}}"
metric_list:
  - metric: perplexity
  - metric: acc
""",
    "which_end": """
output_type: multiple_choice
doc_to_text: "{{begin}}"
doc_to_choice: ["{{end}}", "{{begin}}", "and so on"]
doc_to_target: 0
metric_list:
  - metric: acc
  - metric: acc_norm
""",
    "go_on": """
output_type: generate_until
doc_to_text: "{{begin}}"
doc_to_target: " {{end}}"
generation_kwargs:
  until: [".", ", and"]
  max_gen_toks: 24
  do_sample: false
metric_list:
  - metric: exact_match
""",
    "all_of_it": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{begin}} {{end}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
""",
}

Answers = Mapping[str, Sequence[Any]]
"""What the model said, by task: for every request a text, or a log probability and perhaps whether it is greedy's."""


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Knows the tasks of this module."""
    directory: Path = tmp_path_factory.mktemp("tasks")
    paragraphs = [line for line in TEXT.splitlines() if len(line) > 200][:NUM_DOCUMENTS]
    cut = [line[: 80 + 8 * i].rsplit(" ", 1) for i, line in enumerate(paragraphs)]
    documents = [{"begin": begin, "end": end} for begin, end in cut]
    (directory / "documents.jsonl").write_text("\n".join(map(json.dumps, documents)))
    for name, definition in TASKS.items():
        (directory / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ntest_split: test\n"
            f"dataset_kwargs:\n  data_files: {{test: {directory}/documents.jsonl}}\n  cache_dir: {directory}/cache\n"
            + definition
        )
    return tasks.TaskManager(include_path=str(directory), include_defaults=False)


def evaluate(manager: Any, back_end: str, **arguments: Any) -> tuple[Answers, Mapping[str, Any]]:
    """What the model said to every request, and what the tasks made of it."""
    results = lm_eval.simple_evaluate(
        model=back_end,
        model_args=arguments,
        tasks=list(TASKS),
        task_manager=manager,
        device="cpu",
        batch_size=1,
        bootstrap_iters=0,
    )
    samples = results["samples"]
    return {task: [sample["resps"] for sample in samples[task]] for task in TASKS}, results["results"]


@pytest.fixture(scope="module")
def expected(manager: Any) -> tuple[Answers, Mapping[str, Any]]:
    """By transformers."""
    return evaluate(manager, "hf", pretrained=MODEL, dtype="float32")


@pytest.fixture(scope="module", params=[1, 3], ids=["one stage", "three stages"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    with serving({"model": "demo", "stages": request.param, "device": "cpu", "dtype": "float32"}) as server:
        yield server


def leaves(value: Any) -> Iterator[Any]:
    """The texts and numbers in lists of lists, in order."""
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from leaves(part)
    else:
        yield value


def numbers(scores: Mapping[str, Any]) -> dict[str, float]:
    return {name: score for name, score in scores.items() if isinstance(score, float)}


@pytest.mark.parametrize("sends_tokens", [True, False], ids=["token ids", "texts"])
def test_a_server_is_measured_to_be_what_transformers_is(
    server: Server, expected: tuple[Answers, Mapping[str, Any]], manager: Any, sends_tokens: bool
) -> None:
    answers, scores = evaluate(
        manager,
        "local-completions",
        model="demo",
        base_url=f"{server.base}/v1/completions",
        tokenizer=MODEL,
        tokenizer_backend="huggingface",
        tokenized_requests=sends_tokens,
        max_length=1024,
        num_concurrent=8,
    )
    said, scored = expected
    assert answers["go_on"] == said["go_on"]
    assert len(set(leaves(said["go_on"]))) > NUM_DOCUMENTS / 2
    assert all(len(said[task]) == NUM_DOCUMENTS for task in TASKS)
    for task in TASKS.keys() - {"go_on"}:
        assert list(leaves(answers[task])) == pytest.approx(list(leaves(said[task])), abs=1e-4, rel=0)
    for task in TASKS:
        assert numbers(scores[task]) == pytest.approx(numbers(scored[task]), rel=1e-4)
