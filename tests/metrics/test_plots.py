"""Pictures of results: what is drawn is what came in, missing data is seen to be missing, and nothing is cut off."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import matplotlib as mpl
import pytest
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from torchmetrics import MetricCollection
from torchmetrics.wrappers import MetricTracker

from tests.support.rank_pool import RankPool
from twloss import GlobalLoss, MultiTaskLoss
from twloss.plots import plot_per_task

THREE = ["like", "reply", "share"]
THIRTY = [f"engagement_task_{index}" for index in range(30)]
LONG = [
    "user_follows_author_after_profile_click",
    "video_quality_view_of_at_least_fifty_percent",
    "reply_engaged_by_author",
]
BLACK = mpl.colors.to_rgba("black")


@pytest.fixture(autouse=True)
def _no_window_is_opened_or_left() -> Iterator[None]:
    pyplot.switch_backend("Agg")
    yield
    pyplot.close("all")


def result(tasks: list[str], step: int = 0, missing: tuple[str, ...] = ()) -> dict[str, float]:
    """Losses that differ by task and fall with the steps."""
    losses = {
        f"loss/{task}": math.nan if task in missing else (1 + index) / (2 + index + step)
        for index, task in enumerate(tasks)
    }
    present = [loss for loss in losses.values() if not math.isnan(loss)]
    return {**losses, "loss": sum(present) / len(present) if present else 1 / (1 + step)}


def results(tasks: list[str], steps: int = 12) -> list[dict[str, float]]:
    return [result(tasks, step) for step in range(steps)]


def drawn(tasks: list[str], value: Any, ax: Axes | None = None) -> tuple[Figure, Axes]:
    figure, axes = GlobalLoss(tasks or None).plot(value, ax)
    assert isinstance(figure, Figure)
    assert isinstance(axes, Axes)
    figure.canvas.draw()
    return figure, axes


def bars(axes: Axes) -> list[tuple[float, float]]:
    """The centre and the height of each bar."""
    return [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in axes.patches]  # type: ignore[attr-defined]


def lines(axes: Axes) -> dict[str, Any]:
    """The labelled lines by label."""
    found: list[Any] = [*axes.lines]
    return {line.get_label(): line for line in found if not line.get_label().startswith("_")}


def texts(figure: Figure) -> list[Text]:
    """The texts that are seen: matplotlib keeps labels of ticks beyond the limits, and draws them not."""
    unseen = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            unseen |= {tick.label1 for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high}
    found = [text for text in figure.findobj(Text) if isinstance(text, Text) and text not in unseen]
    return [text for text in found if text.get_visible() and text.get_text()]


def legend_texts(axes: Axes) -> list[str]:
    legend = axes.get_legend()
    return [text.get_text() for text in legend.get_texts()] if legend is not None else []


def expect_all_inside(figure: Figure) -> None:
    """Every text is within the figure."""
    for text in texts(figure):
        box = text.get_window_extent()
        inside = figure.bbox.padded(3)  # a layout is right to a few pixels, which are empty around a slanted text
        assert inside.x0 <= box.x0 <= box.x1 <= inside.x1, (text.get_text(), box)
        assert inside.y0 <= box.y0 <= box.y1 <= inside.y1, (text.get_text(), box)


def expect_no_overlap(boxes: list[Any]) -> None:
    """Boxes in a row from left to right, none over the next."""
    for left, right in itertools.pairwise(boxes):
        assert left.x1 <= right.x0


# One result.


@pytest.mark.parametrize("tasks", [[], THREE, THIRTY, LONG], ids=["one", "three", "thirty", "long"])
def test_one_result_is_a_bar_a_task_and_a_black_one_apart(tasks: list[str]) -> None:
    value = result(tasks)
    figure, axes = drawn(tasks, value)
    places, heights = zip(*bars(axes))
    assert list(heights) == list(value.values())
    assert [tick.get_text() for tick in axes.get_xticklabels()] == [*tasks, "loss"]
    assert list(axes.get_xticks()) == list(places)
    steps = [right - left for left, right in itertools.pairwise(places)]
    assert steps == [*([1.0] * (len(tasks) - 1)), *([1.5] * (len(tasks) > 0))]
    colours = [bar.get_facecolor() for bar in axes.patches]
    assert [colour == BLACK for colour in colours] == [*([False] * len(tasks)), True]
    assert [text.get_text() for text in axes.texts] == [f"{height:.3g}" for height in heights]
    assert axes.get_ylabel() == "loss"
    expect_all_inside(figure)


@pytest.mark.parametrize("tasks", [THREE, THIRTY, LONG], ids=["three", "thirty", "long"])
def test_values_above_the_bars_stay_apart_and_inside_of_the_axes(tasks: list[str]) -> None:
    _, axes = drawn(tasks, result(tasks))
    boxes = [text.get_window_extent() for text in axes.texts]
    expect_no_overlap(boxes)
    assert all(box.y1 <= axes.get_window_extent().y1 for box in boxes)


def test_short_names_stand_upright_and_long_ones_at_an_angle() -> None:
    angles = {
        len(tasks[0]): drawn(tasks, result(tasks))[1].get_xticklabels()[0].get_rotation() for tasks in (THREE, LONG)
    }
    assert angles == {4: 0.0, 39: 45.0}


def test_a_task_without_data_is_said_to_have_none() -> None:
    _, axes = drawn(THREE, result(THREE, missing=("reply",)))
    assert [text.get_text() for text in axes.texts][1] == "no data"
    assert bars(axes)[1] == (1.0, 0.0)
    assert math.isfinite(sum(axes.get_ylim()))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nothing_but_numbers_that_are_not_finite_can_be_drawn(bad: float) -> None:
    value = dict.fromkeys(result(THREE), bad)
    for case in (value, [value, value]):
        figure, axes = drawn(THREE, case)
        assert all(map(math.isfinite, axes.get_ylim()))
        expect_all_inside(figure)


def test_the_axis_begins_just_below_0_unless_a_loss_does() -> None:
    for value, below in ((result(THREE), -0.05), ({**result(THREE), "loss/like": -2.0}, -2.0)):
        for case in (value, [value, result(THREE, 1)]):
            _, axes = drawn(THREE, case)
            bottom, top = axes.get_ylim()
            assert below - 0.4 < bottom < min(below + 0.05, 0)
            assert top > 0.75


def test_losses_of_0_have_an_axis() -> None:
    value = dict.fromkeys(result(THREE), 0.0)
    for case in (value, [value]):
        bottom, top = drawn(THREE, case)[1].get_ylim()
        assert bottom < 0
        assert top > 0.5


# Several results.


@pytest.mark.parametrize("tasks", [[], THREE, THIRTY, LONG], ids=["one", "three", "thirty", "long"])
def test_several_results_are_a_line_a_task_and_a_thick_black_one(tasks: list[str]) -> None:
    values = results(tasks)
    figure, axes = drawn(tasks, values)
    found = lines(axes)
    assert list(found) == list(values[0]) == legend_texts(axes)
    for key, line in found.items():
        assert list(line.get_xdata()) == list(range(12))
        assert list(line.get_ydata()) == [value[key] for value in values]
    looks = {(line.get_color(), line.get_linestyle()) for line in found.values()}
    assert len(looks) == len(found)
    widths = [line.get_linewidth() for line in found.values()]
    assert found["loss"].get_color() == "black"
    assert all(widths[-1] > width for width in widths[:-1])
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "loss")
    expect_all_inside(figure)


@pytest.mark.parametrize("steps", [1, 2, 3, 12, 500])
def test_steps_are_whole_numbers(steps: int) -> None:
    figure, axes = drawn(THREE, results(THREE, steps))
    low, high = axes.get_xlim()
    ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
    assert ticks
    assert all(tick == int(tick) for tick in ticks)
    expect_all_inside(figure)


@pytest.mark.parametrize("tasks", [THREE, THIRTY, LONG], ids=["three", "thirty", "long"])
def test_the_legend_is_beside_the_axes_and_hides_no_line(tasks: list[str]) -> None:
    _, axes = drawn(tasks, results(tasks))
    legend = axes.get_legend()
    assert legend is not None
    assert legend.get_window_extent().x0 >= axes.get_window_extent().x1
    # What a picture is good for: most of it is for the lines, or as wide as usual.
    assert axes.get_window_extent().width > 380


def test_steps_without_data_are_a_gap_and_crosses_far_from_0() -> None:
    values = [result(THREE, step, ("share",) if step < 11 else ()) for step in range(12)]
    for step in (3, 4):
        values[step]["loss/reply"] = math.nan
    figure, axes = drawn(THREE, values)
    assert legend_texts(axes) == [*values[0], "no data"]
    assert [math.isnan(y) for y in lines(axes)["loss/reply"].get_ydata()] == [step in (3, 4) for step in range(12)]
    every: list[Any] = [*axes.lines]
    crosses = {line.get_color(): line for line in every if line.get_marker() == "x" and len(line.get_xdata())}
    colours = {key: lines(axes)[key].get_color() for key in ("loss/reply", "loss/share")}
    assert list(crosses) == list(colours.values())
    assert list(crosses[colours["loss/reply"]].get_xdata()) == [3, 4]
    assert list(crosses[colours["loss/share"]].get_xdata()) == list(range(11))
    for cross in crosses.values():
        place = axes.transAxes.inverted().transform(cross.get_window_extent().get_points())
        assert place[:, 1].min() > 0.9
    expect_all_inside(figure)


# The axes, and the values' forms.


def test_given_axes_are_drawn_on_and_their_figure_is_returned() -> None:
    figure, (left, right) = pyplot.subplots(1, 2)
    for axes, value in ((left, result(THREE)), (right, results(THREE))):
        got = drawn(THREE, value, axes)
        assert got == (figure, axes)
        legend = axes.get_legend()
        # There is no layout to make room for it.
        assert axes.get_window_extent().contains(*legend.get_window_extent().min)
    assert len(left.patches) == 4
    assert len(lines(right)) == 4
    assert len(pyplot.get_fignums()) == 1
    expect_all_inside(figure)


def test_a_figure_with_a_layout_makes_room_on_given_axes() -> None:
    figure = pyplot.figure(figsize=(12, 7), layout="constrained")
    for axes, value in zip(figure.subplots(1, 2), (result(LONG), results(LONG))):
        assert drawn(LONG, value, axes) == (figure, axes)
    expect_all_inside(figure)


def test_without_a_value_it_computes() -> None:
    metric = GlobalLoss(THREE)
    metric.update(torch.tensor([1.0, 4.0, 0.0]), torch.tensor([2, 2, 0]))
    _, axes = metric.plot()
    assert [height for _, height in bars(axes)] == [0.5, 2.0, 0.0, 1.25]


def test_results_of_forward_a_collection_or_a_tracker_can_be_drawn() -> None:
    loss = MultiTaskLoss("bce_with_logits", THREE)
    value = loss(torch.zeros(4, 3, dtype=torch.bfloat16, requires_grad=True), torch.ones(4, 3))
    _, axes = loss.train_metric.plot([value, value])
    assert lines(axes)["loss/like"].get_ydata() == pytest.approx([math.log(2)] * 2)
    tracker = MetricTracker(GlobalLoss(THREE))
    for step in range(3):
        tracker.increment()
        tracker.update(torch.tensor([1.0, 2.0, 3.0]) + step, 2)
    _, axes = loss.train_metric.plot(tracker.compute_all())
    assert list(lines(axes)["loss/reply"].get_ydata()) == [1.0, 1.5, 2.0]
    collection = MetricCollection(GlobalLoss(THREE))
    collection.update(torch.tensor([1.0, 2.0, 3.0]), 2)
    _, axes = loss.train_metric.plot(collection.compute())
    assert [height for _, height in bars(axes)] == [0.5, 1.0, 1.5, 1.0]


def test_a_scalar_view_draws_its_value_or_several() -> None:
    metric = GlobalLoss(THREE)
    view = metric.scalar("loss/reply")
    metric.update(torch.tensor([1.0, 4.0, 0.0]), 2)
    for value in (None, view.compute()):
        _, axes = view.plot(value)
        assert bars(axes) == [(0.0, 2.0)]
        assert axes.get_ylabel() == "loss/reply"
    for several in ([view.compute(), 1.0], torch.tensor([2.0, 1.0])):
        _, axes = view.plot(several)
        assert list(lines(axes)["loss/reply"].get_ydata()) == [2.0, 1.0]


def test_another_metric_has_no_summary_and_other_keys_beside() -> None:
    value = {"ne/like": 0.9, "ne/reply": 0.8, "ctr/like": 0.1, "ctr/reply": 0.2}
    settings: dict[str, Any] = {
        "tasks": ["like", "reply"],
        "prefix": "ne",
        "summary": None,
        "ylabel": "normalised entropy",
        "lower_bound": None,
    }
    _, axes = plot_per_task(value, **settings)
    assert bars(axes) == [(0.0, 0.9), (1.0, 0.8)]
    assert not any(bar.get_facecolor() == BLACK for bar in axes.patches)
    assert axes.get_ylabel() == "normalised entropy"
    _, axes = plot_per_task([value, value], **settings, steps=[100, 250], xlabel="rows")
    assert list(lines(axes)["ne/like"].get_xdata()) == [100, 250]
    assert axes.get_xlabel() == "rows"
    with pytest.raises(ValueError, match="steps: got 3, expected 2"):
        plot_per_task([value, value], **settings, steps=[1, 2, 3])


# Errors.

GOOD = result(THREE)
PART = {key: value for key, value in GOOD.items() if key != "loss/reply"}
BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "a number": (0.5, TypeError, r"val: got float"),
    "a tensor": (torch.tensor(0.5), TypeError, r"val: got Tensor"),
    "a text": ("loss", TypeError, r"val: got str"),
    "a set": ({1.0}, TypeError, r"val: got set"),
    "an empty list": ([], ValueError, r"val: got an empty list"),
    "an empty dict": ({}, ValueError, r"val: got the keys \[\], expected \['loss/like'"),
    "a list of numbers": ([0.5], TypeError, r"val\[0\]: got float"),
    "a list with a list": ([GOOD, [GOOD]], TypeError, r"val\[1\]: got list"),
    "a key too few": (PART, ValueError, r"val: got the keys .*expected \['loss/reply'\]"),
    "a key too few later": ([GOOD, PART], ValueError, r"val\[1\]: got the keys .*expected \['loss/reply'\]"),
    "no global loss": ({k: v for k, v in GOOD.items() if k != "loss"}, ValueError, r"expected \['loss'\]"),
    "a text as loss": ({**GOOD, "loss": "0.5"}, TypeError, r"val\['loss'\]: got str"),
    "None as loss": ([GOOD, {**GOOD, "loss": None}], TypeError, r"val\[1\]\['loss'\]: got NoneType"),
    "a matrix": ({**GOOD, "loss": torch.zeros(2, 2)}, TypeError, r"val\['loss'\]: got a tensor of shape \(2, 2\)"),
    "some stacked": ({**GOOD, "loss": torch.zeros(2)}, ValueError, r"val: got \{'loss': 2\} steps"),
    "uneven": (
        {"loss/like": torch.zeros(2), "loss/reply": torch.zeros(3)},
        ValueError,
        r"val: got \{'loss/like': 2, 'loss/reply': 3\} steps",
    ),
}


@pytest.mark.parametrize(("value", "error", "message"), BAD.values(), ids=BAD)
def test_a_wrong_value_is_a_clear_error_and_leaves_no_figure(value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GlobalLoss(THREE).plot(value)
    assert pyplot.get_fignums() == []


def test_wrong_axes_are_a_clear_error() -> None:
    with pytest.raises(TypeError, match="ax: got ndarray, expected matplotlib Axes"):
        GlobalLoss(THREE).plot(GOOD, pyplot.subplots(1, 2)[1])


WITHOUT = """
import sys
# Before the import of torchmetrics, which itself imports a matplotlib that is installed.
sys.modules["matplotlib"] = None
import importlib.metadata
version = importlib.metadata.version
def version_of_another(name):
    if name == "matplotlib":
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = version_of_another
import torch
import twloss
assert not any(name.startswith("matplotlib.") for name in sys.modules)
metric = twloss.GlobalLoss(["like"])
metric.update(torch.ones(1), 1)
for draw in (metric.plot, metric.scalar("loss").plot):
    try:
        draw()
    except ModuleNotFoundError as error:
        print(error.name, error)
"""


def test_without_matplotlib_all_but_plot_works() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    message = "matplotlib plot() expects matplotlib to be installed: pip install matplotlib\n"
    assert done.stdout == message * 2


def plotted_on_a_rank(rank: int) -> list[float]:
    pyplot.switch_backend("Agg")
    metric = GlobalLoss(["like"])
    metric.update(torch.tensor([4.0 * rank]), 1 + rank)
    figure, axes = metric.plot()
    pyplot.close(figure)
    return [height for _, height in bars(axes)]


def test_every_rank_draws_the_loss_of_all(two_ranks: RankPool) -> None:
    assert two_ranks.run(plotted_on_a_rank) == [pytest.approx([4 / 3, 4 / 3])] * 2
