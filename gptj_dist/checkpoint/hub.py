"""Finds the directory of a model, and downloads the files that a stage needs from the Hugging Face hub.

Quick to import: the hub's client is imported only when a hub name is used.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Collection
from functools import lru_cache
from pathlib import Path

from gptj_dist.checkpoint.files import (
    CONFIG_FILE,
    GENERATION_FILE,
    QUANTIZE_FILES,
    SAFETENSORS,
    TOKENIZER_FILES,
    WEIGHT_FORMS,
    WeightForm,
)
from gptj_dist.checkpoint.foreign import kind_of_files
from gptj_dist.checkpoint.hub_errors import DISK_WARNING, explain, nearest_model
from gptj_dist.checkpoint.index import CheckpointIndex, file_tensors, read_layout
from gptj_dist.config import LayerRange, ModelConfig
from gptj_dist.errors import CheckpointError
from gptj_dist.file_kinds import kind_of_file

DEMO = "demo"

_MAX_LISTED = 8


def resolve_model(model: str, revision: str | None = None) -> Path:
    """Finds a model's directory. For a hub model, downloads configuration and tokenizer, but no weights.

    If the hub does not answer, uses the files of the revision that are in the cache.

    Args:
        model: `demo`, a directory, or a hub name like `EleutherAI/gpt-j-6b`; a directory of that name goes first.
        revision: branch, tag or commit of a hub model.

    Returns:
        An absolute path; of a hub model, the cache's directory of one commit, whose name is that commit.

    Raises:
        CheckpointError: there is no such directory or hub model, it has no weights in a supported form, or the hub
            denies access.
    """
    if (local := local_directory(model)) is not None:
        return local
    _require_hub_name(model)
    directory = _download_config(model, revision).parent
    try:
        files = _list_files(model, directory.name)
    except Exception as error:  # see `_download`
        if any((directory / file).exists() for file in TOKENIZER_FILES):
            return directory
        raise explain(error, model, TOKENIZER_FILES[0], revision) from error
    form = _weight_form(files)
    if form is None:
        raise CheckpointError(_without_weights(model, revision, files))
    index = [] if form.single in files else [form.index]
    for file in [GENERATION_FILE, *QUANTIZE_FILES, *TOKENIZER_FILES, *index]:
        if file in files:
            _download(model, file, directory.name)
    return directory


def model_name(model: str) -> str:
    """Default name of a model for clients: `demo`, the last part of a directory, or a whole hub name."""
    return model if (directory := local_directory(model)) is None or model == DEMO else directory.name


def fetch_weights(
    model: str,
    directory: Path,
    layers: LayerRange,
    config: ModelConfig,
    on_file: Callable[[str], None] = lambda _: None,
) -> list[Path]:
    """Downloads the files that hold a stage's tensors, unless they are cached. Does nothing for a local model.

    Processes that want the same file at once wait for the one that downloads it, by the locks of the hub's client.

    Args:
        model: as given to `resolve_model`.
        directory: what `resolve_model` returned. Its name is the commit that is fetched, even if the branch moved on.
        on_file: called with the name of each missing file, before its download.

    Returns:
        The paths of the files.

    Raises:
        CheckpointError: the download failed.
    """
    names = file_tensors(config, layers, read_layout(directory, config))
    if local_directory(model) is not None:
        return [directory / file for file in CheckpointIndex(directory).files(names)]
    paths = [directory / file for file in _weight_files(model, directory, names)]
    for path in paths:
        if not path.exists():
            on_file(path.name)
            _download(model, path.name, directory.name)
    return paths


def local_directory(model: str) -> Path | None:
    """The directory of a model that needs no hub, or None."""
    if model == DEMO:
        return Path(__file__).absolute().parents[1] / "demo"
    path = Path(model).expanduser()
    return path.absolute() if path.is_dir() else None


def _require_hub_name(model: str) -> None:
    """Refuses what can only be a path, before the hub is asked.

    Raises:
        CheckpointError: there is no such directory.
    """
    if (path := Path(model).expanduser()).is_file():
        kind = kind_of_file(path) or "name the directory that holds the model's files"
        raise CheckpointError(f"{model} is a file: {kind}")
    if model.startswith(("/", "./", "../", "~")) or model.endswith("/") or "\\" in model or model.count("/") > 1:
        raise CheckpointError(f"there is no directory {model}")
    if "/" not in model:
        raise CheckpointError(f"{model!r} is neither a directory nor a hub name; {nearest_model(model)}")


def _download_config(model: str, revision: str | None) -> Path:
    """Raises CheckpointError if the repository has no config; the message names what it holds instead."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return _download(model, CONFIG_FILE, revision)
    except CheckpointError as error:
        is_absent = isinstance(error.__cause__, EntryNotFoundError)
        if not is_absent or isinstance(error.__cause__, LocalEntryNotFoundError):
            raise
        try:
            kind = kind_of_files(_list_files(model, revision))
        except Exception:  # see `_download`
            raise error from None
        if kind is None:
            raise
        raise CheckpointError(f"{model} has no {CONFIG_FILE}; it holds {kind}") from error


def _download(model: str, file: str, revision: str | None) -> Path:
    """Where a file lies in the cache, after downloading it if need be.

    Raises:
        CheckpointError: whatever the hub's client raises, as one line.
    """
    from huggingface_hub import hf_hub_download

    logging.getLogger("huggingface_hub.utils._http").addFilter(_is_for_users)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", DISK_WARNING)  # better now than when the disk is full
            return Path(hf_hub_download(model, file, revision=revision)).absolute()
    # The client lets the errors of its HTTP library through, which was requests, then httpx, then httpx2.
    except Exception as error:
        raise explain(error, model, file, revision) from error


def _is_for_users(record: logging.LogRecord) -> bool:
    """Filters out the hub client's advice to use a token, which `explain` gives where one is needed, and its URLs.

    What it says of another attempt gets a reason.
    """
    message = record.getMessage()
    if message.startswith("Retrying in "):
        record.msg, record.args = f"The hub does not answer. {message}", ()
    return "unauthenticated requests" not in message and " thrown while requesting " not in message


@lru_cache
def _list_files(model: str, commit: str | None) -> frozenset[str]:
    """All files of the repository, which are the same whenever this commit is asked about."""
    from huggingface_hub import HfApi, constants

    info = HfApi().model_info(model, revision=commit, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    return frozenset(sibling.rfilename for sibling in info.siblings or ())


def _weight_files(model: str, directory: Path, names: Collection[str]) -> list[str]:
    """The files of the weights' form that hold these tensors."""
    files: Collection[str]
    try:
        files = _list_files(model, directory.name)
    except Exception:  # see `_download`
        files = {path.name for path in directory.iterdir()}
    form = _weight_form(files) or SAFETENSORS  # without any, downloading will say what is wrong
    return (
        CheckpointIndex(directory).files(names) if form.index in files and form.single not in files else [form.single]
    )


def _weight_form(files: Collection[str]) -> WeightForm | None:
    return next((form for form in WEIGHT_FORMS if form.single in files or form.index in files), None)


def _without_weights(model: str, revision: str | None, files: Collection[str]) -> str:
    """What a repository holds in place of weights that are read; its dot files and texts say nothing."""
    others = sorted(f for f in files if not f.startswith(".") and not f.endswith((".json", ".md", ".txt")))
    held = ", ".join(others[:_MAX_LISTED]) or "no weights at all"
    wanted = " or ".join(form.single for form in WEIGHT_FORMS)
    if kind := kind_of_files(files):
        held += f": {kind}"
    return f"{model} has no {wanted} (nor their index) at revision {revision or 'main'}; it holds {held}"
