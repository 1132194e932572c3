"""The documentation: every code block of it runs, on the ranks that its page is for, and the site builds cleanly."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit
from xml.etree import ElementTree

import pytest
from sybil import Example, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser

import twloss
from tests.support.rank_pool import RankPool

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))

FENCE = re.compile(r"^ *(?:```+|~~~+) *(\S+).*$", re.MULTILINE)
INCLUDED = re.compile(r'--8<-- "([^"]+)"')
RANKS = re.compile(r"\A---\nranks: \[([\d, ]+)\]\n---\n")
TABLE_ROW = re.compile(r"^\| (?:mean|sum) \|.*$|^\| over rows \|.*$", re.MULTILINE)

_run_python = PythonEvaluator()


def run_python(example: Example) -> None:
    """Run a block in the page's namespace; one that includes a file is run by the file's own tests."""
    included = INCLUDED.findall(example.parsed)
    if included:
        assert len(example.parsed.splitlines()) == len(included)
        for name in included:
            check_example(name)
        return
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        _run_python(example)
    example.namespace["_printed"] = printed.getvalue()


def check_example(name: str) -> None:
    """An included file is there, and another test names it."""
    path = ROOT / name
    assert path.is_file()
    assert path.parent.name == "examples"
    tests = [test.read_text(encoding="utf-8") for test in (ROOT / "tests" / "compat").glob("test_*.py")]
    assert any("examples" in text and re.search(rf"\b{path.stem}\b", text) for text in tests)


def compare_output(example: Example) -> None:
    """What the block before it printed."""
    assert example.namespace.pop("_printed") == example.parsed


SYBIL = Sybil([CodeBlockParser("python", run_python), CodeBlockParser("text", compare_output)])


def text_of(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def ranks_of(page: str) -> list[int]:
    """The numbers of processes that a page is for; the front matter says which, if not one."""
    found = RANKS.match(text_of(page))
    return [int(number) for number in found[1].split(",")] if found else [1]


def run_page(rank: int, page: str) -> int:
    """Run the blocks of a page, one after the other, in one namespace."""
    examples = list(SYBIL.parse(DOCS / page))
    for example in examples:
        example.evaluate()
    return len(examples)


CASES = [(page, ranks) for page in PAGES for ranks in ranks_of(page) if FENCE.search(text_of(page))]


@pytest.mark.parametrize(("page", "world_size"), CASES)
def test_every_block_of_the_page_runs(page: str, world_size: int, request: pytest.FixtureRequest) -> None:
    """Blocks of another language than Python, or its output, would be run by nothing: there are none."""
    blocks = len(FENCE.findall(text_of(page)))
    assert set(FENCE.findall(text_of(page))) <= {"python", "text"}
    if world_size == 1:
        assert run_page(0, page) == blocks
    else:
        ranks: RankPool = request.getfixturevalue({2: "two_ranks", 3: "three_ranks"}[world_size])
        assert ranks.run(run_page, page) == [blocks] * world_size


def test_blocks_without_a_language_are_none() -> None:
    """Every opening fence names one; the closing ones do not."""
    for page in PAGES:
        fences = re.findall(r"^ *(?:```+|~~~+).*$", text_of(page), re.MULTILINE)
        assert len(fences) == 2 * len(FENCE.findall(text_of(page))), page


def test_some_pages_run_on_ranks() -> None:
    assert ("guides/ddp.md", 2) in CASES
    assert {ranks for page, ranks in CASES if page == "guides/accumulation.md"} == {1, 2}


def test_the_table_of_errors_is_the_readmes() -> None:
    tables = [TABLE_ROW.findall(path.read_text(encoding="utf-8")) for path in (ROOT / "README.md", DOCS / "laws.md")]
    assert tables[0] == tables[1]
    assert len(tables[0]) == 11


def test_lines_are_not_too_long() -> None:
    """Those of tables can't be broken."""
    for page in PAGES:
        long = [line for line in text_of(page).splitlines() if len(line) > 120 and not line.startswith("|")]
        assert long == [], page


class Html(HTMLParser):
    """The anchors, links, loaded files and tags of a built page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.tags: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Called for each tag."""
        values = {name: value or "" for name, value in attrs}
        self.tags.add(tag)
        self.ids.update(values[name] for name in ("id", "name") if name in values)
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if "src" in values or (tag == "link" and "href" in values):
            self.loaded.append(values.get("src") or values["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site, into which no warning went."""
    target = tmp_path_factory.mktemp("site")
    process = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(target)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        # The theme's own switch for its notice of MkDocs 2.
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "NO_COLOR": "1"},
        timeout=240,
        check=False,
    )
    output = process.stdout + process.stderr
    assert process.returncode == 0, output
    # Nothing but what is done: what is unlinked, or named in no navigation, is told as INFO.
    lines = [line for line in output.splitlines() if line.strip()]
    assert [re.sub(r"[\d.]+ seconds|directory: .*", "…", line) for line in lines] == [
        "INFO    -  Cleaning site directory",
        "INFO    -  Building documentation to …",
        "INFO    -  Documentation built in …",
    ]
    return target


def built(site: Path, page: str) -> Path:
    """Where a page is in the site."""
    path = Path(page).with_suffix("")
    return site / (path.parent if path.name == "index" else path) / "index.html"


def test_every_page_is_built_and_linked_from_the_first(site: Path) -> None:
    first = {(site / link).resolve() for link in Html(site / "index.html").links if not urlsplit(link).scheme}
    for page in PAGES:
        assert built(site, page).is_file()
        assert built(site, page).parent.resolve() in first, page


def test_every_public_name_has_an_entry(site: Path) -> None:
    anchors = Html(built(site, "api.md")).ids
    expected = {f"twloss.{name}" for name in twloss.__all__} | {"twloss.ScalarView"}
    assert expected <= anchors
    assert {"twloss.GlobalLoss.compute", "twloss.MultiTaskLoss.forward", "twloss.GlobalLoss.scalar"} <= anchors


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


def test_docstrings_are_shown_as_they_are_meant(site: Path) -> None:
    """No example as a quotation (a section "Examples:" is one of code), no "<task>" as a tag, no backticks left."""
    text = built(site, "api.md").read_text(encoding="utf-8")
    assert "<blockquote>" not in text
    assert "``" not in text
    assert "task" not in Html(built(site, "api.md")).tags


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
