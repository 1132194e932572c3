"""The texts at the root of the repository: their links, the changelog's form, and the hooks, which are the CI's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import twloss

ROOT = Path(__file__).parents[2]
TEXTS = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"]
KINDS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_within_the_text(name: str) -> None:
    """It is read in the repository, in the site or in a wheel's description: a relative link would break in one."""
    links = re.findall(r"\]\(([^)]*)\)|^\[[^\]]+\]: *(\S+)", text_of(name), re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text_of(name), re.MULTILINE)
    anchors = {"#" + re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert {link for pair in links for link in pair if link} <= anchors


@pytest.mark.parametrize("name", TEXTS)
def test_the_files_that_are_named_are_there(name: str) -> None:
    named = set(re.findall(r"`((?:[\w.-]+/)+[\w.-]*|[\w-]+\.(?:md|toml|txt|yml))`", text_of(name)))
    assert {path for path in named if not (ROOT / path).exists()} == set()


@pytest.mark.parametrize("name", TEXTS)
def test_lines_are_not_too_long(name: str) -> None:
    """Those of tables can't be broken."""
    prose = re.sub(r"^```.*?^```$", "", text_of(name), flags=re.MULTILINE | re.DOTALL)
    assert [line for line in prose.splitlines() if len(line) > 120 and not line.startswith("|")] == []


def test_the_changelog_has_the_form_of_keep_a_changelog() -> None:
    text = text_of("CHANGELOG.md")
    versions = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert versions[0] == "Unreleased"
    assert all(re.fullmatch(r"\d+\.\d+\.\d+ - \d{4}-\d\d-\d\d", version) for version in versions[1:])
    assert set(re.findall(r"^### (.*)$", text, re.MULTILINE)) <= KINDS
    assert re.search(rf"\b{re.escape(twloss.__version__)}\b", text)


def test_the_changelog_names_the_whole_api() -> None:
    assert {name for name in twloss.__all__ if f"`{name}`" not in text_of("CHANGELOG.md")} == set()


def test_the_hooks_before_a_commit_are_the_cis() -> None:
    commands = dict(re.findall(r'^step "(lint|format|types)" "\$python" (.*)$', text_of(".ci/run"), re.MULTILINE))
    config = text_of(".pre-commit-config.yaml")
    assert len(commands) == 3
    assert dict(re.findall(r"- id: (\w+)\n +name: .*\n +entry: \.venv/bin/python (.*)\n", config)) == commands
    assert re.findall(r"repo: (.*)", config) == ["local"]


def test_contributors_are_told_the_same_commands() -> None:
    for command in re.findall(r"entry: (.*)", text_of(".pre-commit-config.yaml")):
        assert f"| `{command}` |" in text_of("CONTRIBUTING.md")
