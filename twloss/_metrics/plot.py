"""Pictures of results: torchmetrics draws them; a legend that hides no line and a bold global loss are ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torchmetrics import Metric

from twloss._arguments import list_some


def plot_results(metric: Metric, keys: Sequence[str], val: Any, ax: Any) -> tuple[Any, Any]:
    """Plot some keys of a result as points, or of several results as lines, with a gap where there is no data.

    Args:
        metric: the metric that the results are of.
        keys: the keys to draw.
        val: a result, or a list of results, one a step; None calls the metric's compute().
        ax: the matplotlib axes to draw on; None makes a figure with room for all names.

    Returns:
        The figure and the axes.

    Raises:
        ModuleNotFoundError: without matplotlib.
        TypeError: for a ``val`` that is no result.
        ValueError: for a ``val`` in which a key is missing.
    """
    val = metric.compute() if val is None else val
    results = val if isinstance(val, (list, tuple)) and val else [val]
    for result in results:
        if not isinstance(result, Mapping):
            raise TypeError(f"val: got {type(result).__name__}, expected a result of compute() or a list of some")
        if missing := [key for key in keys if key not in result]:
            raise ValueError(f"val: got the keys {list_some(list(result))}, expected {list_some(missing)} among them")
    # A MetricTracker gives one result, of all steps.
    lines = {key: torch.hstack([torch.as_tensor(each[key], device="cpu").double() for each in results]) for key in keys}
    axes: Any = metric._plot(lines, ax)[1]
    steps = max(map(len, lines.values()))
    size = min(10, 2 + 200 / steps)  # large markers of many steps would close the gaps
    for index, line in enumerate(axes.lines[-len(keys) :]):
        line.set(marker="osD^"[index // 10 % 4], markersize=size)  # there are 10 colors
        if line.get_label() == "loss":
            line.set(color="black", linewidth=3, marker="o", markersize=1.4 * size, zorder=3)
    if steps > 16:
        axes.set_xticks(range(0, steps, -(-steps // 10)))
    figure = axes.get_figure()
    if ax is None:
        figure.set_layout_engine("constrained")
    # Beside the axes where there is room; torchmetrics' own legend may hide the lines.
    beside = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if figure.get_layout_engine() else {}
    legend = axes.legend(**beside)
    if ax is None:
        width, height = legend.get_window_extent().size / figure.dpi
        figure.set_size_inches(figure.get_figwidth() + width, max(figure.get_figheight(), height + 0.5))
    return figure, axes
