"""Grammars of requests: schemas, regular expressions, choices and grammars that are damaged or mean harm."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import strategies as st

from benchmarks.schemas import schema
from gptj_dist.errors import InvalidRequestError
from gptj_dist.params import Grammar, GrammarKind
from gptj_dist.text.grammar import Grammars
from gptj_dist.text.tool_calls import FORMATS, calls_grammar
from tests.fuzzing.strategies import Target, texts, values

BYTES = Grammars([bytes([byte]) for byte in range(256)], [])
NUM_BYTES = 12
"""Of a text that follows a grammar."""

_PIECES = (
    *("(", ")", "[", "]", "{2,9}", "{1000}", "{", "*", "+", "?", "|", "^", "$", ".", "\\", "\\d", "\\p{L}", "(?i)"),
    *("(?=", "&&", "-", "a", "é", "/", '"', "\n", ": ", "start: ", "root ::= ", "A", "%json ", "%regex", "\0", "#"),
)
_NOTATION = st.lists(st.sampled_from(_PIECES) | texts(), max_size=12).map("".join)
_KINDS: st.SearchStrategy[GrammarKind] = st.sampled_from(("regex", "grammar"))


@st.composite
def _schemas(draw: st.DrawFn) -> dict[str, Any]:
    """A schema that was valid, in which a value has become another."""
    made = schema(draw(st.integers(0, 500)))
    places: list[tuple[Any, Any]] = []
    parts: list[Any] = [made]
    while parts:
        part = parts.pop()
        keys = list(part) if isinstance(part, dict) else range(len(part)) if isinstance(part, list) else ()
        places += [(part, key) for key in keys]
        parts += [part[key] for key in keys]
    where, key = draw(st.sampled_from(places))
    where[key] = draw(values() | texts())
    return made


def _check_grammar(case: tuple[Any, Any]) -> None:
    """A grammar is refused, or some bytes follow it, each of which it allows."""
    kind, content = case
    try:
        if kind == "json":
            grammar = Grammar.json(content)
        elif kind in FORMATS:
            grammar = calls_grammar(FORMATS[kind], {"f": content, "g": {}}, must_call=True, most=2)
        elif kind == "choice":
            grammar = Grammar.choice(content)
        else:
            grammar = Grammar("regex" if kind == "regex" else "grammar", content)
        matcher = BYTES.matcher(grammar)
    except InvalidRequestError as error:
        if "\n" in str(error):
            raise AssertionError("the message has several lines") from error
        return
    draw = random.Random(0)
    for _ in range(NUM_BYTES):
        allowed = [byte for byte in range(256) if matcher.next_tokens().allows(byte)]
        if not allowed:
            return
        matcher.consume([draw.choice(allowed)])


TARGETS = (
    Target(
        "grammars",
        st.tuples(st.sampled_from(("json", *FORMATS)), _schemas())
        | st.tuples(_KINDS, _NOTATION)
        | st.tuples(st.just("choice"), st.lists(texts(), max_size=4)),
        _check_grammar,
        6,
    ),
)
