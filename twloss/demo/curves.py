"""The losses over the course of the training: points come in, a PNG goes out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from twloss.demo.training import Losses, Point

__all__ = ["save_curves"]


def save_curves(path: Path, points: Sequence[Point], base_rate: Losses) -> None:
    """Draw a panel for each task and one for the global loss."""
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    panels = figure.subplots(2, -(-len(base_rate) // 2), sharex=True).flat
    for panel, key in zip(panels, base_rate):
        _draw(panel, key, points, base_rate[key])
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    figure.supxlabel("rows seen in training (thousands)")
    figure.supylabel("binary cross-entropy (nats)")
    figure.savefig(path, format="png", dpi=150)


def _draw(panel: Axes, key: str, points: Sequence[Point], base_rate: float) -> None:
    rows = [point.rows_seen / 1000 for point in points]
    panel.plot(rows, [point.train[key] for point in points], marker=".", label="train, since the point before")
    panel.plot(rows, [point.eval[key] for point in points], marker=".", label="eval")
    panel.axhline(base_rate, color="grey", linestyle="--", label="eval, always the base rate")
    panel.set_title("all tasks (mean)" if key == "loss" else key.removeprefix("loss/"))
    panel.grid(alpha=0.3)
