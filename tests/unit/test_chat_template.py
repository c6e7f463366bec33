"""Where an answer ends, as a chat template shows it."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from gptj_dist.errors import CheckpointError, InvalidRequestError
from gptj_dist.text import chat
from gptj_dist.text.chat import ChatTemplate, load_chat_template

LOOP = "{% for m in messages %}%s{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"


@pytest.mark.parametrize(
    ("turn", "mark"),
    [
        ("{{ m.role }}: {{ m.content }}\n", "\nuser:"),
        ("<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n", "<|im_end|>\n<|im_start|>user"),
        ("{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}", "\nuser:"),
        ("{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}", "<|endoftext|>user:"),
        (
            "{% if m.role == 'user' %}### Instruction:\n{{ m.content }}\n\n### Response:\n"
            "{% else %}{{ m.content }}\n\n{% endif %}",
            "\n\n### Instruction:",
        ),
        ("{{ m.content }}\n", ""),
        ("{{ m.content }}", ""),
        ("{% if loop.first %}{{ m.content }}{% endif %}", ""),
        ("{% if not loop.first %}{{ raise_exception('one message only') }}{% endif %}", ""),
    ],
)
def test_the_text_before_a_users_next_message_is_found(turn: str, mark: str) -> None:
    template = ChatTemplate(LOOP.replace("%s", turn), {"eos_token": "<|endoftext|>"})
    assert template.next_message_mark() == mark


@pytest.mark.parametrize(
    "source",
    ["{% break %}", "{{ " + "9" * 5000 + " }}", "{{ " + "(" * 900 + ")" * 900 + " }}", "{% for %}", "\ud800{{"],
)
def test_what_cannot_be_compiled_is_refused_in_one_line(source: str) -> None:
    with pytest.raises(CheckpointError, match="the chat template is not valid Jinja: ") as refused:
        ChatTemplate(source, {})
    assert str(refused.value).isprintable()


ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ messages|attr('__class__') }}{{ messages.__class__.__name__ }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{{ messages.append(1) }}",
    "{{ range(10 ** 9)|length }}",
)
FAILURES = (
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ 1 / 0 }}",
    "{{ '\\ud800' }}",
    "{{ strftime_now(1) }}",
    "{{ messages|xmlattr }}",
)


@pytest.mark.parametrize("source", [*ESCAPES, *FAILURES])
def test_a_template_reaches_nothing_outside_and_its_failure_is_a_refused_request(source: str) -> None:
    template = ChatTemplate(source, {})
    with pytest.raises(InvalidRequestError, match="the chat template refuses the messages: "):
        template.render([{"role": "user", "content": "a"}], {}, begins_answer=True)


@pytest.mark.parametrize("setting", ['[{"x": 1}]', '[{"name": [], "template": "a"}]', '[{"name": "default"}]', "7"])
def test_a_setting_that_names_no_default_template_is_none(tmp_path: Path, setting: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(f'{{"chat_template": {setting}}}')
    assert load_chat_template(tmp_path) is None


def test_a_template_that_cannot_be_read_is_an_error_of_the_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").mkdir()
    with pytest.raises(CheckpointError, match=r"cannot be read: .*Is a directory"):
        load_chat_template(tmp_path)


def test_the_date_is_that_of_the_request_and_not_of_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock:
        """In place of `datetime`."""

        day = 1

        @classmethod
        def now(cls) -> datetime:
            return datetime(2026, 5, cls.day)

    monkeypatch.setattr(chat, "datetime", Clock)
    template = ChatTemplate("{{ strftime_now('%d %B') }}", {})
    assert template.render([], {}, begins_answer=True) == "01 May"
    Clock.day = 2
    assert template.render([], {}, begins_answer=True) == "02 May"
