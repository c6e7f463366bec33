"""Which tools a request shows to the model, and which it has it call, whatever the form of its fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gptj_dist.answers.schema.tools import Function
from gptj_dist.errors import InvalidRequestError
from gptj_dist.params import Grammar
from gptj_dist.text.chat import ChatTemplate
from gptj_dist.text.tool_calls import MAX_CALLS, ToolFormat, calls_grammar

NO_PLACE = (
    "the chat template has no place for tools: give another with --chat-template FILE, or chat_template in Python, "
    "or let tool_choice be 'none'"
)


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of a request.

    Args:
        functions: all of them.
        choice: none does not show them to the model; auto leaves it to the model whether it calls one; required makes
            it call one.
        name: of the only one that it may call.
        is_parallel: whether a text may have several calls.
    """

    functions: Sequence[Function]
    choice: Literal["none", "auto", "required"]
    name: str | None = None
    is_parallel: bool = True

    @property
    def shown(self) -> Sequence[Function]:
        """The functions that the model learns of."""
        return () if self.choice == "none" else self.functions

    @property
    def must_call(self) -> bool:
        """Whether there is no text without a call."""
        return self.choice == "required"

    def check(self, grammar: Grammar | None, forms: str) -> None:
        """Checks the names of tools, and that no other form is asked for.

        Args:
            grammar: what the text must match otherwise.
            forms: the fields that ask for it.

        Raises:
            InvalidRequestError: names `tools` or `tool_choice`.
        """
        names = [function.name for function in self.functions]
        if double := next((name for name in names if names.count(name) > 1), None):
            raise InvalidRequestError(f"tools must have different names, got {double!r} twice", "tools")
        if not self.shown and not self.must_call:
            return
        if not self._callable:
            problem = "needs tools" if self.name is None else "is not one of the tools"
            raise InvalidRequestError(f"tool_choice {problem}", "tool_choice")
        if grammar is not None:
            raise InvalidRequestError(f"tools contradict {forms}, unless tool_choice is 'none'", "tools")

    def grammar(self, form: ToolFormat) -> Grammar:
        """What a text with calls matches. Raises InvalidRequestError if there can be no such text."""
        most = MAX_CALLS if self.is_parallel and self.name is None else 1
        schemas = {function.name: function.parameters for function in self._callable}
        return calls_grammar(form, schemas, must_call=self.must_call, most=most)

    def variables(self, template: ChatTemplate) -> Mapping[str, Any]:
        """What the template needs to show them. Raises InvalidRequestError if it cannot."""
        if not self.shown:
            return {}
        if not template.shows("tools"):
            raise InvalidRequestError(NO_PLACE, "tools")
        functions = [function.model_dump(exclude_none=True) for function in self.shown]
        return {"tools": [{"type": "function", "function": function} for function in functions]}

    @property
    def _callable(self) -> Sequence[Function]:
        return [function for function in self.shown if self.name in (None, function.name)]


NO_TOOLS = ToolUse((), "none")
