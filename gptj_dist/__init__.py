"""Serves GPT-J, and every checkpoint of its architecture, as a pipeline of stages.

`LLM` and `SamplingParams` are the offline face; importing the package loads neither torch nor Ray.
"""

import sys
from typing import TYPE_CHECKING, Any

OLDEST_PYTHON, NEWEST_PYTHON = (3, 11), (3, 13)
if not OLDEST_PYTHON <= sys.version_info[:2] <= NEWEST_PYTHON:  # the modules below cannot even be imported
    _found = ".".join(map(str, sys.version_info[:3]))
    raise SystemExit(f"gptj-dist: Python {_found} at {sys.executable} is not supported: take 3.11, 3.12 or 3.13")

from gptj_dist.params import AdapterChoice, Grammar, SamplingParams  # noqa: E402

if TYPE_CHECKING:
    from gptj_dist.llm import LLM, Completion

__all__ = ["LLM", "AdapterChoice", "Completion", "Grammar", "SamplingParams"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in ("LLM", "Completion"):
        from gptj_dist import llm

        return {"LLM": llm.LLM, "Completion": llm.Completion}[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
