"""The fields of chat and of responses that tell of tools and of their calls, as OpenAI has them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias

import pydantic_core
from pydantic import BeforeValidator, Field, model_validator

from gptj_dist.answers.request_limits import MAX_ARGUMENTS_CHARS, MAX_TOOLS
from gptj_dist.answers.schema.base import Body, one_of, refused_field
from gptj_dist.errors import excerpt

NAME = re.compile("[a-zA-Z0-9_-]{1,64}")
NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


class Function(Body):
    """A function that the model may call.

    Args:
        name: 1 to 64 letters of ASCII, digits, _ and -.
        description: for the model.
        parameters: a JSON schema of its arguments, which are an object; without it there are none. Arguments are always
            valid by it, whatever `strict` says.
    """

    hints: ClassVar = frozenset(("strict",))

    name: str
    description: str | None = None
    parameters: dict[str, Any] = NO_PARAMETERS

    @model_validator(mode="after")
    def _has_name(self) -> Self:
        if not NAME.fullmatch(self.name):
            raise refused_field("name", "must be 1 to 64 letters of ASCII, digits, _ and -")
        return self


class Tool(Body):
    """A tool that the model may call.

    Args:
        type: only function.
        function: its name and its arguments.
    """

    type: Literal["function"]
    function: Function


class FunctionTool(Function):
    """A tool of a response.

    Args:
        type: only function.
    """

    unserved: ClassVar = {"allowed_callers": ["direct"], "defer_loading": None, "output_schema": None}

    type: Literal["function"]

    def as_function(self) -> Function:
        """The function alone, as chat has it."""
        return Function(name=self.name, description=self.description, parameters=self.parameters)


class NamedFunction(Body):
    """A function of the tools.

    Args:
        name: its name.
    """

    name: str


class NamedTool(Body):
    """The tool that the model is to call.

    Args:
        type: only function.
        function: with its name.
    """

    type: Literal["function"]
    function: NamedFunction


class NamedFunctionTool(NamedFunction):
    """The tool of a response that the model is to call.

    Args:
        type: only function.
    """

    type: Literal["function"]


class CalledFunction(Body):
    """What an earlier answer called.

    Args:
        name: of the function.
        arguments: JSON of an object.
    """

    name: str
    arguments: str

    def parsed(self) -> dict[str, Any]:
        """The arguments. Raises ValueError if they are not JSON of an object."""
        value = pydantic_core.from_json(self.arguments, allow_inf_nan=False)
        if not isinstance(value, dict):
            raise ValueError("not an object")
        return value


class ToolCall(Body):
    """A call in an earlier answer.

    Args:
        id: by which the message with the tool's result names it.
        type: only function.
        function: what was called.
    """

    hints: ClassVar = frozenset(("index",))

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction

    def for_template(self) -> dict[str, Any]:
        """The call as chat templates read it: the arguments are an object."""
        function = {"name": self.function.name, "arguments": self.function.parsed()}
        return {"id": self.id, "type": self.type, "function": function}


def check_arguments(calls: Iterable[tuple[str, CalledFunction]]) -> None:
    """Checks the arguments of calls, all together small enough to be parsed.

    Args:
        calls: each with the name of its field.

    Raises:
        PydanticCustomError: by `refused_field`.
    """
    num_chars = 0
    for place, function in calls:
        num_chars += len(function.arguments)
        if num_chars > MAX_ARGUMENTS_CHARS:
            raise refused_field(place, f"is too long: all calls may have {MAX_ARGUMENTS_CHARS} characters of arguments")
        try:
            function.parsed()
        except ValueError:
            raise refused_field(place, "must be JSON of an object") from None


def _is_function(tool: Any) -> Any:
    """Refuses a tool of the client's provider by its type, before its fields, which are unknown here."""
    if isinstance(tool, dict) and tool.get("type", "function") != "function":
        raise refused_field("type", f"must be 'function'; got {excerpt(tool['type'])}")
    return tool


_LIST_OF_TOOLS = Field(fail_fast=True, max_length=MAX_TOOLS)
Tools: TypeAlias = Annotated[list[Annotated[Tool, BeforeValidator(_is_function)]], _LIST_OF_TOOLS]
FunctionTools: TypeAlias = Annotated[list[Annotated[FunctionTool, BeforeValidator(_is_function)]], _LIST_OF_TOOLS]
ToolCalls: TypeAlias = Annotated[list[ToolCall], Field(fail_fast=True)]
Choice: TypeAlias = Literal["none", "auto", "required"]
ToolChoice: TypeAlias = Annotated[
    Choice | NamedTool,
    one_of('"none", "auto", "required" or {"type": "function", "function": {"name": ...}}'),
]
FunctionToolChoice: TypeAlias = Annotated[
    Choice | NamedFunctionTool, one_of('"none", "auto", "required" or {"type": "function", "name": ...}')
]
