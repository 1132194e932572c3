"""A reduction over tasks that has a parameter named ``present`` is told which tasks have data."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.rank_pool import RankPool
from twloss import GlobalLoss, MultiTaskLoss

TASKS = ["a", "b", "c"]
PRICE = torch.tensor([0.5, 2.0, 4.0], dtype=torch.float64)
"""What a task without data adds in the reductions below: numbers that no loss here has."""


def combine(losses: Tensor, present: Tensor) -> Tensor:
    """The losses of the tasks with data, and a price for each task without."""
    assert present.dtype == torch.bool
    assert present.shape == losses.shape
    assert present.device == losses.device
    return torch.where(present, losses, PRICE.to(losses)).sum()


def by_keyword(losses: Tensor, *, present: Tensor) -> Tensor:
    """With a parameter that is given by name alone."""
    return combine(losses, present)


def optional(losses: Tensor, scale: float = 1.0, present: Tensor | None = None) -> Tensor:
    """With a parameter that has a default, and not the second one."""
    assert present is not None
    return scale * combine(losses, present)


def scaled(scale: float, losses: Tensor, present: Tensor) -> Tensor:
    """To be given its scale beforehand."""
    return scale * combine(losses, present)


class Combine(nn.Module):
    """A module."""

    def forward(self, losses: Tensor, present: Tensor) -> Tensor:
        """As the function."""
        return combine(losses, present)


class Combiner:
    """An object that can be called."""

    def __call__(self, losses: Tensor, present: Tensor) -> Tensor:
        """As the function."""
        return combine(losses, present)

    def method(self, losses: Tensor, present: Tensor) -> Tensor:
        """As the function."""
        return combine(losses, present)


TOLD: dict[str, Callable[[], Any]] = {
    "function": lambda: combine,
    "keyword-only": lambda: by_keyword,
    "default": lambda: optional,
    "partial": lambda: functools.partial(scaled, 1.0),
    "module": Combine,
    "object": Combiner,
    "method": lambda: Combiner().method,
    "compiled module": lambda: torch.compile(Combine(), backend="eager"),
}


def make(reduction: Any, tasks: list[str] = TASKS, **options: Any) -> MultiTaskLoss:
    return MultiTaskLoss("bce_with_logits", tasks, "mean", reduction, **{"global_batch": True, **options})


def batch(*absent: int) -> tuple[Tensor, Tensor]:
    """Two rows, in which the labels of some tasks are missing."""
    logits = torch.tensor([[0.0, 1.0, -2.0], [0.5, -1.0, 3.0]], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    labels[:, list(absent)] = -1.0
    return logits, labels


def expected(*absent: int) -> float:
    logits, labels = batch()
    values = F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(0).tolist()
    return math.fsum(PRICE[t].item() if t in absent else values[t] for t in range(3))


@pytest.mark.usefixtures("new_compiler")
@pytest.mark.parametrize("absent", [(), (1,), (0, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("told", TOLD.values(), ids=TOLD)
def test_it_is_told_in_forward_and_in_compute(told: Callable[[], Any], absent: tuple[int, ...]) -> None:
    loss = make(told(), ignore_index=-1)
    logits, labels = batch(*absent)
    value = loss(logits, labels)["loss"]
    assert value.item() == pytest.approx(expected(*absent), rel=1e-12)
    computed = loss.train_metric.compute()["loss"].item()
    assert computed == pytest.approx(math.nan if len(absent) == 3 else expected(*absent), rel=1e-12, nan_ok=True)
    (gradient,) = torch.autograd.grad(value, logits)
    for t in range(3):
        slopes = (logits[:, t].sigmoid() - labels[:, t]) / 2
        assert torch.allclose(gradient[:, t], 0 * slopes if t in absent else slopes, rtol=1e-12, atol=0)


def test_all_tasks_are_present_where_no_label_can_be_missing() -> None:
    loss = make(combine)
    assert loss(*batch())["loss"].item() == pytest.approx(expected(), rel=1e-12)
    assert loss.train_metric.compute()["loss"].item() == pytest.approx(expected(), rel=1e-12)


def test_no_task_is_present_in_a_batch_without_rows() -> None:
    loss = make(combine)
    logits = torch.zeros(0, 3, dtype=torch.float64, requires_grad=True)
    value = loss(logits, torch.zeros(0, 3))["loss"]
    assert value.item() == pytest.approx(PRICE.sum().item(), rel=1e-12)
    loss(*batch())
    assert loss.train_metric.compute()["loss"].item() == pytest.approx(expected(), rel=1e-12)


def test_a_task_is_present_once_a_step_had_a_label_of_it() -> None:
    loss = make(combine, ignore_index=-1)
    for absent in ((0, 1), (1, 2)):
        assert loss(*batch(*absent))["loss"].item() == pytest.approx(expected(*absent), rel=1e-12)
    assert loss.train_metric.compute()["loss"].item() == pytest.approx(expected(1), rel=1e-12)
    loss(*batch(0, 2))
    assert loss.train_metric.compute()["loss"].item() == pytest.approx(expected(), rel=1e-12)


def test_weights_that_cancel_make_a_task_absent() -> None:
    loss = make(combine, mean_over="weights")
    logits, labels = batch()
    weights = torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 1.0]], dtype=torch.float64)
    assert loss(logits, labels, weights)["loss"].item() == pytest.approx(expected(1), rel=1e-12)
    assert loss.train_metric.compute()["loss"].item() == pytest.approx(expected(1), rel=1e-12)


def test_a_metric_that_is_fed_by_hand_tells_its_reduction_too() -> None:
    reduction: Any = combine
    metric = GlobalLoss(TASKS, "mean", reduction)
    sums = torch.tensor([3.0, 0.0, 10.0], dtype=torch.float64), torch.tensor([2.0, 0.0, 5.0])
    assert metric(*sums)["loss"].item() == 1.5 + 2.0 + 2.0
    assert metric.compute()["loss"].item() == 1.5 + 2.0 + 2.0


def step_of_a_rank(rank: int) -> list[float]:
    """Each rank has labels of one task, so that on two ranks the last task has none."""
    loss = make(combine, ignore_index=-1)
    value = loss(*batch(*(t for t in range(3) if t != rank)))["loss"]
    return [value.item(), loss.train_metric.compute()["loss"].item()]


def test_a_task_is_present_where_any_rank_has_a_label_of_it(ranks: RankPool) -> None:
    truth = expected(*range(ranks.world_size, 3))
    for values in ranks.run(step_of_a_rank):
        assert values == pytest.approx([truth, truth], rel=1e-12)


@pytest.mark.usefixtures("new_compiler")
def test_it_is_told_in_compiled_code() -> None:
    loss = make(Combine(), ignore_index=-1)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for absent in ((), (1,), (0, 2)):
        assert compiled(*batch(*absent))["loss"].item() == pytest.approx(expected(*absent), rel=1e-12)


@pytest.mark.usefixtures("new_compiler")
def test_all_tasks_are_present_in_compiled_code_where_no_label_can_be_missing() -> None:
    compiled = torch.compile(make(combine), fullgraph=True, backend="aot_eager")
    assert compiled(*batch())["loss"].item() == pytest.approx(expected(), rel=1e-12)


# Reductions that are not told.


def plain(losses: Tensor) -> Tensor:
    """Without the parameter."""
    return (1 + losses.square()).sum()


def any_keywords(losses: Tensor, **others: object) -> Tensor:
    """With keywords of any name."""
    assert not others
    return plain(losses)


def any_arguments(*values: Tensor) -> Tensor:
    """With arguments of any number."""
    (losses,) = values
    return plain(losses)


@pytest.mark.parametrize("reduction", [plain, any_keywords, any_arguments, functools.partial(plain)])
def test_without_the_parameter_a_task_without_data_is_0(reduction: Any) -> None:
    loss = make(reduction, ignore_index=-1)
    logits, labels = batch()
    values = F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(0).tolist()
    truth = math.fsum([1 + values[0] ** 2, 1.0, 1 + values[2] ** 2])
    assert loss(*batch(1))["loss"].item() == pytest.approx(truth, rel=1e-12)
    assert loss.train_metric.compute()["loss"].item() == pytest.approx(truth, rel=1e-12)


# Learned uncertainty weighting, of which a task has labels in one batch of ten.


class Uncertainty(nn.Module):
    """Σ_t exp(-s_t)·L_t + s_t over the tasks that are present."""

    def __init__(self) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, losses: Tensor, present: Tensor) -> Tensor:
        """The weighted sum."""
        return torch.where(present, (-self.s).exp() * losses + self.s, 0.0).sum()


class UntoldUncertainty(Uncertainty):
    """The usual form: it is not told, and adds s_t for an absent task too."""

    def forward(self, losses: Tensor) -> Tensor:  # type: ignore[override]
        """The weighted sum."""
        return ((-self.s).exp() * losses + self.s).sum()


def train(reduction: Uncertainty, steps: int, rate: float) -> MultiTaskLoss:
    """Gradient descent on s alone; the second task has labels in each tenth batch."""
    loss = make(reduction, ["often", "rare"], ignore_index=-1)
    optimizer = torch.optim.SGD(reduction.parameters(), rate)
    for step in range(steps):
        optimizer.zero_grad()
        loss(*rare_batch(step))["loss"].backward()
        optimizer.step()
    return loss


def rare_batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    logits, labels = torch.rand(2, 4, 2, dtype=torch.float64, generator=generator)
    if step % 10 != 3:
        labels[:, 1] = -1.0
    return logits, labels


def test_its_parameters_are_trained_as_by_plain_torch() -> None:
    s = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    for step in range(60):
        logits, labels = rare_batch(step)
        total = torch.zeros((), dtype=torch.float64)
        for t in range(2 if step % 10 == 3 else 1):
            loss = F.binary_cross_entropy_with_logits(logits[:, t], labels[:, t])
            total = total + (-s[t]).exp() * loss + s[t]
        (gradient,) = torch.autograd.grad(total, s)
        s = (s - 0.3 * gradient).detach().requires_grad_()
    reduction = Uncertainty()
    losses = train(reduction, 60, 0.3)
    assert reduction.s.tolist() == pytest.approx(s.tolist(), rel=1e-12)
    computed = losses.train_metric.compute()
    weighted = [math.exp(-x) * computed[f"loss/{task}"].item() + x for x, task in zip(s.tolist(), ("often", "rare"))]
    assert computed["loss"].item() == pytest.approx(math.fsum(weighted), rel=1e-12)


def factor_of_the_rare_task(reduction: Uncertainty, rate: float) -> float:
    """What exp(-s) becomes where every loss is log 2."""
    loss = make(reduction, ["often", "rare"], ignore_index=-1)
    optimizer = torch.optim.SGD(reduction.parameters(), rate)
    logits = torch.zeros(2, 2, dtype=torch.float64)
    for step in range(1000):
        optimizer.zero_grad()
        loss(logits, torch.ones(2, 2) if step % 10 == 9 else torch.tensor([[1.0, -1.0]] * 2))["loss"].backward()
        optimizer.step()
    return math.exp(-reduction.s[1].item())


def test_the_weight_of_a_rare_task_becomes_that_of_its_loss() -> None:
    """At the minimum of exp(-s)·L + s, exp(-s) is 1 / L."""
    assert factor_of_the_rare_task(Uncertainty(), 0.5) == pytest.approx(1 / math.log(2), rel=1e-6)


def test_a_reduction_that_is_not_told_takes_a_rare_task_for_a_small_loss() -> None:
    """The naive version: over ten batches it adds s ten times and exp(-s)·L once, so exp(-s) nears 10 / L."""
    assert factor_of_the_rare_task(UntoldUncertainty(), 0.02) > 7 / math.log(2)
