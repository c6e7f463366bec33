"""The body of `POST /v1/responses`, for text and calls of tools."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar, Literal

from gptj_dist.answers.schema.base import Body, Integer
from gptj_dist.answers.schema.chat import Message
from gptj_dist.answers.schema.grammars import TextFormat
from gptj_dist.answers.schema.input_items import Input, as_messages
from gptj_dist.answers.schema.sampling import SamplingFields
from gptj_dist.answers.schema.tool_use import ToolUse
from gptj_dist.answers.schema.tools import FunctionToolChoice, FunctionTools, NamedFunctionTool
from gptj_dist.errors import InvalidRequestError, excerpt
from gptj_dist.params import Grammar

LOGPROBS = "message.output_text.logprobs"


class TextOptions(Body):
    """Options of the text.

    Args:
        format: what the text matches when it ends by itself.
    """

    unserved: ClassVar = {"verbosity": "medium"}

    format: TextFormat | None = None


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
        tools: functions that the model may call, where the chat template shows them to it; at most 128.
        tool_choice: none does not show them; auto leaves it to the model whether it calls one; required and a named one
            make it call.
        parallel_tool_calls: whether a response may have several calls, in a format that has.
    """

    hints: ClassVar = SamplingFields.hints - {"metadata", "parallel_tool_calls"} | {"stream_options"}
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
    tools: FunctionTools = []
    tool_choice: FunctionToolChoice = "auto"
    parallel_tool_calls: bool = True

    @property
    def has_logprobs(self) -> bool:
        """Whether log probabilities are returned."""
        return LOGPROBS in self.include

    def messages(self) -> list[Message]:
        """The whole conversation."""
        messages = [] if self.instructions is None else [Message(role="system", content=self.instructions)]
        if isinstance(self.input, str):
            return [*messages, Message(role="user", content=self.input)]
        return [*messages, *as_messages(self.input)]

    @cached_property
    def tool_use(self) -> ToolUse:
        """What the tools are for."""
        functions, choice = [tool.as_function() for tool in self.tools], self.tool_choice
        if isinstance(choice, NamedFunctionTool):
            return ToolUse(functions, "required", choice.name, self.parallel_tool_calls)
        return ToolUse(functions, choice, is_parallel=self.parallel_tool_calls)

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
        if self.tool_use.shown:
            return names | {"structured_outputs": "tools"}
        return names if self.structured_outputs is not None else names | {"structured_outputs": "text"}

    def check(self) -> None:
        super().check()
        if self.text_format is not None:
            self.text_format.check()
            if self.structured_outputs is not None and self.text_format.type != "text":
                raise InvalidRequestError("text.format and structured_outputs contradict each other", "text")
        self.tool_use.check(self.grammar, "text.format and structured_outputs")
        if self.tool_use.shown and self.has_logprobs:
            raise InvalidRequestError(f"tools contradict {LOGPROBS!r}: the tokens of calls are no text", "include")
        if self.top_logprobs and not self.has_logprobs:
            raise InvalidRequestError(f"top_logprobs may be given only when include has {LOGPROBS!r}", "top_logprobs")
        if self.max_output_tokens is not None and self.max_output_tokens < 1:
            got = excerpt(self.max_output_tokens)
            raise InvalidRequestError(f"max_output_tokens must be at least 1, got {got}", "max_output_tokens")
        self.sampling_params(self.max_output_tokens or max(self.min_tokens, 1))
