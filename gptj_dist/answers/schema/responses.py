"""The body of `POST /v1/responses`, for plain text."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from gptj_dist.answers.schema.base import AS_LIST, AS_TEXT, NON_EMPTY, Body, Integer, text_or_list
from gptj_dist.answers.schema.chat import Message
from gptj_dist.answers.schema.grammars import TextFormat
from gptj_dist.answers.schema.sampling import SamplingFields
from gptj_dist.errors import InvalidRequestError, excerpt
from gptj_dist.params import Grammar

LOGPROBS = "message.output_text.logprobs"


class InputPart(Body):
    """A part of a message's content.

    Args:
        type: only text, because GPT-J reads nothing else; `output_text` is that of an earlier response.
        text: the part's text.
    """

    hints: ClassVar = frozenset(("annotations", "cache_control", "logprobs", "prompt_cache_breakpoint"))
    unserved: ClassVar = dict.fromkeys(
        ("detail", "file_data", "file_id", "file_url", "filename", "image_url", "refusal")
    )

    type: Literal["input_text", "output_text", "text"]
    text: str


InputContent: TypeAlias = Annotated[
    Annotated[str, AS_TEXT] | Annotated[list[InputPart], AS_LIST], text_or_list("a string or a list of text parts")
]


class InputItem(Body):
    """A message of the conversation, from a client or out of an earlier response.

    Args:
        type: only messages.
        role: such as system, user or assistant; the chat template decides which there are.
        content: text, or parts that are joined.
    """

    hints: ClassVar = frozenset(("annotations", "cache_control", "id", "metadata", "phase", "status"))

    type: Literal["message"] = "message"
    role: str
    content: InputContent

    def as_message(self) -> Message:
        """The item as a message of a chat."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message(role=self.role, content=content)


class TextOptions(Body):
    """Options of the text.

    Args:
        format: what the text matches when it ends by itself.
    """

    unserved: ClassVar = {"verbosity": "medium"}

    format: TextFormat | None = None


Input: TypeAlias = Annotated[
    Annotated[str, AS_TEXT] | Annotated[list[InputItem], AS_LIST, NON_EMPTY],
    text_or_list("a string or a list of messages"),
]


class ResponsesRequest(SamplingFields):
    """A text or a conversation to be answered. The server keeps no responses.

    Args:
        input: a conversation, or a text: where there is a chat template, the message of a user; else the text to be
            continued, as in completions.
        instructions: a system message before the conversation.
        max_output_tokens: the most tokens to generate; null leaves it to the checkpoint's `max_new_tokens`, or else to
            the server's `--chat-max-tokens`.
        include: what else to return: `message.output_text.logprobs`, each token's log probability.
        top_logprobs: with those, the log probabilities of this number of the likeliest tokens, 0 to 20.
        metadata: returned with the response, and changes nothing.
        text: with `format`, OpenAI's name for the JSON forms of `structured_outputs`.
        tools: accepted with a `tool_choice` of none, and the model does not see them: only chat calls tools.
        tool_choice: none, or auto without tools.
    """

    hints: ClassVar = SamplingFields.hints - {"metadata"} | {"stream_options"}
    unserved: ClassVar = dict.fromkeys((
        "access_programs", "background", "background_options", "cache_salt", "context_management", "conversation",
        "image", "max_tool_calls", "moderation", "previous_response_id", "prompt", "reasoning", "request_id",
    )) | {"truncation": "disabled"}  # fmt: skip

    input: Input
    instructions: str | None = None
    max_output_tokens: Integer | None = None
    include: list[Literal["message.output_text.logprobs"]] = []
    top_logprobs: Integer = 0
    metadata: dict[str, Any] = {}
    text: TextOptions | None = None
    tools: list[Any] = []
    tool_choice: Literal["none", "auto"] = "auto"

    @property
    def has_logprobs(self) -> bool:
        """Whether log probabilities are returned."""
        return LOGPROBS in self.include

    def messages(self) -> list[Message]:
        """The whole conversation."""
        messages = [] if self.instructions is None else [Message(role="system", content=self.instructions)]
        if isinstance(self.input, str):
            return [*messages, Message(role="user", content=self.input)]
        return [*messages, *(item.as_message() for item in self.input)]

    @property
    def text_format(self) -> TextFormat | None:
        """What the text must match by OpenAI's field, if the request has it."""
        return None if self.text is None else self.text.format

    @cached_property
    def grammar(self) -> Grammar | None:
        of_format = None if self.text_format is None else self.text_format.grammar()
        return super().grammar if of_format is None else of_format

    def own_params(self) -> dict[str, Any]:
        return {"logprobs": self.top_logprobs if self.has_logprobs else None}

    def own_names(self) -> Mapping[str, str]:
        names = {"prompt": "input", "max_tokens": "max_output_tokens", "logprobs": "top_logprobs"}
        return names if self.structured_outputs is not None else names | {"structured_outputs": "text"}

    def check(self) -> None:
        super().check()
        if self.text_format is not None:
            self.text_format.check()
            if self.structured_outputs is not None and self.text_format.type != "text":
                raise InvalidRequestError("text.format and structured_outputs contradict each other", "text")
        if self.tools and self.tool_choice != "none":
            raise InvalidRequestError(
                "tools are not supported in responses: let tool_choice be 'none', or use /v1/chat/completions", "tools"
            )
        if self.top_logprobs and not self.has_logprobs:
            raise InvalidRequestError(f"top_logprobs may be given only when include has {LOGPROBS!r}", "top_logprobs")
        if self.max_output_tokens is not None and self.max_output_tokens < 1:
            got = excerpt(self.max_output_tokens)
            raise InvalidRequestError(f"max_output_tokens must be at least 1, got {got}", "max_output_tokens")
        self.sampling_params(self.max_output_tokens or max(self.min_tokens, 1))
