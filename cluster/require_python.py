"""Run by the interpreter that is to make the environment: refuses a version of Python that is not supported.

Every Python 3 from 3.6 on can read it.
"""

import sys

OLDEST, NEWEST = (3, 11), (3, 13)


def refusal(version):
    """Why Python of this version, such as (3, 10, 1), is not used; None if it is supported."""
    if OLDEST <= tuple(version[:2]) <= NEWEST:
        return None
    found = ".".join(str(number) for number in version[:3])
    return (
        f"Python {found} at {sys.executable} is not supported: gptj-dist runs on 3.11, 3.12 and 3.13. "
        "Install one of them, or name it: make serve PYTHON=/path/to/python3.11"
    )


if __name__ == "__main__":
    sys.exit(refusal(sys.version_info))
