"""Pictures of results: what is drawn is what came in, missing data is a gap, and the global loss stands out."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from matplotlib import pyplot
from torchmetrics.wrappers import MetricTracker

from tests.support.patience import SECONDS
from tests.support.rank_pool import RankPool
from twloss import GlobalLoss, MultiTaskLoss, RankingQuality

THREE = ["like", "reply", "share"]
THIRTY = [f"video_quality_view_of_at_least_{3 * index}_percent" for index in range(30)]


@pytest.fixture(autouse=True)
def _no_window_is_opened_or_left() -> Iterator[None]:
    pyplot.switch_backend("Agg")
    yield
    pyplot.close("all")


def result(tasks: list[str], step: int = 0) -> dict[str, float]:
    """Losses that differ by task and fall with the steps; binary fractions, which are not rounded."""
    return {**{f"loss/{task}": 1 + i - step / 256 for i, task in enumerate(tasks)}, "loss": 0.5 - step / 256}


def drawn(plotted: Any) -> dict[str, list[float]]:
    """The values of each line by its label, after a look at what plot() returned."""
    figure, axes = plotted
    assert axes.get_figure() is figure
    figure.canvas.draw()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [line.get_label() for line in axes.lines]
    return {line.get_label(): line.get_ydata().tolist() for line in axes.lines}


@pytest.mark.parametrize("tasks", [[], THREE, THIRTY], ids=["one", "three", "thirty"])
@pytest.mark.parametrize("steps", [1, 2, 12, 200])
def test_each_key_is_a_line_and_the_global_loss_black_and_bold(tasks: list[str], steps: int) -> None:
    results = [result(tasks, step) for step in range(steps)]
    figure, axes = GlobalLoss(tasks or None).plot(results if steps > 1 else results[0])
    assert drawn((figure, axes)) == {key: [each[key] for each in results] for key in results[0]}
    *others, loss = axes.lines
    assert loss.get_color() == axes.get_legend().get_lines()[-1].get_color() == "black"
    for line in others:
        assert line.get_linewidth() < loss.get_linewidth()
        assert line.get_markersize() < loss.get_markersize()
    assert len({(line.get_color(), line.get_marker()) for line in axes.lines}) == len(axes.lines)
    # The legend hides no line and is not cut off.
    legend = axes.get_legend().get_window_extent()
    assert axes.get_window_extent().x1 <= legend.x0
    assert figure.bbox.contains(*legend.min)
    assert figure.bbox.contains(*legend.max)
    assert len(axes.get_xticks()) <= 16


def test_no_data_is_a_gap() -> None:
    metric, steps = GlobalLoss(THREE), [result(THREE), {**result(THREE, 1), "loss/reply": math.nan}, result(THREE, 2)]
    assert drawn(metric.plot(steps))["loss/reply"] == pytest.approx([2.0, math.nan, 2 - 2 / 256], nan_ok=True)
    assert drawn(metric.plot(steps[1]))["loss/reply"] == pytest.approx([math.nan], nan_ok=True)
    with pytest.warns(UserWarning, match="before update"):
        assert all(math.isnan(loss) for (loss,) in drawn(metric.plot()).values())


def test_a_gap_among_many_steps_is_wider_than_the_markers() -> None:
    figure, axes = GlobalLoss(None).plot([result([], step) for step in range(100)])
    figure.canvas.draw()
    (before, _), (after, _) = axes.transData.transform([(49, 0), (51, 0)])
    assert axes.lines[0].get_markersize() < (after - before) * 72 / figure.dpi


def test_losses_below_0_are_seen() -> None:
    _, axes = GlobalLoss(THREE).plot({**result(THREE), "loss/like": -2.0})
    assert axes.get_ylim()[0] < -2.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_tensors_of_any_dtype_with_or_without_a_graph(dtype: torch.dtype) -> None:
    tensors = {key: torch.tensor(loss, dtype=dtype, requires_grad=True) for key, loss in result(THREE).items()}
    assert drawn(GlobalLoss(THREE).plot([tensors, result(THREE)])) == {k: [v, v] for k, v in result(THREE).items()}


def test_results_of_forward_or_a_tracker() -> None:
    loss = MultiTaskLoss("bce_with_logits", THREE)
    value = loss(torch.zeros(4, 3, requires_grad=True), torch.ones(4, 3))
    assert drawn(loss.train_metric.plot((value, value)))["loss/like"] == pytest.approx([math.log(2)] * 2)
    tracker = MetricTracker(GlobalLoss(THREE))
    for step in range(3):
        tracker.increment()
        tracker.update(torch.tensor([1.0, 2.0, 3.0]) + step, 2)
        assert drawn(GlobalLoss(THREE).plot(tracker.compute_all()))["loss/reply"] == [1.0, 1.5, 2.0][: step + 1]


def test_a_view_draws_its_value_or_several() -> None:
    metric = GlobalLoss(THREE)
    view = metric.scalar("loss/reply")
    metric.update(torch.tensor([1.0, 4.0, 0.0]), 2)
    for value in (None, view.compute(), 2.0):
        assert drawn(view.plot(value)) == {"loss/reply": [2.0]}
    for several in ([view.compute(), 1.0], torch.tensor([2.0, 1.0])):
        assert drawn(view.plot(several)) == {"loss/reply": [2.0, 1.0]}


@pytest.mark.parametrize("tasks", [["like", "reply"], None])
def test_one_quantity_of_the_ranking_quality(tasks: list[str] | None) -> None:
    metric = RankingQuality(tasks, window=2)
    metric.update(torch.randn(20, 2), torch.randint(2, (20, 2)))
    value = metric.compute()
    for asked in ({}, {"quantity": "rce"}, {"quantity": "window_ne"}):
        quantity = asked.get("quantity", "ne")
        keys = [quantity] if tasks is None else [f"{quantity}/{task}" for task in tasks]
        assert drawn(metric.plot(**asked)) == {key: [value[key].item()] for key in keys}
        assert drawn(metric.plot([value] * 2, **asked)) == {key: [value[key].item()] * 2 for key in keys}
    with pytest.raises(ValueError, match=r"quantity: got 'auc', expected one of \['ne', 'rce', .*'window_weight'\]"):
        metric.plot(quantity="auc")


BY_CELL: dict[str, Any] = {"country": ["DE"], "surface": 1}
CELLS = ["country=DE", "country=other", "surface=0", "surface=other"]


def test_cells_are_drawn_for_one_key_and_are_no_lines_otherwise() -> None:
    metric = GlobalLoss(["like", "reply"], segments=BY_CELL)
    metric.update(torch.arange(10.0).view(5, 2), torch.ones(5, 2))
    value = metric.compute()
    for key in ("loss", "loss/like"):
        keys = [key, *(f"{key}/{cell}" for cell in CELLS)]
        assert drawn(metric.plot(key=key)) == {each: [value[each].item()] for each in keys}
        assert drawn(metric.plot([value] * 3, key=key)) == {each: [value[each].item()] * 3 for each in keys}
    assert list(drawn(metric.plot())) == ["loss/like", "loss/reply", "loss"]
    assert list(drawn(metric.plot(key="loss/like/surface=0"))) == ["loss/like/surface=0"]
    with pytest.raises(ValueError, match=r"^key: got 'loss/share', expected one of \['loss/like', "):
        metric.plot(key="loss/share")
    assert list(drawn(GlobalLoss(THREE).plot(result(THREE), key="loss/reply"))) == ["loss/reply"]


@pytest.mark.parametrize("tasks", [["like", "reply"], None])
def test_cells_of_the_ranking_quality(tasks: list[str] | None) -> None:
    metric, columns = RankingQuality(tasks, window=2, segments=BY_CELL), len(tasks or "1")
    ids = {"country": torch.arange(20)[:, None] % 2, "surface": torch.arange(20)[:, None] % 3 - 1}
    metric.update(torch.randn(20, columns), torch.arange(20 * columns).view(20, -1) % 2, segments=ids)
    for quantity in ("ne", "window_ctr"):
        key = quantity if tasks is None else f"{quantity}/reply"
        value, keys = metric.compute(), [key, *(f"{key}/{cell}" for cell in CELLS)]
        assert drawn(metric.plot([value] * 2, key=key)) == {
            each: pytest.approx([value[each].item()] * 2, nan_ok=True) for each in keys
        }
        totals = [f"{quantity}/{task}" for task in tasks or ()] or [key]
        assert list(drawn(metric.plot(quantity=quantity))) == totals
    with pytest.raises(ValueError, match=r"^key: got 'ne/share'"):
        metric.plot(key="ne/share")


@pytest.mark.parametrize("layout", [None, "constrained"])
def test_given_axes_are_drawn_on_and_their_figure_is_returned(layout: Any) -> None:
    figure, (left, right) = pyplot.subplots(1, 2, layout=layout)
    left.plot([7.0], color="red", label="before")
    size = [*figure.get_size_inches()]
    for axes, value in ((left, result(THREE)), (right, [result(THREE)] * 2)):
        assert GlobalLoss(THREE).plot(value, axes) == (figure, axes)
    figure.canvas.draw()
    assert all(figure.bbox.contains(*axes.get_legend().get_window_extent().max) for axes in (left, right))
    assert [line.get_label() for line in left.lines] == ["before", *result(THREE)]
    assert [line.get_color() for line in (left.lines[0], left.lines[-1])] == ["red", "black"]
    assert [*figure.get_size_inches()] == size
    assert len(pyplot.get_fignums()) == 1


PART = {key: value for key, value in result(THREE).items() if key != "loss/reply"}
BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "a number": (0.5, TypeError, "val: got float"),
    "a text": ("loss", TypeError, "val: got str"),
    "an empty list": ([], TypeError, "val: got list"),
    "a list of tensors": ([torch.tensor(0.5)], TypeError, "val: got Tensor"),
    "a key too few": ([result(THREE), PART], ValueError, r"val: got the keys .*expected \['loss/reply'\] among them"),
}


@pytest.mark.parametrize(("value", "error", "message"), BAD.values(), ids=BAD)
def test_a_wrong_value_is_a_clear_error_and_leaves_no_figure(value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GlobalLoss(THREE).plot(value)
    assert pyplot.get_fignums() == []


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
metric = twloss.GlobalLoss(["like"])
metric.update(torch.ones(1), 1)
for draw in (metric.plot, metric.scalar("loss").plot):
    try:
        draw()
    except ModuleNotFoundError as error:
        print(error)
"""


def test_without_matplotlib_all_but_plot_works() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pip install matplotlib") == 2


def plotted_on_a_rank(rank: int) -> list[float]:
    pyplot.switch_backend("Agg")
    metric = GlobalLoss(["like"])
    metric.update(torch.tensor([4.0 * rank]), 1 + rank)
    figure, axes = metric.plot()
    pyplot.close(figure)
    return [line.get_ydata().item() for line in axes.lines]


def test_every_rank_draws_the_loss_of_all(two_ranks: RankPool) -> None:
    assert two_ranks.run(plotted_on_a_rank) == [pytest.approx([4 / 3, 4 / 3])] * 2
