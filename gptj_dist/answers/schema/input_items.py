"""The items of a response's input: messages, calls of tools and their results, as clients send back what they got."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Discriminator, Tag

from gptj_dist.answers.schema.base import AS_LIST, AS_TEXT, NON_EMPTY, Body, refused_field, text_or_list
from gptj_dist.answers.schema.chat import Message
from gptj_dist.answers.schema.tools import CalledFunction, ToolCall, check_arguments
from gptj_dist.errors import excerpt


class InputPart(Body):
    """A part of a message's content, or of a tool's result.

    Args:
        type: only text, because GPT-J reads nothing else; `output_text` is that of an earlier response.
        text: the part's text.
    """

    hints: ClassVar = frozenset(("annotations", "cache_control", "logprobs", "parsed", "prompt_cache_breakpoint"))
    unserved: ClassVar = dict.fromkeys(
        ("detail", "file_data", "file_id", "file_url", "filename", "image_url", "refusal")
    )

    type: Literal["input_text", "output_text", "text"]
    text: str


InputContent: TypeAlias = Annotated[
    Annotated[str, AS_TEXT] | Annotated[list[InputPart], AS_LIST], text_or_list("a string or a list of text parts")
]


def _text_of(content: str | Sequence[InputPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


class MessageItem(Body):
    """A message of the conversation, from a client or out of an earlier response.

    Args:
        type: may be left out.
        role: such as system, user or assistant; the chat template decides which there are.
        content: text, or parts that are joined.
    """

    hints: ClassVar = frozenset(("annotations", "cache_control", "id", "metadata", "phase", "status"))

    type: Literal["message"] = "message"
    role: str
    content: InputContent

    def as_message(self) -> Message:
        """The item as a message of a chat."""
        return Message(role=self.role, content=_text_of(self.content))


class CallItem(CalledFunction):
    """A call in an earlier response.

    Args:
        type: always function_call.
        call_id: by which the result names it.
    """

    hints: ClassVar = frozenset(("id", "parsed_arguments", "status"))
    unserved: ClassVar = {"caller": {"type": "direct"}} | dict.fromkeys(("async", "async_", "namespace"))

    type: Literal["function_call"]
    call_id: str

    def as_call(self) -> ToolCall:
        """The item as a call of a chat."""
        return ToolCall(id=self.call_id, function=CalledFunction(name=self.name, arguments=self.arguments))


class CallOutputItem(Body):
    """The result of a call.

    Args:
        type: always function_call_output.
        call_id: of the call.
        output: text, or parts that are joined.
    """

    hints: ClassVar = frozenset(("id", "name", "status"))
    unserved: ClassVar = {"caller": {"type": "direct"}, "namespace": None}

    type: Literal["function_call_output"]
    call_id: str
    output: InputContent

    def as_message(self) -> Message:
        """The item as a message of a chat."""
        return Message(role="tool", content=_text_of(self.output), tool_call_id=self.call_id)


_KINDS = ("message", "function_call", "function_call_output")


def _tag(item: Any) -> str | None:
    return f"<{item.get('type') or 'message'}>" if isinstance(item, dict) else None


def _served(item: Any) -> Any:
    kind = item.get("type") or "message" if isinstance(item, dict) else "message"
    if kind not in _KINDS:
        raise refused_field("type", f"must be {', '.join(_KINDS[:-1])} or {_KINDS[-1]}; got {excerpt(kind)}")
    return item


InputItem: TypeAlias = Annotated[
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[CallItem, Tag("<function_call>")]
    | Annotated[CallOutputItem, Tag("<function_call_output>")],
    Discriminator(_tag, "form", "Input should be an object"),
    BeforeValidator(_served),
]


def _with_arguments(items: list[MessageItem | CallItem | CallOutputItem]) -> list[Any]:
    check_arguments((f"{i}.arguments", item) for i, item in enumerate(items) if isinstance(item, CallItem))
    return items


Input: TypeAlias = Annotated[
    Annotated[str, AS_TEXT] | Annotated[list[InputItem], NON_EMPTY, AfterValidator(_with_arguments), AS_LIST],
    text_or_list("a string or a list of items"),
]


def as_messages(items: Iterable[MessageItem | CallItem | CallOutputItem]) -> list[Message]:
    """The items as messages of a chat. Calls belong to the assistant's message before them, if there is one."""
    messages: list[Message] = []
    calls: list[list[ToolCall]] = []
    for item in items:
        if not isinstance(item, CallItem):
            messages.append(item.as_message())
            calls.append([])
            continue
        if not messages or messages[-1].role != "assistant":
            messages.append(Message(role="assistant"))
            calls.append([])
        calls[-1].append(item.as_call())
    return [
        message.model_copy(update={"tool_calls": own}) if own else message
        for message, own in zip(messages, calls, strict=True)
    ]
