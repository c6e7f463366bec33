"""Messages as bytes and back. The msgpack form of a message is derived from its type, and decoding checks every field.

A message's type is a dataclass, a NamedTuple or a combination of builtins. Dataclasses become maps with the names of
their fields, NamedTuples become arrays. This module names no message and no field.
"""

from __future__ import annotations

from typing import Generic, TypeVar

import msgspec

T = TypeVar("T")


class CodecError(ValueError):
    """The bytes are not a message of the expected type."""


class Codec(Generic[T]):
    """Encodes and decodes messages of one type.

    Args:
        kind: the type; the types of all its fields must exist when the module that defines them runs.
    """

    def __init__(self, kind: type[T]) -> None:
        self._name = kind.__name__
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(kind)

    def encode(self, message: T) -> bytes:
        """The bytes of the message."""
        return self._encoder.encode(message)

    def decode(self, data: bytes | memoryview) -> T:
        """The message of the bytes.

        Raises:
            CodecError: the bytes are no message of this type.
        """
        try:
            return self._decoder.decode(data)
        except Exception as error:  # msgspec's errors, RecursionError, or whatever a field's class raises
            raise CodecError(f"not a {self._name}: {error}") from error
