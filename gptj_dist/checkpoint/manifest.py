"""What a directory's model consists of: its files, and which of their bytes are no tensor's. Reads no weights.

A machine that has those bytes and the tensors of a stage, each at its place in a file of the right size, can run the
stage: it reads the same headers as a machine with the whole files.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gptj_dist.checkpoint.files import CONFIG_FILE, GENERATION_FILE, QUANTIZE_FILES, TOKENIZER_FILES, WEIGHT_FORMS
from gptj_dist.checkpoint.headers import TensorHeader, listing
from gptj_dist.checkpoint.index import CheckpointIndex, read_stored_header, stage_headers
from gptj_dist.checkpoint.spans import Span, merged, without
from gptj_dist.config import LayerRange, ModelConfig
from gptj_dist.errors import CheckpointError

SAMPLE_BYTES = 4096
"""What `sample` reads at the beginning and in the middle of each tensor."""

_OTHER_FILES = (
    CONFIG_FILE, GENERATION_FILE, *QUANTIZE_FILES, *TOKENIZER_FILES, *(form.index for form in WEIGHT_FORMS)
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A file of a model.

    Args:
        plain: the bytes that belong to no tensor; all of a file without weights.
    """

    name: str
    size_bytes: int
    plain: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """The files of a model.

    Args:
        version: as `version_of`.
    """

    version: str
    files: tuple[ModelFile, ...]


def read_manifest(directory: Path) -> Manifest:
    """The files of the model in a directory.

    Raises:
        CheckpointError: it holds no weights that are read, a file is missing or broken, or no ordinary file.
    """
    version = version_of(directory)
    names, weights = _file_names(directory)
    files = []
    for name in names:
        size_bytes = (directory / name).stat().st_size
        tensors = read_stored_header(directory / name).values() if name in weights else ()
        files.append(ModelFile(name, size_bytes, tuple(without([(0, size_bytes)], map(_span, tensors)))))
    return Manifest(version, tuple(files))


def version_of(directory: Path) -> str:
    """Hexadecimal digits that change when a file of the model does: a hash of names, sizes and times. Reads headers.

    Raises:
        CheckpointError: as `read_manifest`.
    """
    facts = []
    for name in _file_names(directory)[0]:
        try:
            status = (directory / name).stat()
        except OSError:
            raise CheckpointError(f"{directory} lacks {listing([name])}, which its index names") from None
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{directory / name} is no ordinary file")
        facts.append((name, status.st_size, status.st_mtime_ns))
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


def sample(directory: Path) -> str:
    """A hash of all bytes of the model's files that belong to no tensor, and of some of each tensor.

    Directories with equal samples hold the same model, whatever the times of their files, unless somebody has changed
    single numbers: training and editing change each number of the matrices that they change.

    Raises:
        CheckpointError: as `read_manifest`.
    """
    digest = hashlib.sha256()
    _, weights = _file_names(directory)
    for file in read_manifest(directory).files:
        digest.update(repr((file.name, file.size_bytes)).encode())
        spans = list(file.plain)
        if file.name in weights:
            for begin, end in sorted(map(_span, read_stored_header(directory / file.name).values())):
                middle = (begin + end) // 2
                spans += [(at, min(at + SAMPLE_BYTES, end)) for at in (begin, middle)]
        with (directory / file.name).open("rb", buffering=0) as opened:
            for begin, end in merged(spans):
                digest.update(os.pread(opened.fileno(), end - begin, begin))
    return digest.hexdigest()


def is_same_model(directory: Path, version: str, other_sample: Callable[[], str]) -> bool | None:
    """Whether a directory holds the model that another machine has; None if it holds none that can be read whole.

    Args:
        version: of the other machine's files.
        other_sample: their `sample`; called if the version does not tell.
    """
    try:
        if version_of(directory) == version:
            return True
        own_sample = sample(directory)
    except (CheckpointError, OSError):
        return None
    return own_sample == other_sample()


def stage_spans(directory: Path, config: ModelConfig, layers: LayerRange) -> dict[str, list[Span]]:
    """The bytes of a stage's tensors, by the names of their files.

    Args:
        directory: all but tensors must be there.

    Raises:
        CheckpointError: see `stage_headers`.
    """
    spans: dict[str, list[Span]] = {}
    for header in stage_headers(CheckpointIndex(directory), config, layers).values():
        spans.setdefault(header.path.name, []).append(_span(header))
    return {name: merged(each) for name, each in spans.items()}


def is_safe_name(name: str) -> bool:
    """Whether a file of this name lies in its directory itself."""
    return Path(name).name == name and name not in ("", ".", "..") and "\0" not in name


def _file_names(directory: Path) -> tuple[Sequence[str], set[str]]:
    """The files of the model, and which of them hold tensors."""
    weights = set(CheckpointIndex(directory).file_of.values())
    return sorted(weights | {name for name in _OTHER_FILES if (directory / name).is_file()}), weights


def _span(header: TensorHeader) -> Span:
    return header.offset_bytes, header.offset_bytes + header.num_bytes
