"""The items of a response's output, which grow with the text: a message, and calls of tools."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from gptj_dist.json_types import JsonObject


@dataclass(slots=True)
class MessageItem:
    """A message of the assistant, with one part.

    Attributes:
        is_complete: whether its text ended by itself.
    """

    id: str
    text: str = ""
    logprobs: list[JsonObject] = field(default_factory=list)
    is_complete: bool = False

    def body(self) -> JsonObject:
        """The whole message."""
        return self._with_content(_status(self.is_complete), [text_part(self.text, self.logprobs)])

    def beginning(self) -> JsonObject:
        """The message before its text."""
        return self._with_content("in_progress", [])

    def _with_content(self, status: str, content: list[JsonObject]) -> JsonObject:
        return {"type": "message", "id": self.id, "status": status, "role": "assistant", "content": content}


@dataclass(slots=True)
class CallItem:
    """A call of a tool.

    Args:
        call_id: by which the tool's result names it.

    Attributes:
        is_complete: whether it has all its arguments.
    """

    id: str
    call_id: str
    name: str
    arguments: str = ""
    is_complete: bool = False

    def body(self) -> JsonObject:
        """The whole call."""
        return self._with_arguments(_status(self.is_complete), self.arguments)

    def beginning(self) -> JsonObject:
        """The call before its arguments."""
        return self._with_arguments("in_progress", "")

    def _with_arguments(self, status: str, arguments: str) -> JsonObject:
        named = {"id": self.id, "status": status, "call_id": self.call_id, "name": self.name}
        return {"type": "function_call", **named, "arguments": arguments}


OutputItem: TypeAlias = MessageItem | CallItem


def text_part(text: str = "", logprobs: Sequence[JsonObject] = ()) -> JsonObject:
    """The part of a message."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}


def _status(is_complete: bool) -> str:
    return "completed" if is_complete else "incomplete"
