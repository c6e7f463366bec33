"""The body of `POST /v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, ClassVar, Self, TypeAlias

from pydantic import AfterValidator, ConfigDict, model_validator

from gptj_dist.answers.schema.base import NON_EMPTY, Body, Integer, refused_field
from gptj_dist.answers.schema.content import Content, text_of
from gptj_dist.answers.schema.sampling import ChoiceFields
from gptj_dist.answers.schema.tool_use import ToolUse
from gptj_dist.answers.schema.tools import NamedTool, ToolCalls, ToolChoice, Tools, check_arguments
from gptj_dist.errors import InvalidRequestError, excerpt
from gptj_dist.text.chat import ChatTemplate


class Message(Body):
    """One message of a conversation, from a client or out of an earlier response.

    Args:
        role: such as system, user or assistant; the chat template decides which there are.
        content: text, or parts that are joined; an assistant's message may have none.
        name: of the speaker, for templates that show it.
        tool_calls: that an assistant's message made.
        tool_call_id: of the call whose result the message is.
    """

    model_config = ConfigDict(json_schema_extra={"required": ["role", "content"]})

    hints: ClassVar = frozenset(("annotations", "cache_control", "metadata", "options"))
    unserved: ClassVar = dict.fromkeys(("audio", "function_call", "reasoning", "reasoning_content", "refusal"))
    successors: ClassVar = {"function_call": "tool_calls"}

    role: str
    content: Content = ""
    name: str | None = None
    tool_calls: ToolCalls = []
    tool_call_id: str | None = None

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates read it."""
        message: dict[str, Any] = {"role": self.role, "content": text_of(self.content)}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_calls:
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if "content" not in self.model_fields_set and self.role != "assistant":
            raise refused_field("content", "is required")
        if self.tool_calls and self.role != "assistant":
            raise refused_field("tool_calls", "may be only in a message of the assistant")
        return self


def _with_arguments(messages: list[Message]) -> list[Message]:
    check_arguments(
        (f"{i}.tool_calls.{k}.function.arguments", call.function)
        for i, message in enumerate(messages)
        for k, call in enumerate(message.tool_calls)
    )
    return messages


Messages: TypeAlias = Annotated[list[Message], NON_EMPTY, AfterValidator(_with_arguments)]


def check_shown(messages: Sequence[Message], template: ChatTemplate) -> None:
    """Raises InvalidRequestError if messages have calls of tools, and the template leaves them out."""
    if not template.shows("tool_calls") and any(message.tool_calls for message in messages):
        raise InvalidRequestError("the chat template shows no tool_calls", "messages")


class ChatTools(Body):
    """The fields of chat that tell of tools.

    Args:
        tools: functions that the model may call, where the chat template shows them to it; at most 128.
        tool_choice: none does not show them; auto leaves it to the model whether it calls one; required and a named one
            make it call.
        parallel_tool_calls: whether an answer may have several calls, in a format that has.
    """

    tools: Tools = []
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True

    @cached_property
    def tool_use(self) -> ToolUse:
        """What the tools are for."""
        functions, choice = [tool.function for tool in self.tools], self.tool_choice
        if isinstance(choice, NamedTool):
            return ToolUse(functions, "required", choice.function.name, self.parallel_tool_calls)
        return ToolUse(functions, choice, is_parallel=self.parallel_tool_calls)

    def own_names(self) -> Mapping[str, str]:
        return {"structured_outputs": "tools"}


class Conversation(Body):
    """A conversation alone.

    Args:
        messages: one message or more.
    """

    messages: Messages


class ChatRequest(ChatTools, ChoiceFields):
    """A conversation to be continued.

    Args:
        messages: the conversation so far, one message or more.
        max_tokens: the most tokens to generate; null leaves it to the checkpoint's `max_new_tokens`, or else to the
            server's `--chat-max-tokens`.
        add_special_tokens: begin and end the text of the template with the tokens that the checkpoint asks for.
        max_completion_tokens: OpenAI's newer name for it.
        logprobs: return each token's log probability.
        top_logprobs: and that of this number of the likeliest tokens, 0 to 20.
        prompt_logprobs: only null: the prompt's log probabilities are returned by completions.
        chat_template_kwargs: variables for the template.
        add_generation_prompt: let the template end with the beginning of an answer; null does unless the last message
            is continued.
        continue_final_message: continue the last message instead of answering it.
    """

    hints: ClassVar = ChoiceFields.hints - {"parallel_tool_calls"}
    successors: ClassVar = {"functions": "tools", "function_call": "tool_choice"}

    messages: Messages
    max_tokens: Integer | None = None
    max_completion_tokens: Integer | None = None
    add_special_tokens: bool = False
    logprobs: bool = False
    top_logprobs: Integer | None = None
    prompt_logprobs: None = None
    chat_template_kwargs: dict[str, Any] = {}
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False

    @property
    def most_tokens(self) -> int | None:
        """The most tokens to generate, under either name; None leaves it to the server."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def own_params(self) -> dict[str, Any]:
        return {"logprobs": (self.top_logprobs or 0) if self.logprobs else None}

    def own_names(self) -> Mapping[str, str]:
        limit = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        names = {**ChoiceFields.own_names(self), "prompt": "messages", "max_tokens": limit, "logprobs": "top_logprobs"}
        return {**names, **ChatTools.own_names(self)} if self.tool_use.shown else names

    def check(self) -> None:
        super().check()
        self.tool_use.check(self.grammar, "response_format and structured_outputs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise InvalidRequestError(
                "max_tokens and max_completion_tokens contradict each other", "max_completion_tokens"
            )
        if self.most_tokens is not None and self.most_tokens < 1:
            raise InvalidRequestError(f"max_tokens must be at least 1, got {excerpt(self.most_tokens)}", "max_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequestError("top_logprobs may be given only when logprobs is true", "top_logprobs")
        if self.continue_final_message and self.add_generation_prompt:
            raise InvalidRequestError(
                "continue_final_message and add_generation_prompt contradict each other", "continue_final_message"
            )
        self.sampling_params(self.most_tokens or max(self.min_tokens, 1))
