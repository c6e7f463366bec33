"""Damages a file at random, more often in the parts that describe the rest."""

from __future__ import annotations

import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

ABSURD_INTS = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
ABSURD_JSON = (
    *(str(value).encode() for value in (*ABSURD_INTS, -1, -(2**63), 2**64, 10**30)),
    *(
        b"null",
        b"true",
        b"[]",
        b"{}",
        b'""',
        b'"x"',
        b"0.5",
        b"NaN",
        b"-Infinity",
        b"1e999",
        b'"\\ud800"',
        b'"\\u0000"',
    ),
    b'"a\\nb\\u001b[2J"',
    b'"' + b"n" * 300 + b'"',
    b'"../x"',
    b"9" * 5000,
    b"[" * 900 + b"]" * 900,
    b"[" * 100_000,
    b'{"a":' * 900 + b"0" + b"}" * 900,
)
_JSON_VALUE = re.compile(rb'"(?:[^"\\]|\\.)*"|-?\d[\d.eE+-]*|true|false|null')
_ALL_OPCODES = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]


@dataclass(frozen=True)
class Target:
    """An undamaged file.

    Args:
        hot: parts that describe the rest of the file, as offsets and lengths.
        fields: numbers in these parts, as offsets and widths in bytes.
        opcodes: offsets of pickle instructions.
        is_text: whether the last hot part is JSON.
    """

    data: bytes
    hot: list[tuple[int, int]]
    fields: list[tuple[int, int]] = field(default_factory=list)
    opcodes: list[int] = field(default_factory=list)
    is_text: bool = False

    def position(self, random: Random) -> int:
        """The offset of a random byte, nine times out of ten in a hot part."""
        offset, length = random.choice(self.hot) if random.random() < 0.9 else (0, len(self.data))
        return offset + random.randrange(max(1, length))


def damage(target: Target, random: Random) -> bytes:
    """Returns a damaged copy."""
    ways: list[Callable[[Target, Random], bytes]] = [_truncate, _flip, _overwrite, _splice]
    ways += [_replace_value] * 3 if target.is_text else []
    ways += [_set_field] * 2 if target.fields else []
    ways += [_replace_opcode, _replace_opcode, _insert_opcodes] if target.opcodes else []
    return random.choice(ways)(target, random)


def _truncate(target: Target, random: Random) -> bytes:
    return target.data[: target.position(random)]


def _flip(target: Target, random: Random) -> bytes:
    data = bytearray(target.data)
    for _ in range(random.choice((1, 1, 2, 8))):
        data[target.position(random) % len(data)] ^= 1 << random.randrange(8)
    return bytes(data)


def _overwrite(target: Target, random: Random) -> bytes:
    return _put(target.data, target.position(random), _absurd_bytes(random, random.choice((1, 2, 4, 8))))


def _set_field(target: Target, random: Random) -> bytes:
    data = target.data
    for offset, width in random.sample(target.fields, k=min(len(target.fields), random.choice((1, 1, 2)))):
        anywhere = random.randrange(2 * len(data)) % (1 << 8 * width)
        value = anywhere.to_bytes(width, "little") if random.random() < 0.5 else _absurd_bytes(random, width)
        data = _put(data, offset, value)
    return data


def _splice(target: Target, random: Random) -> bytes:
    """Copies, inserts, swaps or drops a run of bytes."""
    data, length = target.data, random.choice((1, 4, 8, 64, 500))
    first, second = sorted((target.position(random), target.position(random)))
    piece, other = data[first : first + length], data[second : second + length]
    match random.randrange(4):
        case 0:
            return _put(data, second, piece)
        case 1:
            return data[:second] + piece + data[second:]
        case 2:
            return _put(_put(data, first, other), second, piece)
        case _:
            return data[:first] + data[first + length :]


def _replace_value(target: Target, random: Random) -> bytes:
    """Replaces one JSON value, and adapts the length of a safetensors header."""
    offset, length = target.hot[-1]
    text = target.data[offset : offset + length]
    value = random.choice(list(_JSON_VALUE.finditer(text)))
    text = text[: value.start()] + random.choice(ABSURD_JSON) + text[value.end() :]
    head = len(text).to_bytes(8, "little") if offset == 8 else target.data[:offset]
    return head + text + target.data[offset + length :]


def _replace_opcode(target: Target, random: Random) -> bytes:
    return _put(target.data, random.choice(target.opcodes), random.choice(_ALL_OPCODES))


def _insert_opcodes(target: Target, random: Random) -> bytes:
    """Inserts pickle instructions. The file keeps its length."""
    code = b"".join(random.choice(_ALL_OPCODES) for _ in range(random.choice((1, 3, 10))))
    offset = random.choice(target.opcodes)
    return target.data[:offset] + code + target.data[offset : -len(code)]


def _absurd_bytes(random: Random, width: int) -> bytes:
    return (random.choice(ABSURD_INTS) % (1 << 8 * width)).to_bytes(width, "little")


def _put(data: bytes, offset: int, piece: bytes) -> bytes:
    return data[:offset] + piece + data[offset + len(piece) :]
