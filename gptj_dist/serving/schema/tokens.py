"""The bodies of `POST /tokenize`, `POST /detokenize` and `POST /v1/embeddings`."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from gptj_dist.errors import InvalidRequestError
from gptj_dist.params import Pooling, SamplingParams
from gptj_dist.serving.schema.base import PROMPT_FORMS, Body, Neutral, TokenIds
from gptj_dist.serving.schema.chat import Messages
from gptj_dist.serving.schema.completions import Prompt, list_prompts


class TokenizeRequest(Body):
    """A text, or a conversation that the chat template makes one.

    Args:
        model: one of the names in `GET /v1/models`; null takes the model that there is.
        prompt: the text.
        messages: the conversation.
        return_token_strs: give the tokens as texts too.
        add_generation_prompt: let the template end with the beginning of an answer.
        chat_template_kwargs: variables for the template.
    """

    neutral: ClassVar[Neutral] = {"add_special_tokens": (True, False), "chat_template": (), "tools": ([],)}

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    return_token_strs: bool = False
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] = {}

    def check(self) -> None:
        """Raises InvalidRequestError unless there is either a prompt or a conversation."""
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequestError("give either prompt or messages", "prompt")


class DetokenizeRequest(Body):
    """Token ids to be read as text.

    Args:
        model: one of the names in `GET /v1/models`; null takes the model that there is.
        tokens: one or more; a special one is read as its name.
    """

    model: str | None = None
    tokens: TokenIds


class EmbeddingRequest(Body):
    """Texts whose hidden states are wanted.

    Args:
        model: one of the names in `GET /v1/models`; null takes the model that there is.
        input: a text, several, token ids, or several lists of them; an empty text stands for end of text.
        encoding_format: lists of numbers, or base64 of little-endian float32.
        pooling: the mean over all tokens, or the last token.
        layer: 0 for the embedding, k for the k-th layer's output, null for the last with the final layer norm.
        priority: as in completions.
        user: goes to the log and changes nothing, as at OpenAI.
    """

    neutral: ClassVar[Neutral] = {"add_special_tokens": (True, False), "dimensions": ()}
    unions: ClassVar = {"input": PROMPT_FORMS}

    model: str | None = None
    input: Prompt
    encoding_format: Literal["float", "base64"] = "float"
    pooling: Literal["mean", "last"] = "mean"
    layer: int | None = None
    priority: int = 0
    user: str | None = None

    def prompts(self) -> list[str | list[int]]:
        """The inputs one by one, each text or token ids."""
        return list_prompts(self.input)

    def sampling_params(self) -> SamplingParams:
        """What an engine is asked for. Raises InvalidRequestError if a value is out of its range."""
        return SamplingParams(max_tokens=0, pooling=Pooling(self.pooling, self.layer), priority=self.priority)

    def check(self) -> None:
        """Raises InvalidRequestError if a value is out of its range."""
        self.sampling_params()
