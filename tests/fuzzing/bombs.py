"""Files of the largest size that the readers allow, or larger, made to be as expensive to read as possible.

`python -m tests.fuzzing.bombs DIRECTORY NAME...` reads the named files, or all, and prints the peak resident memory in
bytes.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models

from gptj_dist.checkpoint.headers import MAX_JSON_BYTES
from gptj_dist.checkpoint.index import expected_tensors
from gptj_dist.checkpoint.unpickle import MAX_PICKLE_BYTES
from gptj_dist.config import LayerRange
from tests.fuzzing.forgeries import Storage, Tensor, as_zip, doubled, pickled
from tests.fuzzing.models import CONFIG
from tests.fuzzing.worker import Watch, prepare
from tests.memory import peak_bytes

MAX_TOKENIZER_BYTES = 8 << 20
_SPARSE_BYTES = 5 << 30
_HUGE = 1 << 16_000_000

Bomb = tuple[str, Callable[[], bytes], int]
"""The file to replace; its content; the number of zero bytes after the content, or before it if negative."""


def _json(repeated: bytes, num_bytes: int = MAX_JSON_BYTES, key: bytes = b"a") -> bytes:
    """`{"a":[...]}` of at most `num_bytes`."""
    return b'{"' + key + b'":[' + repeated * ((num_bytes - 40) // len(repeated)) + b"0]}"


def _header(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


def _names(pattern: str, num_bytes: int = MAX_JSON_BYTES) -> bytes:
    """A JSON object of about `num_bytes`, whose entries are `pattern` with consecutive numbers for `#`."""
    count = num_bytes // (len(pattern) + 9 * pattern.count("#"))
    return ("{" + ",".join(pattern.replace("#", f"{number:08}") for number in range(count)) + "}").encode()


def _program(repeated: bytes, before: bytes = b"N") -> bytes:
    """A zip whose pickle has the largest allowed size."""
    return as_zip(b"\x80\x02" + before + repeated * ((MAX_PICKLE_BYTES - 100) // len(repeated)) + b".")


def _many_tensors() -> bytes:
    """One tensor under as many names as fit."""
    tensor = pickled(Tensor(Storage(torch.FloatStorage, "0", 1), 0, (1,), (1,)))[2:-1]
    items = b"".join(b"\x8c\x06%06xh\xff" % number for number in range((MAX_PICKLE_BYTES - 1000) // 10))
    return as_zip(b"\x80\x02}(\x8c\x01a" + tensor + b"q\xff" + items + b"u.", [("0", bytes(4))])


def _hashed(value: Any) -> bytes:
    """A pickled dict with this key, which `pickle` itself could not write."""
    return as_zip(b"\x80\x02}" + pickle.dumps(value, 2)[2:-1] + b"Ns.")


class _Far(io.BytesIO):
    """The part of a file after `_SPARSE_BYTES`."""

    def tell(self) -> int:
        return super().tell() + _SPARSE_BYTES

    def seek(self, position: int, whence: int = 0, /) -> int:
        return super().seek(position - _SPARSE_BYTES if whence == io.SEEK_SET else position, whence)


def _scattered() -> bytes:
    """The end of a zip whose last tensor has 64 numbers spread over 4 GiB from the start of the file."""
    shapes = expected_tensors(CONFIG, LayerRange.whole(CONFIG.num_layers))
    state = {
        name: Tensor(
            Storage(torch.FloatStorage, name, torch.Size(shape).numel()),
            0,
            shape,
            (1,) if len(shape) == 1 else (shape[1], 1),
        )
        for name, shape in shapes.items()
    }
    last = "lm_head.weight"
    state[last] = Tensor(Storage(torch.FloatStorage, last, 1 << 30), 0, shapes[last], (1 << 26, 1 << 22))
    end = _Far()
    with zipfile.ZipFile(end, "w") as archive:
        archive.writestr("archive/data.pkl", pickled(state))
        for name, shape in shapes.items():
            archive.writestr(f"archive/data/{name}", bytes(4 * torch.Size(shape).numel()))
        entry = archive.getinfo(f"archive/data/{last}")
        entry.header_offset, entry.file_size, entry.compress_size = 0, 1 << 32, 1 << 32
    return end.getvalue()


def _large_directory() -> bytes:
    """A zip's end record that claims a directory of 4 GiB; it is written after zeros."""
    return struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 65535, 65535, (1 << 32) - 2, 0, 0)


def _many_entries() -> bytes:
    return as_zip(pickled({}), [(f"{number:05}", b"") for number in range(MAX_PICKLE_BYTES // 70)])


def _tokenizer(vocab: bytes) -> bytes:
    """A complete `tokenizer.json` with these tokens."""
    bpe = tokenizers.Tokenizer(models.BPE(vocab={}, merges=[]))
    bpe.decoder = decoders.ByteLevel()
    return bpe.to_str().encode().replace(b'"vocab":{}', b'"vocab":' + vocab)


def _token_ids() -> bytes:
    """A `tokenizer.json` of many tokens with different ids."""
    count = (MAX_TOKENIZER_BYTES - 400) // 20
    return _tokenizer(json.dumps({f"{id:08}": id for id in range(count)}, separators=(",", ":")).encode())


_WORDS = b'{"a":0,"b":1,"c":2,"ab":3,"abc":4,'

_ST, _INDEX, _CONFIG = "safetensors/model.safetensors", "shards/model.safetensors.index.json", "zip/config.json"
_BIN, _TOKENIZER, _VOCAB = "zip/pytorch_model.bin", "tokenizer/tokenizer.json", "vocabulary/vocab.json"
_ADDED = "vocabulary/added_tokens.json"

BOMBS: Mapping[str, Bomb] = {
    "header of small objects": (_ST, lambda: _header(_json(b'{"":1},')), 0),
    "header of wide characters": (_ST, lambda: _header(_json('"\U0001f600",'.encode())), 0),
    "header of many tensors": (
        _ST,
        lambda: _header(_names('"#":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}')),
        0,
    ),
    "header that is one name": (_ST, lambda: _header(b'{"' + b"\\u0001" * 2_000_000 + b'":0}'), 0),
    "index of many files": (_INDEX, lambda: b'{"weight_map":' + _names('"#":"#"') + b"}", 0),
    "index that is too large": (_INDEX, lambda: _json(b"[],", 2 * MAX_JSON_BYTES), 0),
    "config of empty objects": (_CONFIG, lambda: _json(b"{},", key=b"model_type"), 0),
    "config of a sparse terabyte": (_CONFIG, lambda: b"{}", 1 << 40),
    "pickle of marks": (_BIN, lambda: _program(b"("), 0),
    "pickle that remembers everything": (_BIN, lambda: _program(b"\x94"), 0),
    "pickle of nested lists": (_BIN, lambda: _program(b"]\x94("), 0),
    "pickle of tuples in tuples": (_BIN, lambda: _program(b"\x85"), 0),
    "pickle of doubling tuples": (_BIN, lambda: _program(b"h\0h\0\x86q\0", b"Nq\0"), 0),
    "pickle of one number": (_BIN, lambda: as_zip(pickled({"a": _HUGE})), 0),
    "pickle of one size": (_BIN, lambda: as_zip(pickled({"a": Storage(torch.FloatStorage, "0", _HUGE)})), 0),
    "pickle of many tensors": (_BIN, _many_tensors, 0),
    "pickle that hashes doubling tuples": (_BIN, lambda: _hashed(doubled(60)), 0),
    "tensor scattered over gigabytes": (_BIN, _scattered, -_SPARSE_BYTES),
    "zip of many entries": (_BIN, _many_entries, 0),
    "zip with a directory of gigabytes": (_BIN, _large_directory, -_SPARSE_BYTES),
    "tokenizer of many tokens": (_TOKENIZER, lambda: _tokenizer(_names('"#":7', MAX_TOKENIZER_BYTES - 400)), 0),
    "tokenizer of many token ids": (_TOKENIZER, _token_ids, 0),
    "tokenizer of numbers": (_TOKENIZER, lambda: _json(b"0,", MAX_TOKENIZER_BYTES, b"decoder"), 0),
    "tokenizer that is too large": (_TOKENIZER, lambda: b"{}", 1 << 40),
    "vocabulary of many tokens": (_VOCAB, lambda: _WORDS + _names('"#":7', MAX_TOKENIZER_BYTES - 100)[1:], 0),
    "added tokens of lists": (_ADDED, lambda: _json(b"[],", MAX_TOKENIZER_BYTES), 0),
}


SLOW_BOMBS = frozenset(
    (
        "header of many tensors", "index of many files", "pickle of marks", "pickle that remembers everything",
        "pickle of nested lists", "pickle of tuples in tuples", "pickle of many tensors",
    )
)  # fmt: skip
"""Those that take seconds: CI leaves them out."""


def explode(root: Path, bomb: Bomb, watch: Watch) -> None:
    """Writes a bomb, reads it, and restores the file.

    Raises:
        AssertionError: as `Watch.read`.
    """
    file, make, sparse_bytes = bomb
    path = root / file
    good = path.read_bytes()
    with path.open("wb") as out:
        if sparse_bytes < 0:
            out.write(b"PK\3\4")
            out.seek(-sparse_bytes)
        out.write(make())
        out.truncate(out.tell() + max(0, sparse_bytes))
    watch.read(path.parent)
    path.write_bytes(good)


def main() -> None:
    root, names = Path(sys.argv[1]), sys.argv[2:]
    _, watch = prepare(root)
    for name in names or BOMBS:
        (root / "case").write_text(name)  # names the case if the process dies
        explode(root, BOMBS[name], watch)
    print(peak_bytes())


if __name__ == "__main__":
    main()
