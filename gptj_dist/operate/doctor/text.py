"""How the checkpoint wants texts to be read, ended and sampled: what `inspect` prints of it, as findings."""

from __future__ import annotations

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
    """Findings about tokenizer, chat template, end tokens and generation config.

    Args:
        directory: of the checkpoint on this machine.
        model: as it would be served.
    """
    findings = {subject: Finding("ok", subject, text) for subject, text in text_rows(directory, model)}
    try:
        load_chat_template(directory)
    except CheckpointError as error:
        cure = "correct it, or serve with another one by --chat-template"
        findings["template"] = Finding("failure", "template", str(error), cure)
    oddities = odd_text_settings(directory, model)
    return [*findings.values(), *(Finding("warning", "texts", oddity, _ODDITY_CURE) for oddity in oddities)]
