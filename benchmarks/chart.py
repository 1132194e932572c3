"""Rows as a picture: a panel a benchmark, a bar for what each row measured, and a mark at each goal."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.report import Report
from benchmarks.row import Row, number, shown

__all__ = ["write_chart"]

COLOURS = {True: "#2a9d5c", False: "#d1495b", None: "#8d99ae"}
BAR_INCHES, PANEL_INCHES, WIDTH_INCHES = 0.22, 0.75, 13.0


def write_chart(report: Report, path: Path) -> None:
    """Draw the rows of every case that has a goal; of a benchmark without goals, all."""
    mpl.use("agg")
    panels = {name: _with_goals(rows) for name, rows in report.rows.items() if rows}
    heights = [BAR_INCHES * len(rows) + PANEL_INCHES for rows in panels.values()]
    figure, axes = plt.subplots(
        len(panels),
        figsize=(WIDTH_INCHES, sum(heights) + 1),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for (name, rows), panel in zip(panels.items(), axes[:, 0]):
        _draw(panel, f"{name}: {report.titles[name]}", rows)
    machine = report.machine
    title = f"{machine['date']}, {machine['CPU']}, threads: {machine['threads']}\n{machine['packages']}"
    figure.suptitle(f"{title}\ngreen: goal met, red: missed, grey: no goal; black mark: the goal", fontsize=9)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def _with_goals(rows: list[Row]) -> list[Row]:
    cases = {row.case for row in rows if row.goal is not None}
    return [row for row in rows if row.case in cases] or rows


def _draw(panel: Axes, title: str, rows: list[Row]) -> None:
    panel.barh(range(len(rows)), [row.measured for row in rows], color=[COLOURS[row.is_met()] for row in rows])
    left = _set_scale(panel, rows)
    for y, row in enumerate(rows):
        goal = 0.0 if row.goal is None else row.goal.bound
        if row.goal is not None:
            panel.plot([max(goal, left)] * 2, [y - 0.42, y + 0.42], color="black", linewidth=2, clip_on=False)
        end = max(row.measured, goal, left)
        panel.annotate(_value(row), (end, y), (6, 0), textcoords="offset points", va="center", fontsize=8)
    panel.set_yticks(range(len(rows)), [_label(row) for row in rows], fontsize=8)
    panel.set_ylim(len(rows) - 0.4, -0.6)
    panel.tick_params(axis="x", labelsize=8)
    panel.set_title(title, fontsize=10, loc="left")
    panel.spines[["top", "right"]].set_visible(False)


def _set_scale(panel: Axes, rows: list[Row]) -> float:
    """Make room for every bar, goal and text; the axis's left end, from where a 0 that has no logarithm is written."""
    values = [abs(value) for row in rows for value in (row.measured, row.goal.bound if row.goal else 0) if value]
    low, high = min(values, default=1.0), max(values, default=1.0)
    if high <= 20 * low:
        panel.set_xlim(0, high * 1.5)
        return 0.0
    panel.set_xscale("log")
    panel.set_xlim(low / 2, high * (high / low) ** 0.5)
    return low / 2


def _value(row: Row) -> str:
    text = shown(row.measured, row.measured_unit)
    if row.theirs is None or row.unit != row.measured_unit:
        return text
    return f"{text}; {row.rival}: {number(row.theirs, row.unit)}"


def _label(row: Row) -> str:
    return f"{row.case} | {row.rival}" if row.rival and row.unit != row.measured_unit else row.case
