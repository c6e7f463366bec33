"""Serves GPT-J, and every checkpoint of its architecture, as a pipeline of stages.

`LLM` and `SamplingParams` are the offline face; importing the package loads neither torch nor Ray.
"""

from typing import TYPE_CHECKING, Any

from gptj_dist.params import AdapterChoice, Grammar, SamplingParams

if TYPE_CHECKING:
    from gptj_dist.llm import LLM, Completion

__all__ = ["LLM", "AdapterChoice", "Completion", "Grammar", "SamplingParams"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in ("LLM", "Completion"):
        from gptj_dist import llm

        return {"LLM": llm.LLM, "Completion": llm.Completion}[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
