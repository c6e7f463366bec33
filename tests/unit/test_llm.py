"""The offline face: every form of prompt, streams that can be left, errors before anything runs, no thread left."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest

from gptj_dist import LLM, SamplingParams
from gptj_dist.engine.request import FinishReason
from gptj_dist.errors import CheckpointError, ConfigurationError, InvalidRequestError, RequestTooLongError
from gptj_dist.llm import Completion, PromptInput
from tests.waiting import wait_until

T = TypeVar("T")
TIME_LIMIT_S = 150
PROMPTS = ["The captain looked at the sea", "In the morning", "It was the best of times, it was"]
GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
SEEDED = SamplingParams(max_tokens=12, temperature=1, seed=4, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("demo", max_batch_size=8) as llm:
        yield llm


@pytest.fixture
def small() -> Iterator[LLM]:
    """One to be closed by the test."""
    llm = LLM("demo", max_batch_size=4, max_model_len=512)
    yield llm
    assert not llm._loop.thread.is_alive()


@pytest.fixture(autouse=True)
def _no_blocks_left(llm: LLM) -> Iterator[None]:
    yield
    llm.generate("a", SamplingParams(max_tokens=1))  # whatever was on its way to the engine has arrived before this
    assert _num_used_blocks(llm) == 0


def _num_used_blocks(llm: LLM) -> int:
    return llm._engine.scheduler.num_used_blocks


def _texts(llm: LLM, prompts: PromptInput | Sequence[PromptInput], params: SamplingParams = GREEDY) -> list[str]:
    return [output.text for output in llm.generate(prompts, params)]


def _in_background(call: Callable[[], T]) -> Future[T]:
    """Runs `call` on a thread that does not keep the tests from ending if it hangs."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


# Prompts


def test_a_text(llm: LLM) -> None:
    (output,) = llm.generate(PROMPTS[0], GREEDY)
    assert list(output.prompt_ids) == llm.tokenizer.encode(PROMPTS[0])
    (completion,) = output.completions
    assert len(completion.token_ids) == 12
    assert completion.text == output.text == llm.tokenizer.decode(completion.token_ids)
    assert completion.finish_reason == FinishReason.LENGTH


def test_texts_and_ids_alone_or_in_lists_say_the_same(llm: LLM) -> None:
    expected = [_texts(llm, prompt)[0] for prompt in PROMPTS]
    ids = [llm.tokenizer.encode(prompt) for prompt in PROMPTS]
    assert _texts(llm, PROMPTS) == expected
    assert _texts(llm, tuple(PROMPTS)) == expected
    assert _texts(llm, ids) == expected
    assert [_texts(llm, one)[0] for one in ids] == expected
    mixed: list[PromptInput] = [PROMPTS[0], ids[1], tuple(ids[2])]
    assert _texts(llm, mixed) == expected


def test_more_prompts_than_run_at_once(llm: LLM) -> None:
    expected = [_texts(llm, prompt)[0] for prompt in PROMPTS]
    assert _texts(llm, PROMPTS * 8) == expected * 8


def test_an_empty_text_starts_at_end_of_text(llm: LLM) -> None:
    (output,) = llm.generate("", GREEDY)
    assert output.prompt_ids == (llm.pipeline.blueprint.model.eos_token_ids[0],)
    assert output.text


def test_sixteen_tokens_are_the_default(llm: LLM) -> None:
    (completion,) = llm.generate(PROMPTS[0])[0].completions
    assert len(completion.token_ids) == 16 or completion.finish_reason == FinishReason.STOP


def test_stages_and_chunks_do_not_change_the_text(llm: LLM) -> None:
    params = [GREEDY, SEEDED]
    with LLM("demo", stages=3, max_chunk_tokens=2, max_batch_size=2, dtype="float32") as cut:
        assert [_texts(cut, PROMPTS, p) for p in params] == [_texts(llm, PROMPTS, p) for p in params]


# Parameters


def test_n_completions_differ_and_a_seed_repeats_them(llm: LLM) -> None:
    params = SamplingParams(max_tokens=12, seed=5, n=3)
    outputs = llm.generate(PROMPTS[:2], params)
    assert [len(output.completions) for output in outputs] == [3, 3]
    assert all(len({completion.text for completion in output.completions}) == 3 for output in outputs)
    assert llm.generate(PROMPTS[:2], params) == outputs
    assert _texts(llm, PROMPTS[0], SEEDED) != _texts(llm, PROMPTS[0], SamplingParams(max_tokens=12, seed=5))


def test_without_a_seed_every_call_is_another(llm: LLM) -> None:
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    assert len({_texts(llm, PROMPTS[0], params)[0] for _ in range(4)}) == 4


def test_a_stop_string_ends_the_text_and_is_not_in_it(llm: LLM) -> None:
    whole = _complete(llm, GREEDY)
    stop = whole.text[10:13]
    stopped = _complete(llm, SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, stop=(stop, "never")))
    assert stopped.finish_reason == FinishReason.STOP
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert stopped.token_ids == whole.token_ids[: len(stopped.token_ids)]
    assert stop in llm.tokenizer.decode(stopped.token_ids)


def test_end_of_text_ends_the_text(llm: LLM) -> None:
    eos = llm.pipeline.blueprint.model.eos_token_ids[0]
    address = "Gentlemen of the Senate and Gentlemen of the House of Representatives:"  # ends 1 time in 60
    completions = llm.generate(address, SamplingParams(max_tokens=3, seed=0, n=128))[0].completions
    ended = [completion for completion in completions if completion.finish_reason == FinishReason.STOP]
    assert 0 < len(ended) < 128
    assert all((completion.token_ids[-1] == eos) == (completion in ended) for completion in completions)
    assert all(eos not in completion.token_ids[:-1] for completion in completions)


def _complete(llm: LLM, params: SamplingParams) -> Completion:
    return llm.generate(PROMPTS[0], params)[0].completions[0]


# Streams


def test_a_stream_says_what_generate_says(llm: LLM) -> None:
    for params in (GREEDY, SEEDED):
        pieces = list(llm.stream(PROMPTS[0], params))
        assert "".join(pieces) == _texts(llm, PROMPTS[0], params)[0]
    assert "".join(llm.stream(llm.tokenizer.encode(PROMPTS[0]), SEEDED)) == _texts(llm, PROMPTS[0], SEEDED)[0]


def test_a_stream_comes_in_pieces(llm: LLM) -> None:
    stream = llm.stream(PROMPTS[0], SamplingParams(max_tokens=100, temperature=0, ignore_eos=True))
    next(stream)
    assert _num_used_blocks(llm) > 0  # the first piece is here, and the text goes on
    assert len(list(stream)) > 10


def test_a_closed_stream_frees_its_blocks(llm: LLM) -> None:
    stream = llm.stream(PROMPTS[0], SamplingParams(max_tokens=900, ignore_eos=True))
    next(stream)
    assert isinstance(stream, Iterator)
    stream.close()  # type: ignore[attr-defined]
    llm.generate("a", SamplingParams(max_tokens=1))
    assert _num_used_blocks(llm) == 0
    assert list(stream) == []


def test_a_stream_that_is_closed_or_dropped_unread_frees_its_blocks(llm: LLM) -> None:
    closed, dropped = (llm.stream(PROMPTS[0], SamplingParams(max_tokens=900, ignore_eos=True)) for _ in range(2))
    wait_until(lambda: llm._engine.scheduler.num_running == 2, "both run")
    closed.close()  # type: ignore[attr-defined]
    del dropped
    llm.generate("a", SamplingParams(max_tokens=1))
    assert _num_used_blocks(llm) == 0


def test_a_loop_that_is_left_frees_its_blocks(llm: LLM) -> None:
    for _ in llm.stream(PROMPTS[0], SamplingParams(max_tokens=900, ignore_eos=True)):
        break
    llm.generate("a", SamplingParams(max_tokens=1))
    assert _num_used_blocks(llm) == 0


def test_a_stream_that_is_left_does_not_disturb_others(llm: LLM) -> None:
    expected = _texts(llm, PROMPTS)
    streams = [llm.stream(PROMPTS[0], SamplingParams(max_tokens=900, ignore_eos=True)) for _ in range(3)]
    for stream in streams:
        next(stream)
    assert _texts(llm, PROMPTS) == expected
    del streams, stream


def test_a_stream_that_cannot_be_served_says_so(llm: LLM) -> None:
    with pytest.raises(RequestTooLongError):
        next(llm.stream(PROMPTS[0], SamplingParams(max_tokens=2000)))


# Errors


def test_a_call_that_is_interrupted_leaves_no_request(llm: LLM) -> None:
    async def interrupt_when_it_runs() -> None:
        """On the engine's own loop: the request cannot end before the signal is sent."""
        while llm._engine.scheduler.num_running == 0:  # noqa: ASYNC110  # the scheduler sets no event
            await asyncio.sleep(0)
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGINT)

    def interrupted_call() -> None:
        llm._loop.submit(interrupt_when_it_runs())
        llm.generate(PROMPTS, SamplingParams(max_tokens=900, ignore_eos=True))

    with pytest.raises(KeyboardInterrupt):
        interrupted_call()
    wait_until(lambda: not llm._engine.scheduler.has_requests, "no request is left")


def test_an_unknown_setting_names_the_nearest() -> None:
    with pytest.raises(ConfigurationError, match="unknown setting 'stage': did you mean 'stages'"):
        LLM("demo", stage=2)


def test_a_setting_of_servers_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="spares is for servers"):
        LLM("demo", spares=1)


@pytest.mark.parametrize("settings", [{"stages": 0}, {"dtype": "int8"}, {"stages": 29}, {"kv_cache_gb": 1e9}])
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        LLM("demo", **settings)


def test_a_bad_model_is_refused_and_leaves_no_thread(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    with pytest.raises(CheckpointError, match="there is no directory"):
        LLM("/nowhere/at/all")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        LLM(str(tmp_path))
    assert set(threading.enumerate()) <= before


def test_too_long_a_request_is_refused_and_none_of_the_others_is_run(llm: LLM) -> None:
    with pytest.raises(RequestTooLongError, match=r"1020.*context window of 1024"):
        llm.generate(PROMPTS, SamplingParams(max_tokens=1020))
    assert not llm._engine.scheduler.has_requests


@pytest.mark.parametrize("prompt", [[-1], [10**6], [[4], []]])
def test_ids_that_are_none_are_refused(llm: LLM, prompt: list[int]) -> None:
    with pytest.raises(InvalidRequestError):
        llm.generate(prompt, GREEDY)


def test_a_list_of_ids_and_texts_is_refused_rather_than_half_used(llm: LLM) -> None:
    mixed: list[object] = [5, PROMPTS[0]]
    with pytest.raises((InvalidRequestError, TypeError)):
        llm.generate(mixed, GREEDY)  # type: ignore[arg-type]


# Threads


def test_two_threads_may_call_at_once(llm: LLM) -> None:
    expected = [_texts(llm, PROMPTS, params) for params in (GREEDY, SEEDED)]
    with ThreadPoolExecutor(3) as threads:
        calls = [threads.submit(_texts, llm, PROMPTS, params) for params in (GREEDY, SEEDED) * 3]
        streamed = threads.submit(lambda: "".join(llm.stream(PROMPTS[1], SEEDED)))
        assert [call.result(TIME_LIMIT_S) for call in calls] == expected * 3
        assert streamed.result(TIME_LIMIT_S) == expected[1][1]


def test_close_leaves_no_threads() -> None:
    before = set(threading.enumerate())
    with LLM("demo", stages=2, max_batch_size=2) as llm:
        assert set(threading.enumerate()) > before
        llm.generate(PROMPTS, GREEDY)
        next(llm.stream(PROMPTS[0], SamplingParams(max_tokens=900, ignore_eos=True)))
    assert set(threading.enumerate()) <= before


def test_a_stream_outlived_by_its_llm_ends_instead_of_hanging(small: LLM) -> None:
    stream = small.stream(PROMPTS[0], SamplingParams(max_tokens=500, ignore_eos=True))
    next(stream)
    small.close()
    with pytest.raises(Exception, match="closed"):
        _in_background(lambda: list(stream)).result(TIME_LIMIT_S)


def test_a_call_outlived_by_its_llm_ends_instead_of_hanging(small: LLM) -> None:
    params = SamplingParams(max_tokens=500, ignore_eos=True)
    call = _in_background(lambda: small.generate([PROMPTS[0]] * 2, params))
    next(small.stream(PROMPTS[1], params))  # both have begun, or the call will find a closed LLM
    small.close()
    with pytest.raises(Exception, match="closed"):
        call.result(TIME_LIMIT_S)


def test_close_may_be_called_twice(small: LLM) -> None:
    small.close()
    small.close()
    with pytest.raises(Exception, match="closed"):
        small.generate(PROMPTS[0])
