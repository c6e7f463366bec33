"""Where an answer ends, as a chat template shows it."""

from __future__ import annotations

from datetime import datetime

import pytest

from gptj_dist.text import chat
from gptj_dist.text.chat import ChatTemplate

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
