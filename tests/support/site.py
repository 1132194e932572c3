"""The documentation as a site: its pages, how it is built, and what stands in a built page."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

from tests.support.patience import SECONDS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def text_of(page: str) -> str:
    """A page as it is written."""
    return (DOCS / page).read_text(encoding="utf-8")


def build_site(target: Path) -> None:
    """Build it strictly. What is unlinked, or named in no navigation, is told as INFO, so nothing else may be told."""
    process = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(target)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        # The theme's own switch for its notice of MkDocs 2.
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "NO_COLOR": "1"},
        timeout=SECONDS,
        check=False,
    )
    output = process.stdout + process.stderr
    assert process.returncode == 0, output
    lines = [line for line in output.splitlines() if line.strip()]
    assert [re.sub(r"[\d.]+ seconds|directory: .*", "…", line) for line in lines] == [
        "INFO    -  Cleaning site directory",
        "INFO    -  Building documentation to …",
        "INFO    -  Documentation built in …",
    ]


def built(site: Path, page: str) -> Path:
    """Where a page is in the site."""
    path = Path(page).with_suffix("")
    return site / (path.parent if path.name == "index" else path) / "index.html"


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
