"""``normalizer``: the gradients of uneven micro-batches on uneven ranks add up to that of the one big batch."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.support import reference
from tests.support.cases import FORMS, Ranker, Rows, Settings, columns, joined, random_rows, split
from tests.support.gradient_errors import exact_gradients, flat_gradients, gradient_error
from tests.support.rank_pool import RankPool
from twloss import Loss, MultiTaskLoss, get_global_loss_detached

# Rows by micro-batch and rank: three micro-batches, one of them empty on a rank.
WINDOW = {1: [[5], [2], [9]], 2: [[3, 10], [0, 4], [6, 1]], 3: [[3, 1, 0], [2, 7, 5], [0, 0, 1]]}


def window(case: Settings, world_size: int) -> list[list[Rows]]:
    """The micro-batches of one optimizer step, by rank."""
    sizes = WINDOW[world_size]
    return split(random_rows(case, sum(map(sum, sizes)), 3, weighted=True), sizes)


def weights_of(case: Settings, rows: Rows) -> Tensor:
    """What each task's mean of these rows divides by, ``(tasks,)``."""
    valid = torch.ones_like(rows.labels) if case.ignore_index is None else (rows.labels != case.ignore_index)
    if case.mean_over == "rows":
        return valid.double().sum(0)
    assert rows.weights is not None
    return (rows.weights * valid).sum(0)


def accumulate(
    rank: int, case: Settings, micro_batches: list[list[Rows]], counts: str
) -> tuple[list[list[float]], float]:
    """One rank's window, as a user would write it; the gradients, and the sum of the losses."""
    distributed = dist.is_initialized()
    ranker = case.ranker(global_batch=True)
    model: nn.Module = ranker
    if distributed:
        model = DistributedDataParallel(model)
    mine = [parts[rank] for parts in micro_batches]
    by_hand = counts == "by hand"
    total = sum(weights_of(case, rows) if by_hand else ranker.loss.count(rows.labels, rows.weights) for rows in mine)
    assert isinstance(total, Tensor)
    if distributed:
        dist.all_reduce(total)
    value = 0.0
    for step, rows in enumerate(mine):
        last = step == len(mine) - 1
        with contextlib.nullcontext() if last or not isinstance(model, DistributedDataParallel) else model.no_sync():
            part = model(rows, total)["loss"]
            part.backward()
        value += part.item()
    return flat_gradients(model), value


CASES = {
    "mean": Settings(),
    "sum over tasks": Settings(global_reduction="sum", pos_weights=[1.0, 5.0, 27.3], task_weights=[1.0, 0.5, 2.0]),
    "missing labels": Settings(ignore_index=-1.0),
    "mean over weights": Settings(mean_over="weights", ignore_index=-1.0),
}


def expect_exact(
    case: Settings, micro_batches: list[list[Rows]], results: list[tuple[list[list[float]], float]]
) -> None:
    rows = joined([part for parts in micro_batches for part in parts])
    exact = exact_gradients(case, rows)
    expected = reference.losses(columns(case, rows), case.rule())["loss"]
    for gradients, value in results:
        assert gradient_error(gradients, exact) <= 1e-12
        assert value == pytest.approx(expected, rel=1e-12)


COUNTS = ("by hand", "by the loss")
# GIVEN tasks have no rows to count.
counted_in_every_form = pytest.mark.parametrize(
    ("counts", "form"), [(counts, form) for counts in COUNTS for form in FORMS if (counts, form) != (COUNTS[1], "sums")]
)


@counted_in_every_form
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_accumulation_on_ranks_is_exact(ranks: RankPool, case: Settings, counts: str, form: str) -> None:
    case = replace(case, form=form)
    micro_batches = window(case, ranks.world_size)
    expect_exact(case, micro_batches, ranks.run(accumulate, case, micro_batches, counts))


@counted_in_every_form
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_accumulation_in_one_process_is_exact(case: Settings, counts: str, form: str) -> None:
    case = replace(case, form=form)
    micro_batches = window(case, 1)
    expect_exact(case, micro_batches, [accumulate(0, case, micro_batches, counts)])


def test_the_usual_division_by_the_number_of_micro_batches_is_not() -> None:
    """Each micro-batch's own mean over K: a row of a small micro-batch counts more than one of a large one."""
    case = CASES["mean"]
    micro_batches = [parts[0] for parts in window(case, 1)]
    model = Ranker(case.loss(), case.tasks)
    for rows in micro_batches:
        (model(rows)["loss"] / len(micro_batches)).backward()
    assert gradient_error(flat_gradients(model), exact_gradients(case, joined(micro_batches))) > 0.05


def test_a_number_or_a_0_dim_tensor_serves_all_tasks() -> None:
    logits, labels = torch.randn(6, 2, dtype=torch.float64), torch.rand(6, 2)
    loss = MultiTaskLoss("bce_with_logits", ["a", "b"])
    expected = F.binary_cross_entropy_with_logits(logits, labels.double(), reduction="none").sum(0) / 40
    for normalizer in (40, 40.0, torch.tensor(40), torch.tensor([40.0, 40.0])):
        result = loss(logits, labels, normalizer=normalizer)
        assert [result["loss/a"].item(), result["loss/b"].item()] == pytest.approx(expected.tolist(), rel=1e-12)
        assert result["loss"].item() == pytest.approx(expected.mean().item(), rel=1e-12)
    one = Loss("bce_with_logits")(logits[:, 0], labels[:, 0], normalizer=torch.tensor([40]))
    assert one.item() == pytest.approx(expected[0].item(), rel=1e-12)


@pytest.mark.parametrize("global_batch", [False, True])
@pytest.mark.parametrize("shape", [(), (2,)])
def test_a_normalizer_gets_no_gradient(shape: tuple[int, ...], global_batch: bool) -> None:
    """A total of learned weights, say, with a graph of its own."""
    logits = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    labels = torch.rand(6, 2, dtype=torch.float64)
    leaf = torch.full(shape, 20.0, dtype=torch.float64, requires_grad=True)
    loss = MultiTaskLoss("bce_with_logits", ["a", "b"], global_batch=global_batch)
    result = loss(logits, labels, normalizer=2 * leaf)
    result["loss"].backward()
    assert leaf.grad is None
    case = {
        task: [reference.Row(reference.bce_with_logits(x, y), reference.bce_slope(x, y)) for x, y in zip(*column)]
        for task, *column in zip(["a", "b"], logits.T.tolist(), labels.T.tolist())
    }
    rule = reference.Rule(normalizer=40.0)
    assert result["loss"].item() == pytest.approx(reference.losses(case, rule)["loss"], rel=1e-12)
    assert logits.grad is not None
    for slopes, column in zip(reference.gradients(case, rule).values(), logits.grad.T.tolist()):
        assert column == pytest.approx(slopes, rel=1e-12)


def test_a_task_that_is_absent_from_the_window_is_left_out_of_the_mean_over_tasks() -> None:
    logits, labels = torch.randn(3, 2, dtype=torch.float64), torch.tensor([[1.0, math.nan]] * 3)
    loss = MultiTaskLoss("bce_with_logits", ["a", "b"], ignore_index=math.nan)
    result = loss(logits, labels, normalizer=torch.tensor([10, 0]))
    assert result["loss"].item() == result["loss/a"].item() != 0.0
    # Absent from this micro-batch alone, it counts: its losses are in the others.
    result = loss(logits, labels, normalizer=torch.tensor([10, 10]))
    assert result["loss"].item() == pytest.approx(result["loss/a"].item() / 2, rel=1e-12)


def test_the_running_sums_are_of_rows_whatever_the_normalizer() -> None:
    loss = MultiTaskLoss("bce_with_logits", ["a"])
    loss(torch.zeros(4, 1), torch.ones(4, 1), normalizer=1000)
    assert loss.train_metric.compute()["loss"].item() == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize(("task_reduction", "reduction"), [("mean", "min"), ("mean", "max"), ("sum", "mean")])
def test_reductions_that_do_not_add_up_over_micro_batches_are_refused(task_reduction: Any, reduction: Any) -> None:
    loss = MultiTaskLoss("bce_with_logits", ["a"], task_reduction, reduction, global_batch=True)
    with pytest.raises(ValueError, match="normalizer"):
        loss(torch.zeros(1, 1), torch.ones(1, 1), normalizer=4)
    assert not loss.train_metric.update_called


def test_a_callable_reduction_is_refused() -> None:
    loss = MultiTaskLoss("bce_with_logits", ["a"], "mean", Tensor.sum, global_batch=True)
    with pytest.raises(ValueError, match="normalizer"):
        loss(torch.zeros(1, 1), torch.ones(1, 1), normalizer=4)


# Uneven numbers of batches.


def train_to_the_end(rank: int, case: Settings, steps: list[list[Rows]]) -> tuple[Any, dict[str, float]]:
    """Each rank's batches, and an empty one on the rank that has run out."""
    ranker = case.ranker(global_batch=True)
    model = DistributedDataParallel(ranker)
    gradients = []
    for parts in steps:
        model.zero_grad()
        model(parts[rank])["loss"].backward()
        gradients.append(flat_gradients(model))
    return gradients, {key: value.item() for key, value in ranker.loss.train_metric.compute().items()}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reduction", ["mean", "min", "max", "median", "sum"])
def test_three_batches_against_two_stay_exact(two_ranks: RankPool, reduction: Any, form: str) -> None:
    case = Settings(global_reduction=reduction, form=form)
    sizes = [[4, 3], [4, 3], [4, 0]]
    steps = split(random_rows(case, 18, 2, weighted=True), sizes)
    rows = joined([part for parts in steps for part in parts])
    expected = reference.losses(columns(case, rows), case.rule())
    for gradients, computed in two_ranks.run(train_to_the_end, case, steps):
        assert computed == pytest.approx(expected, rel=1e-12)
        for parts, ours in zip(steps, gradients):
            assert gradient_error(ours, exact_gradients(case, joined(parts))) <= 1e-12


def test_the_total_may_come_from_the_helper_for_detached_values() -> None:
    rows = torch.tensor([3.0, 5.0])
    with pytest.warns(UserWarning, match="reduction='sum'"):
        assert get_global_loss_detached(rows, "sum").tolist() == [3.0, 5.0]
