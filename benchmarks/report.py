"""Rows as tables for a terminal, as JSON, and as markdown.

In a quick run, and on a GPU, goals that depend on the clock are shown but not asserted: those of the full run are set
for one thread of a quiet CPU.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from benchmarks.row import Row, in_words, number, quartiles_in_words, shown

__all__ = ["HEADLINE_GROUPS", "Report", "as_glance", "as_table", "write_json", "write_markdown"]

COLUMNS = ("case", "against", "twloss", "rival", "measured (quartiles)", "goal", "met")
GLANCE_COLUMNS = ("what", "twloss", "the other", "in words")
HEADLINE_GROUPS = {
    "the tracked step against plain BCE": ("tracking_cost", "compile"),
    "against a loop with MeanMetric": ("step_cost", "mixed_types"),
    "compute() against torchmetrics and TorchRec": ("sync_cost", "torchrec_metrics"),
}
"""The groups of the summary and the chart: a title, and the benchmarks whose rows with a headline are in it."""


@dataclass(frozen=True)
class Report:
    """One run: the benchmarks' rows by name, and what they were measured on."""

    machine: dict[str, str]
    asserts_timing: bool
    titles: dict[str, str]
    rows: dict[str, list[Row]]
    seconds: dict[str, float]

    def measured_on(self) -> str:
        """The date and the machine, on one line."""
        gpu = "" if self.machine["GPU"] == "none used" else f", {self.machine['GPU']}"
        return f"{self.machine['date']}, {self.machine['CPU']}{gpu}, threads: {self.machine['threads']}"

    def missed(self) -> list[str]:
        """A line for each asserted goal that is not met."""
        return [
            f"{name}: {row.case}{row.rival and f', against {row.rival}'}: measured {in_words(row)}, goal {_goal(row)}"
            for name, rows in self.rows.items()
            for row in rows
            if row.is_met() is False and self.is_asserted(row)
        ]

    def headlines(self) -> dict[str, list[Row]]:
        """The rows with a headline, by the title of their group; no group is empty."""
        groups = {
            title: [row for name in names for row in self.rows.get(name, ()) if row.headline]
            for title, names in HEADLINE_GROUPS.items()
        }
        return {title: rows for title, rows in groups.items() if rows}

    def is_asserted(self, row: Row) -> bool:
        """Whether the exit status depends on the row's goal."""
        return row.goal is not None and (self.asserts_timing or not row.timed)


def as_table(report: Report, name: str) -> Table:
    """One benchmark, for a terminal."""
    rows = report.rows[name]
    caption = f"{report.seconds[name]:.0f} s"
    if any(row.goal is not None and not report.is_asserted(row) for row in rows):
        caption += "; * depends on the clock: shown, not asserted in this run"
    table = Table(*COLUMNS, title=f"{name}: {report.titles[name]}", caption=caption, box=box.SIMPLE_HEAD)
    for column in table.columns[2:]:
        column.justify, column.no_wrap = "right", True
    for row in rows:
        *cells, met = _cells(report, row)
        table.add_row(*map(Text, cells), Text(met, {True: "green", False: "bold red", None: ""}[row.is_met()]))
    return table


def as_glance(report: Report) -> Table:
    """The rows with a headline, for a terminal."""
    table = Table(*GLANCE_COLUMNS, title="At a glance", box=box.SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    for cells in _glance(report):
        table.add_row(*map(Text, cells))
    return table


def write_json(report: Report, path: Path) -> None:
    """Everything, for a program."""
    benchmarks = {
        name: {
            "what": report.titles[name],
            "seconds": report.seconds[name],
            "rows": [{**row.as_json(), "asserted": report.is_asserted(row)} for row in rows],
        }
        for name, rows in report.rows.items()
    }
    document: dict[str, Any] = {"machine": report.machine, "benchmarks": benchmarks, "missed": report.missed()}
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_markdown(report: Report, path: Path) -> None:
    """The summary and the tables as markdown: between the marks of a file that has them, else as the whole file."""
    parts = {"last run": _last_run_as_markdown(report)}
    if report.headlines():
        parts = {"at a glance": _glance_as_markdown(report), **parts}
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if not any(_has_marks(text, name) for name in parts):
        text = "\n\n".join(map(_begin_and_end, parts))
    for name, part in parts.items():
        text = _put_between_marks(text, name, part)
    path.write_text(text.rstrip("\n") + "\n", encoding="utf-8")


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- begin: {name} -->", f"<!-- end: {name} -->"


def _begin_and_end(name: str) -> str:
    return "\n".join(_marks(name))


def _has_marks(text: str, name: str) -> bool:
    return all(mark in text for mark in _marks(name))


def _put_between_marks(text: str, name: str, part: str) -> str:
    if not _has_marks(text, name):
        return text
    begin, end = _marks(name)
    before, after = text[: text.index(begin)], text[text.index(end) :]
    return f"{before}{begin}\n\n{part}\n\n{after}"


def _glance_as_markdown(report: Report) -> str:
    lines = [_markdown_line(GLANCE_COLUMNS), _markdown_line(["---"] + ["---:"] * (len(GLANCE_COLUMNS) - 1))]
    lines += map(_markdown_line, _glance(report))
    return "\n".join([*lines, "", f"Median times; {report.measured_on()}."])


def _last_run_as_markdown(report: Report) -> str:
    lines = [f"- {key}: {value}" for key, value in report.machine.items()]
    for name, rows in report.rows.items():
        lines += ["", f"### {name}", "", f"{report.titles[name]} ({report.seconds[name]:.0f} s)", ""]
        lines += [_markdown_line(COLUMNS), _markdown_line(["---"] * 2 + ["---:"] * (len(COLUMNS) - 2))]
        lines += [_markdown_line(_cells(report, row)) for row in rows]
    missed = report.missed()
    lines += ["", *(["Goals missed:", ""] if missed else ["Every goal is met."])]
    return "\n".join(lines + [f"- {line}" for line in missed])


def _markdown_line(cells: tuple[str, ...] | list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _glance(report: Report) -> list[list[str]]:
    return [
        [
            row.headline,
            shown(row.ours, row.unit),
            "" if row.theirs is None else shown(row.theirs, row.unit),
            in_words(row),
        ]
        for rows in report.headlines().values()
        for row in rows
    ]


def _cells(report: Report, row: Row) -> list[str]:
    """Where the goal is about twloss's own figure, its unit stands once, in the first cell."""
    bare = row.unit == row.measured_unit
    show = number if bare else shown
    measured = number(row.measured, row.unit) if bare else in_words(row)
    if quartiles := quartiles_in_words(row):
        measured += f" ({quartiles})"
    theirs = "" if row.theirs is None else show(row.theirs, row.unit)
    met = {True: "yes", False: "no", None: ""}[row.is_met()]
    star = "*" if met and not report.is_asserted(row) else ""
    case = f"{row.case}: {row.unit}" if bare else row.case
    return [case, row.rival, show(row.ours, row.unit), theirs, measured, _goal(row), met + star]


def _goal(row: Row) -> str:
    """With its unit where that is a ratio's: what was measured may be said in another one."""
    if row.goal is None:
        return ""
    return f"{row.goal}{row.measured_unit if row.measured_unit.startswith('×') else ''}"
