"""The documentation's site: it builds without a warning, all of it is linked, and its diagram says what it shows."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit
from xml.etree import ElementTree

import pytest

import twloss
from tests.support.site import DOCS, PAGES, Html, built


def test_every_page_is_built_and_linked_from_the_first(site: Path) -> None:
    first = {(site / link).resolve() for link in Html(site / "index.html").links if not urlsplit(link).scheme}
    for page in PAGES:
        assert built(site, page).is_file()
        assert built(site, page).parent.resolve() in first, page


API = [page for page in PAGES if page.startswith("api/")]
NAMES = {f"twloss.{name}" for name in twloss.__all__} | {"twloss.ScalarView"}


def test_every_public_name_has_an_entry_on_one_page_and_a_row_on_the_first(site: Path) -> None:
    entries = [entry for page in API for entry in Html(built(site, page)).ids & NAMES]
    assert sorted(entries) == sorted(NAMES)
    assert Html(built(site, "api.md")).ids >= NAMES
    members = set().union(*(Html(built(site, page)).ids for page in API))
    assert {"twloss.GlobalLoss.compute", "twloss.MultiTaskLoss.forward", "twloss.GlobalLoss.scalar"} <= members
    assert {f"twloss.{loss}.{call}" for loss in ("Loss", "MultiTaskLoss") for call in ("compute", "reset")} <= members


def test_links_lead_somewhere_and_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    pages = {path: Html(path) for path in site.rglob("*.html") if path.name != "404.html"}
    assert len(pages) == len(PAGES)
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), (path, link)
            if parts.fragment and target.suffix == ".html":
                assert unquote(parts.fragment) in pages[target].ids, (path, link)
        for name in page.loaded:
            parts = urlsplit(name)
            assert not parts.scheme, (path, name)
            assert not parts.netloc, (path, name)
            assert (path.parent / parts.path).exists(), (path, name)


@pytest.mark.parametrize("page", API)
def test_docstrings_are_shown_as_they_are_meant(page: str, site: Path) -> None:
    """No example as a quotation (a section "Examples:" is one of code), no "<task>" as a tag, no backticks left."""
    text = built(site, page).read_text(encoding="utf-8")
    assert "<blockquote>" not in text
    assert "``" not in text
    assert "task" not in Html(built(site, page)).tags


SVG = "{http://www.w3.org/2000/svg}"
# Upper bounds of a letter's mean width, by the class of a label: semibold at 15 pixels, regular at 13.
LETTER = {"title": 8.2, "detail": 6.9}


def test_the_diagram_describes_itself() -> None:
    root = ElementTree.parse(DOCS / "data-flow.svg").getroot()
    assert root.tag == f"{SVG}svg"
    assert root.get("role") == "img"
    described = [element.get("id") for element in root if element.tag in (f"{SVG}title", f"{SVG}desc") and element.text]
    assert described == (root.get("aria-labelledby") or "").split()


def test_the_labels_of_the_diagram_fit_into_their_boxes() -> None:
    root = ElementTree.parse(DOCS / "data-flow.svg").getroot()
    labels = 0
    for group in root.iter(f"{SVG}g"):
        box = group.find(f"{SVG}rect")
        assert box is not None
        left, top, width, height = (float(box.get(name, "nan")) for name in ("x", "y", "width", "height"))
        for label in group.iter(f"{SVG}text"):
            text = label.text or ""
            assert float(label.get("x", "nan")) == left + width / 2, text
            assert top + 15 <= float(label.get("y", "nan")) <= top + height - 4, text
            assert LETTER[label.get("class", "")] * len(text) <= width - 10, text
            labels += 1
    assert labels == sum(label.get("class") in LETTER for label in root.iter(f"{SVG}text"))
