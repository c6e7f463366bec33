"""The body of `POST /v1/chat/completions`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from gptj_dist.answers.schema.base import NON_EMPTY, Body, Neutral
from gptj_dist.answers.schema.sampling import NEUTRAL_FIELDS, SamplingFields
from gptj_dist.errors import InvalidRequestError
from gptj_dist.params import SamplingParams


class TextPart(Body):
    """A part of a message's content.

    Args:
        type: GPT-J reads text, so other types are refused.
        text: what the part says.
    """

    type: Literal["text"]
    text: str


class Message(Body):
    """What somebody said.

    Args:
        role: such as system, user or assistant: what the chat template knows.
        content: text, or parts that are joined.
        name: who speaks, for templates that show it.
    """

    role: str
    content: str | list[TextPart]
    name: str | None = None

    def for_template(self) -> dict[str, str]:
        """As chat templates read it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": content} | ({} if self.name is None else {"name": self.name})


Messages: TypeAlias = Annotated[list[Message], NON_EMPTY]


class ChatRequest(SamplingFields):
    """A conversation to be continued.

    Args:
        messages: what was said so far, one or more.
        max_tokens: the most tokens to generate; null takes what the context window leaves.
        max_completion_tokens: OpenAI's newer name for it.
        logprobs: tell each token's log probability.
        top_logprobs: and that of so many of the likeliest, 0 to 20.
        chat_template_kwargs: variables for the template.
        add_generation_prompt: let the template end with the beginning of an answer; null does unless the last message
            is continued.
        continue_final_message: continue the last message instead of answering it.
    """

    neutral: ClassVar[Neutral] = {
        **NEUTRAL_FIELDS,
        "audio": (),
        "best_of": (1,),
        "chat_template": (),
        "documents": (),
        "echo": (False,),
        "function_call": ("none",),
        "functions": ([],),
        "include_reasoning": (True, False),
        "metadata": (),
        "mm_processor_kwargs": (),
        "modalities": (["text"],),
        "parallel_tool_calls": (True, False),
        "prediction": (),
        "prompt_cache_key": (),
        "prompt_logprobs": (),
        "reasoning_effort": (),
        "safety_identifier": (),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "tool_choice": ("none",),
        "tools": ([],),
        "verbosity": (),
        "web_search_options": (),
    }
    unions: ClassVar = {
        "messages": "a list of messages, each with a role and a content, which is a string or a list of text parts",
        "stop": "a string or a list of strings",
    }

    messages: Messages
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] = {}
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False

    @property
    def most_tokens(self) -> int | None:
        """The most tokens to generate, under either name; None leaves it to the context window."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def sampling_params(self, max_tokens: int, bad_words: tuple[tuple[int, ...], ...] = ()) -> SamplingParams:
        """How the answer is to be sampled.

        Args:
            max_tokens: `most_tokens`, or what the context window leaves.
            bad_words: their tokens.

        Raises:
            InvalidRequestError: a value is out of its range.
        """
        return self._sampling_params(max_tokens, (self.top_logprobs or 0) if self.logprobs else None, None, bad_words)

    def check(self) -> None:
        """Raises InvalidRequestError if fields contradict each other or a value is out of its range."""
        super().check()
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise InvalidRequestError("max_tokens and max_completion_tokens contradict each other", "max_tokens")
        if self.most_tokens is not None and self.most_tokens < 1:
            name = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
            raise InvalidRequestError(f"{name} must be at least 1, got {self.most_tokens}", name)
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequestError("top_logprobs may be given only when logprobs is true", "top_logprobs")
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= 20:
            raise InvalidRequestError(f"top_logprobs must be from 0 to 20, got {self.top_logprobs}", "top_logprobs")
        if self.continue_final_message and self.add_generation_prompt:
            raise InvalidRequestError(
                "continue_final_message and add_generation_prompt contradict each other", "continue_final_message"
            )
        self.sampling_params(self.most_tokens or max(self.min_tokens, 1))
