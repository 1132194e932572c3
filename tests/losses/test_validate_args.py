"""``validate_args=True``: labels that can't be, and negative weights, are counted and told by compute()."""

from __future__ import annotations

import copy
import math
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.support.pairwise import pairwise
from tests.support.rank_pool import RankPool
from twloss import GlobalLoss, Loss, MultiTaskLoss, RankingQuality, TaskMetric, global_sums

TASKS = ["like", "reply"]
Faults = dict[str, dict[str, int]]


def squared(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits - labels).square()


def batch(seed: int, rows: int = 48) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels and weights; labels from -1 to 255 and NaN, weights from -2 to 2 with many of 0."""
    generator = torch.Generator().manual_seed(seed)
    choices = torch.tensor([0.0, 1.0, 0.5, 1.0 + 1e-6, -1e-6, -1.0, 255.0, math.inf, math.nan])
    labels = choices[torch.randint(len(choices), (rows, 2), generator=generator)]
    weights = torch.randint(-2, 3, (rows, 2), generator=generator).float()
    return torch.randn(rows, 2, generator=generator), labels, weights


def faults_of(*batches: tuple[Tensor, ...], missing: float | None = None, weighted: bool = True) -> Faults:
    """By a loop over rows."""
    found: Faults = {"labels": dict.fromkeys(TASKS, 0), "weights": dict.fromkeys(TASKS, 0)}
    for _, labels, weights in batches:
        for t, task in enumerate(TASKS):
            for y, w in zip(labels[:, t].tolist(), weights[:, t].tolist()):
                is_missing = missing is not None and (math.isnan(y) if math.isnan(missing) else y == missing)
                if is_missing or (weighted and w == 0):
                    continue
                found["labels"][task] += not 0 <= y <= 1
                found["weights"][task] += weighted and w < 0
    return found


def told_by(compute: Callable[[], object]) -> Faults:
    """The counts in the warnings of compute()."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compute()
    found: Faults = {"labels": dict.fromkeys(TASKS, 0), "weights": dict.fromkeys(TASKS, 0)}
    for message in (str(each.message) for each in caught):
        for name, text in (("labels", r"no class\): ([^;]*)"), ("weights", r"negative weights: ([^;]*)")):
            if match := re.search(text, message):
                found[name] |= {task: int(n) for task, n in (each.split(": ") for each in match[1].split(", "))}
    return found


NONE = faults_of()


@pytest.mark.usefixtures("new_compiler")
@pairwise(
    way=["eager", "fused", "compiled", "no gradient", "gradient by labels", "global_batch"],
    weighted=[True, False],
    missing=[None, -1.0, math.nan],
    pos_weights=[None, [2.0, 3.0]],
    mean_over=["rows", "weights"],
    quality=[False, True],
    rows=[5, 48, 1024],
)
def test_compute_warns_with_the_counts_of_all_steps(
    way: str,
    weighted: bool,
    missing: float | None,
    pos_weights: Any,
    mean_over: Any,
    quality: bool,
    rows: int,
) -> None:
    options: dict[str, Any] = {"pos_weights": pos_weights, "ignore_index": missing, "mean_over": mean_over}
    options |= {"quality": quality, "fused": way == "fused", "global_batch": way == "global_batch"}
    loss = MultiTaskLoss("bce_with_logits", TASKS, validate_args=True, **options)
    call: Any = torch.compile(loss, fullgraph=True, backend="aot_eager") if way == "compiled" else loss
    batches = [batch(seed, rows) for seed in range(3)]
    for logits, labels, weights in batches:
        logits.requires_grad_(way != "no gradient")
        labels.requires_grad_(way == "gradient by labels")
        call(logits, labels, weights if weighted else None)
    expected = faults_of(*batches, missing=missing, weighted=weighted)
    assert told_by(loss.train_metric.compute) == expected
    assert told_by(loss.eval_metric.compute) == NONE
    loss.train_metric.reset()
    assert told_by(loss.train_metric.compute) == NONE


def test_values_and_gradients_are_those_of_a_loss_that_does_not_count() -> None:
    """Silently wrong ones included."""
    results = []
    for validates in (False, True):
        loss = MultiTaskLoss("bce_with_logits", TASKS, ignore_index=math.nan, validate_args=validates)
        logits, labels, weights = batch(0)
        losses = loss(logits.requires_grad_(), labels.nan_to_num(0.5, 2.0), weights)
        results.append((losses, torch.autograd.grad(losses["loss"], logits), loss.train_metric.totals[0, 0, :3]))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_nothing_is_told_unasked_nor_where_all_is_well() -> None:
    loss = MultiTaskLoss("bce_with_logits", TASKS)
    logits, labels, weights = batch(0)
    loss(logits, labels.nan_to_num(-3.0, -3.0), weights)
    loss.train_metric.compute()  # a warning is an error here
    loss = MultiTaskLoss("bce_with_logits", TASKS, validate_args=True)
    loss(logits, labels.nan_to_num(0.0).clamp(0, 1), weights.abs())
    loss.train_metric.compute()


def test_class_labels_that_are_none_have_a_loss_of_infinity_and_are_counted() -> None:
    """A class that only another task has is none of this task's either."""
    types: dict[str, Any] = dict.fromkeys(TASKS, "cross_entropy")
    loss = MultiTaskLoss(types, TASKS, validate_args=True, ignore_index=-100)
    logits = {"like": torch.zeros(4, 2, requires_grad=True), "reply": torch.zeros(5, 5, requires_grad=True)}
    labels = {"like": torch.tensor([0, -100, 2, 1]), "reply": torch.tensor([-1, 4, 5, 255, 0])}
    losses = loss(logits, labels)
    assert losses["loss/like"].item() == losses["loss/reply"].item() == math.inf
    counts: Faults = {"labels": {"like": 1, "reply": 3}, "weights": dict.fromkeys(TASKS, 0)}
    assert told_by(loss.train_metric.compute) == counts
    # Of the rows that are right, the gradient is that of softmax.
    (grad,) = torch.autograd.grad(losses["loss/reply"], logits["reply"])
    assert grad[4].tolist() == pytest.approx([-0.16, 0.04, 0.04, 0.04, 0.04])


def test_class_labels_in_rows_that_do_not_count_are_not_counted() -> None:
    loss = Loss("cross_entropy", validate_args=True)
    result = loss(torch.zeros(3, 2), torch.tensor([7, 1, -1]), torch.tensor([0.0, 1.0, 0.0]))
    assert result.item() == pytest.approx(math.log(2) / 3)
    loss.train_metric.compute()


def test_of_a_single_task_the_counts_have_its_key() -> None:
    loss = Loss("bce_with_logits", validate_args=True)
    loss(torch.zeros(2, 2), torch.tensor([[2, 1], [0, -1]]), torch.tensor([[1.0, -1.0], [1.0, 1.0]]))
    message = r"got invalid labels \(outside of \[0, 1\], or no class\): loss: 2; negative weights: loss: 1$"
    with pytest.warns(UserWarning, match=message):
        loss.train_metric.compute()


def test_labels_of_a_callable_may_be_anything_and_the_groups_counts_are_in_the_tasks_order() -> None:
    types: dict[str, Any] = {"price": squared, "like": "bce_with_logits", "cost": squared, "reply": "bce_with_logits"}
    loss = MultiTaskLoss(types, ["like", "price", "reply", "cost"], validate_args=True)
    logits = torch.zeros(3, 4)
    labels = torch.tensor([[2.0, -9, 1, 9], [0, 9, 3, 9], [-1, 9, 0, 9]])
    loss(logits, labels, torch.tensor([[1.0, -1, -1, 1], [1, -1, 1, -1], [1, 1, 1, 1]]))
    message = r"no class\): like: 2, reply: 1; negative weights: price: 2, reply: 1, cost: 1$"
    with pytest.warns(UserWarning, match=message):
        loss.train_metric.compute()


@pytest.mark.parametrize("options", [{}, {"window": 1}, {"window_rows": 60}], ids=str)
def test_a_quality_counts_by_itself(options: dict[str, Any]) -> None:
    quality = RankingQuality(TASKS, validate_args=True, **options)
    batches = [batch(seed) for seed in range(3)]
    for each in batches:
        quality.update(*each)
    assert told_by(quality.compute) == faults_of(*batches)
    view = quality.scalar("ne/like")
    view.reset()
    quality.update(*batch(3))
    assert told_by(view.compute) == faults_of(batch(3))
    quality(*batch(4))
    assert told_by(quality.compute_async().wait) == faults_of(*(batch(seed) for seed in range(5)))


def test_a_metric_that_is_fed_sums_counts_updates_of_negative_weight() -> None:
    metric = GlobalLoss(TASKS, validate_args=True)
    metric.update(torch.ones(2), torch.tensor([1.0, -1.0]))
    metric.update(torch.ones(2), -2)
    metric(torch.ones(2), 4.0)
    assert told_by(metric.compute)["weights"] == {"like": 1, "reply": 2}


def of_all_ranks(rank: int, is_global: bool) -> Faults:
    loss = MultiTaskLoss("bce_with_logits", TASKS, validate_args=True, global_batch=is_global)
    for seed in range(rank, 6, dist.get_world_size()):
        loss(*batch(seed))
    return told_by(loss.train_metric.compute)


@pytest.mark.parametrize("is_global", [False, True], ids=["local", "global_batch"])
def test_the_counts_are_of_all_ranks(ranks: RankPool, is_global: bool) -> None:
    assert ranks.run(of_all_ranks, is_global)[0] == faults_of(*(batch(seed) for seed in range(6)))


def test_copies_and_merges_have_the_counts() -> None:
    first, second = (RankingQuality(TASKS, validate_args=True) for _ in range(2))
    first.update(*batch(0))
    second.update(*batch(1))
    first.merge_state(second)
    expected = faults_of(batch(0), batch(1))
    assert told_by(first.compute) == expected
    assert told_by(copy.deepcopy(first).compute) == expected
    assert told_by(pickle.loads(pickle.dumps(first)).compute) == expected


@pytest.mark.parametrize("saved_by", [False, True])
@pytest.mark.parametrize("loaded_by", [False, True])
@pytest.mark.parametrize("options", [{}, {"window_rows": 60}], ids=str)
def test_a_checkpoint_has_no_counts_and_suits_both(saved_by: bool, loaded_by: bool, options: dict[str, Any]) -> None:
    """What is counted is what this run was given."""
    first = RankingQuality(TASKS, validate_args=saved_by, **options)
    second = RankingQuality(TASKS, validate_args=loaded_by, **options)
    alone = RankingQuality(TASKS, **options)
    for metric in (first, second):
        metric.persistent(True)
    batches = [batch(seed) for seed in range(2)]
    clean = [(logits, labels.nan_to_num(0.5, 2.0), weights) for logits, labels, weights in batches]
    first.update(*clean[0])
    with global_sums(first):
        second.load_state_dict(first.state_dict())
    assert told_by(second.compute) == NONE
    second.update(*clean[1])
    assert told_by(second.compute) == (faults_of(clean[1]) if loaded_by else NONE)
    for each in clean:
        alone.update(*each)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(second.compute(), alone.compute(), rtol=1e-12, atol=0, equal_nan=True)


def test_the_argument_is_checked_and_read_only() -> None:
    with pytest.raises(TypeError, match="validate_args: got int, expected a bool"):
        MultiTaskLoss("bce_with_logits", TASKS, validate_args=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="validate_args: got str, expected a bool"):
        RankingQuality(TASKS, validate_args="yes")  # type: ignore[arg-type]
    loss = MultiTaskLoss("bce_with_logits", TASKS, validate_args=True)
    assert loss.validate_args is True
    with pytest.raises(AttributeError, match="validate_args is read-only"):
        loss.validate_args = False
    quality = RankingQuality(TASKS, validate_args=True)
    with pytest.raises(ValueError, match="quality: got one with validate_args=True, expected the loss to have it"):
        MultiTaskLoss("bce_with_logits", TASKS, quality=quality)


class Counting(TaskMetric):
    """A metric of one's own that does not return what it says."""

    def __init__(self, **options: Any) -> None:
        super().__init__(["price"], 1, **options)

    def update(self, values: Tensor) -> None:
        """Add their sum."""
        self._add(self._sum_batch(values))

    def _sum_batch(self, values: Tensor) -> tuple[Tensor, ...]:
        return (values.sum(0),)

    def _keys(self) -> dict[str, bool | None]:
        return {"sum/price": None}

    def _results(self, sums: Tensor) -> tuple[Tensor, ...]:
        return tuple(sums.flatten())


def test_a_metric_of_ones_own_returns_the_faults_that_it_says() -> None:
    metric = Counting(validate_args=True)
    with pytest.raises(ValueError, match=r"_sum_batch: got 1 sums, expected 1, and last the faults \(2, tasks\)"):
        metric.update(torch.ones(2, 1))
    assert metric.update_count == 0


def test_sums_with_counts_and_without_are_not_merged() -> None:
    first, second = RankingQuality(TASKS, validate_args=True), RankingQuality(TASKS)
    for one, other in ((first, second), (second, first)):
        with pytest.raises(ValueError, match=r"incoming_state: totals: got shape .*, as with the same validate_args"):
            one.merge_state(other)
