"""Settings of conversations: what ends an answer, which a base model does not by itself, and how tools are called."""

from __future__ import annotations

from dataclasses import dataclass

from gptj_dist.config import DEFAULT_CHAT_MAX_TOKENS
from gptj_dist.errors import ConfigurationError
from gptj_dist.params import MAX_STOP_STRINGS
from gptj_dist.text.chat import ChatTemplate
from gptj_dist.text.tool_calls import FORMATS, ToolFormat, ToolFormatName, format_of


@dataclass(frozen=True, slots=True)
class ChatDefaults:
    """Defaults for chat and responses.

    Args:
        max_tokens: the most tokens of an answer.
        stop: strings that end an answer; None takes the text by which the chat template begins a user's next message.
        tool_format: how the model writes calls of tools; None takes the chat template's.

    Raises:
        ConfigurationError: a value is out of its range.
    """

    max_tokens: int = DEFAULT_CHAT_MAX_TOKENS
    stop: tuple[str, ...] | None = None
    tool_format: ToolFormatName | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ConfigurationError(f"chat_max_tokens must be at least 1, got {self.max_tokens}")
        if len(self.stop or ()) > MAX_STOP_STRINGS:
            raise ConfigurationError(f"chat_stop takes at most {MAX_STOP_STRINGS} strings, got {len(self.stop or ())}")
        if not all(self.stop or ()):
            raise ConfigurationError("chat_stop must not hold an empty string")

    def form_of_calls(self, template: ChatTemplate) -> ToolFormat:
        """How a model of this template writes calls."""
        return FORMATS[self.tool_format or format_of(template.source)]

    def stop_strings(self, template: ChatTemplate) -> tuple[str, ...]:
        """The strings that end an answer in a conversation of this template."""
        if self.stop is not None:
            return self.stop
        mark = template.next_message_mark()
        return (mark,) if mark else ()
