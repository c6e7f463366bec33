"""How the checkpoint wants texts to be read, ended and sampled: what `inspect` prints of it, as findings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gptj_dist.config import ModelConfig
from gptj_dist.errors import CheckpointError
from gptj_dist.operate.doctor.cluster import Finding
from gptj_dist.operate.text_settings import odd_text_settings, text_rows
from gptj_dist.text.chat import load_chat_template

_ODDITY_CURE = (
    "correct config.json, generation_config.json or the tokenizer's files, or send `stop` and the sampling fields with "
    "each request"
)


def find_in_text_settings(directory: Path, model: ModelConfig) -> list[Finding]:
    """What there is to say of tokenizer, chat template, end tokens and generation config.

    Args:
        directory: of the checkpoint on this machine.
        model: as it would be served.
    """
    template = list(_broken_template(directory))
    rows = [row for row in text_rows(directory, model) if not (template and row[0] == "template")]
    return [
        *(Finding("ok", subject, text) for subject, text in rows),
        *template,
        *(Finding("warning", "texts", oddity, _ODDITY_CURE) for oddity in odd_text_settings(directory, model)),
    ]


def _broken_template(directory: Path) -> Iterator[Finding]:
    try:
        load_chat_template(directory)
    except CheckpointError as error:
        yield Finding("failure", "template", str(error), "correct it, or serve with another one by --chat-template")
