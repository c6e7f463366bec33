"""The forms in which `LLM` takes prompts and parameters. Knows no tokenizer and no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypedDict

from gptj_dist.config import refuse_unknown_keys
from gptj_dist.errors import ConfigurationError, InvalidRequestError, excerpt
from gptj_dist.params import SamplingParams


class TextPrompt(TypedDict):
    """vLLM's form of a text prompt."""

    prompt: str


class TokensPrompt(TypedDict):
    """vLLM's form of a prompt of token ids."""

    prompt_token_ids: Sequence[int]


PromptInput: TypeAlias = str | Sequence[int] | TextPrompt | TokensPrompt
Prompt: TypeAlias = str | list[int]
"""A text, or token ids."""

FORMS = "a text, a list of token ids, {'prompt': text} or {'prompt_token_ids': ids}"


def read_prompts(prompts: object) -> list[Prompt]:
    """One prompt or a list of prompts, as a list.

    Raises:
        InvalidRequestError: a prompt has none of the forms; names its place in the list.
    """
    if not isinstance(prompts, list | tuple) or any(map(_is_id, prompts)):
        return [read_prompt(prompts)]
    return [read_prompt(prompt, f"prompts[{i}]") for i, prompt in enumerate(prompts)]


def read_prompt(prompt: object, name: str = "prompt") -> Prompt:
    """One prompt.

    Args:
        name: of the prompt in messages.

    Raises:
        InvalidRequestError: it has none of the forms.
    """
    if isinstance(prompt, Mapping):
        return _read_mapping(prompt, name)
    if isinstance(prompt, str):
        return _text(prompt, name)
    if not isinstance(prompt, list | tuple):
        raise InvalidRequestError(f"{name} must be {FORMS}, got {excerpt(prompt)}", name)
    for i, token_id in enumerate(prompt):
        if not _is_id(token_id):
            raise InvalidRequestError(
                f"{name} is a list of token ids, so {name}[{i}] must be an int, got {excerpt(token_id)}", name
            )
    return list(prompt)


def params_of_prompts(params: object, num_prompts: int) -> list[SamplingParams]:
    """The parameters of each prompt.

    Args:
        params: for all prompts, or a list with one for each.

    Raises:
        InvalidRequestError: another type, or another number of them.
    """
    if isinstance(params, SamplingParams):
        return [params] * num_prompts
    if not isinstance(params, list | tuple) or not all(isinstance(item, SamplingParams) for item in params):
        raise InvalidRequestError(
            f"params must be SamplingParams, or a list with one for each prompt, got {excerpt(params)}", "params"
        )
    if len(params) != num_prompts:
        raise InvalidRequestError(f"params has {len(params)} entries for {num_prompts} prompts", "params")
    return list(params)


def _read_mapping(prompt: Mapping[Any, Any], name: str) -> Prompt:
    given = {str(key): value for key, value in prompt.items() if value is not None}
    try:
        refuse_unknown_keys(given, ("prompt", "prompt_token_ids"))
    except ConfigurationError as error:
        raise InvalidRequestError(f"{name}: {error}", name) from None
    if (token_ids := given.get("prompt_token_ids")) is not None:
        if isinstance(token_ids, list | tuple):
            return read_prompt(token_ids, f"{name}['prompt_token_ids']")
        raise InvalidRequestError(
            f"{name}['prompt_token_ids'] must be a list of token ids, got {excerpt(token_ids)}", name
        )
    text = given.get("prompt")
    if not isinstance(text, str):
        raise InvalidRequestError(f"{name}['prompt'] must be a text, got {excerpt(text)}", name)
    return _text(text, name)


def _text(prompt: str, name: str) -> str:
    """The prompt, if every character of it has a form in UTF-8."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"{name} holds {prompt[error.start]!r} at {error.start}, half of a character in UTF-16", name
        ) from None
    return prompt


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
