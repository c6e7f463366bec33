"""`gptj-dist doctor`: what the checkpoint says of its texts is reported, and what is odd about it is a warning."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gptj_dist.checkpoint.hub import DEMO, resolve_model
from gptj_dist.checkpoint.index import read_model_config
from gptj_dist.checkpoint.synthetic import write_checkpoint
from gptj_dist.config import ModelConfig
from gptj_dist.operate.doctor.cluster import Finding
from gptj_dist.operate.doctor.text import find_in_text_settings
from gptj_dist.text.vocabulary import write_tokenizer
from tests.unit.test_doctor import only, troubles


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """300 rows and tokens; token 299 ends texts."""
    write_checkpoint(tmp_path, ModelConfig(310, 4, 16, 2, 4, 64, 32, (299,)))
    write_tokenizer(tmp_path, 300)
    return tmp_path


def found(directory: Path) -> list[Finding]:
    return find_in_text_settings(directory, read_model_config(directory))


def test_the_demo_has_its_tokenizer_template_and_end_reported_and_nothing_odd() -> None:
    findings = found(resolve_model(DEMO))
    assert troubles(findings) == []
    assert "4096 entries" in only(findings, "tokenizer").what
    assert only(findings, "template").what == "none: chat needs --chat-template"
    assert only(findings, "end").what == "0 '<|endoftext|>'"


def test_defaults_of_the_generation_config_are_reported_and_what_is_not_applied_is_odd(checkpoint: Path) -> None:
    fields = {"eos_token_id": [13], "temperature": 0.7, "num_beams": 4}
    (checkpoint / "generation_config.json").write_text(json.dumps(fields))
    findings = found(checkpoint)
    assert only(findings, "end").what == "299 '<|endoftext|>', 13 '.'"
    assert "temperature 0.7" in only(findings, "generation").what
    assert troubles(findings) == ["warning texts"]
    assert "num_beams 4" in only(findings, "texts").what
    assert only(findings, "texts").cure


@pytest.mark.parametrize(
    ("end", "oddity"),
    [(None, "no eos_token_id"), ([299, 305], "token 305 ends texts, but the tokenizer has no entry for it")],
)
def test_an_end_that_no_text_can_reach_is_odd(checkpoint: Path, end: object, oddity: str) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": end}))
    findings = found(checkpoint)
    assert troubles(findings) == ["warning texts"]
    assert oddity in only(findings, "texts").what


def test_a_template_that_is_no_jinja_is_a_failure_and_a_good_one_is_reported(checkpoint: Path) -> None:
    template = checkpoint / "chat_template.jinja"
    template.write_text("{{ messages }}")
    assert only(found(checkpoint), "template").what == "for chat"
    template.write_text("{% for %}")
    finding = only(found(checkpoint), "template")
    assert (finding.severity, "not valid Jinja" in finding.what) == ("failure", True)
    assert "--chat-template" in (finding.cure or "")


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
INSTRUCTIONS = "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
MARKS_ONLY = "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"
WITH_EOS = "{% for m in messages %}{{ m.content }} {{ eos_token }}{% endfor %}"


@pytest.mark.parametrize("is_special", [True, False])
@pytest.mark.parametrize(
    ("template", "end", "is_odd"),
    [
        (CHATML, [299], True),
        (CHATML, [299, 301], False),
        (CHATML, [301], False),
        (INSTRUCTIONS, [299], False),
        (MARKS_ONLY, [299], False),
        (WITH_EOS, [299], False),
        (WITH_EOS, [301], True),
        ("{{ raise_exception('no') }}", [299], False),
    ],
)
def test_a_template_that_ends_answers_with_a_token_that_ends_no_text_is_odd(
    checkpoint: Path, template: str, end: list[int], is_special: bool, is_odd: bool
) -> None:
    tokens = {id: {"content": name, "special": is_special} for id, name in ((300, "<|im_start|>"), (301, "<|im_end|>"))}
    for file, fields in (
        ("tokenizer_config.json", {"added_tokens_decoder": tokens, "chat_template": template}),
        ("config.json", {"eos_token_id": end}),
    ):
        path = checkpoint / file
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    findings = found(checkpoint)
    assert troubles(findings) == ["warning texts"] * is_odd
    if is_odd:
        name = "299 '<|endoftext|>'" if template == WITH_EOS else "301 '<|im_end|>'"
        assert f"the chat template ends an answer with token {name}" in only(findings, "texts").what
