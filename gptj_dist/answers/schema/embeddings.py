"""The body of `POST /v1/embeddings`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from gptj_dist.answers.schema.base import Body, Integer
from gptj_dist.answers.schema.completions import PromptField, list_prompts
from gptj_dist.params import Pooling, SamplingParams


class EmbeddingRequest(Body):
    """Texts of which vectors are computed, from the model's hidden states.

    Args:
        model: one of the names in `GET /v1/models`, of the model or of an adapter; null takes the model that there is.
        input: a text, several, token ids, or several lists of them; an empty text stands for end of text.
        add_special_tokens: begin and end texts with the tokens that the checkpoint asks for, if it does.
        encoding_format: lists of numbers, or base64 of little-endian float32.
        pooling: the mean over all tokens, or the last token.
        layer: 0 for the embedding, k for the k-th layer's output, null for the last with the final layer norm.
        priority: as in completions.
        user: goes to the log and changes nothing, as at OpenAI.
    """

    unserved: ClassVar = dict.fromkeys((
        "additional_data", "cache_salt", "dimensions", "embed_dtype", "messages", "mm_processor_kwargs",
        "normalize", "request_id", "truncate_prompt_tokens",
    )) | {"endianness": "native"}  # fmt: skip

    model: str | None = None
    input: PromptField
    add_special_tokens: bool = True
    encoding_format: Literal["float", "base64"] = "float"
    pooling: Literal["mean", "last"] = "mean"
    layer: Integer | None = None
    priority: Integer = 0
    user: str | None = None

    def prompts(self) -> list[str | list[int]]:
        """The inputs one by one, each text or token ids."""
        return list_prompts(self.input)

    @property
    def num_completions(self) -> int:
        """Inputs: each is computed as a completion is."""
        return len(self.prompts())

    def sampling_params(self) -> SamplingParams:
        """The parameters of the computation. Raises InvalidRequestError if a value is out of its range."""
        return SamplingParams(max_tokens=0, pooling=Pooling(self.pooling, self.layer), priority=self.priority)

    def own_names(self) -> Mapping[str, str]:
        return {"prompt": "input"}

    def check(self) -> None:
        self.sampling_params()
