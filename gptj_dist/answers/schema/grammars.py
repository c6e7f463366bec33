"""The fields that say what an answer's text must match, as OpenAI and vLLM have them."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import Field

from gptj_dist.answers.schema.base import Body, Strings, one_of
from gptj_dist.errors import InvalidRequestError
from gptj_dist.params import BLANKS, Grammar

ANY_OBJECT: dict[str, Any] = {"type": "object"}

Schema: TypeAlias = Annotated[str | dict[str, Any], one_of("a JSON schema: an object, or its text")]


class NamedSchema(Body):
    """A JSON schema. An answer is always valid by it, whatever `strict` says.

    Args:
        schema: the schema.
    """

    hints: ClassVar = frozenset(("description", "name", "strict"))

    schema_object: dict[str, Any] = Field(alias="schema")


class ResponseFormat(Body):
    """OpenAI's form of it.

    Args:
        type: text, json_object or json_schema.
        json_schema: with json_schema, the schema.
    """

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    def check(self) -> None:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise InvalidRequestError("json_schema must come with the type json_schema", "response_format")

    def grammar(self) -> Grammar | None:
        """What the text must match; None for any text."""
        schema = ANY_OBJECT if self.json_schema is None else self.json_schema.schema_object
        return None if self.type == "text" else Grammar.json(schema)


class TextFormat(Body):
    """OpenAI's form of it for responses.

    Args:
        type: text, json_object or json_schema.
        schema: with json_schema, the schema.
    """

    hints: ClassVar = NamedSchema.hints

    type: Literal["text", "json_object", "json_schema"] = "text"
    schema_object: dict[str, Any] | None = Field(None, alias="schema")

    def check(self) -> None:
        if (self.type == "json_schema") != (self.schema_object is not None):
            raise InvalidRequestError("text.format must have a schema with the type json_schema, and only then", "text")

    def grammar(self) -> Grammar | None:
        """What the text must match; None for any text."""
        schema = ANY_OBJECT if self.schema_object is None else self.schema_object
        return None if self.type == "text" else Grammar.json(schema)


class StructuredOutputs(Body):
    """vLLM's form of it. Exactly one of the first five is given.

    Args:
        json: JSON that is valid by this schema.
        json_object: any JSON object, if true.
        regex: a text that matches a regular expression as a whole, in the syntax of Rust's `regex`: without look-around
            and references to groups.
        choice: one of these texts.
        grammar: a text of a context-free grammar, in Lark's or GBNF's notation.
        disable_any_whitespace: no blanks between the tokens of JSON.
        whitespace_pattern: what blanks there may be, as a regular expression.
    """

    unserved: ClassVar = {"disable_additional_properties": False, "structural_tag": None}

    json_schema: Schema | None = Field(None, alias="json")
    json_object: bool = False
    regex: str | None = None
    choice: Strings | None = None
    grammar: str | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None

    def check(self) -> None:
        given = (self.json_schema, self.regex, self.choice, self.grammar, self.json_object or None)
        if sum(value is not None for value in given) != 1:
            raise InvalidRequestError(
                "structured_outputs must have exactly one of json, json_object, regex, choice and grammar",
                "structured_outputs",
            )

    def as_grammar(self) -> Grammar:
        """What the text must match."""
        if self.regex is not None:
            return Grammar("regex", self.regex)
        if self.choice is not None:
            return Grammar.choice(self.choice)
        if self.grammar is not None:
            return Grammar("grammar", self.grammar)
        blanks = BLANKS if self.whitespace_pattern is None else self.whitespace_pattern
        schema = ANY_OBJECT if self.json_schema is None else self.json_schema
        return Grammar.json(schema, "" if self.disable_any_whitespace else blanks)
