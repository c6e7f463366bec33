"""Turns what a person calls a model into a directory, and gets the files that a stage needs from the Hugging Face hub.

Knows the names of files, not what is in them. Quick to import: the hub's client is loaded when a hub name is met.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gptj_dist.checkpoint.files import CONFIG_FILE, SAFETENSORS
from gptj_dist.checkpoint.index import CheckpointIndex, expected_tensors
from gptj_dist.config import LayerRange, ModelConfig
from gptj_dist.errors import CheckpointError

DEMO = "demo"

_METADATA_FILES = [
    CONFIG_FILE,
    SAFETENSORS.index,
    "tokenizer*.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
]


def resolve_model(model: str, revision: str | None = None) -> Path:
    """Finds a model's directory; of a hub model it downloads the configuration and tokenizer, but no weights.

    Args:
        model: `demo`, a directory, or a hub name like `EleutherAI/gpt-j-6b`; a directory of that name goes first.
        revision: branch, tag or commit of a hub model.

    Returns:
        An absolute path; of a hub model, the cache's directory of one commit.

    Raises:
        CheckpointError: there is no such directory or hub model, it has no safetensors, or the hub cannot be reached.
    """
    if (local := local_directory(model)) is not None:
        return local
    if model.startswith(("/", "./", "../", "~")) or model.count("/") > 1:
        raise CheckpointError(f"there is no directory {model}")
    from huggingface_hub import constants, file_exists, snapshot_download

    with _readable_errors(model, revision):
        directory = Path(snapshot_download(model, revision=revision, allow_patterns=_METADATA_FILES)).absolute()
        has_safetensors = (
            any((directory / file).exists() for file in (SAFETENSORS.index, SAFETENSORS.single))
            or constants.HF_HUB_OFFLINE  # nobody to ask: a machine may hold the tokenizer alone, and need no weights
            or file_exists(model, SAFETENSORS.single, revision=directory.name)
        )
    if not has_safetensors:
        raise CheckpointError(f"{model} has no {SAFETENSORS.single} at revision {revision or 'main'}")
    return directory


def fetch_weights(model: str, directory: Path, layers: LayerRange, config: ModelConfig) -> None:
    """Downloads the files that hold a stage's tensors, and no others, unless they are there. Nothing for a local model.

    Args:
        model: as given to `resolve_model`.
        directory: what `resolve_model` returned. Its name is the commit that is fetched, even if the branch moved on.

    Raises:
        CheckpointError: the hub does not give them out.
    """
    if local_directory(model) is not None:
        return
    from huggingface_hub import hf_hub_download

    is_sharded = (directory / SAFETENSORS.index).exists()
    files = CheckpointIndex(directory).files(expected_tensors(config, layers)) if is_sharded else [SAFETENSORS.single]
    with _readable_errors(model, directory.name):
        for file in files:
            hf_hub_download(model, file, revision=directory.name)


def local_directory(model: str) -> Path | None:
    """The directory of a model that needs no hub, or None."""
    if model == DEMO:
        return Path(__file__).absolute().parents[1] / "demo"
    path = Path(model).expanduser()
    return path.absolute() if path.is_dir() else None


@contextmanager
def _readable_errors(model: str, revision: str | None) -> Iterator[None]:
    """Turns whatever the hub's client raises into a CheckpointError of one line."""
    try:
        yield
    # The client lets the errors of its HTTP library through, which was requests, then httpx, then httpx2.
    except Exception as error:
        raise CheckpointError(f"cannot get {model!r} from the hub: {_reason(error, revision)}") from error


def _reason(error: Exception, revision: str | None) -> str:
    from huggingface_hub import errors

    match error:
        case errors.GatedRepoError():
            return "it is gated; ask for access on its page, then run `hf auth login`"
        case errors.RepositoryNotFoundError():
            return "there is no such repository (nor a directory of that name), or it is private: run `hf auth login`"
        case errors.RevisionNotFoundError():
            return f"it has no revision {revision!r}"
        case errors.LocalEntryNotFoundError() | errors.OfflineModeIsEnabled():
            return "the hub cannot be reached (no network, or HF_HUB_OFFLINE is set), and it is not in the local cache"
        case errors.HFValidationError():
            return "that is neither a directory nor a hub name"
    first_line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first_line}"
