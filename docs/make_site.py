"""Writes the pages of the site to build/pages: those of docs/, and reference pages made of the code.

`make docs` runs it before the site generator. No page that is made here is kept in the repository.
"""

from __future__ import annotations

import dataclasses
import inspect
import posixpath
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from gptj_dist.config import PipelineConfig
from gptj_dist.serving.http.endpoints import Endpoints
from gptj_dist.serving.http.pages import docs_page
from gptj_dist.serving.settings import AppConfig, Arguments

DOCS = Path(__file__).parent
PAGES = DOCS.parent / "build" / "pages"
ARGUMENT = re.compile(r"^    (\w+(?:, \w+)*): (.*(?:\n     +.*)*)", re.MULTILINE)
NAMED_PAGE = re.compile(r"`(?:docs/([\w./-]+\.md)|(\d{4}-[\w-]+\.md))`")


def main() -> None:
    """Writes all pages anew."""
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.copytree(DOCS, PAGES, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    for page in PAGES.rglob("*.md"):
        page.write_text(link_named_pages(page.read_text(), page.relative_to(PAGES).as_posix()))
    with (PAGES / "decisions/index.md").open("a") as index:
        index.write(decisions_list())
    (PAGES / "reference").mkdir()
    for name, text in (("commands", commands_page()), ("http", http_page()), ("settings", settings_page())):
        (PAGES / f"reference/{name}.md").write_text(text)


def link_named_pages(text: str, page: str) -> str:
    """Makes a link of each page that the text names in backticks, with the title of that page.

    Args:
        page: where the text stands, below docs/.
    """

    def link(match: re.Match[str]) -> str:
        target = match[1] or f"decisions/{match[2]}"
        return f"[{title_of(DOCS / target)}]({posixpath.relpath(target, posixpath.dirname(page) or '.')})"

    return NAMED_PAGE.sub(link, text)


def title_of(page: Path) -> str:
    """Its first heading; its name if there is no such page, which the generator then reports."""
    return page.read_text().partition("\n")[0].removeprefix("# ") if page.exists() else page.name


def decisions_list() -> str:
    """A line for each decision."""
    pages = sorted((DOCS / "decisions").glob("0*.md"))
    return "\n" + "".join(f"- [{page.name[:4]} {title_of(page)}]({page.name})\n" for page in pages)


def commands_page() -> str:
    """Every command with its options, as typer writes it."""
    command = [sys.executable, "-m", "typer", "gptj_dist.cli", "utils", "docs", "--name", "gptj-dist"]
    return subprocess.run(
        [*command, "--title", "Commands and options"], capture_output=True, text=True, check=True
    ).stdout


def http_page() -> str:
    """Every endpoint with its fields: what a server shows at `/docs`."""
    nothing: Any = None  # the table of endpoints calls no component
    endpoints = Endpoints(("demo",), nothing, nothing, nothing, nothing, nothing, nothing)
    html = docs_page(endpoints.table(), "")
    page = "# Endpoints and fields\n\nBodies are JSON; a field that is null has its default.\n"
    for title, body in re.findall(r"<h2>(.*?)</h2>(.*?)(?=<h2>|</html>)", html, re.DOTALL):
        lines = [line.strip() for line in body.splitlines() if line.strip()]  # an empty line would end the HTML
        page += "\n".join(["", f"## {title}", "", "<div>", *lines, "</div>", ""])
    return page


def settings_page() -> str:
    """The settings of a pipeline and of an application: name, default, meaning."""
    own = {field.name: field.default for field in dataclasses.fields(PipelineConfig)}
    others = {name: field.default for name, field in Arguments.model_fields.items()}
    meanings = meanings_of(AppConfig) | meanings_of(Arguments) | meanings_of(PipelineConfig)
    page = "# Settings\n\nThe `args` of a Serve config (`deployments/`). `gptj-dist serve` has an option for each.\n"
    for title, defaults in (("Of a pipeline, and of `LLM`", own), ("Of the application", others)):
        page += f"\n## {title}\n\n| setting | default | meaning |\n|---|---|---|\n"
        for name, default in defaults.items():
            shown = "required" if default is dataclasses.MISSING else f"`{default!r}`"
            page += f"| `{name}` | {shown} | {meanings[name]} |\n"
    return page


def meanings_of(kind: type) -> dict[str, str]:
    """What the docstring of a class says about each argument."""
    arguments = (inspect.getdoc(kind) or "").partition("Args:\n")[2].partition("\nRaises:")[0]
    return {name: " ".join(text.split()) for names, text in ARGUMENT.findall(arguments) for name in names.split(", ")}


if __name__ == "__main__":
    main()
