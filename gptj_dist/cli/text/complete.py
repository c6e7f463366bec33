"""`gptj-dist complete`: a prompt continued by a running server, streamed to standard output."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptj_dist.cli.request_options import (
    DEFAULT_TIMEOUT_S,
    DEFAULT_URL,
    MAX_TOKENS,
    MIN_P,
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
from gptj_dist.cli.streams import as_text, print_json
from gptj_dist.errors import ConfigurationError, ServerError

if TYPE_CHECKING:
    from gptj_dist.cli.client import Server

PATH = "/v1/completions"


def complete(
    prompt: Annotated[
        str | None,
        typer.Argument(
            help="The text to continue; - or a pipe reads standard input.",
            show_default=False,
            metavar="PROMPT",
            parser=as_text,
        ),
    ] = None,
    max_tokens: Annotated[int, MAX_TOKENS] = 64,
    temperature: Annotated[float | None, TEMPERATURE] = None,
    top_p: Annotated[float | None, TOP_P] = None,
    top_k: Annotated[int | None, TOP_K] = None,
    min_p: Annotated[float | None, MIN_P] = None,
    seed: Seed = None,
    stop: StopOption = None,
    n: Annotated[int, typer.Option("-n", "--n", help="Completions to make; several are not streamed.")] = 1,
    echo: Annotated[bool, typer.Option("--echo", help="Print the prompt before its continuation.")] = False,
    logprobs: Annotated[
        int | None, typer.Option(help="With --json: log probabilities, and those of this many alternatives.")
    ] = None,
    model: ModelName = None,
    no_stream: Annotated[bool, typer.Option("--no-stream", help="Print all at once, when it is there.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the response as the server gives it.")] = False,
    url: ServerUrl = DEFAULT_URL,
    api_key: KeyOption = None,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """Have a running server continue a prompt, and print the text as it comes. Ctrl-C cancels it.

    Options without a default are left to the server.
    """
    if logprobs is not None and not json:
        raise ConfigurationError("--logprobs needs --json: plain text has no place for them")
    body = given(
        model=model,
        prompt=read_text(prompt, "PROMPT"),
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        stop=stop,
        n=None if n == 1 else n,
        echo=echo or None,
        logprobs=logprobs,
    )
    from gptj_dist.cli.client import Server, ServerAddress

    with Server(ServerAddress.of(url, api_key, timeout)) as server:
        if json:
            print_json(server.post(PATH, body))
        elif no_stream or n != 1:
            _print_choices(_texts(server.post(PATH, body)))
        else:
            _print_stream(server, body)


def _print_stream(server: Server, body: dict[str, Any]) -> None:
    """Prints the text as it comes; whatever ends it, the line is ended too."""
    has_begun = False
    try:
        with closing(server.stream(PATH, body)) as chunks:
            for text in (text for chunk in chunks for text in _texts(chunk)):
                has_begun = True
                print(text, end="", flush=True)
    finally:
        if has_begun:
            print(flush=True)


def _print_choices(texts: Sequence[str]) -> None:
    """One as it is; several under a number each."""
    if len(texts) == 1:
        print(texts[0])
        return
    for number, text in enumerate(texts, start=1):
        print(f"--- {number}\n{text}")


def _texts(response: dict[str, Any]) -> list[str]:
    """What a response or a chunk of one adds to its choices.

    Raises:
        ServerError: it is no completion.
    """
    try:
        texts = [choice["text"] for choice in response["choices"]]
    except (KeyError, TypeError):
        texts = [None]
    if not all(isinstance(text, str) for text in texts):
        raise ServerError("the server's answer is no completion: is it a gptj-dist server?")
    return texts
