"""GlobalLoss alone: its reductions over rows and tasks, and the digits of its sums."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from tests.support import reference
from twloss import GlobalLoss

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
