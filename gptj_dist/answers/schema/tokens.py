"""The bodies of `POST /tokenize` and `POST /detokenize`."""

from __future__ import annotations

from typing import Any, ClassVar

from gptj_dist.answers.schema.base import Body, TokenIds
from gptj_dist.answers.schema.chat import Messages
from gptj_dist.answers.schema.tools import Tools
from gptj_dist.errors import InvalidRequestError


class TokenizeRequest(Body):
    """A text, or a conversation that the chat template makes one.

    Args:
        model: one of the names in `GET /v1/models`; null takes the model that there is.
        prompt: the text.
        messages: the conversation.
        add_special_tokens: begin and end the text with the tokens that the checkpoint asks for; null does so with a
            prompt, and leaves it to the template with a conversation.
        return_token_strs: return the tokens as texts, too.
        add_generation_prompt: let the template end with the beginning of an answer.
        chat_template_kwargs: variables for the template.
        tools: as in chat, for the template.
    """

    unserved: ClassVar = dict.fromkeys(("chat_template", "continue_final_message", "mm_processor_kwargs"))

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool = False
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] = {}
    tools: Tools = []

    def check(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequestError("give either prompt or messages", "prompt")


class DetokenizeRequest(Body):
    """Token ids to be read as text.

    Args:
        model: one of the names in `GET /v1/models`; null takes the model that there is.
        tokens: one or more; a special one is read as its name.
    """

    model: str | None = None
    tokens: TokenIds
