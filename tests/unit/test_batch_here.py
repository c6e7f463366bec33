"""`gptj-dist batch --model`: requests answered in this process are answered as a server would answer them."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gptj_dist.checkpoint.synthetic import write_checkpoint
from gptj_dist.cli.text.batch_answers import BatchAnswer
from gptj_dist.cli.text.batch_local import answering_here
from gptj_dist.cli.text.batch_requests import BatchRequest, Url
from gptj_dist.config import ModelConfig, PipelineConfig
from gptj_dist.llm import LLM
from gptj_dist.params import SamplingParams
from gptj_dist.text.vocabulary import write_tokenizer
from tests.verbs import run_verb

COMPLETIONS: Url = "/v1/completions"
CHAT: Url = "/v1/chat/completions"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def answered(*requests: BatchRequest, chat_template: Path | None = None) -> list[BatchAnswer]:
    async def answer_all() -> list[BatchAnswer]:
        config = PipelineConfig("demo", stages=2, device="cpu", kv_cache_gb=0.1)
        async with answering_here(config, ("demo", "alias"), chat_template) as answerer:
            return list(await asyncio.gather(*map(answerer.answer, requests)))

    return asyncio.run(answer_all())


def body_of(answer: BatchAnswer, status: int = 200) -> dict[str, Any]:
    assert answer.response is not None
    assert (answer.response["status_code"], answer.error) == (status, None)
    body: dict[str, Any] = answer.response["body"]
    return body


def test_completions_are_those_of_the_model_and_have_a_servers_form() -> None:
    fields = {"prompt": "Call me Ishmael.", "max_tokens": 8, "seed": 1, "temperature": 0.8}
    first, second = answered(
        BatchRequest("a", COMPLETIONS, fields), BatchRequest("b", COMPLETIONS, fields | {"model": "alias", "n": 2})
    )
    with LLM("demo", device="cpu", kv_cache_gb=0.1) as llm:
        text = llm.generate("Call me Ishmael.", SamplingParams(max_tokens=8, seed=1, temperature=0.8))[0].text
    body = body_of(first)
    assert body["choices"][0]["text"] == text
    assert body["usage"]["completion_tokens"] == first.num_output_tokens == 8
    assert (body["object"], body["model"]) == ("text_completion", "demo")
    assert first.response is not None
    assert body["id"] == f"cmpl-{first.response['request_id']}"
    assert body_of(second)["choices"][0]["text"] == text


def test_a_request_that_a_server_would_refuse_has_the_servers_refusal() -> None:
    wrong, unknown, long = answered(
        BatchRequest("a", COMPLETIONS, {"prompt": "x", "temperatur": 1}),
        BatchRequest("b", COMPLETIONS, {"prompt": "x", "model": "other"}),
        BatchRequest("c", COMPLETIONS, {"prompt": "x", "max_tokens": 100_000}),
    )
    assert body_of(wrong, 400)["error"]["param"] == "temperatur"
    assert body_of(unknown, 404)["error"]["code"] == "model_not_found"
    assert body_of(long, 400)["error"]["code"] == "context_length_exceeded"


def test_chat_wants_a_template_and_is_answered_with_one(tmp_path: Path) -> None:
    request = BatchRequest("a", CHAT, {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3, "seed": 1})
    (without,) = answered(request)
    assert "chat template" in body_of(without, 400)["error"]["message"]
    (tmp_path / "template").write_text(TEMPLATE)
    (answer,) = answered(request, chat_template=tmp_path / "template")
    assert body_of(answer)["choices"][0]["message"]["role"] == "assistant"
    assert answer.num_output_tokens == 3


def test_embeddings_are_answered_too() -> None:
    (answer,) = answered(BatchRequest("a", "/v1/embeddings", {"input": ["one", "two"]}))
    assert [len(entry["embedding"]) for entry in body_of(answer)["data"]] == [128, 128]
    assert answer.num_output_tokens == 0


def test_the_command_answers_without_a_server(tmp_path: Path) -> None:
    body = {"prompt": "Call me", "max_tokens": 4, "seed": 1}
    line = {"custom_id": "a", "method": "POST", "url": COMPLETIONS, "body": body}
    (tmp_path / "in").write_text(json.dumps(line) + "\n")
    done = run_verb(
        "batch", tmp_path / "in", tmp_path / "out", "--model", "demo", "--stages", "2", "--kv-cache-gb", "0.1",
        GPTJ_URL="http://127.0.0.1:1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "1 requests answered" in done.stdout
    (answer,) = map(json.loads, (tmp_path / "out").read_text().splitlines())
    assert answer["response"]["body"]["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize(("setting", "num_tokens"), [("auto", 3), ("none", 16)])
def test_the_checkpoints_sampling_defaults_apply_unless_they_are_left_out(
    tmp_path: Path, setting: str, num_tokens: int
) -> None:
    write_checkpoint(tmp_path, ModelConfig(300, 2, 16, 2, 4, 64, 32, (299,)))
    write_tokenizer(tmp_path, 300)
    (tmp_path / "generation_config.json").write_text(json.dumps({"max_new_tokens": 3}))
    body = {"prompt": "Call me", "seed": 1, "ignore_eos": True}
    line = {"custom_id": "a", "method": "POST", "url": COMPLETIONS, "body": body}
    (tmp_path / "in").write_text(json.dumps(line) + "\n")
    done = run_verb(
        "batch", tmp_path / "in", tmp_path / "out", "--model", tmp_path, "--generation-config", setting,
        "--kv-cache-gb", "0.01",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads((tmp_path / "out").read_text())
    assert answer["response"]["body"]["usage"]["completion_tokens"] == num_tokens


def test_no_ray_is_loaded_for_it() -> None:
    code = "import sys, gptj_dist.cli.text.batch_local; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
