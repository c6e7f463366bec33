"""Correctly encoded files with absurd content, which random damage hardly ever produces."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch._utils import _rebuild_parameter, _rebuild_tensor_v2

from gptj_dist.checkpoint.index import expected_tensors
from gptj_dist.config import LayerRange, ModelConfig

_STORAGE_TYPES = (torch.FloatStorage, torch.HalfStorage, torch.BFloat16Storage, torch.LongStorage, torch.BoolStorage)
_SIZES = (0, 1, 2, 3, 8, 16, 1000, 2**31 - 1, 2**32, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**100, -1)
_DTYPES = ("F32", "F16", "BF16", "F64", "BOOL", "U8", "F8_E4M3", "x", "", "\n", "\ud800")


@dataclass(frozen=True)
class Storage:
    """Pickles as a storage; its fields may be anything."""

    kind: Any
    key: Any
    num_elements: Any


class Tensor:
    """Pickles as a tensor; its arguments may be anything."""

    def __init__(self, storage: Any, offset: Any, shape: Any, strides: Any) -> None:
        self._arguments: tuple[Any, ...] = (storage, offset, shape, strides, False, OrderedDict())

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_tensor_v2, self._arguments


class Parameter:
    """Pickles as a parameter."""

    def __init__(self, data: Any) -> None:
        self._data = data

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_parameter, (self._data, False, OrderedDict())


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return ("storage", obj.kind, obj.key, "cpu", obj.num_elements) if isinstance(obj, Storage) else None


def pickled(content: Any, protocol: int = 2) -> bytes:
    """The pickle that `torch.save` would write."""
    buffer = io.BytesIO()
    _Pickler(buffer, protocol).dump(content)
    return buffer.getvalue()


def as_zip(pickle_bytes: bytes, storages: Iterable[tuple[str, bytes]] = ()) -> bytes:
    """A zip with the layout of `torch.save`."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle_bytes)
        for key, data in storages:
            archive.writestr(f"archive/data/{key}", data)
    return buffer.getvalue()


def forge_torch_file(config: ModelConfig, random: Random) -> bytes:
    """A state dict with the right names, in which one tensor is absurd."""
    shapes = expected_tensors(config, LayerRange.whole(config.num_layers))
    state: dict[str, Any] = {name: _honest(key, shape) for key, (name, shape) in enumerate(shapes.items())}
    name = random.choice(list(shapes))
    state[name] = _absurd_tensor(random, list(shapes).index(name), shapes[name])
    data = [(str(key), bytes(4 * torch.Size(shape).numel())) for key, shape in enumerate(shapes.values())]
    protocol = random.randrange(2, 6)
    whole = as_zip(pickled(state, protocol), data)
    return _with_absurd_directory(whole, random) if random.random() < 0.4 else whole


def forge_safetensors(config: ModelConfig, random: Random) -> bytes:
    """A file whose header has the right names, and one absurd entry."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in expected_tensors(config, LayerRange.whole(config.num_layers)).items():
        begin, end = end, end + 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    entry = header[random.choice(list(header))]
    what = random.choice(("dtype", "shape", "data_offsets"))
    entry[what] = random.choice(_DTYPES) if what == "dtype" else _sizes(random, 2 if what[0] == "d" else None)
    if random.random() < 0.2:
        header[random.choice(("a\nb", "\ud800", "n" * 5000, "wte.weight", ""))] = entry
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(end)


def doubled(levels: int) -> Any:
    """A tuple of 2**levels parts in a few bytes of pickle. Hashing or printing it would take forever."""
    value: Any = ("x",)
    for _ in range(levels):
        value = (value, value)
    return value


def _honest(key: int, shape: tuple[int, ...]) -> Tensor:
    strides = (shape[1], 1) if len(shape) == 2 else (1,)
    return Tensor(Storage(torch.FloatStorage, str(key), torch.Size(shape).numel()), 0, shape, strides)


def _absurd_tensor(random: Random, key: int, shape: tuple[int, ...]) -> Any:
    kind = random.choice((*_STORAGE_TYPES, torch.Tensor, "FloatStorage", None))
    storage_key = random.choice((str(key), str(key), "0", "nowhere", "a\nb", "\ud800", key, doubled(60), None))
    storage = Storage(kind, storage_key, random.choice((torch.Size(shape).numel(), *_SIZES, doubled(60), 2**80_000)))
    arguments = [
        random.choice((storage, Storage(torch.FloatStorage, str(key), torch.Size(shape).numel()))),
        random.choice((0, 0, 0, *_SIZES)),
        random.choice((shape, shape, tuple(_sizes(random)), doubled(60), list(shape))),
        random.choice(((1, 1), (0, 0), (1,), (2, 1), (2**62, 1), (2**62, 2**62), tuple(_sizes(random)), doubled(60))),
    ]
    tensor = Tensor(*arguments)
    return random.choice(
        (tensor, tensor, tensor, Parameter(tensor), Parameter(7), doubled(60), storage, 2**80_000, [0])
    )


def _sizes(random: Random, length: int | None = None) -> list[Any]:
    """Dimensions, some of them absurd; without `length`, mostly as many as a weight has."""
    count = random.choice((1, 2, 2, 3, 9, 100)) if length is None else length
    return [random.choice((*_SIZES, True, None, "8", 0.5)) if random.random() < 0.5 else 8 for _ in range(count)]


def _with_absurd_directory(whole: bytes, random: Random) -> bytes:
    """Rewrites the zip's directory with absurd offsets, sizes, names or types, in 64 bits where needed."""
    buffer = io.BytesIO(whole)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.comment = b"x"  # the directory is written again only after a change
        for entry in random.sample(archive.filelist, k=random.choice((1, 2, 5))):
            sizes = (0, 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63 + 5, 2**64 - 1, random.randrange(2 * len(whole)))
            match random.randrange(4):
                case 0:
                    entry.header_offset = random.choice(sizes)
                case 1:
                    entry.file_size = entry.compress_size = random.choice(sizes)
                case 2:
                    entry.filename = random.choice(("archive/data/0", "data.pkl", "x/data.pkl", "/data.pkl", "", "a\n"))
                case _:
                    entry.compress_type = random.choice((8, 12, 14, 99))
    return buffer.getvalue()
