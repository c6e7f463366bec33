"""Turns errors of the Hugging Face hub's client into one line: what failed, and what to do."""

from __future__ import annotations

import difflib
import errno

from gptj_dist.errors import CheckpointError

DISK_WARNING = "Not enough free disk space"
"""How the hub's client begins its warning, which it gives before it downloads a file."""

_KNOWN_MODELS = ("EleutherAI/gpt-j-6b", "nomic-ai/gpt4all-j", "togethercomputer/GPT-JT-6B-v1", "databricks/dolly-v1-6b")
"""What a misspelt name may have meant."""

_GIVE_TOKEN = "give a token: `hf auth login`, or HF_TOKEN"  # nosec B105  # a hint


def explain(error: Exception, model: str, file: str, revision: str | None) -> CheckpointError:
    """The error that the hub's client raised about a file, as an error of one line.

    Args:
        model: the hub's name for it.
        revision: as the user gave it.
    """
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # why it was looked for in the cache alone
    return CheckpointError(f"cannot get {model!r} from the hub: {_reason(error, model, file, revision)}")


def _reason(error: Exception, model: str, file: str, revision: str | None) -> str:
    from huggingface_hub import errors
    from huggingface_hub.constants import ENDPOINT, HF_HUB_CACHE

    match error:
        case errors.GatedRepoError():
            return f"it is gated; ask for access at {ENDPOINT}/{model}, then {_GIVE_TOKEN}"
        case errors.RepositoryNotFoundError():
            return f"there is no such repository, nor directory; {nearest_model(model)} If it is private, {_GIVE_TOKEN}"
        case errors.RevisionNotFoundError():
            return f"it has no branch, tag or commit {revision!r}; see {ENDPOINT}/{model}/tree/main"
        case errors.OfflineModeIsEnabled():
            return f"HF_HUB_OFFLINE is set, and {file} is not in the cache {HF_HUB_CACHE}; unset it to download"
        case errors.LocalEntryNotFoundError():
            return f"{ENDPOINT} cannot be reached, and {file} is not in the cache {HF_HUB_CACHE}"
        case errors.EntryNotFoundError():
            return f"it has no {file} at revision {revision or 'main'}"
        case errors.HFValidationError():
            return "that is neither a directory nor a hub name"
        case errors.HfHubHTTPError(response=response) if response.status_code == 401:
            return f"your token is not valid (HF_TOKEN, or of `hf auth login`); make one at {ENDPOINT}/settings/tokens"
    line = str(error).strip().partition("\n")[0]
    if line.startswith(DISK_WARNING) or (isinstance(error, OSError) and error.errno == errno.ENOSPC):
        return f"{line}; free some of it, or set HF_HOME to a directory on another disk ({file} goes to {HF_HUB_CACHE})"
    return (
        f"{file} did not arrive from {ENDPOINT} ({type(error).__name__}: {line}); "
        "run the same again, complete files are kept"
    )


def nearest_model(model: str) -> str:
    """Advice on a name that does not exist: the nearest known one, given with or without its owner."""
    spellings = {spelling.lower(): known for known in _KNOWN_MODELS for spelling in (known, known.partition("/")[2])}
    nearest = difflib.get_close_matches(model.lower(), spellings, n=1, cutoff=0.8)
    if nearest:
        return f"did you mean {spellings[nearest[0]]!r}?"
    return "check the spelling." if "/" in model else f"hub names are OWNER/NAME, such as {_KNOWN_MODELS[0]}"
