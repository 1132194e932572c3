"""The losses over the course of the training: points come in, a PNG goes out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from twloss.demo.movielens import TASKS
from twloss.demo.training import Losses, Point

__all__ = ["save_curves"]

LOOKS: dict[str, dict[str, Any]] = {
    **{f"loss/{task}": {"color": f"C{index}"} for index, task in enumerate(TASKS)},
    "loss": {"color": "black", "linewidth": 2.5, "zorder": 3},
}


def save_curves(path: Path, points: Sequence[Point], base_rate: Losses) -> None:
    """Draw the training's and the evaluation's losses at each point, and the last evaluation's beside the base rate."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    train, evaluation, last = figure.subplots(1, 3)
    rows_seen = [point.rows_seen / 1000 for point in points]
    _draw_lines(train, "train, since the point before", rows_seen, [point.train for point in points])
    _draw_lines(evaluation, "eval", rows_seen, [point.eval for point in points])
    evaluation.sharey(train)
    _draw_bars(last, "eval, at the end", points[-1].eval, base_rate)
    for panel in (train, evaluation, last):
        panel.set_ylabel("cross-entropy (nats); stars: squared error (stars²)")
        panel.set_axisbelow(True)
    handles = [*train.lines, last.lines[0]]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    figure.savefig(path, format="png", dpi=150)


def _draw_lines(panel: Axes, title: str, rows_seen: Sequence[float], losses: Sequence[Losses]) -> None:
    for key, look in LOOKS.items():
        panel.plot(rows_seen, [each[key] for each in losses], marker="o", markersize=5, label=key, **look)
    panel.set_title(title)
    panel.set_xlabel("rows seen in training (thousands)")
    panel.grid(alpha=0.3)


def _draw_bars(panel: Axes, title: str, losses: Losses, base_rate: Losses) -> None:
    """A bar for each task and, apart from them, one for all; a line across each at the base rate's loss."""
    places = [*range(len(TASKS)), len(TASKS) + 0.5]
    for place, (key, look) in zip(places, LOOKS.items()):
        panel.bar(place, losses[key], color=look["color"])
        ends = place - 0.45, place + 0.45
        panel.plot(ends, [base_rate[key]] * 2, color="grey", linestyle="--", linewidth=2, label="always the base rate")
    panel.set_xticks(places, [*TASKS, "loss"])
    panel.margins(y=0.1)
    panel.set_title(title)
    panel.grid(axis="y", alpha=0.3)
