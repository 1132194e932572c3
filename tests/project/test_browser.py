"""The documentation as a browser shows it, on a desktop and on a phone: nothing is cut off.

It needs Debian's ``chromium``; ``TWLOSS_CHROMIUM`` names another one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.support.patience import SECONDS
from tests.support.site import PAGES, built

pytestmark = pytest.mark.exhaustive

DESKTOP, PHONE, HEIGHT = 1280, 390, 900  # pixels
MILLISECONDS = 1000 * SECONDS  # Playwright's own limit is 30 seconds
SHOWN = ["index.md", "how-it-works.md", "api/multi-task-loss.md"]
OPTIONS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]

# By how many pixels each block of code is wider than the box that it is shown in.
EXCESS = """() => [...document.querySelectorAll(".md-typeset pre > code")].map(
    code => code.scrollWidth - code.clientWidth
)"""
# The same, where no line is broken.
UNBROKEN = """() => [...document.querySelectorAll(".md-typeset pre > code")].map(code => {
    code.style.whiteSpace = "pre";
    return code.scrollWidth - code.clientWidth;
})"""
SIDEWAYS = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
# Tables that reach beyond the screen, and are in no box on it that scrolls.
LOST_TABLES = """() => {
    const onScreen = box => box.getBoundingClientRect().right <= document.documentElement.clientWidth;
    const scrolls = box => ["auto", "scroll"].includes(getComputedStyle(box).overflowX);
    return [...document.querySelectorAll(".md-typeset table")].filter(table => {
        if (onScreen(table)) return false;
        for (let box = table.parentElement; box !== document.body; box = box.parentElement)
            if (scrolls(box) && onScreen(box)) return false;
        return true;
    }).length;
}"""
LONGEST = """() => {
    const code = document.querySelector(".md-typeset pre > code");
    code.style.whiteSpace = "pre";
    code.textContent = "m".repeat(88);
    return code.scrollWidth - code.clientWidth;
}"""
DIAGRAM = """() => {
    const figure = document.querySelector("figure.diagram"), svg = figure.querySelector("svg");
    const left = svg.getBoundingClientRect().left - figure.getBoundingClientRect().left;
    figure.scrollLeft = figure.scrollWidth;
    const text = [...svg.querySelectorAll("text")].map(label => label.getBoundingClientRect());
    return {
        left,
        right: Math.max(...text.map(box => box.right)) - document.documentElement.clientWidth,
        height: Math.min(...text.map(box => box.height)),
    };
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium without a window."""
    executable = os.environ.get("TWLOSS_CHROMIUM") or shutil.which("chromium")
    if executable is None:
        pytest.skip("no Chromium: apt-get install chromium, or name one in TWLOSS_CHROMIUM")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable, args=OPTIONS, timeout=MILLISECONDS)
        yield chromium
        chromium.close()


@pytest.fixture
def page(request: pytest.FixtureRequest, browser: Browser) -> Iterator[Page]:
    """A tab of the width that the test asks for."""
    tab = browser.new_page(viewport={"width": request.param, "height": HEIGHT})
    tab.set_default_timeout(MILLISECONDS)
    yield tab
    tab.close()


def at(*widths: int) -> pytest.MarkDecorator:
    """The widths of the screens that a test is for."""
    return pytest.mark.parametrize("page", widths, indirect=True)


@at(DESKTOP, PHONE)
@pytest.mark.parametrize("name", SHOWN)
def test_a_page_is_shown_whole(name: str, page: Page, site: Path, tmp_path: Path) -> None:
    page.goto(built(site, name).as_uri())
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    excess = page.evaluate(EXCESS)
    assert excess
    assert set(excess) == {0}
    assert page.evaluate(SIDEWAYS) == 0


@at(DESKTOP, PHONE)
def test_no_page_is_cut_off(page: Page, site: Path) -> None:
    """A block of code, the page itself, a table beyond its own box: each would be. A desktop breaks no line of code."""
    for name in PAGES:
        page.goto(built(site, name).as_uri())
        found = sum(page.evaluate(EXCESS)), page.evaluate(SIDEWAYS), page.evaluate(LOST_TABLES)
        assert found == (0, 0, 0), name
        if page.viewport_size == {"width": DESKTOP, "height": HEIGHT}:
            assert sum(page.evaluate(UNBROKEN)) == 0, name


@at(DESKTOP)
def test_the_longest_line_of_code_fits_a_desktop(page: Page, site: Path) -> None:
    """88 characters; test_docs.py checks that none is longer."""
    page.goto(built(site, "index.md").as_uri())
    assert page.evaluate(LONGEST) == 0


@at(DESKTOP, PHONE)
def test_all_of_the_diagram_can_be_reached_and_read(page: Page, site: Path) -> None:
    page.goto(built(site, "how-it-works.md").as_uri())
    diagram = page.evaluate(DIAGRAM)
    assert diagram["left"] >= 0
    assert diagram["right"] <= 0
    assert diagram["height"] >= 10  # pixels of a label


@at(PHONE)
def test_a_line_that_is_too_wide_would_be_seen(page: Page, site: Path) -> None:
    """The measures themselves: on a page whose code and tables are not broken, they are not 0."""
    page.goto(built(site, "index.md").as_uri())
    assert max(page.evaluate(UNBROKEN)) > 0
    page.add_style_tag(content=".md-typeset__scrollwrap, .md-typeset__table { overflow: visible !important }")
    page.add_style_tag(content=".md-typeset table { width: 2000px !important; max-width: none; overflow: visible }")
    assert page.evaluate(LOST_TABLES) > 0
