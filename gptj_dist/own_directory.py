"""The directory in which this user keeps what can be made again: compiled code and copies of models. Stdlib only."""

from __future__ import annotations

import logging
import os
from pathlib import Path

logger = logging.getLogger(__name__)


def own_directory() -> Path | None:
    """`$XDG_CACHE_HOME/gptj-dist`, or `~/.cache/gptj-dist`; None if the user has no writable home.

    Raises:
        OSError: other users can write to the directory, whose files this process trusts.
    """
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        directory = home / "gptj-dist"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home
        logger.info("nothing is kept for the next start: %s", error)
        return None
    status = directory.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise OSError(f"{directory} must belong to this user, and no other user may write to it")
    return directory if os.access(directory, os.W_OK) else None
