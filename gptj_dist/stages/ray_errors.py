"""Ray's errors in this package's words."""

from __future__ import annotations

import ray

from gptj_dist.errors import GPTJDistError
from gptj_dist.stages.pulse import StageHungError
from gptj_dist.stages.transport.frames import FrameFaultError


def own_error(error: Exception) -> GPTJDistError | None:
    """The package's own error inside the error of an actor call; None if it is another kind of error."""
    cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else None
    return cause if isinstance(cause, GPTJDistError) else None


def frame_fault(error: Exception) -> FrameFaultError | None:
    """What an edge did to a frame, if that ended a stage's run; None if it is another kind of error."""
    cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
    return cause if isinstance(cause, FrameFaultError) else None


def summary(error: Exception) -> str:
    """A short description of how a stage ended; continues its name."""
    if isinstance(error, StageHungError):
        return str(error)
    if isinstance(error, ray.exceptions.RayTaskError):
        return f"failed: {_first_line(error.cause)}"
    if isinstance(error, ray.exceptions.ActorDiedError):
        lines = str(error).strip().splitlines()
        has_not_started = "creation task" in lines[0]
        return f"failed: {lines[-1]}" if has_not_started else "died"  # the constructor's traceback ends with its error
    return f"failed: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
