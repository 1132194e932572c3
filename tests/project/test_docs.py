"""The documentation: every code block of it runs, on the ranks that its page is for, and fits its column."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import shlex
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
from sybil import Example, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser

from tests.support.rank_pool import RankPool
from tests.support.site import DOCS, PAGES, ROOT, text_of

FENCE = re.compile(r"^ *(?:```+|~~~+) *(\S+).*$", re.MULTILINE)
INCLUDED = re.compile(r'--8<-- "([^"]+)"')
RANKS = re.compile(r"\A---\nranks: \[([\d, ]+)\]\n---\n")
TABLE_ROW = re.compile(r"^\| (?:mean|sum) \|.*$|^\| over rows \|.*$", re.MULTILINE)

PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
OPTIONAL = PROJECT.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
EXTRAS = set(re.findall(r"^([\w-]+) = \[", OPTIONAL, re.MULTILINE))

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


def check_configuration(example: Example) -> None:
    """YAML is a file that a test gives to a command line."""
    included = INCLUDED.findall(example.parsed)
    assert included
    run_python(example)


def check_example(name: str) -> None:
    """An included file is there, and another test names it."""
    path = ROOT / name
    assert path.is_file()
    assert path.parent.name == "examples"
    tests = [test.read_text(encoding="utf-8") for test in (ROOT / "tests").rglob("test_*.py")]
    assert any("examples" in text and re.search(rf"\b{path.stem}\b", text) for text in tests)


def compare_output(example: Example) -> None:
    """What the block before it printed."""
    assert example.namespace.pop("_printed") == example.parsed


def check_commands(example: Example) -> None:
    """Commands are not run, but are those of a shell, and what they name of Python and the repository is there."""
    process = subprocess.run(["bash", "-n"], input=example.parsed, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    for line in example.parsed.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for option, value in pairwise(words):
            if option == "-m" and Path(words[0]).name == "python" and value != "exhaustive":
                assert importlib.util.find_spec(value) is not None, line
            if option == "-c" and Path(words[0]).name == "pip":
                assert (ROOT / value).is_file(), line
        for word in words:
            assert not word.startswith("examples/") or (ROOT / word).is_file(), line
            if extras := re.fullmatch(r"[^\[\]]+\[([\w,-]+)\]", word):
                assert set(extras[1].split(",")) <= EXTRAS, line


LANGUAGES = {
    "python": run_python,
    "text": compare_output,
    "sh": check_commands,
    "yaml": check_configuration,
}
SYBIL = Sybil([CodeBlockParser(language, evaluator) for language, evaluator in LANGUAGES.items()])


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
    """Blocks of another language would be checked by nothing: there are none."""
    blocks = len(FENCE.findall(text_of(page)))
    assert set(FENCE.findall(text_of(page))) <= set(LANGUAGES)
    if world_size == 1:
        assert run_page(0, page) == blocks
    else:
        ranks: RankPool = request.getfixturevalue({2: "two_ranks", 3: "three_ranks", 4: "four_ranks"}[world_size])
        assert ranks.run(run_page, page) == [blocks] * world_size


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_commands_outside_of_the_pages_name_what_is_there(name: str) -> None:
    commands = list(Sybil([CodeBlockParser("sh", check_commands)]).parse(ROOT / name))
    assert commands
    for command in commands:
        command.evaluate()


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


def test_the_page_of_the_installation_has_every_extra_and_file_of_constraints() -> None:
    first_cells = re.findall(r"^\| `([\w.-]+)` \|", text_of("install.md"), re.MULTILINE)
    files = {path.name for path in ROOT.glob("constraints*.txt")}
    assert sorted(first_cells) == sorted(EXTRAS | files)


def test_lines_are_not_too_long() -> None:
    """Those of tables can't be broken."""
    for page in PAGES:
        long = [line for line in text_of(page).splitlines() if len(line) > 120 and not line.startswith("|")]
        assert long == [], page


WRITTEN = [*(f"docs/{page}" for page in PAGES), "README.md", "CONTRIBUTING.md", "benchmarks/README.md"]
BLOCK = re.compile(r"(?:^<!-- command: (\w+) -->\n)?^( *)```\w+.*\n((?:.*\n)*?)^\2```$", re.MULTILINE)


@pytest.mark.parametrize("name", WRITTEN)
def test_a_line_of_code_fits_its_column(name: str) -> None:
    """A command that is set up and run from the README stands on one line, whatever its length."""
    text = (ROOT / name).read_text(encoding="utf-8")
    blocks = BLOCK.findall(text)
    assert len(blocks) == len(FENCE.findall(text))
    lines = [line for command, _, block in blocks if not command for line in block.splitlines()]
    assert [line for line in lines if len(line) > 88] == []


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_an_example_fits_its_column(path: Path) -> None:
    """The guides show it whole."""
    assert [line for line in path.read_text(encoding="utf-8").splitlines() if len(line) > 88] == []
