"""Converts a checkpoint of any form to safetensors with one file per layer, so that stages share no files.

Holds one tensor in memory at a time. The written bytes depend only on the source, the dtype and the bits.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from gptj_dist.checkpoint.conversion_plan import ConversionPlan, draw_plan, file_bytes
from gptj_dist.checkpoint.files import (
    CONFIG_FILE,
)
from gptj_dist.checkpoint.gptq_form import gptq_tensors, matrix_name
from gptj_dist.checkpoint.index import (
    expected_tensors,
    stored_bits,
)
from gptj_dist.checkpoint.loader import TORCH_DTYPES, StageTensors
from gptj_dist.checkpoint.partial import PartialDirectory, settle, siblings
from gptj_dist.checkpoint.writer import (
    CODE_OF,
    Layout,
    tensor_bytes,
    write_safetensors,
)
from gptj_dist.config import DTypeName, LayerRange
from gptj_dist.errors import CheckpointError, ConfigurationError, ConversionError
from gptj_dist.quantization import Bits, scale_name
from gptj_dist.sizes import bytes_text

Quantize = Callable[[torch.Tensor, Bits], tuple[torch.Tensor, torch.Tensor]]
"""Makes values and float32 scales, as a checkpoint has them, of a matrix."""

CHECKSUMS_FILE = "SHA256SUMS"
"""What `sha256sum -c` reads."""

_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NAME_IS_TAKEN = (errno.ENOTEMPTY, errno.EEXIST)


class Observer(Protocol):
    """Receives the progress of a conversion."""

    def note(self, text: str) -> None:
        """Receives one line for the user."""
        ...

    def progress(self, done_bytes: int, total_bytes: int) -> None:
        """Receives how much of the result is written."""
        ...


@dataclass(frozen=True, slots=True)
class Conversion:
    """The result of a conversion.

    Args:
        quantized: the bits of the weights, such as `int4`; None if they have the dtype.
    """

    directory: Path
    dtype: DTypeName
    quantized: str | None
    num_files: int
    num_bytes: int


def convert_checkpoint(
    source: Path,
    destination: Path,
    dtype: DTypeName | None,
    overwrite: bool,
    observer: Observer,
    bits: Bits | None = None,
    quantize: Quantize | None = None,
    as_gptq: bool = False,
) -> Conversion:
    """Writes the checkpoint in `source` to `destination`, which appears when it is complete.

    An error, an interrupt or a kill before that changes neither the source nor an existing destination. The finished
    files stay beside the destination, and the same call resumes. A call with another source or dtype deletes them.

    Args:
        dtype: of the result; None takes that of the weights, or `config.json`'s where they differ.
        overwrite: replace the checkpoint that `destination` holds.
        bits: of the result's matrices; None leaves them as they are.
        quantize: how to make them; needed with `bits`.
        as_gptq: write matrices of 4 bits as AutoGPTQ does; the embedding and the head keep the dtype.

    Raises:
        ConfigurationError: `destination` must not be written, see `check_destination`; or the matrices do not suit the
            bits, or have other ones already.
        CheckpointError: the source is broken, or not a GPT-J, or has numbers that the dtype cannot hold.
        ConversionError: the disk is full or broken, or another process has written the same.
    """
    with _readable_errors(destination):
        check_destination(source, destination, overwrite)
        source, destination = source.resolve(), destination.resolve()
        plan = draw_plan(source, dtype, bits, as_gptq)
        _Converter(plan, destination, overwrite, observer, quantize).run()
    quantization = plan.result.quantization
    quantized = None if quantization is None else quantization.name(0, plan.result.num_layers)
    return Conversion(destination, plan.dtype, quantized, len(plan.files) + 1, plan.num_bytes)


def check_destination(source: Path, destination: Path, overwrite: bool) -> None:
    """Refuses a destination where writing would lose data. Opens no files, so it can run before a download.

    A destination that was being replaced when a process was killed is restored first.

    Raises:
        ConfigurationError: `destination` exists, unless it is a checkpoint to be overwritten; or it and the source lie
            within each other.
        ConversionError: the disk is broken.
    """
    destination = destination.resolve()
    for path in (source.resolve(), *(file.resolve() for file in source.iterdir())):
        for written in (destination, *siblings(destination)):
            if path == written or path in written.parents or written in path.parents:
                raise ConfigurationError(
                    f"{written} would be written, but the source {path} is there: name another directory"
                )
    with _readable_errors(destination):
        settle(destination)
    if destination.exists() and not overwrite:
        raise ConfigurationError(f"{destination} exists already: --overwrite replaces it")
    if destination.exists() and not (destination / CONFIG_FILE).is_file():
        raise ConfigurationError(
            f"{destination} exists and is no checkpoint, so it is not replaced: name another directory"
        )


class _Converter:
    """One run of a conversion."""

    def __init__(
        self, plan: ConversionPlan, destination: Path, overwrite: bool, observer: Observer, quantize: Quantize | None
    ) -> None:
        self._plan = plan
        self._quantize = quantize
        self._destination = destination
        self._overwrite = overwrite
        self._partial = PartialDirectory(destination, plan.identity)
        self._observer = observer
        self._done_bytes = 0

    def run(self) -> None:
        """Writes what is not finished, and gives the result its name.

        Raises:
            CheckpointError: the source cannot be converted; no files are kept.
            ConversionError: the disk is full, and finished files are kept; or another process has taken them.
        """
        try:
            self._write_files()
            self._partial.publish(self._overwrite)
        except CheckpointError:
            self._partial.discard()
            raise
        except OSError as error:
            is_gone = error.errno == errno.ENOENT and not self._partial.path.exists()
            if is_gone or error.errno in _NAME_IS_TAKEN:
                raise ConversionError(
                    f"another process has written {self._destination}, or is at it: this one has stopped"
                ) from error
            if error.errno in _DISK_IS_FULL:
                raise self._too_little_space(f" ({error.strerror})") from error
            raise
        finally:
            with suppress(OSError):
                self._partial.path.rmdir()  # if no file is finished

    def _write_files(self) -> None:
        self._resume()
        with StageTensors(
            self._plan.source, self._plan.config, LayerRange.whole(self._plan.config.num_layers)
        ) as tensors:
            buffer = torch.empty(self._largest_tensor_bytes(), dtype=torch.uint8)
            while missing := self._missing():
                self._write_file(next(iter(missing)), tensors, buffer)
                self._report(self._plan.num_bytes - sum(self._missing().values()))
        if self._plan.has_source_changed():
            raise CheckpointError(f"{self._plan.source} changed while it was being converted: run it again")
        while CHECKSUMS_FILE not in self._partial.finished():
            with self._partial.create(CHECKSUMS_FILE) as file:
                file.write("".join(f"{self._partial.sha256(n)}  {n}\n" for n in sorted(self._plan.files)).encode())

    def _resume(self) -> None:
        for path in self._partial.begin():
            self._observer.note(f"{path} held a part of another conversion: deleted")
        missing = self._missing()
        finished_bytes = self._plan.num_bytes - sum(missing.values())
        if num_finished := len(self._plan.files) - len(missing):
            finished = f"{num_finished} of {len(self._plan.files)} files are finished, {bytes_text(finished_bytes)}"
            self._observer.note(f"resuming: {finished}")
        self._report(finished_bytes)
        if sum(missing.values()) > self._free_bytes():
            raise self._too_little_space()

    def _write_file(self, name: str, tensors: StageTensors, buffer: torch.Tensor) -> None:
        content = self._plan.files[name]
        with self._partial.create(name) as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                write_safetensors(file, content, self._cast(content, tensors, buffer))

    def _cast(self, layout: Layout, tensors: StageTensors, buffer: torch.Tensor) -> Iterator[torch.Tensor]:
        """The tensors of a file as they are written, one after the other in the same memory."""
        shapes = expected_tensors(self._plan.config, LayerRange.whole(self._plan.config.num_layers))
        made: dict[str, torch.Tensor] = {}
        for name, (code, shape) in layout.items():
            weight = matrix_name(name)
            bits = stored_bits(self._plan.result, weight or name)
            if name in made:
                yield made.pop(name).to(TORCH_DTYPES[code])
            elif bits is None or self._quantize is None or stored_bits(self._plan.config, name) is not None:
                out = _view(buffer, code, shape)
                tensors.read(name, out)
                yield out
            else:
                matrix = _view(buffer, CODE_OF[self._plan.config.dtype], shapes[weight or name])
                tensors.read(weight or name, matrix)
                values, scales = self._quantize(matrix, bits)
                made |= gptq_tensors(weight, values, scales) if weight else {name: values, scale_name(name): scales}
                yield made.pop(name)
            self._report(self._done_bytes + tensor_bytes(code, shape))

    def _report(self, done_bytes: int) -> None:
        self._done_bytes = done_bytes
        self._observer.progress(done_bytes, self._plan.num_bytes)

    def _largest_tensor_bytes(self) -> int:
        """Of the source and of the result."""
        layouts = [content for content in self._plan.files.values() if isinstance(content, dict)]
        written = [tensor_bytes(code, shape) for layout in layouts for code, shape in layout.values()]
        shapes = expected_tensors(self._plan.config, LayerRange.whole(self._plan.config.num_layers)).values()
        return max(*written, *(tensor_bytes(CODE_OF[self._plan.config.dtype], shape) for shape in shapes))

    def _too_little_space(self, detail: str = "") -> ConversionError:
        missing, free = bytes_text(sum(self._missing().values())), bytes_text(self._free_bytes())
        return ConversionError(
            f"{self._destination} needs {missing} more, and its disk has {free} free{detail}: "
            "make room and run it again, what is finished is kept"
        )

    def _missing(self) -> dict[str, int]:
        """Name -> size in bytes of each file that is not finished."""
        finished = self._partial.finished()
        sizes = {name: file_bytes(content) for name, content in self._plan.files.items()}
        return {name: size for name, size in sizes.items() if finished.get(name) != size}

    def _free_bytes(self) -> int:
        return shutil.disk_usage(self._partial.path).free


@contextmanager
def _readable_errors(destination: Path) -> Iterator[None]:
    """Turns what the file system says into an error of one line."""
    try:
        yield
    except OSError as error:
        reason = f"{error.strerror or error}" + (f", {error.filename}" if error.filename else "")
        raise ConversionError(f"{destination} could not be written: {reason}") from error


def _view(buffer: torch.Tensor, code: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The beginning of a buffer of bytes as a tensor."""
    return buffer[: tensor_bytes(code, shape)].view(TORCH_DTYPES[code]).view(shape)
