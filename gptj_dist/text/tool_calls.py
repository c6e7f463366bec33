"""Calls of tools in a model's text: how models write them, the grammar of such texts, and a reader.

In each format a call is an object of the tool's name and its arguments, in that order, so that a stream can name the
tool first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal, NamedTuple

from gptj_dist.errors import InvalidRequestError
from gptj_dist.params import Grammar
from gptj_dist.text.exact_schema import exact_schema

ToolFormatName = Literal["hermes", "mistral", "json"]

MAX_CALLS = 8
"""In one text."""

GAP = r"[ \n]?"
"""Between the tokens of a call, as a regular expression: an untrained model would fill longer ones."""


class ToolFormat(NamedTuple):
    """How a model writes calls; all but `mark` and `arguments` are regular expressions.

    Args:
        mark: begins the calls after a text; without one, the answer is a text or a call.
        arguments: the name of the arguments in a call.
        first: between the mark and the first call.
        between: two calls; None if there is one at most.
        last: after the last call.
    """

    mark: str
    arguments: str = "arguments"
    first: str = ""
    between: str | None = None
    last: str = ""


FORMATS: Mapping[ToolFormatName, ToolFormat] = {
    "hermes": ToolFormat("<tool_call>", between=rf"<\/tool_call>{GAP}<tool_call>", last=r"<\/tool_call>"),
    "mistral": ToolFormat("[TOOL_CALLS]", first=r"\[", between=",", last=r"\]"),
    "json": ToolFormat("", arguments="parameters"),
}
"""`<tool_call>{"name": ..., "arguments": ...}</tool_call>`, `[TOOL_CALLS] [{"name": ..., "arguments": ...}]`, and
`{"name": ..., "parameters": ...}` as Llama 3."""


MARKS = frozenset(("<tool_call>", "</tool_call>", "[TOOL_CALLS]"))
"""Texts of the formats that may be tokens of their own."""


def format_of(template: str) -> ToolFormatName:
    """The format of which a chat template has the mark."""
    return next((name for name, form in FORMATS.items() if form.mark and form.mark in template), "json")


def calls_grammar(form: ToolFormat, tools: Mapping[str, Mapping[str, Any]], must_call: bool, most: int) -> Grammar:
    """Texts in which tools are called, with arguments that are valid by their schemas.

    Args:
        tools: the schema of each tool's arguments, which are an object.
        must_call: whether there is no text without a call, or before it.
        most: calls in a text.

    Raises:
        InvalidRequestError: a schema is not one of an object, or they are too large.
    """
    schemas = _exact_arguments(tools)
    body = "\n  | ".join(f"{_head(form, name)} %json {schema}" for name, schema in schemas.items())
    num_more = 0 if form.between is None else most - 1
    more = f" (/{GAP}\\}}{GAP}{form.between}/ body){{0,{num_more}}}" if num_more else ""
    calls = (f"/{GAP}{form.first}/ " if form.first else "") + f"body{more} /{GAP}\\}}{GAP}{form.last}/"
    mark = re.escape(form.mark)
    if must_call:
        start, text = f"/{mark}/ {calls}" if mark else calls, ""
    elif mark:
        start = f"TEXT | before {calls}"
        text = f"before[lazy]: /(?s:.*){mark}/\nTEXT: /(?s:.*)/ & ~/(?s:.*){mark}(?s:.*)/\n"
    else:
        start, text = f"TEXT | {calls}", r"TEXT: /(?s:.*)/ & ~/\s*\{(?s:.*)/" + "\n"
    return Grammar("calls", f"start: {start}\n{text}body: {body}\n")


def _head(form: ToolFormat, name: str) -> str:
    """A call up to its arguments."""
    tokens = ("{", '"name"', ":", f'"{name}"', ",", f'"{form.arguments}"', ":")
    return f"/{GAP}{GAP.join(map(re.escape, tokens))}{GAP}/"


def _exact_arguments(tools: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The schema of each tool's arguments, for llguidance; all together may take as long as one that comes alone."""
    try:
        schemas = json.loads(json.dumps(tools))
        for name, schema in schemas.items():
            if schema.get("type", "object") != "object":
                raise ValueError(
                    f"the parameters of {name!r} have the type {schema['type']!r:.80}, and must be an object"
                )
            schema |= {"type": "object", "x-guidance": {"whitespace_pattern": GAP}}
        exact_schema({"$defs": schemas})
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"structured_outputs cannot be served: {error}", "structured_outputs") from None
    return {name: json.dumps(schema) for name, schema in schemas.items()}


class CallPiece(NamedTuple):
    """A piece of a call.

    Args:
        number: of the call in the text, from 0.
        name: of the tool, with the first piece of a call.
        arguments: the next characters of them.
        is_last: whether they are complete.
    """

    number: int
    name: str | None
    arguments: str
    is_last: bool = False


_TOOL = re.compile(r'\{\s*"name"\s*:\s*"([^"]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*\{')
_STEP = re.compile(r'\\.|\\\Z|["{}]', re.DOTALL)
"""What a reader of JSON must see; a backslash at the end waits for what it escapes."""


@dataclass(slots=True)
class CallReader:
    """Finds the calls in a text of a `calls_grammar` that comes in pieces.

    Attributes:
        num_calls: complete ones.
    """

    form: ToolFormat
    num_calls: int = 0
    _part: Literal["begin", "text", "calls"] = "begin"
    _rest: str = ""
    _depth: int = 0
    _in_string: bool = False

    @property
    def ends_with_call(self) -> bool:
        """Whether there were calls, and all are complete so far."""
        return self.num_calls > 0 and not self._depth

    def push(self, piece: str, is_last: bool) -> tuple[str, list[CallPiece]]:
        """What is new outside of calls, and of each call. One that breaks off before its arguments is left out."""
        self._rest += piece
        text = "" if self._part == "calls" else self._read_text(is_last)
        calls: list[CallPiece] = []
        while self._part == "calls" and (found := self._read_call()) is not None:
            if calls and calls[-1].number == found.number:
                found = found._replace(name=calls[-1].name, arguments=calls.pop().arguments + found.arguments)
            calls.append(found)
        return text, calls

    def _read_text(self, is_last: bool) -> str:
        rest, mark = self._rest, self.form.mark
        end = len(rest)
        if mark in rest and (mark or rest.lstrip().startswith("{")) and self._part == "begin":
            self._part = "calls"
            end = rest.index(mark)
        elif mark and not is_last:
            end -= next(length for length in range(len(mark) - 1, -1, -1) if rest.endswith(mark[:length]))
        elif self._part == "begin" and not mark:
            end, self._part = (end, "text") if is_last or rest.strip() else (0, "begin")
        self._rest = rest[end:]
        return rest[:end]

    def _read_call(self) -> CallPiece | None:
        if self._depth:
            return self._read_arguments()
        tool = _TOOL.search(self._rest)
        if tool is None:
            return None
        self._rest, self._depth = self._rest[tool.end() :], 1
        return CallPiece(self.num_calls, tool[1], "{")

    def _read_arguments(self) -> CallPiece | None:
        end = len(self._rest)
        for step in _STEP.finditer(self._rest):
            match step[0]:
                case "\\":
                    end = step.start()
                case '"':
                    self._in_string = not self._in_string
                case "{" | "}" if not self._in_string:
                    self._depth += 1 if step[0] == "{" else -1
            if not self._depth:
                end = step.end()
                break
        arguments, self._rest = self._rest[:end], self._rest[end:]
        number = self.num_calls
        self.num_calls += not self._depth
        return CallPiece(number, None, arguments, is_last=not self._depth) if arguments else None


def call_id(request_id: str, choice: int, number: int) -> str:
    """Of the call of that number in a choice: the same in every process.

    Nine letters and digits, as Mistral's templates demand.
    """
    return sha256(f"{request_id} {choice} {number}".encode()).hexdigest()[:9]
