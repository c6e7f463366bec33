"""The fields of chat that tell of tools and of their calls, as OpenAI has them."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias

import pydantic_core
from pydantic import Field, model_validator

from gptj_dist.answers.request_limits import MAX_TOOLS
from gptj_dist.answers.schema.base import Body, one_of, refused_field

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


Tools: TypeAlias = Annotated[list[Tool], Field(fail_fast=True, max_length=MAX_TOOLS)]
ToolCalls: TypeAlias = Annotated[list[ToolCall], Field(fail_fast=True)]
ToolChoice: TypeAlias = Annotated[
    Literal["none", "auto", "required"] | NamedTool,
    one_of('"none", "auto", "required" or {"type": "function", "function": {"name": ...}}'),
]
