"""Reads the pickle of a PyTorch state dict as data. Runs none of it: it calls nothing and imports nothing.

A pickle is a program for a stack machine (the opcodes are those of the standard library's `pickletools`). This machine
implements only the few opcodes that `torch.save` writes for tensors, and its own versions of five global names. It
refuses any other name that a pickle contains. Stdlib only; opens no files.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from gptj_dist.checkpoint.headers import MAX_DIMENSIONS, MAX_SIZE

T = TypeVar("T")

MAX_PICKLE_BYTES = 2 << 20
"""More than any state dict has (GPT-J's 50 kB), and few enough that no program of that length takes a gigabyte or many
seconds (up to 85 bytes and half a microsecond an opcode)."""

_MALFORMED = (ValueError, TypeError, IndexError, KeyError, OverflowError, struct.error)
"""What `pickletools` and a stack that holds other things than expected raise."""

_STORAGE_CODES: Mapping[str, str] = {
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "DoubleStorage": "F64",
    "BoolStorage": "BOOL",
    "ByteStorage": "U8",
    "CharStorage": "I8",
    "ShortStorage": "I16",
    "IntStorage": "I32",
    "LongStorage": "I64",
}
"""torch's classes of typed storages -> safetensors' names of the types."""

_MAX_NAME_LENGTH = 80


class UnsafePickleError(ValueError):
    """The pickle names something that only code could make: loading it with `pickle` would run that code."""


class MalformedPickleError(ValueError):
    """The bytes are no pickle, or not one of a state dict."""


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of numbers, kept outside the pickle.

    Args:
        key: its name in the file.
        dtype: as safetensors spells it.
    """

    key: str
    dtype: str
    num_elements: int


@dataclass(frozen=True, slots=True)
class PickledTensor:
    """A view of a storage; offset and strides count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Global:
    module: str
    name: str


_ORDERED_DICT = _Global("collections", "OrderedDict")
_REBUILD_TENSOR = _Global("torch._utils", "_rebuild_tensor_v2")
_REBUILD_PARAMETER = _Global("torch._utils", "_rebuild_parameter")
_NAMESPACE = _Global("argparse", "Namespace")
"""The options of a command, which some programs save beside the tensors. Its values are dropped."""


def read_state_dict(pickled: bytes) -> dict[str, PickledTensor]:
    """The tensors of a pickled state dict, by name; bytes after it are ignored.

    It may be in a list, as its only mapping that is not empty.

    Raises:
        UnsafePickleError: the pickle names anything but tensors, storages, ordered dicts and options of a command.
        MalformedPickleError: it is broken, or not a mapping from names to tensors.
    """
    content = _run(pickled)
    if isinstance(content, list):
        mappings = [item for item in content if isinstance(item, dict) and item]
        content = mappings[0] if len(mappings) == 1 else content
    if not isinstance(content, dict):
        raise MalformedPickleError(f"it holds a {type(content).__name__}, not a mapping from names to tensors")
    for name, value in content.items():
        if not isinstance(value, PickledTensor):
            raise MalformedPickleError(f"{_shortened(name)} is no tensor: it is not a plain state dict")
    return content


def _run(pickled: bytes) -> object:
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(pickled):
            machine.do(opcode.name, argument)
        return machine.result()
    except (UnsafePickleError, MalformedPickleError):
        raise
    except _MALFORMED as error:
        raise MalformedPickleError(f"it is no whole pickle: {_shortened(str(error))}") from error


class _Machine:
    """The stack machine of `pickle`, cut down to data."""

    def __init__(self) -> None:
        self._stack: list[object] = []
        self._outer_stacks: list[list[object]] = []
        self._memo: dict[int, object] = {}

    def result(self) -> object:
        (result,) = self._stack
        return result

    def do(self, opcode: str, argument: object) -> None:
        """Carries out one instruction."""
        stack = self._stack
        match opcode:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "MARK":
                self._outer_stacks.append(stack)
                self._stack = []
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "LONG4" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [stack.pop() for _ in range(int(opcode[-1]))]
                stack.append(tuple(reversed(items)))
            case "TUPLE":
                items = self._collect()
                self._stack.append(tuple(items))
            case "APPEND" | "APPENDS":
                items = [stack.pop()] if opcode == "APPEND" else self._collect()
                _expect(self._stack[-1], list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = [stack.pop(-2), stack.pop()] if opcode == "SETITEM" else self._collect()
                _expect(self._stack[-1], dict).update(_pairs(items))
            case "BINPUT" | "LONG_BINPUT":
                self._memo[_expect(argument, int)] = stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self._memo[_expect(argument, int)])
            case "GLOBAL":
                module, _, name = _expect(argument, str).partition(" ")
                stack.append(_known_global(module, name))
            case "STACK_GLOBAL":
                name, module = _expect(stack.pop(), str), _expect(stack.pop(), str)
                stack.append(_known_global(module, name))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE":
                arguments = _expect(stack.pop(), tuple)
                stack.append(_call(stack.pop(), arguments))
            case "NEWOBJ" if stack[-2:] == [_NAMESPACE, ()]:
                stack[-2:] = [{}]
            case "BUILD":  # of an OrderedDict: its `_metadata`, versions of modules; of a Namespace: its values
                stack.pop()
                _expect(stack[-1], dict)
            case "INST" | "OBJ" | "NEWOBJ" | "NEWOBJ_EX" | "EXT1" | "EXT2" | "EXT4":
                raise UnsafePickleError(f"the instruction {opcode}")
            case _:
                raise MalformedPickleError(f"it has the instruction {opcode}, which no state dict needs")

    def _collect(self) -> list[object]:
        """What was put on the stack since the last mark; the stack from before it is current again."""
        items, self._stack = self._stack, self._outer_stacks.pop()
        return items


def _known_global(module: str, name: str) -> _Global:
    found = _Global(module, name)
    is_storage = module == "torch" and name in _STORAGE_CODES
    if not is_storage and found not in (_ORDERED_DICT, _REBUILD_TENSOR, _REBUILD_PARAMETER, _NAMESPACE):
        raise UnsafePickleError(_shortened(f"{module}.{name}"))
    return found


def _call(function: object, arguments: tuple[object, ...]) -> object:
    """What calling one of the known globals would give."""
    if function == _ORDERED_DICT and arguments == ():
        return {}
    if function == _REBUILD_TENSOR:
        storage, offset, shape, strides, *_ = arguments
        return PickledTensor(_expect(storage, Storage), _size(offset), _sizes(shape), _sizes(strides))
    if function == _REBUILD_PARAMETER:
        return _expect(arguments[0], PickledTensor)
    raise MalformedPickleError("it calls something that is no function")


def _storage(persistent_id: object) -> Storage:
    kind, storage_type, key, _location, num_elements, *_ = _expect(persistent_id, tuple)
    if kind != "storage":
        raise MalformedPickleError("it refers to something that is no storage")
    dtype = _STORAGE_CODES[_expect(storage_type, _Global).name]
    return Storage(_expect(key, str), dtype, _size(num_elements))


def _sizes(values: object) -> tuple[int, ...]:
    sizes = _expect(values, tuple)
    if len(sizes) > MAX_DIMENSIONS:
        raise MalformedPickleError(f"a tensor has {len(sizes)} dimensions")
    return tuple(map(_size, sizes))


def _size(value: object) -> int:
    size = _expect(value, int)
    if not 0 <= size <= MAX_SIZE:
        raise MalformedPickleError("a tensor has a size or an offset that none can have")
    return size


def _pairs(items: list[object]) -> Iterator[tuple[str, object]]:
    """Keys and values in turn. Keys of other types are refused: hashing a nested tuple can take for ever."""
    keys, values = items[0::2], items[1::2]
    return ((_expect(key, str), value) for key, value in zip(keys, values, strict=True))


def _expect(value: object, kind: type[T]) -> T:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise MalformedPickleError(f"it has a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def _shortened(text: str) -> str:
    return repr(text[:_MAX_NAME_LENGTH])
