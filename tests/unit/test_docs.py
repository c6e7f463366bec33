"""The documents lead somewhere: links, headings and files that they name exist. Those of the web are not asked."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCED = re.compile(r"^( *)```.*?^\1```$", re.DOTALL | re.MULTILINE)


def prose(page: Path) -> str:
    """Its text without fenced blocks."""
    return FENCED.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """What `page.md#...` may name: its headings, as code hosts and mkdocs write them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_named_files_exist(page: Path) -> None:
    text = prose(page)
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if re.match(r"\w+:", target):
            continue
        linked = (page.parent / path).resolve() if path else page
        if not linked.exists() or (anchor and anchor not in anchors(linked)):
            missing.append(target)
    missing += [
        name for name in re.findall(r"`(\d{4}-[\w-]+\.md)`", text) if not (ROOT / "docs/decisions" / name).exists()
    ]
    named = re.findall(r"`((?:cluster|deployments|docs|examples|tests|gptj_dist|benchmarks)/[\w./-]+)`", text)
    missing += [name for name in named if not (ROOT / name).exists()]
    assert missing == []


def test_reference_pages_are_made_of_the_code() -> None:
    made = runpy.run_path(str(ROOT / "docs/make_site.py"))
    settings, http = made["settings_page"](), made["http_page"]()
    for name in ("max_batch_size", "resumable", "chat_stop"):
        assert re.search(rf"^\| `{name}` \| `.+` \| .+ \|$", settings, re.MULTILINE)
    assert "## POST /v1/completions\n" in http
    assert "<code>temperature</code>" in http
    assert made["link_named_pages"]("see `docs/api.md`", "how-to/x.md") == "see [The HTTP API](../api.md)"


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in PAGES if page.is_relative_to(ROOT / "docs")]
    assert [page for page in pages if not page.startswith("decisions/0") and page not in navigation] == []
