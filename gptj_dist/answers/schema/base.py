"""Bodies of requests: from bytes to a checked object, or to one error that names the field.

Knows no tokenizer, so ids are only checked to be whole and not negative: the vocabulary, the context window and the
model's name are checked where they are known.
"""

from __future__ import annotations

import difflib
import json
import reprlib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, TypeAlias, TypeVar

import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gptj_dist.errors import InvalidRequestError

# `fail_fast`: a list of a million wrong elements is one problem, not a million.
NON_EMPTY = Field(min_length=1, fail_fast=True)
Strings: TypeAlias = Annotated[list[str], Field(fail_fast=True)]
Ids: TypeAlias = Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)]
TokenIds: TypeAlias = Annotated[list[Annotated[int, Field(ge=0)]], NON_EMPTY]

PROMPT_FORMS = (
    "a string, a list of strings, a list of token ids (whole numbers from 0) or a list of such lists; "
    "no list may be empty"
)
Neutral: TypeAlias = Mapping[str, tuple[object, ...]]


class Body(BaseModel):
    """A JSON object that a client sends.

    Attributes:
        neutral: fields of others' schemas without an effect here, and the values at which they ask for none, to which
            null always belongs. Any other value is refused rather than ignored.
        unions: what a field of several types takes, in words; pydantic would report each type's complaint.
        parts: fields that are bodies themselves.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    neutral: ClassVar[Neutral] = {}
    unions: ClassVar[Mapping[str, str]] = {}
    parts: ClassVar[Mapping[str, type[Body]]] = {}

    def check(self) -> None:
        """Raises InvalidRequestError if fields contradict each other or a value is out of its range."""


B = TypeVar("B", bound=Body)


def parse_body(body: bytes, kind: type[B]) -> B:
    """Reads and checks a body.

    Raises:
        InvalidRequestError: of all that is wrong, what was found first; `param` names the field, with a dot before the
            name of a part's field, and is None when the body is not a JSON object.
    """
    fields = _supported_fields(_json_object(body), kind)
    try:
        request = kind.model_validate(fields)
    except ValidationError as error:
        raise _first_problem(error, kind.unions) from None
    request.check()
    return request


def _json_object(body: bytes) -> dict[str, Any]:
    try:
        value = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidRequestError("the body must be a JSON object")
    return value


def _supported_fields(given: Mapping[str, Any], kind: type[Body], prefix: str = "") -> dict[str, Any]:
    """The fields of `given` that the kind has, less nulls, which mean the default.

    Raises:
        InvalidRequestError: a field that it does not have is not neutral, or has none of its neutral values.
    """
    fields = {}
    for name, value in given.items():
        if name not in kind.model_fields and name not in kind.neutral:
            raise _unknown_field(prefix, name, [*kind.model_fields, *kind.neutral])
        if value is None:
            continue
        if name in kind.parts:
            if not isinstance(value, dict):
                raise InvalidRequestError(f"{prefix}{name} must be an object", prefix + name)
            fields[name] = _supported_fields(value, kind.parts[name], f"{prefix}{name}.")
        elif name in kind.model_fields:
            fields[name] = value
        elif not any(_is_same_json(value, allowed) for allowed in kind.neutral[name]):
            allowed = json.dumps(next(iter(kind.neutral[name]), None))
            raise InvalidRequestError(f"{prefix}{name} is not supported yet: it can only be {allowed}", prefix + name)
    return fields


def _is_same_json(left: object, right: object) -> bool:
    """Equality that tells false from 0, which Python does not."""
    return left == right and isinstance(left, bool) == isinstance(right, bool)


def _unknown_field(prefix: str, name: str, known: Iterable[str]) -> InvalidRequestError:
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {prefix + nearest[0]!r}?" if nearest else ""
    return InvalidRequestError(f"unknown field {prefix + name!r:.80}{hint}", prefix + name)


def _first_problem(error: ValidationError, unions: Mapping[str, str]) -> InvalidRequestError:
    problem = error.errors(include_url=False, include_context=False)[0]
    param = ".".join(map(str, problem["loc"]))
    if problem["type"] == "missing":
        return InvalidRequestError(f"{param} is required", param)
    if problem["type"] == "extra_forbidden":
        return InvalidRequestError(f"unknown field {param!r:.80}", param)
    rule = problem["msg"].removeprefix("Input should be ")
    if problem["loc"][0] in unions:
        param = str(problem["loc"][0])
        rule = unions[param]
    return InvalidRequestError(f"{param} must be {rule}; got {reprlib.repr(problem['input'])}", param)
