"""Compiles `attention.c` once for this machine and loads it. Knows no tensors.

torch has no operator that reads a paged cache, or one of 16 bits, near the speed of memory; a compiler for the very
CPU makes one of 300 lines. It links against nothing: OpenMP's symbols are found in the library that torch has loaded.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("attention.c")
COMPILERS = ("gcc", "cc")
COMPILE_TIMEOUT_S = 120
_COMPILE = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-c")
_LINK = ("-shared", "-nostdlib")


class Batch(ctypes.Structure):
    """`struct batch` of the source."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("num_rows", "num_tiles", "num_heads", "head_dim", "padded_dim")),
        *((name, ctypes.c_int64) for name in ("rotary_dim", "row_stride", "table_stride", "max_tokens")),
        *((name, ctypes.c_void_p) for name in ("positions", "slots", "tables", "tiles", "cos", "sin")),
    )


@cache
def load_library() -> ctypes.CDLL | None:
    """The compiled library, or None where it cannot be had; the log says why."""
    try:
        return _declare(ctypes.CDLL(str(_compiled())))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: the user has no home
        said = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else error
        logger.warning("attention falls back to torch, several times slower: %s", said)
        return None


def find_compiler() -> str | None:
    """The C compiler that this process would use."""
    return next((found for name in COMPILERS if (found := shutil.which(name))), None)


def _compiled() -> Path:
    """The library's file, made if this machine and compiler have none of this source yet."""
    compiler = find_compiler()
    if compiler is None:
        raise OSError(f"there is no C compiler ({' or '.join(COMPILERS)}) on {platform.node()}")
    version = _run(compiler, "--version")
    key = hashlib.blake2b("\n".join((SOURCE.read_text(), version, *_COMPILE, *_LINK, _cpu())).encode(), digest_size=12)
    path = _directory() / f"attention-{key.hexdigest()}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            object_file, library = f"{scratch}/attention.o", f"{scratch}/attention.so"
            _run(compiler, *_COMPILE, str(SOURCE), "-o", object_file)
            _run(compiler, *_LINK, object_file, "-o", library)
            Path(library).replace(path)  # at once, as other stages may look for it
    return path


def _directory() -> Path:
    """Where this user's libraries are; nobody else may write there, as what lies there is run."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = home / "gptj-dist"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise OSError(f"{directory} must be this user's, and writable by nobody else")
    return directory


def _cpu() -> str:
    """What the code is compiled for: a home directory may be shared by unlike machines."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    kept = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return "\n".join((platform.machine(), *sorted(kept)))


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S).stdout


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    pointers = (ctypes.c_void_p,) * 3
    for function in (library.attend_float32, library.attend_bfloat16):
        function.argtypes = (ctypes.POINTER(Batch), *pointers, ctypes.c_int)
        function.restype = ctypes.c_int
    return library
