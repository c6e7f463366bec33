"""Log probabilities and controls through a whole pipeline: transformers' numbers, however the work is cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPTJForCausalLM

from gptj_dist import LLM, SamplingParams
from gptj_dist.checkpoint.hub import resolve_model
from gptj_dist.errors import InvalidRequestError
from gptj_dist.params import TokenLogprobs

PROMPT = "The state of the Union is as strong as it was, and the people of this country are at work."
TOLERANCE = 1e-4
LONG = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, logprobs=5, prompt_logprobs=3)


@pytest.fixture(scope="module")
def expected_of() -> Any:
    """Natural log probabilities [tokens, vocab_size] of what follows each token."""
    model: Any = GPTJForCausalLM.from_pretrained(resolve_model("demo"), dtype=torch.float32).eval()

    @torch.inference_mode()
    def logprobs(token_ids: tuple[int, ...]) -> Tensor:
        result: Tensor = model(torch.tensor([token_ids])).logits[0].double().log_softmax(-1)
        return result

    return logprobs


def check(told: tuple[TokenLogprobs, ...], token_ids: tuple[int, ...], expected: Tensor, num_top: int) -> None:
    """`told` is of `token_ids`; `expected` has the row before each of them."""
    assert tuple(token.token_id for token in told) == token_ids
    for token, row in zip(told, expected, strict=True):
        assert token.logprob == pytest.approx(row[token.token_id].item(), abs=TOLERANCE)
        assert 1 <= token.rank <= 1 + int((row > row[token.token_id] - TOLERANCE).sum())
        values = row.topk(num_top).values.tolist()
        assert [logprob for _, logprob in token.top] == pytest.approx(values, abs=TOLERANCE)
        assert all(row[id_].item() == pytest.approx(logprob, abs=TOLERANCE) for id_, logprob in token.top)


@pytest.mark.parametrize("settings", [{"stages": 1}, {"stages": 3}, {"stages": 2, "max_chunk_tokens": 5}])
def test_they_are_transformers_however_work_is_cut(settings: dict[str, Any], expected_of: Any) -> None:
    with LLM("demo", device="cpu", dtype="float32", **settings) as llm:
        outputs = llm.generate([PROMPT, "It was", "x"], LONG)
    for output in outputs:
        (completion,) = output.completions
        expected = expected_of((*output.prompt_ids, *completion.token_ids))
        num_prompt = len(output.prompt_ids)
        check(output.prompt_logprobs, output.prompt_ids[1:], expected[: num_prompt - 1], 3)
        check(completion.logprobs, completion.token_ids, expected[num_prompt - 1 : -1], 5)


def test_a_preemption_tells_nothing_twice(expected_of: Any) -> None:
    params = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True, logprobs=0, prompt_logprobs=0)
    with LLM("demo", device="cpu", dtype="float32", stages=2, kv_cache_gb=0.003) as llm:
        outputs = llm.generate([PROMPT] * 6, params)
        assert llm._engine.scheduler.num_preemptions > 0
    (one,) = {(output.prompt_logprobs, output.completions) for output in outputs}
    prompt_ids = outputs[0].prompt_ids
    check(one[0], prompt_ids[1:], expected_of(prompt_ids)[:-1], 0)
    assert len(one[1][0].logprobs) == 40


@pytest.fixture(scope="module")
def llm() -> Any:
    with LLM("demo", device="cpu", dtype="float32", stages=2) as llm:
        yield llm


def test_a_prompt_is_scored_without_generating(llm: LLM) -> None:
    params = SamplingParams(max_tokens=0, prompt_logprobs=1)
    (output,) = llm.generate(PROMPT, params)
    assert [token.token_id for token in output.prompt_logprobs] == list(output.prompt_ids[1:])
    assert output.completions[0].token_ids == ()
    assert output.completions[0].finish_reason == "length"
    assert not llm._engine.scheduler.has_requests


def test_a_prompt_as_long_as_the_context_can_be_scored(llm: LLM) -> None:
    length = llm.pipeline.limits().max_model_len
    (output,) = llm.generate([7] * length, SamplingParams(max_tokens=0, prompt_logprobs=0))
    assert len(output.prompt_logprobs) == length - 1


def test_penalties_see_prompt_and_output_of_every_stage_and_chunk() -> None:
    """What the engine makes is what one row after the other makes by the formula."""
    params = SamplingParams(
        max_tokens=30,
        temperature=0,
        ignore_eos=True,
        repetition_penalty=1.3,
        presence_penalty=0.4,
        frequency_penalty=0.2,
    )
    texts = set()
    for stages, max_chunk_tokens in ((1, None), (3, None), (2, 5)):
        with LLM("demo", device="cpu", dtype="float32", stages=stages, max_chunk_tokens=max_chunk_tokens) as llm:
            (output,) = llm.generate(PROMPT, params)
            prompt_ids, generated = output.prompt_ids, output.completions[0].token_ids
            texts.add(generated)
    assert len(texts) == 1
    model: Any = GPTJForCausalLM.from_pretrained(resolve_model("demo"), dtype=torch.float32).eval()
    token_ids = list(prompt_ids)
    for token_id in generated:
        with torch.inference_mode():
            logits = model(torch.tensor([token_ids])).logits
        row = logits[0, -1].clone()
        for seen in set(token_ids):
            row[seen] = row[seen] / 1.3 if row[seen] > 0 else row[seen] * 1.3
        output_ids = token_ids[len(prompt_ids) :]
        for seen in set(output_ids):
            row[seen] -= 0.2 * output_ids.count(seen) + 0.4
        assert int(row.argmax()) == token_id
        token_ids.append(token_id)


def test_stop_tokens_end_the_text(llm: LLM) -> None:
    greedy = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    whole = llm.generate(PROMPT, greedy)[0].completions[0]
    stop = whole.token_ids[7]
    first = whole.token_ids.index(stop)

    def run(**settings: Any) -> Any:
        params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True, stop_token_ids=(stop,), **settings)
        return llm.generate(PROMPT, params)[0].completions[0]

    ended = run()
    assert (ended.token_ids, ended.finish_reason) == (whole.token_ids[: first + 1], "stop")
    assert ended.text == llm.tokenizer.decode(whole.token_ids[:first])
    assert run(include_stop_str_in_output=True).text == llm.tokenizer.decode(whole.token_ids[: first + 1])
    assert stop not in run(min_tokens=12).token_ids[:12]
    assert len(run(min_tokens=12).token_ids) >= 12


def test_a_stop_string_is_kept_on_demand(llm: LLM) -> None:
    text = llm.generate(PROMPT, SamplingParams(max_tokens=20, temperature=0, ignore_eos=True))[0].text
    stop = text[8:11]
    params = SamplingParams(max_tokens=20, temperature=0, stop=(stop,), include_stop_str_in_output=True)
    assert llm.generate(PROMPT, params)[0].text == text[: text.index(stop) + 3]


def test_special_tokens_are_shown_on_demand(llm: LLM) -> None:
    eos = llm.pipeline.blueprint.model.eos_token_ids[0]
    params = SamplingParams(
        max_tokens=3, temperature=0, ignore_eos=True, allowed_token_ids=(eos,), skip_special_tokens=False
    )
    assert llm.generate(PROMPT, params)[0].text == "<|endoftext|>" * 3


@pytest.mark.parametrize("name", ["stop_token_ids", "allowed_token_ids"])
def test_tokens_beyond_the_vocabulary_are_refused_by_name(llm: LLM, name: str) -> None:
    settings: dict[str, Any] = {name: (10**6,)}
    with pytest.raises(InvalidRequestError, match="vocabulary ends") as raised:
        llm.generate(PROMPT, SamplingParams(**settings))
    assert raised.value.param == name
