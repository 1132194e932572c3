"""The losses over the course of the training: points come in, a PNG goes out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from twloss.demo.movielens import TASKS
from twloss.demo.training import Losses, Point
from twloss.plots import plot_per_task

__all__ = ["save_curves"]


def save_curves(path: Path, points: Sequence[Point], base_rate: Losses) -> None:
    """Draw the training's and the evaluation's losses at each point, and the last evaluation's beside the base rate."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    train, evaluation, last = figure.subplots(1, 3)
    rows_seen = [point.rows_seen / 1000 for point in points]
    _draw(train, "train, since the point before", [point.train for point in points], rows_seen)
    _draw(evaluation, "eval", [point.eval for point in points], rows_seen)
    evaluation.sharey(train)
    _draw(last, "eval, at the end", points[-1].eval)
    # The table has the values; above the bars they would be in the lines' way.
    for text in [*last.texts]:
        text.remove()
    for bar, key in zip(last.patches, points[-1].eval):
        ends = bar.get_x() - 0.05, bar.get_x() + bar.get_width() + 0.05
        (line,) = last.plot(ends, [base_rate[key]] * 2, color="grey", linestyle="--", linewidth=2)
    line.set_label("always the base rate")
    handles = [*train.get_legend_handles_labels()[0], line]
    for panel in (train, evaluation, last):
        panel.get_legend().remove()
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    figure.savefig(path, format="png", dpi=150)


def _draw(panel: Axes, title: str, results: Losses | list[Losses], rows_seen: Sequence[float] | None = None) -> None:
    settings: dict[str, Any] = {"tasks": TASKS, "prefix": "loss", "summary": "loss", "lower_bound": None}
    plot_per_task(
        results,
        panel,
        **settings,
        ylabel="binary cross-entropy (nats)",
        steps=rows_seen,
        xlabel="rows seen in training (thousands)",
    )
    panel.set_title(title)
