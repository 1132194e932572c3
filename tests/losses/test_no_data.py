"""Tasks without data: by weights of 0, by weights that cancel, and by a normalizer of 0."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.rank_pool import RankPool, eager_alone
from tests.support.reference import bce_with_logits
from twloss import GlobalLoss, Loss, MultiTaskLoss

pytestmark = pytest.mark.usefixtures("eager_and_fused")

TASKS = ["a", "b", "c"]
LOGITS = [[0.0, 1.0, -2.0], [0.5, 0.25, 3.0]]
LABELS = [[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
CANCEL = [[1.0, 1.0, 2.0], [1.0, -1.0, 0.5]]
"""Weights of which the second task's cancel."""
ZERO = [[1.0, 0.0, 2.0], [1.0, 0.0, 0.5]]

REDUCE: dict[str, Callable[[list[float]], float]] = {
    "mean": statistics.fmean,
    "sum": math.fsum,
    "min": min,
    "max": max,
    "median": statistics.median_low,
}
every_reduction = pytest.mark.parametrize("reduction", REDUCE)


def make(*args: Any, **kwargs: Any) -> MultiTaskLoss:
    """A loss of the tasks, without the warning of reductions that are chosen on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return MultiTaskLoss("bce_with_logits", TASKS, *args, **kwargs)


def inputs(weights: list[list[float]]) -> list[Tensor]:
    return [torch.tensor(values, dtype=torch.float64) for values in (LOGITS, LABELS, weights)]


def loss_sum(task: int, weights: list[list[float]]) -> float:
    return math.fsum(w[task] * bce_with_logits(x[task], y[task]) for x, y, w in zip(LOGITS, LABELS, weights))


def expected(weights: list[list[float]], over_rows: str, reduction: str, mean_over: str, has_data: bool) -> Any:
    """What compute() gives, where the second task has data or has none, and the others have some."""
    values: list[float] = []
    for task in range(3):
        weight = 2.0 if mean_over == "rows" else math.fsum(w[task] for w in weights)
        total = loss_sum(task, weights)
        values.append(math.nan if task == 1 and not has_data else total if over_rows == "sum" else total / weight)
    present = [value for value in values if not math.isnan(value)]
    return {**dict(zip(("loss/a", "loss/b", "loss/c"), values)), "loss": REDUCE[reduction](present)}


def numbers(losses: dict[str, Tensor]) -> dict[str, float]:
    return {key: value.item() for key, value in losses.items()}


def expect(loss: MultiTaskLoss, weights: list[list[float]], truth: dict[str, float]) -> None:
    """The same of forward, where a task without data is 0, and of compute(), where it is NaN."""
    trained = numbers(loss(*inputs(weights)))
    no_nan = {key: 0.0 if math.isnan(value) else value for key, value in truth.items()}
    assert trained == pytest.approx(no_nan, rel=1e-12)
    assert numbers(loss.train_metric.compute()) == pytest.approx(truth, rel=1e-12, nan_ok=True)


# Weights.


@every_reduction
def test_weights_that_cancel_are_no_data_of_a_mean_over_weights(reduction: Any) -> None:
    loss = make("mean", reduction, mean_over="weights")
    expect(loss, CANCEL, expected(CANCEL, "mean", reduction, "weights", False))


@every_reduction
def test_weights_that_cancel_are_data_of_a_sum(reduction: Any) -> None:
    """It does not divide by them."""
    loss = make("sum", reduction, mean_over="weights")
    expect(loss, CANCEL, expected(CANCEL, "sum", reduction, "weights", True))


@every_reduction
@pytest.mark.parametrize("over_rows", ["mean", "sum"])
def test_weights_of_0_are_no_data_of_what_counts_weights(over_rows: Any, reduction: Any) -> None:
    loss = make(over_rows, reduction, mean_over="weights")
    expect(loss, ZERO, expected(ZERO, over_rows, reduction, "weights", False))


@every_reduction
@pytest.mark.parametrize("over_rows", ["mean", "sum"])
@pytest.mark.parametrize("weights", [CANCEL, ZERO], ids=["cancel", "zero"])
def test_rows_are_data_whatever_their_weights_where_rows_are_counted(
    weights: list[list[float]], over_rows: Any, reduction: Any
) -> None:
    loss = make(over_rows, reduction, mean_over="rows")
    expect(loss, weights, expected(weights, over_rows, reduction, "rows", True))


@pytest.mark.parametrize("over_rows", ["mean", "sum"])
@pytest.mark.parametrize(("mean_over", "weights"), [("weights", ZERO), ("weights", CANCEL), ("rows", ZERO)])
def test_the_gradient_is_that_of_the_tasks_with_data(
    over_rows: Any, mean_over: Any, weights: list[list[float]]
) -> None:
    """By plain torch, from the definitions."""
    has_data = mean_over == "rows" or (over_rows == "sum" and weights is CANCEL)
    logits, labels, tensor = inputs(weights)
    logits.requires_grad_()
    loss = make(over_rows, mean_over=mean_over)
    (found,) = torch.autograd.grad(loss(logits, labels, tensor)["loss"], logits)
    rows = tensor * torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    tasks = [
        rows[:, t].sum() / (1.0 if over_rows == "sum" else 2.0 if mean_over == "rows" else tensor[:, t].sum())
        for t in ((0, 1, 2) if has_data else (0, 2))
    ]
    (exact,) = torch.autograd.grad(torch.stack(tasks).mean(), logits)
    assert torch.allclose(found, exact, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("over_rows", ["mean", "sum"])
def test_a_loss_of_one_task_has_the_same_rule(over_rows: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        loss = Loss("bce_with_logits", over_rows, mean_over="weights")
    logits, labels, weights = (each[:, 1] for each in inputs(CANCEL))
    value = loss_sum(1, CANCEL)
    assert value != 0.0
    assert loss(logits, labels, weights).item() == pytest.approx(value if over_rows == "sum" else 0.0, rel=1e-12)
    computed = loss.train_metric.compute()["loss"].item()
    assert computed == pytest.approx(value if over_rows == "sum" else math.nan, rel=1e-12, nan_ok=True)
    loss.train_metric.reset()
    assert loss(logits, labels, 0 * weights).item() == 0.0
    assert loss.train_metric.compute()["loss"].isnan()


def losses_of_a_row(loss: MultiTaskLoss, row: int, form: str) -> dict[str, Tensor]:
    """The losses of one row, or of none, by forward, or of the sums of it."""
    logits, labels, weights = (each[row : row + 1] for each in inputs(CANCEL))
    if form == "rows":
        return loss(logits, labels, weights)
    losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    sums: Any = (weights * losses).sum(0), weights.sum(0)
    return loss.from_sums(*(dict(zip(TASKS, each)) for each in sums) if form == "by task" else sums)


every_form = pytest.mark.parametrize("form", ["rows", "sums", "by task"])


@every_reduction
@every_form
@pytest.mark.parametrize("over_rows", ["mean", "sum"])
def test_weights_that_cancel_over_two_steps(over_rows: Any, reduction: Any, form: str) -> None:
    """Each step has data; all of them together have data of a sum alone."""
    loss = make(over_rows, reduction, mean_over="weights")
    for row in range(2):
        value = bce_with_logits(LOGITS[row][1], LABELS[row][1])
        entry = losses_of_a_row(loss, row, form)["loss/b"].item()
        assert entry == pytest.approx(value * CANCEL[row][1] if over_rows == "sum" else value, rel=1e-12)
    truth = expected(CANCEL, over_rows, reduction, "weights", over_rows == "sum")
    assert numbers(loss.train_metric.compute()) == pytest.approx(truth, rel=1e-12, nan_ok=True)


def step_of_a_rank(rank: int, over_rows: Any, reduction: Any, form: str) -> list[dict[str, float]]:
    """One row a rank, and none on a third."""
    loss = make(over_rows, reduction, mean_over="weights", global_batch=True)
    losses = losses_of_a_row(loss, rank, form)
    return [numbers(losses), numbers(loss.train_metric.compute())]


@eager_alone
@every_reduction
@every_form
@pytest.mark.parametrize("over_rows", ["mean", "sum"])
def test_weights_that_cancel_over_ranks(ranks: RankPool, over_rows: Any, reduction: Any, form: str) -> None:
    truth = expected(CANCEL, over_rows, reduction, "weights", over_rows == "sum")
    no_nan = {key: 0.0 if math.isnan(value) else value for key, value in truth.items()}
    for trained, computed in ranks.run(step_of_a_rank, over_rows, reduction, form):
        assert trained == pytest.approx(no_nan, rel=1e-12)
        assert computed == pytest.approx(truth, rel=1e-12, nan_ok=True)


@pytest.mark.parametrize(("over_rows", "value"), [("mean", math.nan), ("sum", 3.0)])
def test_weights_fed_by_hand_may_cancel(over_rows: Any, value: float) -> None:
    metric = GlobalLoss(["a", "b"], over_rows)
    metric.update(torch.tensor([5.0, 1.0]), torch.tensor([1.0, 1.0]))
    metric.update(torch.tensor([-2.0, 1.0]), torch.tensor([-1.0, 1.0]))
    other = 2.0 if over_rows == "sum" else 1.0
    truth = {"loss/a": value, "loss/b": other, "loss": (value + other) / 2 if over_rows == "sum" else other}
    assert numbers(metric.compute()) == pytest.approx(truth, nan_ok=True)


@pytest.mark.parametrize("over_rows", ["mean", "sum"])
def test_weights_of_0_fed_by_hand_are_no_data(over_rows: Any) -> None:
    metric = GlobalLoss(["a", "b"], over_rows)
    for _ in range(2):
        metric.update(torch.tensor([0.0, 4.0]), torch.tensor([0.0, 1.0]))
    value = 8.0 if over_rows == "sum" else 4.0
    assert numbers(metric.compute()) == pytest.approx({"loss/a": math.nan, "loss/b": value, "loss": value}, nan_ok=True)


def test_sums_that_cancel_are_merged_saved_and_loaded_as_data() -> None:
    first, second = GlobalLoss(None, "sum"), GlobalLoss(None, "sum")
    first.update(torch.tensor(5.0), 1)
    second.update(torch.tensor(-2.0), -1)
    first.merge_state(second)
    assert first.compute()["loss"].item() == 3.0
    first.persistent(True)
    loaded = GlobalLoss(None, "sum")
    loaded.persistent(True)
    loaded.load_state_dict(first.state_dict())
    assert loaded.compute()["loss"].item() == 3.0
    assert first.clone().compute()["loss"].item() == 3.0


# A normalizer of 0.

ZEROS: dict[str, Any] = {
    "int": 0,
    "float": 0.0,
    "minus": -0.0,
    "0-dim": torch.tensor(0.0),
    "0-dim of integers": torch.tensor(0),
    "of each task": torch.zeros(3),
}


@pytest.mark.parametrize("global_batch", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("normalizer", ZEROS.values(), ids=ZEROS)
def test_a_normalizer_of_0_is_no_data(normalizer: Any, reduction: Any, global_batch: bool) -> None:
    loss = make("mean", reduction, global_batch=global_batch)
    logits, labels, weights = inputs(CANCEL)
    head = torch.ones((), dtype=torch.float64, requires_grad=True)
    losses = loss(logits * head, labels, weights, normalizer=normalizer)
    assert numbers(losses) == dict.fromkeys(("loss/a", "loss/b", "loss/c", "loss"), 0.0)
    assert all(value.requires_grad for value in losses.values())
    losses["loss"].backward()
    assert head.grad is not None
    assert head.grad.item() == 0.0


@pytest.mark.parametrize("global_batch", [False, True])
@pytest.mark.parametrize("normalizer", [0, 0.0, torch.tensor(0.0), torch.zeros(1)])
def test_a_normalizer_of_0_is_no_data_of_one_task(normalizer: Any, global_batch: bool) -> None:
    loss = Loss("bce_with_logits", global_batch=global_batch)
    logits = torch.tensor([1.0, -3.0], requires_grad=True)
    value = loss(logits, torch.ones(2), normalizer=normalizer)
    value.backward()
    assert value.item() == 0.0
    assert logits.grad is not None
    assert logits.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("task_weights", [None, [2.0, 3.0, 5.0]], ids=["", "task_weights"])
@pytest.mark.parametrize("global_batch", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_a_task_of_normalizer_0_is_left_out(
    dtype: torch.dtype, reduction: Any, global_batch: bool, task_weights: list[float] | None
) -> None:
    loss = make("mean", reduction, task_weights=task_weights, global_batch=global_batch)
    logits, labels, weights = inputs(CANCEL)
    logits.requires_grad_()
    losses = loss(logits, labels, weights, normalizer=torch.tensor([4, 0, 8], dtype=dtype))
    values = {"loss/a": loss_sum(0, CANCEL) / 4, "loss/b": 0.0, "loss/c": loss_sum(2, CANCEL) / 8}
    factors = task_weights or [1.0, 1.0, 1.0]
    present = [factors[0] * values["loss/a"], factors[2] * values["loss/c"]]
    assert numbers(losses) == pytest.approx({**values, "loss": REDUCE[reduction](present)}, rel=1e-12)
    losses["loss"].backward()
    assert logits.grad is not None
    for task, divisor in enumerate((4.0, math.inf, 8.0)):
        share = factors[task] / (divisor * (2 if reduction == "mean" else 1))
        slopes = [share * w[task] * (1 / (1 + math.exp(-x[task])) - y[task]) for x, y, w in zip(LOGITS, LABELS, CANCEL)]
        assert logits.grad[:, task].tolist() == pytest.approx(slopes, rel=1e-12)


def test_a_normalizer_of_0_counts_the_rows_in_the_running_sums() -> None:
    loss = make()
    loss(*inputs(CANCEL), normalizer=0)
    truth = expected(CANCEL, "mean", "mean", "rows", True)
    assert numbers(loss.train_metric.compute()) == pytest.approx(truth, rel=1e-12)


@pytest.mark.parametrize("normalizer", [0, torch.tensor(0.0), torch.tensor([4.0, 0.0, 8.0])])
@pytest.mark.usefixtures("new_compiler")
def test_a_compiled_loss_has_the_same_rule(normalizer: Any) -> None:
    loss = make()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    logits, labels, weights = inputs(CANCEL)
    losses = compiled(logits.requires_grad_(), labels, weights, normalizer=normalizer)
    losses["loss"].backward()
    assert losses["loss/b"].item() == 0.0
    assert logits.grad is not None
    assert logits.grad[:, 1].tolist() == [0.0, 0.0]
    some = isinstance(normalizer, Tensor) and normalizer.ndim == 1
    mean = (loss_sum(0, CANCEL) / 4 + loss_sum(2, CANCEL) / 8) / 2
    assert losses["loss"].item() == pytest.approx(mean if some else 0.0, rel=1e-12)
