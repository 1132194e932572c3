"""GlobalLoss alone: its reductions over rows and tasks, and the digits of its sums."""

from __future__ import annotations

import itertools
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from tests.support import reference
from twloss import GlobalLoss, RankingQuality

TASKS = ["like", "reply", "retweet", "dwell"]


def values(losses: dict[str, Tensor]) -> dict[str, float]:
    """The numbers of a result."""
    return {key: value.item() for key, value in losses.items()}


def expected(loss_sums: list[float], weights: list[float], task_reduction: Any, reduction: Any) -> dict[str, float]:
    """The oracle's losses of given sums: one row of weight n and loss s/n for each task has exactly these sums."""
    columns = {task: [reference.Row(s / n, weight=n)] if n else [] for task, s, n in zip(TASKS, loss_sums, weights)}
    return reference.losses(columns, reference.Rule(task_reduction, reduction, "weights"))


@pytest.mark.parametrize("task_reduction", ["mean", "sum"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "min", "max", "median"])
@pytest.mark.parametrize("present", list(itertools.product([0, 1], repeat=4)))
def test_reductions_are_over_the_tasks_with_data(task_reduction: Any, reduction: Any, present: tuple[int, ...]) -> None:
    loss_sums = [7.0 * n for n in (3.0, 1.0, 4.0, 2.0)]
    weights = [8.0 * n for n in present]
    metric = GlobalLoss(TASKS, task_reduction, reduction)
    metric.update(torch.tensor(loss_sums, dtype=torch.float64) * torch.tensor(present), torch.tensor(weights))
    assert values(metric.compute()) == pytest.approx(
        expected(loss_sums, weights, task_reduction, reduction), rel=1e-14, nan_ok=True
    )


@pytest.mark.parametrize(("reduction", "expected"), [("min", -3.0), ("max", -1.0), ("median", -3.0), ("mean", -2.0)])
def test_a_task_without_data_is_in_no_reduction_of_losses_below_0_either(reduction: Any, expected: float) -> None:
    """As log likelihoods of densities are."""
    metric = GlobalLoss(["a", "b", "c"], "mean", reduction)
    metric.update(torch.tensor([-3.0, 0.0, -2.0]), torch.tensor([1.0, 0.0, 2.0]))
    assert metric.compute()["loss"].item() == expected


def test_the_mean_is_over_rows_and_not_over_batches() -> None:
    """A mean of the two batches' means would be 2.0."""
    metric = GlobalLoss(["like"])
    metric.update(torch.tensor([1000.0]), 1000)
    metric.update(torch.tensor([3.0]), 1)
    assert metric.compute()["loss"].item() == pytest.approx(1003 / 1001, rel=1e-15)


def test_one_task_has_one_key() -> None:
    metric = GlobalLoss(None)
    metric.update(torch.tensor(3.0), 2)
    metric.update(torch.tensor([4.0]), torch.tensor(2))
    assert values(metric.compute()) == {"loss": 1.75}


def test_sums_do_not_stop_at_the_precision_of_float32() -> None:
    """1e9 rows at 0.3, then 1000 batches at 0.01: a float32 sum does not move any more."""
    metric, mean = GlobalLoss(["like"]), MeanMetric()
    metric.update(torch.tensor([3e8], dtype=torch.float64), 10**9)
    mean.update(0.3, 1e9)
    for _ in range(1000):
        metric.update(torch.tensor([10.24], dtype=torch.float64), 1024)
        mean.update(0.01, 1024)
    exact = (3e8 + 10240) / (1e9 + 1024000)
    assert metric.compute()["loss"].item() == pytest.approx(exact, rel=1e-12)
    assert mean.compute().item() != pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("weight", [0.1, 16777217.0, 2**53, torch.tensor(0.1, dtype=torch.float64)])
def test_a_weight_keeps_all_of_its_digits(weight: Any) -> None:
    metric = GlobalLoss(["like"])
    metric.update(torch.tensor([0.1], dtype=torch.float64), weight)
    assert metric.compute()["loss"].item() == 0.1 / float(weight)


def test_a_module_as_reduction_is_used_but_not_registered() -> None:
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(2.0))

        def forward(self, losses: Tensor) -> Tensor:
            return self.factor * losses.sum()

    metric = GlobalLoss(["like", "reply"], "mean", Doubled())
    assert list(metric.parameters()) == []
    metric.update(torch.tensor([1.0, 2.0]), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert values(metric.compute())["loss"] == 6.0


def test_a_loss_takes_no_window() -> None:
    options: dict[str, Any] = {"window": 5}
    with pytest.raises(ValueError, match="window"):
        GlobalLoss(["like"], **options)


class Scaled(nn.Module):
    """A reduction with a parameter, which computes in the dtype of its input."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.ones(2, dtype=dtype))

    def forward(self, losses: Tensor) -> Tensor:
        """The sum."""
        return (losses * self.factors.to(losses)).sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_module_in_half_precision_gets_losses_in_float32(dtype: torch.dtype) -> None:
    """In bfloat16 100.03 and 7 are 107.0."""
    metric = GlobalLoss(["like", "reply"], "mean", Scaled(dtype))
    metric.update(torch.tensor([100.03, 7.0], dtype=torch.float64), 1)
    for losses in (metric.compute(), metric(torch.tensor([100.03, 7.0], dtype=torch.float64), 1)):
        assert losses["loss"].dtype == torch.float64
        precision = 1e-15 if dtype == torch.float64 else 1e-7
        assert losses["loss"].item() == pytest.approx(107.03, rel=precision)


# Sums of cells.


@pytest.mark.parametrize("tasks", [["like", "reply"], None])
def test_sums_of_cells_come_below_those_of_all_rows(tasks: Any) -> None:
    """Each row of them is reduced by itself, over the tasks with data in the cell."""
    metric = GlobalLoss(tasks, segments={"country": ["DE"], "surface": 1})
    columns = len(tasks or "1")
    loss_sum, weight = torch.arange(10.0).view(5, 2)[:, :columns] + 1, torch.full((5, columns), 2.0)
    weight[1, -1] = 0.0
    found = values(metric(loss_sum, weight))
    cells = ["", "/country=DE", "/country=other", "/surface=0", "/surface=other"]
    oracle: dict[str, float] = {}
    for cell, sums, weights in zip(cells, loss_sum.tolist(), weight.tolist()):
        rows = {name: [reference.Row(s / n, weight=n)] if n else [] for name, s, n in zip(tasks or "1", sums, weights)}
        losses = reference.losses(rows, reference.Rule(mean_over="weights"))
        oracle |= {f"{key}{cell}": value for key, value in losses.items() if tasks or key == "loss"}
    assert list(found) == metric.keys() == list(oracle)
    assert found == pytest.approx(oracle, rel=1e-14, nan_ok=True)
    if tasks is None:
        metric.update(loss_sum[:, 0], weight[:, 0])
        assert values(metric.compute()) == pytest.approx(oracle, rel=1e-14, nan_ok=True)
    assert {metric.scalar(key).higher_is_better for key in metric.keys()} == {False}  # noqa: SIM118 (not a mapping)


@pytest.mark.parametrize(
    ("loss_sum", "weight", "error", "message"),
    [
        ((5, 2), 3, TypeError, r"weight: got int, expected a Tensor \(5, 2\), since segments"),
        ((5, 2), (), ValueError, r"weight: got shape \(\), expected \(5, 2\)"),
        ((5, 2), (2,), ValueError, r"weight: got shape \(2,\), expected \(5, 2\)"),
        ((5, 2), (5, 1), ValueError, r"weight: got shape \(5, 1\), expected \(5, 2\)"),
        ((2,), (2,), ValueError, r"loss_sum: got shape \(2,\), expected \(5, 2\)"),
        ((10,), (10,), ValueError, r"loss_sum: got shape \(10,\), expected \(5, 2\)"),
        ((2, 5), (2, 5), ValueError, r"loss_sum: got shape \(2, 5\), expected \(5, 2\)"),
    ],
)
def test_sums_that_do_not_fit_the_cells_are_refused(loss_sum: Any, weight: Any, error: Any, message: str) -> None:
    metric = GlobalLoss(["like", "reply"], segments={"country": ["DE"], "surface": 1})
    given = weight if isinstance(weight, int) else torch.ones(weight)
    with pytest.raises(error, match=f"^{message}"):
        metric.update(torch.ones(loss_sum), given)
    assert metric.update_count == 0


def test_a_negative_weight_of_a_cell_is_one_of_the_update() -> None:
    metric = GlobalLoss(["like", "reply"], segments={"country": ["DE"]}, validate_args=True)
    weight = torch.tensor([[1.0, 1.0], [2.0, 1.0], [-1.0, 0.0]])
    metric.update(torch.ones(3, 2), weight)
    with pytest.warns(UserWarning, match="negative weights: like: 1$"):
        metric.compute()


NAMES: dict[str, tuple[list[str], dict[str, Any], str]] = {
    "a task as a cell": (["like", "country=DE"], {"country": ["DE"]}, "country=DE"),
    "a task as a task's cell": (["like/country=DE", "like"], {"country": ["DE"]}, "like/country=DE"),
    "a cell as another's": (["like"], {"a": ["b=c"], "a=b": ["c"]}, "a=b=c"),
}


@pytest.mark.parametrize("of", [GlobalLoss, RankingQuality])
@pytest.mark.parametrize(("tasks", "segments", "key"), NAMES.values(), ids=NAMES)
def test_names_that_make_two_equal_keys_are_refused(of: Any, tasks: list[str], segments: Any, key: str) -> None:
    with pytest.raises(ValueError, match=rf"^segments: .*no two equal keys: \['{key}'"):
        of(tasks, segments=segments)


@pytest.mark.parametrize("of", [GlobalLoss, RankingQuality])
def test_names_may_have_what_joins_them(of: Any) -> None:
    metric = of(["a/b", "a", "c=d"], segments={"b/c": ["d"], "e=f": ["g=/h"]})
    keys = metric.keys()
    assert len(set(keys)) == len(keys)
    assert [metric.scalar(key).key for key in keys] == keys
    prefix = keys[0].partition("/")[0]
    total, *cells = metric._keys_to_plot(f"{prefix}/a")
    assert total == f"{prefix}/a"
    assert cells == [f"{prefix}/a/{cell}" for cell in ("b/c=d", "b/c=other", "e=f=g=/h", "e=f=other")]


def test_a_state_of_too_many_numbers_is_refused_before_anything_is_made() -> None:
    """Those of a window count, too."""
    for make in (
        partial(RankingQuality, None, window=1000, segments={"c": 100_000}),
        partial(RankingQuality, None, window_rows=10**6, segments={"c": 100_000}),
        partial(GlobalLoss, None, segments={"c": 10**15}),
    ):
        with pytest.raises(ValueError, match=r"^segments: got .* cells for 1 tasks, .* at most 134,217,728$"):
            make()
