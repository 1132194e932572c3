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

from benchmarks.row import Row, number, shown

__all__ = ["Report", "as_table", "write_json", "write_markdown"]

COLUMNS = ("case", "against", "twloss", "rival", "measured (quartiles)", "goal", "met")
BEGIN, END = "<!-- begin: last run -->", "<!-- end: last run -->"


@dataclass(frozen=True)
class Report:
    """One run: the benchmarks' rows by name, and what they were measured on."""

    machine: dict[str, str]
    asserts_timing: bool
    titles: dict[str, str]
    rows: dict[str, list[Row]]
    seconds: dict[str, float]

    def missed(self) -> list[str]:
        """A line for each asserted goal that is not met."""
        return [
            f"{name}: {row.case}{row.rival and f', against {row.rival}'}: measured "
            f"{shown(row.measured, row.measured_unit)}, goal {_goal(row)}"
            for name, rows in self.rows.items()
            for row in rows
            if row.is_met() is False and self.is_asserted(row)
        ]

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
    """The tables as markdown: between the two marks of a file that has them, else as the whole file."""
    text = f"{BEGIN}\n\n{_markdown(report)}\n{END}"
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    if BEGIN in old and END in old:
        text = old[: old.index(BEGIN)] + text + old[old.index(END) + len(END) :].rstrip("\n")
    path.write_text(text + "\n", encoding="utf-8")


def _markdown(report: Report) -> str:
    lines = [f"- {key}: {value}" for key, value in report.machine.items()]
    for name, rows in report.rows.items():
        lines += ["", f"### {name}", "", f"{report.titles[name]} ({report.seconds[name]:.0f} s)", ""]
        lines += [_markdown_line(COLUMNS), _markdown_line(["---"] * 2 + ["---:"] * (len(COLUMNS) - 2))]
        lines += [_markdown_line(_cells(report, row)) for row in rows]
    missed = report.missed()
    lines += ["", "Goals missed:" if missed else "Every goal is met.", ""]
    return "\n".join(lines + [f"- {line}" for line in missed] + [""] * bool(missed))


def _markdown_line(cells: tuple[str, ...] | list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(report: Report, row: Row) -> list[str]:
    """Where the goal is about twloss's own figure, its unit stands once, in the first cell."""
    bare = row.unit == row.measured_unit
    show = number if bare else shown
    measured = show(row.measured, row.measured_unit)
    if row.spread is not None:
        low, high = (number(value, row.measured_unit) for value in row.spread)
        measured += f" ({low} – {high})"
    theirs = "" if row.theirs is None else show(row.theirs, row.unit)
    met = {True: "yes", False: "no", None: ""}[row.is_met()]
    star = "*" if met and not report.is_asserted(row) else ""
    case = f"{row.case}: {row.unit}" if bare else row.case
    return [case, row.rival, show(row.ours, row.unit), theirs, measured, _goal(row), met + star]


def _goal(row: Row) -> str:
    if row.goal is None:
        return ""
    return f"{row.goal.sign} {row.goal.bound:g}{'×' if row.measured_unit.startswith('×') else ''}"
