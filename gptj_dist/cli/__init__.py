"""The command line: one module a verb. A verb imports what it needs when it is called, so that `--help` is quick."""

from __future__ import annotations

import sys

import typer

from gptj_dist.cli.convert import convert
from gptj_dist.cli.doctor import doctor
from gptj_dist.cli.download import download
from gptj_dist.cli.generate import generate
from gptj_dist.cli.inspect import inspect
from gptj_dist.cli.key import key
from gptj_dist.cli.plan import plan
from gptj_dist.cli.serve import serve
from gptj_dist.cli.synth import synth
from gptj_dist.cli.top import top
from gptj_dist.cli.verify import verify
from gptj_dist.errors import ConfigurationError, GPTJDistError, InvalidRequestError

app = typer.Typer(
    help="Serves GPT-J, and every checkpoint of its architecture, as a pipeline of stages.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(serve)
app.command()(generate)
app.command()(top)
app.command()(plan)
app.command()(synth)
app.command()(doctor)
app.command()(download)
app.command()(inspect)
app.command()(convert)
app.command()(verify)
app.command()(key)


def main() -> None:
    """Entry point of `gptj-dist`: what the user can mend ends in one line and exit code 2, other failures in 1."""
    try:
        app()
    except GPTJDistError as error:
        print(f"gptj-dist: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigurationError | InvalidRequestError) else 1)
