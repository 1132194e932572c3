"""The rows with a headline as a picture: a bar for twloss's time, and a line for the time of what it is compared to."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import offset_copy

from benchmarks.report import Report
from benchmarks.row import Row, in_words, times_as_long

__all__ = ["SUFFIXES", "write_chart"]

SUFFIXES = (".png", ".svg")
SHORTER, LONGER, TEXT = "#2a9d5c", "#d98e3f", "#59636e"
LINE_INCHES, MARGIN_INCHES, WIDTH_INCHES = 0.27, 1.1, 9.0
BEHIND_TEXT = {"facecolor": "white", "edgecolor": "none", "pad": 1}


def write_chart(report: Report, path: Path) -> None:
    """Draw the report's headlines as PNG or SVG, by the file's suffix. The same report gives the same SVG."""
    mpl.use("agg")
    lines = _lines(report)
    size = WIDTH_INCHES, LINE_INCHES * len(lines) + MARGIN_INCHES
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "twloss"}):
        figure, axes = plt.subplots(figsize=size, layout="constrained")
        _draw(figure, axes, lines)
        figure.supxlabel(report.measured_on(), fontsize=7, color=TEXT)
        figure.savefig(path, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)
        plt.close(figure)


def _lines(report: Report) -> list[str | Row]:
    """From the top down: a group's title, then its rows."""
    lines: list[str | Row] = []
    for title, rows in report.headlines().items():
        lines += [title, *rows]
    return lines


def _draw(figure: Figure, axes: Axes, lines: list[str | Row]) -> None:
    bars = {y: line for y, line in enumerate(lines) if isinstance(line, Row)}
    for y, row in bars.items():
        length = times_as_long(row)
        axes.barh(y, length, height=0.7, color=SHORTER if length < 1 else LONGER)
        beside = offset_copy(axes.transData, figure, x=0.07)
        axes.text(length, y, in_words(row), transform=beside, va="center", fontsize=8, bbox=BEHIND_TEXT)
    axes.axvline(1, color="black", linewidth=1, zorder=1.5)
    axes.set_xlim(0, 1.25 * max([1.0, *map(times_as_long, bars.values())]))
    axes.set_ylim(len(lines) - 0.4, -0.6)
    _label(axes, lines)


def _label(axes: Axes, lines: list[str | Row]) -> None:
    names = [line.headline if isinstance(line, Row) else line for line in lines]
    axes.set_yticks(range(len(lines)), names, fontsize=8)
    for line, label in zip(lines, axes.get_yticklabels()):
        label.set_fontweight("normal" if isinstance(line, Row) else "bold")
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel("twloss's time, where the other's is 1", fontsize=8)
    axes.set_title("Shorter is faster; the black line is the other's time", fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
