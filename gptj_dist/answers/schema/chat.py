"""The body of `POST /v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias

from pydantic import ConfigDict, model_validator

from gptj_dist.answers.schema.base import NON_EMPTY, Body, Integer, refused_field
from gptj_dist.answers.schema.content import Content, text_of
from gptj_dist.answers.schema.sampling import ChoiceFields
from gptj_dist.errors import InvalidRequestError, excerpt


class Message(Body):
    """One message of a conversation, from a client or out of an earlier response.

    Args:
        role: such as system, user or assistant; the chat template decides which there are.
        content: text, or parts that are joined; an assistant's message may have none.
        name: of the speaker, for templates that show it.
    """

    model_config = ConfigDict(json_schema_extra={"required": ["role", "content"]})

    hints: ClassVar = frozenset(("annotations", "cache_control", "metadata", "options"))
    unserved: ClassVar = dict.fromkeys(
        ("audio", "function_call", "reasoning", "reasoning_content", "refusal", "tool_call_id", "tool_calls")
    )

    role: str
    content: Content = ""
    name: str | None = None

    def for_template(self) -> dict[str, str]:
        """The message as chat templates read it."""
        name = {} if self.name is None else {"name": self.name}
        return {"role": self.role, "content": text_of(self.content)} | name

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if "content" not in self.model_fields_set and self.role != "assistant":
            raise refused_field("content", "is required")
        return self


Messages: TypeAlias = Annotated[list[Message], NON_EMPTY]


class Conversation(Body):
    """A conversation alone.

    Args:
        messages: one message or more.
    """

    messages: Messages


ToolChoice: TypeAlias = Literal["none", "auto"]


def check_tools(tools: Sequence[Any], choice: ToolChoice) -> None:
    """Raises InvalidRequestError if the model is to call tools."""
    if tools and choice != "none":
        raise InvalidRequestError("tools are not supported: leave them out, or let tool_choice be 'none'", "tools")


class ChatRequest(ChoiceFields):
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
        tools: GPT-J calls no tools; they are accepted with a `tool_choice` of none, and the model does not see them.
        tool_choice: none, or auto without tools.
        chat_template_kwargs: variables for the template.
        add_generation_prompt: let the template end with the beginning of an answer; null does unless the last message
            is continued.
        continue_final_message: continue the last message instead of answering it.
    """

    messages: Messages
    max_tokens: Integer | None = None
    max_completion_tokens: Integer | None = None
    add_special_tokens: bool = False
    logprobs: bool = False
    top_logprobs: Integer | None = None
    prompt_logprobs: None = None
    tools: list[Any] = []
    tool_choice: ToolChoice = "auto"
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
        return {**super().own_names(), "prompt": "messages", "max_tokens": limit, "logprobs": "top_logprobs"}

    def check(self) -> None:
        super().check()
        check_tools(self.tools, self.tool_choice)
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
