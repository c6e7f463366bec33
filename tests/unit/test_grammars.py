"""Grammars: what tokens they allow, which ones are refused, and how requests ask for them."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from typing import Any

import pytest

from gptj_dist.answers.schema.base import parse_body
from gptj_dist.answers.schema.chat import ChatRequest
from gptj_dist.answers.schema.completions import CompletionRequest
from gptj_dist.answers.schema.responses import ResponsesRequest
from gptj_dist.checkpoint.hub import resolve_model
from gptj_dist.errors import InvalidRequestError
from gptj_dist.params import Grammar
from gptj_dist.text.grammar import Grammars
from gptj_dist.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.load(resolve_model("demo"))
GRAMMARS = TOKENIZER.grammars
BYTES = Grammars([bytes([byte]) for byte in range(256)], [])
"""For a vocabulary whose tokens are the bytes."""

REGEXES = (
    r"[0-9]{3}-[a-z]+",
    r"\d+(\.\d{1,3})?",
    r"(foo|ba[rz])*x?",
    r"[^a-c\n]{2,4}",
    r"a.b",
    r"(?i:yes|no)",
    r"\w{1,9}@\w{1,9}\.(com|org)",
    r"\s*\S{1,3}\s*",
    r"é?[à-ü]{1,2}ß",
    r"(a|ab)(c|bcd)",
    r"a/b\\c\"d'",
    r"x*?y+?z??",
    r"",
)
HOSTILE = {
    "two thousand optional properties": {"properties": {f"p{i}": {} for i in range(2000)}, "type": "object"},
    "depth": json.loads('{"items":' * 150 + "{}" + "}" * 150),
    "products of alternatives": {
        "allOf": [
            {"anyOf": [{"properties": {f"p{i}{j}": {"type": "null"}}, "required": [f"p{i}{j}"]} for j in range(3)]}
            for i in range(12)
        ]
    },
    "a reference to itself": {"$ref": "#"},
    "a reference to elsewhere": {"$ref": "http://127.0.0.1/schema.json"},
    "a number of 300 decimals": {"type": "number", "multipleOf": 1e-300},
    "a range of 400 digits": {"type": "integer", "minimum": -(10**400)},
    "nothing between two lengths": {"type": "string", "minLength": 3, "maxLength": 2},
    "two types at once": {"allOf": [{"type": "string"}, {"type": "integer"}]},
    "an unknown rule": {"not": {"type": "string"}},
    "half a character": {"const": "\ud800"},
    "a large multiple": {"type": "integer", "multipleOf": 10_000_003},
    "a multiple of ten decimals": {"type": "number", "multipleOf": 1.0000000003},
    "multiples of several numbers": {"allOf": [{"type": "integer", "multipleOf": 97 + 2 * i} for i in range(3)]},
    "a large multiple by a property's name": {"properties": {"default": {"type": "integer", "multipleOf": 10_000_003}}},
    "a large multiple by a reference to data": {
        "$ref": "#/default",
        "default": {"type": "integer", "multipleOf": 99991},
    },
    "a date four hundred times": {"prefixItems": [{"type": "string", "format": "date-time"}] * 400, "type": "array"},
    "a thousand bounds": {"anyOf": [{"type": "integer", "minimum": i, "maximum": 10**18 + i} for i in range(1000)]},
}


def matches(grammar: Grammar, text: bytes) -> bool:
    """Whether the bytes are a whole text of the grammar."""
    matcher = BYTES.matcher(grammar)
    for byte in text:
        if not matcher.next_tokens().allows(byte):
            return False
        matcher.consume([byte])
    return matcher.next_tokens().may_end


def walk(grammar: Grammar, seed: int, most: int = 60) -> tuple[str, bool]:
    """A text of random tokens that the grammar allows, and whether it ended."""
    draw, matcher, text = random.Random(seed), GRAMMARS.matcher(grammar), b""
    for _ in range(most):
        tokens = matcher.next_tokens()
        ids = [id for id in range(TOKENIZER.num_entries) if tokens.allows(id)]
        if tokens.may_end and (not ids or draw.random() < 0.3):
            return text.decode(), True
        token_id = draw.choice(ids)
        matcher.consume([token_id])
        text += TOKENIZER.token_bytes(token_id)
    return text.decode("utf-8", "replace"), False


@pytest.mark.parametrize("regex", REGEXES)
def test_a_text_of_a_regular_expression_matches_it_in_python(regex: str) -> None:
    grammar = Grammar("regex", regex)
    ended = [text for text, has_ended in (walk(grammar, seed) for seed in range(8)) if has_ended]
    assert ended
    assert [text for text in ended if re.fullmatch(regex, text) is None] == []


@pytest.mark.parametrize("regex", REGEXES)
def test_a_text_matches_where_python_says_so(regex: str) -> None:
    draw, grammar = random.Random(regex), Grammar("regex", regex)
    good = [text for text, has_ended in (walk(grammar, seed, 8) for seed in range(6)) if has_ended]
    pieces = ["a", "b", "x", "1", "2", "-", ".", " ", "\n", "é", "A", "@"]
    for text in (*good, *("".join(draw.choices(pieces, k=draw.randrange(5))) for _ in range(30))):
        cut = draw.randrange(len(text) + 1)
        changed = text[:cut] + draw.choice(pieces) + text[cut + 1 :]
        for one in (text, changed):
            assert matches(grammar, one.encode()) == (re.fullmatch(regex, one) is not None), one


def test_a_choice_is_one_of_the_texts() -> None:
    choices = ["yes", "yesterday", 'a "b"\n\\', "né", "😀", "", "/x/"]
    grammar = Grammar.choice(choices)
    assert all(matches(grammar, text.encode()) for text in choices)
    assert not any(matches(grammar, text) for text in (b"no", b"ye", b"yes ", b"n\xc3", b"yesyes"))
    assert {walk(grammar, seed)[0] for seed in range(40)} <= set(choices)


@pytest.mark.parametrize(
    "text", ['start: e\ne: e "+" e | /[0-9]+/', 'root ::= e\ne ::= n ("+" n)*\nn ::= [0-9]+'], ids=("Lark", "GBNF")
)
def test_a_grammar_is_in_one_of_two_notations(text: str) -> None:
    grammar = Grammar("grammar", text)
    assert matches(grammar, b"1+23+4")
    assert not matches(grammar, b"1+")


def test_json_is_valid_by_its_schema_with_or_without_blanks() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    assert matches(Grammar.json(schema), b'{\n  "a" : 1, "b":[]}')
    assert not matches(Grammar.json(schema), b'{\n\n\n"a":1}')
    assert not matches(Grammar.json(schema, ""), b'{ "a":1}')
    assert matches(Grammar.json(json.dumps(schema), "[ ]{3}"), b'{   "a":1}')
    assert not matches(Grammar.json(schema), b'{"a":"1"}')


@pytest.mark.parametrize(
    ("form", "good", "bad"),
    [
        ("date", ["2024-02-29", "2000-02-29", "2023-02-28", "1999-12-31"], ["2023-02-29", "1900-02-29", "2023-02-30"]),
        ("time", ["23:59:59Z", "10:00:00.5+01:00"], ["23:59:60Z", "24:00:00Z", "10:00:00"]),
        ("date-time", ["2024-02-29T10:00:00Z"], ["2023-02-29T10:00:00Z", "2024-02-29T10:00:60Z"]),
    ],
)
def test_a_date_and_a_time_exist(form: str, good: Sequence[str], bad: Sequence[str]) -> None:
    schema = {"type": "object", "properties": {"a": {"format": form, "type": "string"}}, "required": ["a"]}
    for text in (*good, *bad):
        assert matches(Grammar.json(schema), json.dumps({"a": text}).encode()) == (text in good)


def test_a_schema_cannot_switch_its_own_rules_off() -> None:
    schema = {"type": "object", "not": {}, "x-guidance": {"lenient": True}}
    with pytest.raises(InvalidRequestError, match="not"):
        GRAMMARS.check(Grammar.json(schema))


@pytest.mark.parametrize("schema", HOSTILE.values(), ids=HOSTILE)
def test_a_schema_that_takes_long_or_that_nothing_matches_is_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=r"structured_outputs cannot be served: [^\n]{5,300}$") as refused:
        GRAMMARS.check(Grammar.json(schema))
    assert refused.value.param == "structured_outputs"


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("regex", r"(a)\1"),
        ("regex", r"(?=a)b"),
        ("regex", "(" * 2000 + ")" * 2000),
        ("regex", "[a"),
        ("regex", "[a&&b]"),
        ("grammar", 'start: "a" b'),
        ("grammar", 'start: "a'),
        ("grammar", "start: a\na: b\nb: a"),
        ("grammar", 'start: "a"\n%llguidance {"no_forcing": false}'),
        ("grammar", "start: " + "(" * 5000),
        ("grammar", "root ::= " + "(" * 5000),
        ("grammar", "start: " + " ".join(['"a"?'] * 9000)),
        ("grammar", "start: " + " ".join(['"a"'] * 5000)),
        ("grammar", "root ::= " + " ".join(['"a"'] * 2500)),
        ("grammar", 'start: "a" %json{"type": "integer", "multipleOf": 10000003}'),
        ("grammar", "start: %json x"),
    ],
)
def test_other_grammars_are_refused_likewise(kind: Any, text: str) -> None:
    with pytest.raises(InvalidRequestError, match="structured_outputs cannot be served"):
        GRAMMARS.check(Grammar(kind, text))


HARD = {
    "alternatives": Grammar.json(
        {"anyOf": [{"type": "object", "properties": {f"p{i}{j}": {} for j in range(50)}} for i in range(20)]}
    ),
    "repetitions of repetitions": Grammar("grammar", 'start: ("a"{1,1000}){1,1000}'),
    "repetitions": Grammar("regex", "((a{1,1000}){1000}b){1000}"),
    "catastrophic": Grammar("regex", "(a+)+b"),
    "many states": Grammar("regex", ".*a.{30}"),
    "references": Grammar.json(
        {"$defs": {f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(40)} | {"d40": {}}, "items": {}}
    ),
    "choices": Grammar.choice([f"value {i}" for i in range(5000)]),
    "ambiguous": Grammar("grammar", 'start: s\ns: s s | s s s | "a" | '),
    "a length": Grammar.json({"type": "string", "minLength": 100_000}),
}


@pytest.mark.parametrize("grammar", HARD.values(), ids=HARD)
def test_a_hard_grammar_is_followed_for_some_tokens(grammar: Grammar) -> None:
    walk(grammar, seed=1)


def test_a_schema_within_a_grammar_is_as_strict_as_alone() -> None:
    grammar = Grammar("grammar", 'start: %json {"format": "date", "type": "string"} "x" | "y" %json {"const": 1}\n')
    for text, expected in (('"2024-02-29"x', True), ('"2023-02-29"x', False), ("y1", True), ("y2", False)):
        assert matches(grammar, text.encode()) == expected


def test_nothing_follows_tokens_that_do_not_match() -> None:
    matcher = GRAMMARS.matcher(Grammar.choice(["yes"]))
    matcher.consume(TOKENIZER.encode("no"))
    tokens = matcher.next_tokens()
    assert (set(tokens.bits), tokens.may_end) == ({0}, False)


def test_drafts_are_followed_as_far_as_they_match() -> None:
    grammar = Grammar.json({"type": "array", "items": {"enum": ["ab", "cd"]}})
    drafts = TOKENIZER.encode('["ab", "cd"xxx')
    matcher, other = GRAMMARS.matcher(grammar), GRAMMARS.matcher(grammar)
    along = matcher.along(drafts)
    assert matcher.next_tokens() == along[0]
    assert len(along) == len(drafts) + 1
    for draft, expected in zip(drafts, along, strict=False):
        if not any(expected.bits):
            break
        assert expected == other.next_tokens()
        other.consume([draft])
    assert not any(along[-1].bits)
    assert matcher.along(drafts) == along


def test_special_tokens_belong_to_no_text() -> None:
    tokens = GRAMMARS.matcher(Grammar("regex", "(?s:.*)")).next_tokens()
    [end_of_text] = TOKENIZER.encode("<|endoftext|>")
    assert tokens.may_end
    assert not tokens.allows(end_of_text)
    assert tokens.allows(TOKENIZER.encode("a")[0])


SCHEMA = {"type": "object", "properties": {"a": {"type": "null"}}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Grammar.json({"type": "object"})),
        ({"response_format": FORMAT}, Grammar.json(SCHEMA)),
        ({"structured_outputs": {"json": SCHEMA}}, Grammar.json(SCHEMA)),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, Grammar.json(SCHEMA)),
        ({"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}}, Grammar.json(SCHEMA, "")),
        ({"structured_outputs": {"json": SCHEMA, "whitespace_pattern": " ?"}}, Grammar.json(SCHEMA, " ?")),
        ({"structured_outputs": {"json_object": True}}, Grammar.json({"type": "object"})),
        ({"structured_outputs": {"regex": "a+"}}, Grammar("regex", "a+")),
        ({"structured_outputs": {"choice": ["a", "b"]}, "response_format": {"type": "text"}}, Grammar.choice("ab")),
        ({"structured_outputs": {"grammar": "start: /a/"}}, Grammar("grammar", "start: /a/")),
    ],
)
def test_a_request_asks_for_a_grammar(fields: dict[str, Any], grammar: Grammar | None) -> None:
    request = parse_body(json.dumps({"prompt": "a", **fields}).encode(), CompletionRequest)
    assert request.sampling_params().structured_outputs == grammar


def test_a_response_asks_for_a_grammar_by_its_format() -> None:
    body = {"input": "a", "text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}}
    request = parse_body(json.dumps(body).encode(), ResponsesRequest)
    assert request.sampling_params(9).structured_outputs == Grammar.json(SCHEMA)
    for wrong in ({"type": "json_schema"}, {"schema": SCHEMA}):
        with pytest.raises(InvalidRequestError) as refused:
            parse_body(json.dumps({"input": "a", "text": {"format": wrong}}).encode(), ResponsesRequest)
        assert refused.value.param == "text"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_object", "json_schema": {"schema": {}}}}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.schema"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"json": "[1]"}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a" * 200_000}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "a", "regex": "a"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"json": {}, "disable_additional_properties": True}}, None),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "response_format"),
    ],
)
def test_a_grammar_that_is_not_clear_is_refused(fields: dict[str, Any], param: str | None) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "a"}], **fields}).encode()
    with pytest.raises(InvalidRequestError) as refused:
        parse_body(body, ChatRequest)
    assert refused.value.param == (param or "structured_outputs.disable_additional_properties")
