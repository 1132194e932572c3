"""What a type checker tells a user of the package: no error in right code, and one at each wrong call.

mypy checks two files of ``typing_snippets`` from outside of the repository and without its settings, so that it finds
the package where a user's would: installed, with its ``py.typed``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from tests.project.typing_snippets import user_code
from tests.support.patience import SECONDS

SNIPPETS = Path(__file__).parent / "typing_snippets"
# The one comment of a snippet that is not for its reader.
OF_THE_REPOSITORY = "# mypy: ignore-errors"

Errors = set[tuple[int, str]]


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Errors]:
    """The lines and codes of mypy's errors in each file; of one run, since most of it goes into reading torch."""
    folder = tmp_path_factory.mktemp("user")
    for name in ("user_code.py", "wrong_calls.py"):
        text = (SNIPPETS / name).read_text(encoding="utf-8")
        (folder / name).write_text(text.replace(OF_THE_REPOSITORY, "#"), encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", f"--cache-dir={folder / 'cache'}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MYPY")}
    done = subprocess.run(
        [*command, "--no-pretty", "--no-color-output", "--no-error-summary", "user_code.py", "wrong_calls.py"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    print(done.stdout)
    assert done.stderr == ""
    errors: dict[str, Errors] = {"user_code.py": set(), "wrong_calls.py": set()}
    for line in done.stdout.splitlines():
        found = re.fullmatch(r"(\w+\.py):(\d+): (?:error: .* \[([\w-]+)\]|note: .*)", line)
        assert found, done.stdout
        if found[3]:
            errors[found[1]].add((int(found[2]), found[3]))
    return errors


def marked(name: str) -> Errors:
    """The lines and codes that a snippet's comments announce."""
    lines = (SNIPPETS / name).read_text(encoding="utf-8").splitlines()
    found = ((number, re.search(r"# E: (.+)$", line)) for number, line in enumerate(lines, 1))
    return {(number, code) for number, mark in found if mark for code in mark[1].split(", ")}


@pytest.mark.exhaustive
def test_right_code_has_no_error_and_every_call_in_it_a_type(reported: dict[str, Errors]) -> None:
    """Its assert_type() calls would find an Any."""
    assert reported["user_code.py"] == set()


@pytest.mark.exhaustive
def test_each_wrong_call_is_an_error_of_its_kind_and_nothing_else_is(reported: dict[str, Errors]) -> None:
    announced = marked("wrong_calls.py")
    assert len(announced) > 60
    assert reported["wrong_calls.py"] - announced == set(), "not announced"
    assert announced - reported["wrong_calls.py"] == set(), "not reported"


@pytest.fixture
def _figures() -> Iterator[None]:
    """Figures that nobody looks at."""
    plt.switch_backend("agg")
    yield
    plt.close("all")


@pytest.mark.usefixtures("_figures")
@pytest.mark.parametrize("part", user_code.PARTS, ids=lambda part: part.__name__)
def test_the_right_code_runs(part: Callable[[], None]) -> None:
    part()
