"""Opens an adapter, whatever its format is. Stdlib only."""

from __future__ import annotations

from pathlib import Path

from gptj_dist.checkpoint.adapters import StoredAdapter, check_adapter
from gptj_dist.checkpoint.control_vectors import is_directions, is_gguf, read_control_vector, read_directions
from gptj_dist.checkpoint.edits import SUFFIXES, read_edits
from gptj_dist.checkpoint.headers import printable
from gptj_dist.checkpoint.lm_steer import is_steer, read_steer, split_steer
from gptj_dist.checkpoint.peft import CONFIG_FILE, is_peft, read_peft
from gptj_dist.config import ModelConfig
from gptj_dist.errors import CheckpointError

FORMS = (
    f"a directory with {CONFIG_FILE} (LoRA), a {' or '.join(SUFFIXES)} file of edits, a .gguf or "
    ".safetensors file of a control vector, or a file of LM-Steer's"
)


def open_adapter(path: Path) -> StoredAdapter:
    """The adapter at a path.

    Raises:
        CheckpointError: there is none, it is in no known format, or it is broken.
    """
    file, _ = split_steer(path)
    try:
        is_there = file.exists()
    except OSError:  # such as a name that is too long
        is_there = False
    if not is_there:
        raise CheckpointError(f"there is no adapter {printable(str(path))}")
    if is_peft(path):
        return read_peft(path)
    if path.is_file() and is_gguf(path):
        return read_control_vector(path)
    if path.is_file() and is_directions(path):
        return read_directions(path)
    if file.is_file() and is_steer(file):
        return read_steer(path)
    if path.is_file() and path.suffix in SUFFIXES:
        return read_edits(path)
    raise CheckpointError(f"{path} is no adapter, which is {FORMS}")


def open_fitting(path: Path, config: ModelConfig) -> StoredAdapter:
    """As `open_adapter`; also raises CheckpointError if the adapter does not fit the model."""
    adapter = open_adapter(path)
    check_adapter(adapter, config)
    return adapter
