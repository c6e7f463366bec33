"""Embeddings are transformers' hidden states, pooled, however the work is cut and whoever shares it."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GPTJForCausalLM

from gptj_dist import LLM, SamplingParams
from gptj_dist.checkpoint.hub import resolve_model
from gptj_dist.engine.mailbox import Delta
from gptj_dist.engine.record import new_records
from gptj_dist.errors import InvalidRequestError
from gptj_dist.llm import Output
from gptj_dist.llm.progress import Meter
from gptj_dist.params import Pooling, PoolingKind
from tests.adapters import chosen

PROMPTS: tuple[str | list[int], ...] = (
    "The state of the Union is as strong as it was, and the people of this country are at work. " * 2,
    "It was",
    [7] * 33,
    [9],
)
TOLERANCE = 1e-4
NUM_LAYERS = 28
DEPTHS = (0, 1, 9, 10, 14, 15, 27, NUM_LAYERS, None)
"""At the ends of the model and of stages, and within them."""
KINDS: tuple[PoolingKind, ...] = ("mean", "last")

SETTINGS: tuple[dict[str, Any], ...] = (
    {"stages": 1},
    {"stages": 2, "max_chunk_tokens": 5},
    {"stages": 3},
    {"stages": 3, "max_chunk_tokens": 1},
)
HiddenStates = Callable[[tuple[int, ...]], tuple[Tensor, ...]]


def start(**settings: Any) -> LLM:
    return LLM("demo", device="cpu", dtype="float32", **settings)


@pytest.fixture(scope="module")
def hidden_states() -> HiddenStates:
    """transformers' of a prompt, [tokens, d_model] each."""
    model: Any = GPTJForCausalLM.from_pretrained(resolve_model("demo"), dtype=torch.float32).eval()
    known: dict[tuple[int, ...], tuple[Tensor, ...]] = {}

    @torch.inference_mode()
    def of(token_ids: tuple[int, ...]) -> tuple[Tensor, ...]:
        if token_ids not in known:
            states = model(torch.tensor([token_ids]), output_hidden_states=True).hidden_states
            known[token_ids] = tuple(state[0] for state in states)
        return known[token_ids]

    return of


def check(llm: LLM, embeddings: list[tuple[float, ...]], pooling: Pooling, hidden_states: HiddenStates) -> None:
    for prompt, embedding in zip(PROMPTS, embeddings, strict=True):
        states = hidden_states(tuple(llm._encode(prompt)))
        rows = states[-1 if pooling.layer is None else pooling.layer]
        expected = rows.double().mean(0) if pooling.kind == "mean" else rows[-1].double()
        assert len(embedding) == len(expected)
        assert (torch.tensor(embedding, dtype=torch.float64) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_they_are_transformers_however_work_is_cut(settings: dict[str, Any], hidden_states: HiddenStates) -> None:
    poolings = [  # the next settings swap the kinds
        Pooling(KINDS[number % 2], depth) for number, depth in enumerate(DEPTHS, start=SETTINGS.index(settings))
    ]
    with start(**settings) as llm:
        for pooling, embeddings in zip(poolings, embed_at_once(llm, poolings), strict=True):
            check(llm, embeddings, pooling, hidden_states)
        assert not llm._engine.scheduler.has_requests


def embed_at_once(llm: LLM, poolings: list[Pooling]) -> list[list[tuple[float, ...]]]:
    """The embeddings of all prompts by each pooling, computed beside each other."""
    prompts = [llm._encode(prompt) for prompt in PROMPTS]

    async def run() -> list[list[tuple[float, ...]]]:
        each = [SamplingParams(max_tokens=0, pooling=pooling) for pooling in poolings]
        return await asyncio.gather(*(llm._completer.embed_all(prompts, params) for params in each))

    return llm._loop.run(run())


def test_no_bit_depends_on_the_cut() -> None:
    told = set()
    for settings in SETTINGS:
        with start(**settings) as llm:
            told.add(tuple(llm.embed(PROMPTS, "mean", 15) + llm.embed(PROMPTS, "last")))
    assert len(told) == 1


def beside_completions(llm: LLM, params: SamplingParams) -> tuple[list[Output], list[tuple[float, ...]]]:
    """Embeddings that are asked for while completions are made."""
    pooled = SamplingParams(max_tokens=0, pooling=Pooling("mean", 15))
    prompts = [llm._encode(prompt) for prompt in PROMPTS]

    async def run() -> tuple[list[Output], list[tuple[float, ...]]]:
        completing = asyncio.ensure_future(
            llm._completer.complete_all(prompts, [params] * len(prompts), Meter(len(prompts)))
        )
        await asyncio.sleep(0)
        embedding = asyncio.ensure_future(llm._completer.embed_all(prompts * 3, pooled))
        return await completing, await embedding

    return llm._loop.run(run())


@pytest.mark.parametrize("settings", [{"stages": 3}, {"stages": 2, "max_chunk_tokens": 5, "kv_cache_gb": 0.004}])
def test_beside_completions_both_are_what_they_are_alone(settings: dict[str, Any], hidden_states: HiddenStates) -> None:
    params = SamplingParams(max_tokens=20, seed=1, n=2, ignore_eos=True)
    with start() as llm:
        expected = llm.generate(PROMPTS, params)
    with start(**settings) as llm:
        outputs, embeddings = beside_completions(llm, params)
        assert outputs == expected
        for first in range(0, len(embeddings), len(PROMPTS)):
            check(llm, embeddings[first : first + len(PROMPTS)], Pooling("mean", 15), hidden_states)
        assert (llm._engine.scheduler.num_preemptions > 0) == ("kv_cache_gb" in settings)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with start(stages=2) as llm:
        yield llm


def test_a_prompt_as_long_as_the_context_has_one(llm: LLM) -> None:
    [embedding] = llm.embed([7] * llm.pipeline.limits().max_model_len)
    assert len(embedding) == llm.pipeline.blueprint.model.d_model


def test_several_for_one_prompt_are_each_computed_whole(llm: LLM) -> None:
    params = SamplingParams(max_tokens=0, pooling=Pooling("mean", 3))

    async def run() -> list[list[Delta]]:
        streams = llm._engine.generate_all(new_records(llm._encode("It was the best of times"), params, 3))
        return [[delta async for delta in stream] for stream in streams]

    told = llm._loop.run(run())
    assert [delta.embedding is not None for deltas in told for delta in deltas] == [True] * 3
    assert len({delta.embedding for deltas in told for delta in deltas}) == 1


def test_what_an_adapter_adds_to_the_last_layernorms_output_is_in_them(llm: LLM, tmp_path: Path) -> None:
    change = torch.randn(1, llm.pipeline.blueprint.model.d_model, generator=torch.Generator().manual_seed(1))
    save_file({"add_vec": change}, tmp_path / "steer.safetensors")
    steer = chosen(tmp_path / "steer.safetensors", llm.pipeline.blueprint.model, strength=0.5)
    params = SamplingParams(max_tokens=0, pooling=Pooling("mean", None), adapters=(steer,))
    text = "It was the best of times"
    [changed] = llm._loop.run(llm._completer.embed_all([llm._encode(text)], params))
    [plain] = llm.embed(text)
    assert torch.allclose(torch.tensor(changed), torch.tensor(plain) + 0.5 * change[0], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("layer", [-1, NUM_LAYERS + 1])
def test_a_layer_that_is_not_there_is_refused(llm: LLM, layer: int) -> None:
    with pytest.raises(InvalidRequestError, match=f"from 0 to {NUM_LAYERS}") as raised:
        llm.embed("a", layer=layer)
    assert raised.value.param == "layer"


def test_an_embedding_samples_nothing_and_makes_no_logits(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    from gptj_dist.model.gptj import StageModel

    def logits(_self: StageModel, _hidden: Tensor) -> Tensor:
        raise AssertionError("nobody asked for logits")

    monkeypatch.setattr(StageModel, "logits", logits)
    [embedding] = llm.embed("It was the best of times")
    assert array("f", embedding)


@pytest.mark.parametrize("kind", ["mean", "last"])
def test_an_embedding_generates_nothing(kind: PoolingKind) -> None:
    with pytest.raises(InvalidRequestError, match="must be 0 with pooling"):
        SamplingParams(pooling=Pooling(kind))
