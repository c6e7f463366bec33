"""Request bodies: from bytes to a checked object, or to one error that names the field.

Knows no tokenizer: token ids are only checked to be whole numbers from 0. The vocabulary, the context window and the
model's name are checked where they are known.
"""

from __future__ import annotations

import codecs
import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypeAlias, TypeVar

import pydantic_core
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    Tag,
    ValidationError,
    WrapValidator,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import PydanticCustomError, core_schema

from gptj_dist.answers.json_limits import check_json
from gptj_dist.errors import InvalidRequestError, excerpt
from gptj_dist.file_kinds import known_form


@dataclass(frozen=True, slots=True)
class WholeNumber:
    """Makes an `int` field accept 16.0, which is an integer in JSON. Neither true nor "16" is one.

    Args:
        least: the smallest number that is accepted; None for any.
    """

    least: int | None = None

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        integer = core_schema.int_schema(strict=True, ge=self.least)
        whole_float = core_schema.float_schema(strict=True, multiple_of=1, allow_inf_nan=False)
        to_integer = core_schema.no_info_plain_validator_function(int)
        rule = "valid integer" if self.least is None else f"whole number from {self.least}"
        return core_schema.union_schema(
            [integer, core_schema.chain_schema([whole_float, to_integer, integer])],
            mode="left_to_right",
            custom_error_type="whole_number",
            custom_error_message=f"Input should be a {rule}",
        )

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return handler(core_schema.int_schema(ge=self.least))


# `fail_fast`: a list of a million wrong elements is one problem, not a million.
NON_EMPTY = Field(min_length=1, fail_fast=True)
Strings: TypeAlias = Annotated[list[str], Field(fail_fast=True)]
Integer: TypeAlias = Annotated[int, WholeNumber()]
TokenId: TypeAlias = Annotated[int, WholeNumber(least=0)]
Ids: TypeAlias = Annotated[list[TokenId], Field(fail_fast=True)]
TokenIds: TypeAlias = Annotated[list[TokenId], NON_EMPTY]

PROMPT_FORMS = (
    "a string, a list of strings, a list of token ids (whole numbers from 0) or a list of such lists; "
    "no list may be empty"
)
MAX_PARAM_CHARS = 200
AS_TEXT, AS_LIST = Tag("<text>"), Tag("<list>")
_TAG = re.compile(r"<\w+>")
"""Of a body's form, in the path to a problem in it."""

Unserved: TypeAlias = Mapping[str, object]


class Body(BaseModel):
    """A JSON object that a client sends. A null stands for the field's default.

    Attributes:
        hints: fields of other servers that have no effect on the text: any value is accepted.
        unserved: fields of OpenAI's and vLLM's APIs that are not served, each with the value that it has there when it
            is left out. A neutral value is accepted, see `is_neutral`; any other is refused.
        successors: of these, the fields to use instead.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    hints: ClassVar[frozenset[str]] = frozenset()
    unserved: ClassVar[Unserved] = {}
    successors: ClassVar[Mapping[str, str]] = {}

    def check(self) -> None:
        """Raises InvalidRequestError if fields contradict each other or a value is out of its range."""

    @classmethod
    def field_names(cls) -> set[str]:
        """The served fields, as clients call them: pydantic has methods of the names `json` and `schema`."""
        return {field.alias or name for name, field in cls.model_fields.items()}

    def own_names(self) -> Mapping[str, str]:
        """Names of `SamplingParams`, and `prompt`, for which this body has another name; and that name."""
        return {}

    @model_validator(mode="before")
    @classmethod
    def _served_fields(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if cls._is_served(name, value)}

    @classmethod
    def _is_served(cls, name: str, value: object) -> bool:
        """Whether the field counts. Raises PydanticCustomError if it is unknown, or asks for what is not served."""
        if name in cls.field_names():
            return value is not None
        if name in cls.hints:
            return False
        if name not in cls.unserved:
            raise refused_field(name, "is unknown" + cls._nearest(name))
        if not is_neutral(value, cls.unserved[name]):
            default = cls.unserved[name]
            choice = "leave it out" if default is None else f"it can only be {json.dumps(default)}"
            if name in cls.successors:
                choice = f"use {cls.successors[name]!r}"
            raise refused_field(name, f"is not supported: {choice}")
        return False

    @classmethod
    def _nearest(cls, name: str) -> str:
        nearest = difflib.get_close_matches(name[:100], [*cls.field_names(), *cls.hints, *cls.unserved], n=1)
        return f"; did you mean {nearest[0]!r}?" if nearest else ""


B = TypeVar("B", bound=Body)
T = TypeVar("T")


def is_neutral(value: object, default: object = None) -> bool:
    """Whether a value asks for nothing: null, false, empty, zero, an object of these, or the field's default."""
    if not value or (value == default and isinstance(value, bool) == isinstance(default, bool)):
        return True
    return isinstance(value, dict) and not any(value.values())


def refused_field(name: str, reason: str) -> PydanticCustomError:
    """The error by which a validator of a body refuses a field of it, such as `stop` for the reason `is unknown`."""
    return PydanticCustomError("refused_field", "{reason}", {"field": name, "reason": reason})


def one_of(forms: str) -> WrapValidator:
    """For a field of several types: in words what it takes, in place of pydantic's complaint about each of them."""

    def validate(value: Any, handler: Callable[[Any], T]) -> T:
        try:
            return handler(value)
        except ValidationError:
            raise PydanticCustomError("form", "Input should be {forms}", {"forms": forms}) from None

    return WrapValidator(validate)


def text_or_list(forms: str) -> Discriminator:
    """For a field that is a text (`AS_TEXT`) or a list of bodies (`AS_LIST`); a problem in the list names its place."""

    def tag(value: object) -> str | None:
        if isinstance(value, str):
            return AS_TEXT.tag
        return AS_LIST.tag if isinstance(value, list) else None

    return Discriminator(tag, "form", "Input should be {forms}", {"forms": forms})


def parse_body(body: bytes, kind: type[B]) -> B:
    """Reads and checks a body.

    Raises:
        InvalidRequestError: of all that is wrong, what was found first. `param` names the field, with dots between the
            names and numbers that lead to it; it is None when the body is not a JSON object.
    """
    return check_fields(_json_object(body), kind)


def check_fields(fields: dict[str, Any], kind: type[B]) -> B:
    """Checks a body that is an object already.

    Raises:
        InvalidRequestError: as `parse_body`.
    """
    try:
        request = kind.model_validate(fields)
    except ValidationError as error:
        raise _first_problem(error) from None
    with naming(request):
        request.check()
    return request


@contextmanager
def naming(request: Body) -> Iterator[None]:
    """Lets errors about `SamplingParams` and the prompt name fields as the request calls them."""
    try:
        yield
    except InvalidRequestError as error:
        param, own = error.param, request.own_names().get(error.param or "")
        if own is None:
            raise
        raise type(error)(re.sub(rf"\b{param}\b(?!')", own, str(error)), own) from None


def _json_object(body: bytes) -> dict[str, Any]:
    """The body's object. A byte order mark of UTF-8 before it is dropped."""
    body = body.removeprefix(codecs.BOM_UTF8)
    if (form := known_form(body)) is not None or b"\0" in body[:4]:
        hint = "; a compressed body needs the header content-encoding" if form == "gzip" else ""
        raise InvalidRequestError(f"the body is {form or 'UTF-16 or UTF-32'}, not JSON in UTF-8{hint}")
    check_json(body)
    try:
        value = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidRequestError("the body must be a JSON object")
    return value


def _first_problem(error: ValidationError) -> InvalidRequestError:
    problem = error.errors(include_url=False)[0]
    path = [str(name) for name in problem["loc"] if not _TAG.fullmatch(str(name))]
    if problem["type"] == "refused_field":
        path.append(problem["ctx"]["field"])
    param = ".".join(path)[:MAX_PARAM_CHARS]
    if problem["type"] == "missing":
        return InvalidRequestError(f"{param} is required", param)
    if problem["type"] == "refused_field":
        return InvalidRequestError(f"{param} {problem['ctx']['reason']}", param)
    if problem["type"] == "none_required":
        return InvalidRequestError(f"{param} is not supported: leave it out", param)
    rule = "an object" if problem["type"] == "model_type" else problem["msg"].removeprefix("Input should be ")
    return InvalidRequestError(f"{param} must be {rule}; got {excerpt(problem['input'])}", param)
