"""What a call of `LLM` returns. Knows no engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from gptj_dist.engine.request import FinishReason
from gptj_dist.params import TokenLogprobs


class ToolCall(NamedTuple):
    """A call of a tool.

    Args:
        id: by which the message with the result names it; nine letters and digits.
        name: of the tool.
        arguments: JSON, valid by the tool's schema unless `max_tokens` or a stop string cut it.
    """

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Completion:
    """One continuation of a prompt.

    Args:
        text: the generated text, without a stop string and what follows it, and without calls of tools.
        token_ids: the generated tokens, with end of text or the tokens of a stop string.
        finish_reason: why the text ended.
        logprobs: of each token, if `params.logprobs` asks for them.
        score: of a text that a beam search has found: the sum of the log probabilities of its tokens, divided by their
            number to the power of `params.length_penalty`.
        tool_calls: of the tools that were given to `LLM.chat`.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprobs, ...] = ()
    score: float | None = None
    tool_calls: tuple[ToolCall, ...] = ()

    @property
    def message(self) -> dict[str, Any]:
        """The completion as an answer in OpenAI's form, for the conversation of a next call of `LLM.chat`."""
        calls = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in self.tool_calls
        ]
        return {"role": "assistant", "content": self.text, **({"tool_calls": calls} if calls else {})}


@dataclass(frozen=True, slots=True)
class Output:
    """The `params.n` completions of one prompt.

    Args:
        prompt_ids: the prompt's tokens.
        completions: one or more.
        prompt_logprobs: of the prompt's tokens from the second on, if `params.prompt_logprobs` asks for them.
        num_cached_tokens: tokens of the prompt that were not computed, because the KV cache still held them. Outputs
            that differ only in this are equal.
    """

    prompt_ids: tuple[int, ...]
    completions: tuple[Completion, ...]
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    num_cached_tokens: int = field(default=0, compare=False)

    @property
    def text(self) -> str:
        """The first completion's text."""
        return self.completions[0].text
