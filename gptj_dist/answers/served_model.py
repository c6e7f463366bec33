"""What the ingress knows of the model: its names, its tokenizer, its chat template. Knows no requests."""

from __future__ import annotations

from collections.abc import Mapping
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
from gptj_dist.text.tool_calls import ToolFormat


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model as far as requests are concerned.

    Args:
        names: what clients call it; the first is what answers say.
        empty_prompt_ids: what an empty prompt stands for.
        chat: for conversations whose requests leave it out.
        max_model_len: the most tokens of prompt and output together, as far as it is known while the model loads.
        tokenizer_info: what `GET /tokenizer_info` returns.
        defaults: values of `SamplingParams` where a request gives none.
    """

    names: tuple[str, ...]
    tokenizer: Tokenizer
    empty_prompt_ids: tuple[int, ...]
    chat_template: ChatTemplate | None = None
    chat: ChatDefaults = ChatDefaults()  # noqa: RUF009  # frozen
    max_model_len: int | None = None
    tokenizer_info: JsonObject = field(default_factory=dict)
    defaults: Mapping[str, float] = field(default_factory=dict)

    @property
    def max_answer_tokens(self) -> int:
        """The most tokens of an answer to a conversation whose request does not say."""
        return int(self.defaults.get("max_tokens", self.chat.max_tokens))

    @property
    def form_of_calls(self) -> ToolFormat | None:
        """How the model writes calls of tools; None without a chat template."""
        return None if self.chat_template is None else self.chat.form_of_calls(self.chat_template)

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
        _ = tokenizer.grammars  # now, since it would hold up the requests of an event loop
        end_of_text = tokenizer.token_text(model.eos_token_ids[0]) if model.eos_token_ids else ""
        return cls(
            names=names,
            tokenizer=tokenizer,
            empty_prompt_ids=model.empty_prompt_ids,
            chat_template=template,
            chat=chat,
            max_model_len=config.max_model_len or model.context_length,
            tokenizer_info=tokenizer_info(directory, end_of_text, template),
            defaults=dict(model.generation.defaults) if config.generation_config == "auto" else {},
        )
