"""Exits with an error if the interpreter that runs it is not a supported version. Runs on Python 3.6 and newer."""

import sys

OLDEST, NEWEST = (3, 11), (3, 13)


def refusal(version):
    """The error message for a version such as (3, 10, 1); None if it is supported."""
    if OLDEST <= tuple(version[:2]) <= NEWEST:
        return None
    found = ".".join(str(number) for number in version[:3])
    return (
        f"Python {found} at {sys.executable} is not supported: gptj-dist runs on 3.11, 3.12 and 3.13. "
        "Install one of them, or name it: make serve PYTHON=/path/to/python3.11"
    )


if __name__ == "__main__":
    sys.exit(refusal(sys.version_info))
