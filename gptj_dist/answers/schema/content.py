"""Texts in the form of OpenAI's messages: a string, or a list of parts."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, TypeAlias

from gptj_dist.answers.schema.base import AS_LIST, AS_TEXT, Body, text_or_list


class TextPart(Body):
    """A part of a message's content.

    Args:
        type: only text, because GPT-J reads nothing else.
        text: the part's text.
    """

    hints: ClassVar = frozenset(("annotations", "cache_control", "prompt_cache_breakpoint"))
    unserved: ClassVar = dict.fromkeys(("audio_url", "file", "image_url", "input_audio", "refusal", "video_url"))

    type: Literal["text"]
    text: str


Content: TypeAlias = Annotated[
    Annotated[str, AS_TEXT] | Annotated[list[TextPart], AS_LIST], text_or_list("a string or a list of text parts")
]


def text_of(content: Content) -> str:
    """The whole text."""
    return content if isinstance(content, str) else "".join(part.text for part in content)


class Prediction(Body):
    """Text that the client expects to be generated.

    Args:
        type: only content.
        content: a string, or a list of text parts.
    """

    type: Literal["content"]
    content: Content
