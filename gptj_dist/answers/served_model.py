"""What the ingress knows of the model: its names, its tokenizer, its chat template. Knows no requests."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

from gptj_dist.answers.chat_defaults import ChatDefaults
from gptj_dist.checkpoint.hub import resolve_model
from gptj_dist.checkpoint.index import read_model_config
from gptj_dist.config import PipelineConfig
from gptj_dist.json_types import JsonObject
from gptj_dist.text.chat import ChatTemplate, load_chat_template
from gptj_dist.text.tokenizer import Tokenizer
from gptj_dist.text.tokenizer_info import tokenizer_info


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model as far as requests are concerned.

    Args:
        names: what clients call it; the first is what answers say.
        chat: for conversations whose requests leave it out.
        max_model_len: the most tokens of prompt and output together, as far as it is known while the model loads.
        tokenizer_info: what `GET /tokenizer_info` returns.
    """

    names: tuple[str, ...]
    tokenizer: Tokenizer
    eos_token_id: int
    chat_template: ChatTemplate | None = None
    chat: ChatDefaults = ChatDefaults()  # noqa: RUF009  # frozen
    max_model_len: int | None = None
    tokenizer_info: JsonObject = field(default_factory=dict)

    @classmethod
    def load(
        cls,
        config: PipelineConfig,
        names: tuple[str, ...],
        chat_template: str | None,
        chat: ChatDefaults = ChatDefaults(),  # noqa: B008  # frozen
    ) -> Self:
        """Reads it from the model's files, which have been fetched.

        Args:
            names: what clients call it.
            chat_template: Jinja, in place of the checkpoint's.
            chat: for conversations whose requests leave it out.

        Raises:
            CheckpointError: one of them is broken.
        """
        directory = resolve_model(config.model, config.revision)
        model = read_model_config(directory)
        tokenizer, template = Tokenizer.load(directory), load_chat_template(directory, chat_template)
        return cls(
            names=names,
            tokenizer=tokenizer,
            eos_token_id=model.eos_token_id,
            chat_template=template,
            chat=chat,
            max_model_len=config.max_model_len or model.context_length,
            tokenizer_info=tokenizer_info(directory, tokenizer.token_text(model.eos_token_id), template),
        )
