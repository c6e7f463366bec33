"""How `LLM` may be called: vLLM's forms of prompts and parameters, chat, the bar; wrong types are refused by name."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gptj_dist import LLM, SamplingParams
from gptj_dist.errors import CheckpointError, ConfigurationError, InvalidRequestError, NotReadyError
from gptj_dist.llm.prompts import read_prompts
from gptj_dist.stages.blueprint import LoadedPipeline

GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
MESSAGES = [{"role": "user", "content": "What is the state of the Union?"}]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("demo", max_batch_size=8) as llm:
        yield llm


def test_vllms_forms_of_a_prompt_are_read_as_theirs(llm: LLM) -> None:
    text = "The captain looked"
    ids = llm.tokenizer.encode(text)
    forms: list[Any] = [
        text,
        ids,
        tuple(ids),
        {"prompt": text},
        {"prompt_token_ids": ids},
        {"prompt": "not read", "prompt_token_ids": ids},
        {"prompt": text, "multi_modal_data": None},
        [text],
        [{"prompt": text}],
        [ids],
    ]
    expected = llm.generate(text, GREEDY)
    for form in forms:
        assert llm.generate(form, GREEDY) == expected
    assert llm.generate([form for form in forms if form not in ([text], [ids])][:7], GREEDY) == expected * 7
    assert "".join(llm.stream({"prompt": text}, GREEDY)) == expected[0].text
    assert llm.embed({"prompt_token_ids": ids}) == llm.embed(text)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (None, "prompt must be a text, a list of token ids, .*, got None"),
        (b"bytes", "prompt must be a text"),
        (3, "prompt must be a text"),
        ({"the", "set"}, "prompt must be a text"),
        ({}, r"prompt\['prompt'\] must be a text, got None"),
        ({"prompt": None}, r"prompt\['prompt'\] must be a text, got None"),
        ({"prompt": 7}, r"prompt\['prompt'\] must be a text, got 7"),
        ({"promt": "x"}, "prompt: unknown setting 'promt': did you mean 'prompt'"),
        ({"prompt": "x", "multi_modal_data": {"image": 1}}, "unknown setting 'multi_modal_data'"),
        ({"prompt_token_ids": "x"}, r"prompt\['prompt_token_ids'\] must be a list of token ids, got 'x'"),
        ({"prompt_token_ids": [1, "x"]}, r"prompt_token_ids'\]\[1\] must be an int, got 'x'"),
        (["x", None], r"prompts\[1\] must be a text"),
        (["x", 3], r"prompt is a list of token ids, so prompt\[0\] must be an int, got 'x'"),
        ([3, 4.0], r"prompt\[1\] must be an int, got 4.0"),
        ([[3, True]], r"prompts\[0\]\[1\] must be an int, got True"),
        (["half \ud83d of a character"], r"prompts\[0\] holds .* at 5, half of a character"),
    ],
)
def test_another_prompt_is_refused_with_its_place(prompts: object, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        read_prompts(prompts)


def test_a_prompt_that_came_before_is_cached_but_for_its_last_block(llm: LLM) -> None:
    ids = list(range(7, 57))
    first, again, salted = (llm.generate(ids, replace(GREEDY, cache_salt=salt))[0] for salt in (None, None, "mine"))
    assert [output.num_cached_tokens for output in (first, again, salted)] == [0, 48, 0]
    assert first == again == salted


def test_a_list_of_parameters_has_one_for_each_prompt(llm: LLM) -> None:
    prompts = ["The captain looked", "In the morning", "It was"]
    params = [GREEDY, SamplingParams(max_tokens=3, seed=1), SamplingParams(max_tokens=4, temperature=0, n=2)]
    expected = [llm.generate(*pair)[0] for pair in zip(prompts, params, strict=True)]
    assert llm.generate(prompts, params) == expected
    assert [len(output.completions) for output in expected] == [1, 1, 2]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"max_tokens": 3}, r"params must be SamplingParams, or a list .*, got \{'max_tokens': 3\}"),
        ([{"max_tokens": 3}], "params must be SamplingParams"),
        (64, "params must be SamplingParams"),
        ([GREEDY] * 2, "params has 2 entries for 1 prompts"),
        ([], "params has 0 entries for 1 prompts"),
    ],
)
def test_other_parameters_are_refused(llm: LLM, params: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        llm.generate("x", params)
    with pytest.raises(InvalidRequestError, match=message):
        llm.stream("x", params)


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (None, {}, "model must be str, got None"),
        (7, {}, "model must be str, got 7"),
        ("demo", {"stages": "2"}, r"stages must be int \| None, got '2'"),
        ("demo", {"stages": 2.0}, r"stages must be int \| None, got 2.0"),
        ("demo", {"dtype": None}, "dtype must be 'auto' or 'float32'"),
        ("demo", {"layers": "14,14"}, r"layers must be tuple\[int, \.\.\.\] \| None, got '14,14'"),
        ("demo", {"max_batch_size": "8"}, "max_batch_size must be int, got '8'"),
        ("demo", {"kv_cache_gb": "auto"}, r"kv_cache_gb must be float \| None, got 'auto'"),
    ],
)
def test_settings_of_a_wrong_type_are_refused_by_name(model: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        LLM(model, **settings)


def test_a_path_and_a_list_of_layers_are_taken() -> None:
    demo = Path(__file__).parents[2] / "gptj_dist" / "demo"
    with LLM(demo, layers=[20, 8]) as llm:
        assert [layers.num_layers for layers in llm.pipeline.blueprint.layers] == [20, 8]


@pytest.mark.parametrize(
    "changes", [{"n": 2}, {"logprobs": 1}, {"prompt_logprobs": 0}], ids=lambda changes: next(iter(changes))
)
def test_a_stream_refuses_what_it_cannot_yield(llm: LLM, changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match="stream yields the text of one completion"):
        llm.stream("x", SamplingParams(**changes))


# Chat


def test_a_chat_is_the_completion_of_the_templates_text(llm: LLM) -> None:
    text = "user: What is the state of the Union?\nassistant:"
    expected = llm.generate(text, GREEDY)
    assert llm.chat(MESSAGES, GREEDY, chat_template=TEMPLATE) == expected
    assert llm.chat([MESSAGES, MESSAGES], GREEDY, chat_template=TEMPLATE) == expected * 2


def test_a_chat_can_continue_its_last_message(llm: LLM) -> None:
    messages: list[dict[str, Any]] = [*MESSAGES, {"role": "assistant", "content": "The Union is", "refusal": None}]
    expected = llm.generate("user: What is the state of the Union?\nassistant: The Union is", GREEDY)
    arguments: dict[str, Any] = {"chat_template": TEMPLATE, "continue_final_message": True}
    assert llm.chat(messages, GREEDY, add_generation_prompt=False, **arguments) == expected
    with pytest.raises(InvalidRequestError, match="needs add_generation_prompt=False"):
        llm.chat(messages, GREEDY, **arguments)


def test_a_chat_without_parameters_ends_before_the_users_next_message(llm: LLM) -> None:
    [params] = llm._params_of(None, [[1] * 1000], llm._chat_defaults(llm._chat_template(TEMPLATE)))
    assert params.stop == ("\nuser:",)
    assert params.max_tokens == 24  # the context's rest


def test_a_default_of_more_tokens_than_fit_is_cut_to_what_the_context_and_the_kv_cache_hold(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = llm.pipeline.limits()
    monkeypatch.setattr(LoadedPipeline, "limits", lambda _: replace(limits, kv_tokens=40))
    params = llm._params_of(None, [[1] * 10, [1] * 30, [1] * 50], {"max_tokens": 20})
    assert [each.max_tokens for each in params] == [20, 10, 1]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, "messages must be a list of messages"),
        ([], "messages must be a list of messages"),
        ("hello", "messages must be a list of messages"),
        (["hello"], "messages.0 must be an object"),
        ([{"role": "user"}], "messages.0.content is required"),
        ([{"role": "user", "content": 7}], "messages.0.content must be a string or a list of text parts"),
        ([[]], "messages"),
    ],
)
def test_another_conversation_is_refused_with_the_place(llm: LLM, messages: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        llm.chat(messages, GREEDY, chat_template=TEMPLATE)


def test_a_chat_needs_a_template_that_is_valid(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="no chat template, as GPT-J has none: give chat_template"):
        llm.chat(MESSAGES)
    with pytest.raises(InvalidRequestError, match="chat_template must be the text of a Jinja template"):
        llm.chat(MESSAGES, chat_template=Path("x"))  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="not valid Jinja"):
        llm.chat(MESSAGES, chat_template="{% for %}")


# Processes


def _run_script(code: str, tmp_path: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """A script of its own process, whose temporary files would stay in `tmp_path`."""
    script = f"from gptj_dist import LLM, SamplingParams\n{code}"
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    return subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        **options,
    )


@pytest.mark.parametrize(
    "code",
    [
        "llm = LLM('demo'); print(len(llm.generate('x')))",
        "print(len(LLM('demo').generate('x')))",
        "llm = LLM('demo'); stream = llm.stream('x', SamplingParams(max_tokens=900)); next(stream); print(1)",
        "a, b = LLM('demo'), LLM('demo'); a.generate('x'); del a; print(len(b.generate('x')))",
        "llm = LLM('demo'); llm.me = llm; import gc; del llm; gc.collect(); print(1)",
        "for _ in LLM('demo').stream('x'): pass\nprint(1)",
    ],
)
def test_a_script_that_closes_nothing_ends_without_litter(code: str, tmp_path: Path) -> None:
    done = _run_script(code, tmp_path)
    # On a busy machine asyncio's debug mode reports calls that took long.
    litter = [line for line in done.stderr.splitlines() if not line.startswith("Executing <")]
    assert (done.returncode, done.stdout, litter) == (0, "1\n", [])
    assert list(tmp_path.iterdir()) == []


def test_an_llm_that_is_garbage_leaves_no_thread(tmp_path: Path) -> None:
    code = "import threading; llm = LLM('demo'); llm.generate('x'); del llm; print(threading.active_count())"
    assert _run_script(code, tmp_path).stdout == "1\n"


def test_a_fork_is_refused_and_does_not_disturb_the_parent(tmp_path: Path) -> None:
    code = """
import os, sys
from gptj_dist.errors import NotReadyError
llm = LLM('demo')
expected = llm.generate('x', SamplingParams(temperature=0))
child = os.fork()
if not child:
    for call in (llm.generate, llm.embed, llm.stream, lambda _: llm.write_trace('t')):
        try:
            call('x')
        except NotReadyError as error:
            print(error)
    llm.close()
    sys.exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), llm.generate('x', SamplingParams(temperature=0)) == expected)
"""
    script = ["-c", f"from gptj_dist import LLM, SamplingParams\n{code}"]
    done = subprocess.run(
        [sys.executable, *script], cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False
    )
    *refusals, last = done.stdout.splitlines()
    assert (last, done.stderr) == ("7 True", "")
    assert len(refusals) == 4
    assert all("not in a fork of it: make one in each process" in line for line in refusals)


@pytest.mark.parametrize(("argument", "is_shown"), [("", True), (", use_tqdm=False", False)])
def test_a_terminal_gets_a_bar_unless_it_is_not_wanted(argument: str, is_shown: bool) -> None:
    outer, inner = pty.openpty()
    code = f"llm = LLM('demo'); llm.generate(['x'] * 3, SamplingParams(max_tokens=30, ignore_eos=True){argument})"
    script = f"from gptj_dist import LLM, SamplingParams\n{code}"
    environment = os.environ | {"TERM": "xterm"}
    with subprocess.Popen([sys.executable, "-c", script], stderr=inner, stdout=inner, env=environment) as process:
        os.close(inner)
        seen = b""
        while data := _read(outer):
            seen += data
        assert process.wait(timeout=100) == 0
    os.close(outer)
    assert (b" of 3 prompts, " in seen) == is_shown
    assert b"Traceback" not in seen


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # the other end is closed
        return b""


def test_a_pipe_gets_no_bar(tmp_path: Path) -> None:
    done = _run_script("LLM('demo').generate(['x'] * 3)", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_closed_llm_says_so(llm: LLM) -> None:
    closed = LLM("demo", max_batch_size=1)
    closed.close()
    for call in (closed.generate, closed.embed, closed.stream):
        with pytest.raises(NotReadyError, match="the LLM has been closed"):
            call("x")
    with pytest.raises(InvalidRequestError, match="use_tqdm must be True or False"):
        llm.generate("x", GREEDY, use_tqdm=1)  # type: ignore[arg-type]


def test_the_types_of_the_package_are_for_its_users_too() -> None:
    import gptj_dist

    assert (Path(gptj_dist.__file__).parent / "py.typed").exists()
