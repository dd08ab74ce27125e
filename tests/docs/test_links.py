"""Links of the pages beside the manual lead somewhere; `mkdocs build --strict` checks the manual's own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from paths import ROOT

from docs.pages import PAGES, name_of

TEXTS = [*PAGES, *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"))]
REPOSITORY = "https://github.com/w4a16gen/w4a16gen"


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", TEXTS, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
        place = target.removeprefix(f"{REPOSITORY}/blob/main/").removeprefix(f"{REPOSITORY}/tree/main/")
        if place.startswith("http"):
            continue
        base = page.parent if place == target else ROOT
        path, _, anchor = place.partition("#")
        linked = (base / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in PAGES if page.parent != ROOT]
    assert [page for page in pages if f": {page}\n" not in navigation] == []


def test_the_project_names_its_places() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    for name in ("Homepage", "Documentation", "Issues", "Changelog"):
        assert re.search(rf'^{name} = "https://', project, re.MULTILINE)
