"""Every error that gptj-dist raises on purpose, in one tree. Knows nothing about HTTP or Ray.

    GPTJDistError
    ├── ConfigurationError      the settings cannot work: nothing was started
    │   └── CheckpointError     the model's files are missing, broken or not GPT-J
    ├── ConversionError         a converted checkpoint could not be written; source and destination are as they were
    ├── InvalidRequestError     the request cannot be served as it stands; `param` names the culprit
    │   ├── RequestTooLongError prompt and output exceed the context window or the whole KV cache
    │   └── TimeoutReachedError the request was not done in the time that it gave
    ├── AuthenticationError     the call has no key, or one that opens nothing
    ├── NotPermittedError       the call has no key that permits what it asks for
    ├── TooManyRequestsError    more is asked for than there is room or allowance for; `retry_after_s` says when to come
    ├── NotReadyError           no pipeline can make a token right now; trying again may help
    ├── StageFailedError        its pipeline failed with the request in flight; trying again may help
    │   └── PipelineLostError   the pipeline is gone as a whole; another one can go on with the request
    └── ServerError             a server that the command line asked refused, broke off or is not there

All of them survive pickling, because they cross process borders.
"""

import reprlib

MAX_EXCERPT_CHARS = 80
MAX_INTERNAL_CHARS = 300


class GPTJDistError(Exception):
    """Base class: `except GPTJDistError` catches whatever this package raises on purpose."""


class ConfigurationError(GPTJDistError):
    """The settings cannot work. Raised before any process, actor or file is created."""


class CheckpointError(ConfigurationError):
    """The model's files are missing, broken, or do not describe a GPT-J."""


class ConversionError(GPTJDistError):
    """A converted checkpoint could not be written: a full disk, or another process is at it. Trying again resumes."""


class InvalidRequestError(GPTJDistError):
    """The request cannot be served as it stands.

    Args:
        message: what is wrong, in the caller's words.
        param: name of the request field at fault, or None when it is the request as a whole.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class RequestTooLongError(InvalidRequestError):
    """Prompt and requested output together exceed the context window or the whole KV cache."""


class TimeoutReachedError(InvalidRequestError):
    """The request was not done in the time that it gave itself, and was given up."""


class AuthenticationError(GPTJDistError):
    """The call has no API key, or one that opens nothing."""


class NotPermittedError(GPTJDistError):
    """The call has no key that permits what it asks for."""


class TooManyRequestsError(GPTJDistError):
    """More is asked for than there is room or allowance for.

    Args:
        retry_after_s: seconds after which trying again may help; None if it never will.
    """

    def __init__(self, message: str, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NotReadyError(GPTJDistError):
    """No pipeline can make a token right now: stages are loading or restarting.

    Args:
        retry_after_s: seconds after which trying again may help; None for the usual ones.
    """

    def __init__(self, message: str, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class StageFailedError(GPTJDistError):
    """The pipeline, or a stage of it, failed while the request was in flight; no more tokens follow."""


class PipelineLostError(StageFailedError):
    """The pipeline is gone as a whole. Another one can go on with the request from its record."""


class ServerError(GPTJDistError):
    """A server that the command line asked refused, broke off or is not there; the message says what to do about it."""


def one_line(error: object) -> str:
    """An error's text with a space for each run of white space and of characters that a terminal does not show."""
    return " ".join("".join(char if char.isprintable() else " " for char in str(error)).split())


def internal_error(error: Exception) -> str:
    """An error that is not one of ours, in a line."""
    if isinstance(error, MemoryError):
        return "there is not enough memory"
    return f"internal error: {type(error).__name__}: {one_line(error)[:MAX_INTERNAL_CHARS]}"


def excerpt(value: object) -> str:
    """The beginning of a value that a user gave, for an error message: at most `MAX_EXCERPT_CHARS` characters."""
    try:
        text = reprlib.repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= MAX_EXCERPT_CHARS else text[: MAX_EXCERPT_CHARS - 3] + "..."
