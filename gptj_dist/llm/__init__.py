"""The offline interface: prompts in, completions out, in one process and without Ray.

Knows texts, token ids and conversations; answers and engine do the work. Knows no HTTP.
"""

from gptj_dist.llm.llm import LLM
from gptj_dist.llm.outputs import Completion, Output, ToolCall
from gptj_dist.llm.prompts import PromptInput, TextPrompt, TokensPrompt

__all__ = ["LLM", "Completion", "Output", "PromptInput", "TextPrompt", "TokensPrompt", "ToolCall"]
