"""Compiles the C sources once for this machine and loads them. Knows no tensors.

torch has no operator that reads a paged cache, or one of 16 bits, near the speed of memory, and its products read
weights and multiply one after the other; 1,200 lines of C, compiled for this very CPU, do both at once.
The library links against nothing: it finds OpenMP's symbols in the library that torch has loaded.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from gptj_dist.own_directory import own_directory

logger = logging.getLogger(__name__)

SOURCES = tuple(
    Path(__file__).with_name(name) for name in ("attention.c", "product.c", "low_bit.c", "low_rank.c", "team.c")
)
HEADERS = tuple(Path(__file__).with_name(name) for name in ("vectors.h", "panels.h"))
COMPILERS = ("gcc", "cc")
COMPILE_TIMEOUT_S = 120
COMPILE = ("-O3", "-march=native", "-ffp-contract=off", "-fopenmp", "-fPIC", "-c")
_LINK = ("-shared", "-nostdlib")

WaitFunction = ctypes.CFUNCTYPE(None)
"""A function that `wait_as_team` calls."""

NativeFunction = Any
"""A function of the library; ctypes has no public name for the type."""


class NativeBatch(ctypes.Structure):
    """`struct batch` of the source."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("num_rows", "num_tiles", "num_heads", "head_dim", "padded_dim")),
        *((name, ctypes.c_int64) for name in ("rotary_dim", "row_stride", "table_stride", "max_tokens")),
        *((name, ctypes.c_void_p) for name in ("positions", "spans", "tables", "tiles", "cos", "sin")),
    )


class Product(ctypes.Structure):
    """`struct product` of the source."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("num_rows", "num_columns", "depth", "x_stride", "residual_stride")),
        *((name, ctypes.c_int64) for name in ("element", "bits", "group")),
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "scales", "offsets")),
    )


class LowRank(ctypes.Structure):
    """`struct low_rank` of the source."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rank", "depth", "num_columns")),
        *((name, ctypes.c_void_p) for name in ("a", "b")),
    )


class Adapted(ctypes.Structure):
    """`struct adapted` of the source."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("num_tiles", "num_groups", "num_places", "depth", "num_columns")),
        *((name, ctypes.c_int64) for name in ("x_stride", "y_stride")),
        *((name, ctypes.c_void_p) for name in ("tiles", "rows", "strengths", "tables")),
    )


@cache
def load_library() -> ctypes.CDLL | None:
    """The compiled library, or None if it cannot be compiled or loaded; the log says why."""
    try:
        if (directory := own_directory()) is not None:
            return _declare(ctypes.CDLL(str(_compiled(directory))))
        with tempfile.TemporaryDirectory() as own:  # compiled at each start; a loaded library does not need its file
            return _declare(ctypes.CDLL(str(_compiled(Path(own)))))
    except (OSError, subprocess.SubprocessError) as error:
        said = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else error
        logger.warning("attention falls back to torch, several times slower: %s", said)
        return None


def load_product_library() -> ctypes.CDLL | None:
    """The compiled library if its bfloat16 products run on this CPU, else None: oneDNN's are as fast there."""
    library = load_library()
    return library if library is not None and library.can_multiply_bfloat16() else None


def load_low_bit_library() -> ctypes.CDLL | None:
    """The compiled library if its products with weights of 8 and 4 bits run on this CPU, else None."""
    library = load_library()
    return library if library is not None and library.can_multiply_low_bit() else None


def find_compiler() -> str | None:
    """The C compiler on this process's PATH, if there is one."""
    return next((found for name in COMPILERS if (found := shutil.which(name))), None)


def _compiled(directory: Path) -> Path:
    """The library's file. Compiles it if there is none for this source, machine and compiler yet."""
    compiler = find_compiler()
    if compiler is None:
        raise OSError(f"there is no C compiler ({' or '.join(COMPILERS)}) on {platform.node()}")
    version = _run(compiler, "--version")
    texts = (path.read_text() for path in (*SOURCES, *HEADERS))
    key = hashlib.blake2b("\n".join((*texts, version, *COMPILE, *_LINK, _cpu())).encode(), digest_size=12)
    path = directory / f"native-{key.hexdigest()}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            _run(compiler, *COMPILE, *map(str, SOURCES), directory=scratch)
            _run(compiler, *_LINK, *(f"{source.stem}.o" for source in SOURCES), "-o", "native.so", directory=scratch)
            Path(scratch, "native.so").replace(path)  # atomic, because other stages may look for it
    return path


def _cpu() -> str:
    """The CPU that the code is compiled for: different machines may share a home directory."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    kept = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return "\n".join((platform.machine(), *sorted(kept)))


def _run(*command: str, directory: str | None = None) -> str:
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, cwd=directory
    ).stdout


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    pointers = (ctypes.c_void_p,) * 3
    for function in (library.attend_float32, library.attend_bfloat16):
        function.argtypes = (ctypes.POINTER(NativeBatch), *pointers, ctypes.c_int)
        function.restype = ctypes.c_int
    for function in (library.add_low_rank_float32, library.add_low_rank_bfloat16):
        function.argtypes = (ctypes.POINTER(Adapted), ctypes.c_int64, *pointers[1:], ctypes.c_int)
        function.restype = ctypes.c_int
    library.place_team.argtypes, library.place_team.restype = (ctypes.c_void_p, ctypes.c_int, ctypes.c_int), None
    library.wait_as_team.argtypes, library.wait_as_team.restype = (WaitFunction,), None
    if library.can_multiply_bfloat16():
        _declare_product(library.size_of_bfloat16, library.pack_bfloat16, library.multiply_bfloat16)
    if library.can_multiply_low_bit():
        _declare_product(library.size_of_low_bit, library.pack_low_bit, library.multiply_low_bit)
    return library


def _declare_product(size_of: NativeFunction, pack: NativeFunction, multiply: NativeFunction) -> None:
    product, pointer = ctypes.POINTER(Product), ctypes.c_void_p
    size_of.argtypes, size_of.restype = (product,), ctypes.c_int64
    pack.argtypes, pack.restype = (product, pointer, ctypes.c_int), None
    multiply.argtypes = (product, pointer, pointer, ctypes.c_int, pointer, ctypes.c_int)
