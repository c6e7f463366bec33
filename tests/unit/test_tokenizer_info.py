"""What clients that tokenise by asking the server, such as lm-eval, read from /tokenizer_info."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from gptj_dist.answers.served_model import ServedModel
from gptj_dist.checkpoint.hub import resolve_model
from gptj_dist.config import PipelineConfig
from gptj_dist.text.chat import ChatTemplate
from gptj_dist.text.tokenizer import Tokenizer
from gptj_dist.text.tokenizer_info import tokenizer_info

DEMO = resolve_model("demo")


def test_it_has_what_lm_eval_reads() -> None:
    tokenizer = Tokenizer.load(DEMO)
    info = ServedModel.load(PipelineConfig("demo"), ("demo",), "{{ messages[0].content }}").tokenizer_info
    assert json.loads(json.dumps(info)) == info
    assert isinstance(info["tokenizer_class"], str)
    assert len(tokenizer.encode(info["eos_token"])) == len(tokenizer.encode(info["bos_token"])) == 1
    assert info["chat_template"] == "{{ messages[0].content }}"
    assert "chat_template" not in ServedModel.load(PipelineConfig("demo"), ("demo",), None).tokenizer_info


def test_tokens_are_texts_and_the_template_is_the_one_in_use(tmp_path: Path) -> None:
    shutil.copy(DEMO / "tokenizer.json", tmp_path)
    pad = {"content": "<pad>", "lstrip": False, "special": True}
    config = {"tokenizer_class": "X", "pad_token": pad, "chat_template": "old", "model_max_length": 2048}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    info = tokenizer_info(tmp_path, "<|endoftext|>", ChatTemplate("new", {}))
    assert (info["tokenizer_class"], info["pad_token"], info["model_max_length"]) == ("X", "<pad>", 2048)
    assert (info["eos_token"], info["chat_template"]) == ("<|endoftext|>", "new")
