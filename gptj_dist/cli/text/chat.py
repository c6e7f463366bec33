"""`gptj-dist chat`: a conversation with a running server, at a terminal, from a pipe or of one message."""

from __future__ import annotations

import difflib
import functools
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptj_dist.cli.request_options import (
    DEFAULT_TIMEOUT_S,
    DEFAULT_URL,
    MAX_TOKENS,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    KeyOption,
    ModelName,
    Seed,
    ServerUrl,
    StopOption,
    Timeout,
    given,
    read_text,
)
from gptj_dist.cli.streams import as_text
from gptj_dist.errors import ServerError

if TYPE_CHECKING:
    from gptj_dist.cli.client import Server

PATH = "/v1/chat/completions"
COMMANDS = ("/reset", "/exit")
HELP = "/reset begins a new conversation, /exit or Ctrl-D ends, Ctrl-C stops an answer."


def chat(
    message: Annotated[
        str | None,
        typer.Option(
            "--message",
            "-m",
            help="Send this message alone and print the answer; - reads standard input.",
            metavar="TEXT",
            parser=as_text,
        ),
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="System message, before all others.", metavar="TEXT", parser=as_text)
    ] = None,
    max_tokens: Annotated[int | None, MAX_TOKENS] = None,
    temperature: Annotated[float | None, TEMPERATURE] = None,
    top_p: Annotated[float | None, TOP_P] = None,
    top_k: Annotated[int | None, TOP_K] = None,
    seed: Seed = None,
    stop: StopOption = None,
    model: ModelName = None,
    url: ServerUrl = DEFAULT_URL,
    api_key: KeyOption = None,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """Talk with a running server, which gets the whole conversation with each message.

    /reset begins a new conversation, /exit or Ctrl-D ends, Ctrl-C stops an answer. Without a terminal each line of
    standard input is a message. Options without a default are left to the server.
    """
    options = given(
        model=model,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=stop,
    )
    from gptj_dist.cli.client import Server, ServerAddress

    with Server(ServerAddress.of(url, api_key, timeout)) as server:
        conversation = Conversation(server, options, system)
        if message is not None:
            _answer(read_text(message, "--message"), conversation)
        elif sys.stdin.isatty():
            _talk(conversation, server.base)
        else:
            for line in sys.stdin:
                if not _take_line(line, conversation):
                    break


class Conversation:
    """The messages so far, which are sent to the server with each new one.

    Args:
        options: fields of each request besides the messages.
    """

    def __init__(self, server: Server, options: dict[str, Any], system: str | None) -> None:
        self._server = server
        self._options = options
        self._beginning = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self._beginning)

    def reset(self) -> None:
        """Drops all messages but the system's."""
        self.messages = list(self._beginning)

    def say(self, text: str, show: Callable[[str], None]) -> str | None:
        """Sends a message and shows the answer as it comes; an answer that is broken off is kept as far as it came.

        Returns why the answer ended, if the server said so.

        Raises:
            ServerError: a refusal, or an answer that broke off; a message without any answer is dropped.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        answer: list[str] = []
        reason: str | None = None
        try:
            with closing(self._server.stream(PATH, {**self._options, "messages": messages})) as chunks:
                for piece, ended in map(_piece, chunks):
                    reason = ended or reason
                    answer.append(piece)
                    show(piece)
        finally:
            if whole := "".join(answer):
                self.messages = [*messages, {"role": "assistant", "content": whole}]
        return reason


def _piece(chunk: dict[str, Any]) -> tuple[str, str | None]:
    """The text that a chunk adds to the answer, and the finish reason if it is the last chunk.

    Raises:
        ServerError: it is no chunk of a chat.
    """
    try:
        choices = chunk["choices"]
        if not choices:  # the numbers of tokens
            return "", None
        content, reason = choices[0]["delta"].get("content") or "", choices[0].get("finish_reason")
    except (KeyError, TypeError, AttributeError):
        content = reason = None
    if not isinstance(content, str):
        raise ServerError("the server's answer is no chat: is it a gptj-dist server?")
    return content, reason


def _talk(conversation: Conversation, base: str) -> None:
    """A session at a terminal, until Ctrl-D or /exit. An error costs a message, not the session."""
    with suppress(ImportError):  # Python may be built without it: lines are edited less comfortably then
        import readline  # noqa: F401
    print(f"Talking with {base}. {HELP}")
    for line in _typed_lines():
        try:
            if not _take_line(line, conversation):
                return
        except ServerError as error:
            print(f"\ngptj-dist: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print("\n[stopped]")


def _typed_lines() -> Iterator[str]:
    """Lines until Ctrl-D; Ctrl-C drops the one that is being typed."""
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()


def _take_line(line: str, conversation: Conversation) -> bool:
    """Answers a line or does what it commands. Whether the session goes on."""
    line = line.strip()
    if line == "/exit":
        return False
    if line == "/reset":
        conversation.reset()
    elif re.fullmatch(r"/\w*", line):
        nearest = difflib.get_close_matches(line, COMMANDS, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else HELP
        print(f"gptj-dist: there is no command {line}: {hint}", file=sys.stderr)
    elif line:
        _answer(line, conversation)
    return True


def _answer(text: str, conversation: Conversation) -> None:
    """Prints the answer to a message as it comes."""
    reason = conversation.say(text, functools.partial(print, end="", flush=True))
    print()
    if reason == "length":
        print("gptj-dist: cut at the most tokens of an answer; --max-tokens sets them", file=sys.stderr)
