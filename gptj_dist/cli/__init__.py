"""The command line: one module a verb. A verb imports what it needs when it is called, so that `--help` is quick."""

from __future__ import annotations

import inspect as inspect_
import sys
from collections.abc import Callable, Mapping

import typer

from gptj_dist.cli.checkpoints.convert import convert
from gptj_dist.cli.checkpoints.download import download
from gptj_dist.cli.checkpoints.inspect import inspect
from gptj_dist.cli.checkpoints.synth import synth
from gptj_dist.cli.checkpoints.verify import verify
from gptj_dist.cli.examples import examples_of
from gptj_dist.cli.server.doctor import doctor
from gptj_dist.cli.server.key import key
from gptj_dist.cli.server.plan import plan
from gptj_dist.cli.server.serve import serve
from gptj_dist.cli.server.status import status
from gptj_dist.cli.server.top import top
from gptj_dist.cli.text.batch import batch
from gptj_dist.cli.text.chat import chat
from gptj_dist.cli.text.complete import complete
from gptj_dist.cli.text.generate import generate
from gptj_dist.errors import ConfigurationError, GPTJDistError, InvalidRequestError

VERBS: Mapping[str, tuple[Callable[..., None], ...]] = {
    "Serving": (serve, status, top, plan, doctor, key),
    "Text": (complete, chat, batch, generate),
    "Checkpoints": (download, inspect, convert, verify, synth),
}
"""As `--help` groups them."""


def _help_of(verb: Callable[..., None]) -> str:
    """Its docstring, with the lines of a paragraph joined: typer would keep the breaks of all but the first."""
    paragraphs = inspect_.cleandoc(verb.__doc__ or "").split("\n\n")
    return "\n\n".join(paragraph.replace("\n", " ") for paragraph in paragraphs)


app = typer.Typer(
    help="Serves GPT-J, and every checkpoint of its architecture, as a pipeline of stages.",
    epilog="gptj-dist VERB --help has examples. gptj-dist --install-completion lets the Tab key complete verbs, "
    "options and values.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for panel, verbs in VERBS.items():
    for verb in verbs:
        app.command(help=_help_of(verb), epilog=examples_of(verb.__name__), rich_help_panel=panel)(verb)


def main() -> None:
    """Entry point of `gptj-dist`: what the user can mend ends in one line and exit code 2, other failures in 1."""
    try:
        app()
    except GPTJDistError as error:
        print(f"gptj-dist: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigurationError | InvalidRequestError) else 1)
