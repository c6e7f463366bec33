"""From a conversation to a prompt, by a Jinja template as Hugging Face's tokenizers have them. Knows no HTTP."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, meta, nodes
from jinja2.exceptions import TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gptj_dist.errors import CheckpointError, InvalidRequestError, one_line
from gptj_dist.text.tokenizer_files import read_settings

TEMPLATE_FILE = "chat_template.jinja"


class ChatTemplate:
    """A template, compiled. It runs in a sandbox: a checkpoint is data.

    Args:
        source: Jinja, with the variables and functions that Hugging Face's templates rely on.
        special_tokens: variables such as `eos_token`.

    Raises:
        CheckpointError: it is no Jinja template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
        self.source = source
        self._special_tokens = special_tokens
        try:
            self._template = environment.from_string(source)
            self._names = _names(environment.parse(source))
        except Exception as error:  # Python compiles what Jinja makes of it, and has errors of its own
            line = f", line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
            raise CheckpointError(f"the chat template is not valid Jinja: {one_line(error)[:200]}{line}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any],
        *,
        begins_answer: bool,
        continues_last: bool = False,
    ) -> str:
        """The conversation as one text.

        Args:
            variables: more of them for the template.
            begins_answer: let it end with the beginning of an answer.
            continues_last: let it end with the last message's content, to be continued.

        Raises:
            InvalidRequestError: the template refuses the conversation, or fails on it.
        """
        try:
            text = self._template.render(
                {**self._special_tokens, **variables, "messages": messages, "add_generation_prompt": begins_answer}
            )
            text.encode()  # no half of a surrogate pair, which no tokenizer takes
        except Exception as error:  # a template computes, and can fail like any program
            raise InvalidRequestError(
                f"the chat template refuses the messages: {one_line(error)[:200]}", "messages"
            ) from error
        return _cut_after(text, messages[-1]["content"].strip()) if continues_last else text

    def shows(self, name: str) -> bool:
        """Whether it uses a variable such as `tools`, or a field such as `tool_calls`."""
        return name in self._names

    def next_message_mark(self) -> str:
        """The text between an answer and a user's next message, without white space at its end.

        A special token that a line break follows is left out: a base model may go on without it. Empty if there is only
        white space, or the template refuses such a conversation.
        """
        mark, is_found, _ = self._after_answer("user").partition("[2]")
        for token in self._special_tokens.values():
            if mark.startswith(f"{token}\n"):
                mark = mark.removeprefix(token)
        return mark.rstrip() if is_found else ""

    def answer_end(self) -> str:
        """The text after an answer that is the last message; empty if the template refuses such a conversation."""
        return self._after_answer()

    def _after_answer(self, *next_roles: str) -> str:
        """What follows the answer to a user's message; the content of the next message would be `[2]`."""
        roles = ("user", "assistant", *next_roles)
        messages = [{"role": role, "content": f"[{i}]"} for i, role in enumerate(roles)]
        try:
            return self.render(messages, {}, begins_answer=False).partition("[1]")[2]
        except InvalidRequestError:
            return ""


def _names(tree: nodes.Template) -> set[str]:
    """The variables that a template is given, and what may be fields of them."""
    fields = {field.attr for field in tree.find_all(nodes.Getattr)}
    texts = {text.value for text in tree.find_all(nodes.Const) if isinstance(text.value, str)}
    return meta.find_undeclared_variables(tree) | fields | texts


def load_chat_template(directory: Path, source: str | None = None) -> ChatTemplate | None:
    """The checkpoint's chat template, if it has one.

    Args:
        source: a template that takes its place.

    Raises:
        CheckpointError: a file is broken.
    """
    settings = read_settings(directory)
    if source is None and (directory / TEMPLATE_FILE).exists():
        source = read_template(directory / TEMPLATE_FILE, "replace")
    source = source or _default(settings.config.get("chat_template"))
    tokens = {name: token.content for name, token in settings.named.items()}
    return None if source is None else ChatTemplate(source, tokens)


def _default(template: object) -> str | None:
    """The template of a tokenizer's settings: a text, or several with names, of which one is the default."""
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[-1].get("template") if named else None
    return template if isinstance(template, str) else None


def _cut_after(text: str, content: str) -> str:
    end = text.rfind(content)
    if not content or end < 0:
        raise InvalidRequestError("the chat template changes the last message, so it cannot be continued", "messages")
    return text[: end + len(content)]


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(value: object, indent: int | None = None, **options: Any) -> str:
    """JSON as it is: Jinja's own filter escapes it for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def read_template(path: Path, errors: str = "strict") -> str:
    """A chat template. Raises CheckpointError if the file cannot be read.

    Args:
        errors: what to do with bytes that are not UTF-8, as for `bytes.decode`.
    """
    try:
        return path.read_text("utf-8", errors)
    except (OSError, ValueError) as error:  # ValueError: it is not UTF-8, or no path
        raise CheckpointError(f"the chat template {one_line(path)} cannot be read: {one_line(error)}") from error
