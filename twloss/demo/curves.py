"""The losses over the course of the training: points come in, a picture goes out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from twloss.demo.movielens import TASKS
from twloss.demo.training import Losses, Point, Results

__all__ = ["draw_curves", "save_curves"]

LOOKS: dict[str, dict[str, Any]] = {
    **{f"loss/{task}": {"color": f"C{index}"} for index, task in enumerate(TASKS)},
    "loss": {"color": "black", "linewidth": 2.5, "zorder": 3},
}


def save_curves(path: Path, points: Sequence[Point], base_rate: Losses) -> None:
    """Save the picture of ``draw_curves``, in the format that the path's ending names; PNG without one."""
    draw_curves(points, base_rate).savefig(path, format=path.suffix[1:].lower() or "png", dpi=150)


def draw_curves(points: Sequence[Point], base_rate: Losses) -> Figure:
    """The training's and the evaluation's losses and normalised entropy at each point, and the losses at the end."""
    figure = Figure(figsize=(17, 5), layout="constrained")
    train, evaluation, entropy, last = figure.subplots(1, 4)
    rows_seen = [point.rows_seen / 1000 for point in points]
    _draw_lines(train, "train, since the point before", rows_seen, [point.train for point in points])
    _draw_lines(evaluation, "eval", rows_seen, [point.eval for point in points])
    evaluation.sharey(train)
    _draw_entropy(entropy, rows_seen, [point.eval for point in points])
    _draw_bars(last, "eval, at the end", points[-1].eval, base_rate)
    for panel in (train, evaluation, last):
        panel.set_ylabel("cross-entropy (nats); stars: squared error (stars²)")
        panel.set_axisbelow(True)
    handles = [*train.lines, last.lines[0]]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    return figure


def _draw_lines(panel: Axes, title: str, rows_seen: Sequence[float], results: Sequence[Results]) -> None:
    for key, look in LOOKS.items():
        panel.plot(rows_seen, [each[key] for each in results], marker="o", markersize=5, label=key, **look)
    _describe(panel, title)


def _draw_entropy(panel: Axes, rows_seen: Sequence[float], results: Sequence[Results]) -> None:
    """A line for each binary task, and the base rate's, which is 1 for all of them."""
    for key, look in LOOKS.items():
        ne = f"ne/{key.removeprefix('loss/')}"
        if ne in results[0]:
            panel.plot(rows_seen, [each[ne] for each in results], marker="o", markersize=5, **look)
    panel.axhline(1.0, color="grey", linestyle="--", linewidth=2)
    panel.set_ylabel("loss over the entropy of the eval rows' base rate")
    panel.set_axisbelow(True)
    _describe(panel, "eval, normalised entropy")


def _describe(panel: Axes, title: str) -> None:
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
