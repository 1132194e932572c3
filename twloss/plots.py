"""Pictures of results: ``{"<prefix>/<task>": …, "<summary>": …}`` comes in, drawn axes go out.

One result is drawn as bars, several as lines over steps. Only here does the package ask for matplotlib, and only when
something is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

__all__ = ["plot_per_task"]

SUMMARY_COLOR = "black"
MUTED_COLOR = "dimgrey"
COLORS = 10
"""So many tasks have a colour of their own; after them comes another line style."""
LINE_STYLES = ("-", "--", ":", "-.")
LEGEND_ROWS = 24
INCHES_PER_CHARACTER = 0.085
"""Of names, at matplotlib's usual size of text."""
INCHES_PER_VALUE = 0.5
"""Of the value above a bar; it stands upright on a narrower one."""


class _Series(NamedTuple):
    """The values of one key, one a step."""

    key: str
    name: str
    """Short, for the ticks."""
    values: list[float]
    style: dict[str, Any]


def plot_per_task(
    results: Any,
    ax: Axes | None = None,
    *,
    tasks: Sequence[str],
    prefix: str,
    summary: str | None,
    ylabel: str,
    lower_bound: float | None,
    steps: Sequence[float] | None = None,
    xlabel: str = "step",
) -> tuple[Figure | SubFigure, Axes]:
    """Draw one result as a bar for each task, or several as a line for each task.

    The summary of all tasks is black, and as a bar stands apart. A value that is NaN is no 0: its bar is the text "no
    data", its line has a gap and a cross at the top.

    Args:
        results: a mapping key -> number or 0-dim tensor of any device, or a list of them, one a step; or stacked, as
            ``MetricTracker`` does: a mapping key -> ``(steps,)``.
        ax: the axes to draw on; None makes a figure that has room for all names. On axes of a figure without a layout
            the legend stays inside of them, and long names may need ``layout="constrained"``.
        tasks: the tasks whose "<prefix>/<task>" is drawn, in this order; none in the one-task form.
        prefix: of the tasks' keys.
        summary: the key of all tasks together; None if there is none.
        ylabel: what the values are.
        lower_bound: the least possible value, drawn as a line; None if there is none.
        steps: where each result of a list stands on the x axis; None counts them from 0.
        xlabel: what the steps are.

    Returns:
        The figure and the axes.

    Raises:
        ModuleNotFoundError: without matplotlib.
        TypeError: for results or axes of another type.
        ValueError: for a missing key, no result at all, or a number of steps other than that of the results.
    """
    pyplot = import_pyplot()
    axes = _checked_axes(ax)
    results = _stacked_as_list(results)
    series = _series(results, tasks, prefix, summary)
    is_single = isinstance(results, Mapping)
    positions: Sequence[float] = range(len(series[0].values)) if steps is None else steps
    if len(positions) != len(series[0].values):
        raise ValueError(f"steps: got {len(positions)}, expected {len(series[0].values)}, one for each result")
    if axes is None:
        _, axes = pyplot.subplots(figsize=_figure_size(series, is_single), layout="constrained")
    figure = axes.get_figure()
    assert figure is not None
    if is_single:
        _draw_bars(axes, series, 0.0 if lower_bound is None else lower_bound)
    else:
        _draw_lines(axes, series, positions)
        axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(axis="y" if is_single else "both", alpha=0.3)
    axes.set_axisbelow(True)
    _show_lower_bound(axes, series, lower_bound)
    _show_legend(axes, has_room=figure.get_layout_engine() is not None)
    return figure, axes


def import_pyplot() -> Any:
    """``matplotlib.pyplot``.

    Raises:
        ModuleNotFoundError: without matplotlib, saying how to get it.
    """
    try:
        from matplotlib import pyplot  # noqa: PLC0415 (who draws nothing needs no matplotlib)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "plot() expects matplotlib to be installed: pip install matplotlib", name="matplotlib"
        ) from error
    return pyplot


# Results, checked.


def _checked_axes(ax: Any) -> Axes | None:
    from matplotlib.axes import Axes  # noqa: PLC0415 (as above)

    if ax is None or isinstance(ax, Axes):
        return ax
    raise TypeError(f"ax: got {type(ax).__name__}, expected matplotlib Axes or None")


def _series(results: Any, tasks: Sequence[str], prefix: str, summary: str | None) -> list[_Series]:
    """The values of every key to draw, in the order of the tasks, then of all tasks together."""
    by_step = [("val", results)] if isinstance(results, Mapping) else _steps_of(results)
    names = {f"{prefix}/{task}": task for task in tasks}
    if summary is not None:
        names[summary] = summary
    for where, result in by_step:
        missing = [key for key in names if key not in result]
        if missing:
            raise ValueError(f"{where}: got the keys {list(result)}, expected {missing} among them")
    return [
        _Series(
            key,
            name,
            [_number(f"{where}[{key!r}]", result[key]) for where, result in by_step],
            _summary_style() if key == summary else _task_style(index),
        )
        for index, (key, name) in enumerate(names.items())
    ]


def _stacked_as_list(results: Any) -> Any:
    """A list of results from a mapping key -> ``(steps,)``; anything else as it is."""
    if not isinstance(results, Mapping):
        return results
    stacked = {key: values for key, values in results.items() if isinstance(values, Tensor) and values.ndim == 1}
    lengths = {key: len(values) for key, values in stacked.items()}
    if not stacked:
        return results
    if len(stacked) < len(results) or len(set(lengths.values())) > 1:
        raise ValueError(f"val: got {lengths} steps, expected the same number for each of {list(results)}")
    rows = zip(*(values.tolist() for values in stacked.values()))
    return [dict(zip(stacked, row)) for row in rows]


def _steps_of(results: Any) -> list[tuple[str, Mapping[str, Any]]]:
    if isinstance(results, (str, bytes)) or not isinstance(results, Sequence):
        raise TypeError(f"val: got {type(results).__name__}, expected a result of compute(), or a list of them")
    if not results:
        raise ValueError("val: got an empty list, expected one or more results of compute()")
    by_step = [(f"val[{step}]", result) for step, result in enumerate(results)]
    for where, result in by_step:
        if not isinstance(result, Mapping):
            raise TypeError(f"{where}: got {type(result).__name__}, expected a result of compute(), which is a mapping")
    return by_step


def _number(where: str, value: Any) -> float:
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return float(value.detach().item())
    if isinstance(value, Real):
        return float(value)
    got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise TypeError(f"{where}: got {got}, expected a number or a 0-dim tensor")


# Drawing.


def _summary_style() -> dict[str, Any]:
    return {"color": SUMMARY_COLOR, "linestyle": "-", "linewidth": 2.5, "zorder": 3}


def _task_style(index: int) -> dict[str, Any]:
    line_style = LINE_STYLES[index // COLORS % len(LINE_STYLES)]
    return {"color": f"C{index % COLORS}", "linestyle": line_style, "linewidth": 1.5, "zorder": 2}


def _is_summary(series: _Series) -> bool:
    color: str = series.style["color"]
    return color == SUMMARY_COLOR


def _draw_bars(axes: Axes, series: Sequence[_Series], base: float) -> None:
    """A bar for each key with its value above it, and a gap before that of all tasks."""
    places = [index + 0.5 * (_is_summary(each) and index > 0) for index, each in enumerate(series)]
    margin = 0.75 if len(places) > 1 else 1.5
    axes.set_xlim(places[0] - margin, places[-1] + margin)
    slot = _inches(axes) / (places[-1] - places[0] + 2 * margin)
    upright_values = slot < INCHES_PER_VALUE
    for place, each in zip(places, series):
        value = each.values[0]
        height = value - base if math.isfinite(value) else 0.0
        # Colours tell the tasks apart as long as there is one for each; the names below the bars always do.
        named = {"color": each.style["color"], "label": each.key} if _have_colors(series) else {}
        axes.bar(place, height, bottom=base, **(named or {"color": SUMMARY_COLOR if _is_summary(each) else "C0"}))
        axes.annotate(
            _text_of(value),
            (place, base + height),
            (0, 3 if height >= 0 else -3),
            textcoords="offset points",
            ha="center",
            va="bottom" if height >= 0 else "top",
            rotation=90 if upright_values else 0,
            fontsize="small",
            color=MUTED_COLOR,
        )
    # Room for the values above the bars.
    axes.margins(y=0.2 if upright_values else 0.1)
    names = [each.name for each in series]
    slanted: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    fit = max(map(len, names)) * INCHES_PER_CHARACTER < slot
    axes.set_xticks(places, names, **({} if fit else slanted))


def _text_of(value: float) -> str:
    return "no data" if math.isnan(value) else f"{value:.3g}"


def _draw_lines(axes: Axes, series: Sequence[_Series], steps: Sequence[float]) -> None:
    """A line for each key; where it has no data, a gap and a cross at the top."""
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415 (who draws nothing needs no matplotlib)

    marker_size = 5 if len(steps) <= LEGEND_ROWS else 2
    cross: dict[str, Any] = {"marker": "x", "linestyle": "none", "transform": axes.get_xaxis_transform()}
    any_missing = False
    for each in series:
        axes.plot(steps, each.values, marker="o", markersize=marker_size, label=each.key, **each.style)
        missing = [step for step, value in zip(steps, each.values) if not math.isfinite(value)]
        if missing:
            # At the top, as one at the bottom would look like a loss of 0.
            axes.plot(missing, [0.97] * len(missing), color=each.style["color"], **cross)
            any_missing = True
    if any_missing:
        axes.plot([], [], color=MUTED_COLOR, label="no data", **cross)
        axes.margins(y=0.1)
    if len(steps) == 1:
        axes.set_xlim(steps[0] - 0.5, steps[0] + 0.5)
    if any(isinstance(step, int) for step in steps):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _show_lower_bound(axes: Axes, series: Sequence[_Series], lower_bound: float | None) -> None:
    """A line at the bound, and the axis from just below it, unless a value is below it all the same."""
    if lower_bound is None:
        return
    axes.axhline(lower_bound, color=MUTED_COLOR, linewidth=1, linestyle="--", zorder=1)
    values = [value for each in series for value in each.values if math.isfinite(value)]
    if all(value >= lower_bound for value in values):
        top = axes.get_ylim()[1] if any(value > lower_bound for value in values) else lower_bound + 1
        axes.set_ylim(lower_bound - 0.03 * (top - lower_bound), top)


def _show_legend(axes: Axes, *, has_room: bool) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    columns = -(-len(labels) // LEGEND_ROWS)
    if has_room:
        # A layout makes room for it beside the axes, where it hides nothing.
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, frameon=False, ncols=columns)
    else:
        axes.legend(loc="best", fontsize="small", ncols=columns)


def _figure_size(series: Sequence[_Series], is_single: bool) -> tuple[float, float]:
    """Inches that leave the axes their usual size beside the names."""
    longest = INCHES_PER_CHARACTER * max(len(each.key) for each in series)
    legend = -(-len(series) // LEGEND_ROWS) * (0.6 + longest)
    if not is_single:
        return 5.5 + legend, max(4.8, 0.6 + 0.22 * min(len(series) + 1, LEGEND_ROWS))
    # At 45°, a name is as high as it is wide.
    slanted = 0.7 * longest
    return max(5.5, 0.4 * len(series)) + slanted + legend * _have_colors(series), 4.3 + slanted


def _have_colors(series: Sequence[_Series]) -> bool:
    """Whether every task has a colour of its own."""
    return len(series) <= COLORS + 1


def _inches(axes: Axes) -> float:
    """The width of axes, as far as it is known before the layout."""
    figure = axes.get_figure()
    assert figure is not None
    return float(axes.get_window_extent().width) / figure.dpi
