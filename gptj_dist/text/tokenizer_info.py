"""A tokenizer described for clients that tokenise by asking the server, as lm-eval's remote tokenizer does."""

from __future__ import annotations

from pathlib import Path

from gptj_dist.json_types import JsonObject
from gptj_dist.text.chat import ChatTemplate
from gptj_dist.text.tokenizer_files import ADDED_FIELD, read_settings


def tokenizer_info(directory: Path, eos_token: str, template: ChatTemplate | None) -> JsonObject:
    """The fields of `tokenizer_config.json` in vLLM's shape: tokens are texts, and the chat template is the one in use.

    Args:
        eos_token: for a checkpoint whose files do not name it.

    Raises:
        CheckpointError: a file is broken.
    """
    settings = read_settings(directory)
    info: JsonObject = {"tokenizer_class": "GPT2Tokenizer", "eos_token": eos_token, **settings.config}
    info |= {name: token.content for name, token in settings.named.items()}
    info[ADDED_FIELD] = {str(id): token.content for id, token in settings.added.items()}
    info.pop("chat_template", None)
    return info if template is None else info | {"chat_template": template.source}
