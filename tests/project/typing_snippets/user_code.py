"""A user's code, in which a type checker must find no error and no Any; it runs, too. ``test_typing.py`` does both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from typing_extensions import assert_type

from twloss import (
    GlobalLoss,
    Loss,
    LossType,
    MultiTaskLoss,
    RankingQuality,
    TaskMetric,
    build_loss,
    build_multi_task_loss,
    get_global_loss_detached,
)

TASKS = ["like", "reply"]


class Ranker(nn.Module):
    """A model with the loss attached."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.Linear(3, len(TASKS))
        self.loss = MultiTaskLoss("bce_with_logits", TASKS, pos_weights={"like": 1.0, "reply": 27.3}, quality=True)

    def forward(self, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The losses of a batch."""
        return self.loss(self.heads(features), labels)


class Pinball(nn.Module):
    """A loss function that is a module."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The unreduced loss."""
        return (labels - logits).abs()


class Uncertainty(nn.Module):
    """A reduction over tasks with parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(torch.zeros(len(TASKS)))

    def forward(self, losses: Tensor, present: Tensor) -> Tensor:
        """The global loss."""
        return (losses * (-self.log_variance).exp() + self.log_variance).where(present, 0.0).sum()


def mean_of_present(losses: Tensor, *, present: Tensor) -> Tensor:
    """A reduction over tasks that is a function, and is told which have data."""
    return losses.sum() / present.sum()


def listwise(logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
    """A loss function that couples rows, and is told which count."""
    return -labels * logits.where(valid, -torch.inf).log_softmax(0).where(valid, 0.0)


def squared_error(logits: Tensor, labels: Tensor) -> Tensor:
    """A loss function that is a function."""
    return F.mse_loss(logits, labels, reduction="none")


def train() -> None:
    """Train through the loss, and log it."""
    model = Ranker()
    losses = model(torch.randn(8, 3), torch.ones(8, 2))
    losses["loss"].backward()
    for key, value in model.loss.train_metric.compute().items():
        assert_type(key, str)
        assert_type(value, Tensor)
    model.eval()
    assert_type(model.loss.eval_metric, GlobalLoss)
    model.loss.eval_metric.reset()
    assert_type(model.loss.train_quality, RankingQuality)
    assert_type(model.loss.train_quality.compute(), dict[str, Tensor])


def multi_task_losses() -> None:
    """Tensors and mappings, in every combination that a model may have."""
    loss = MultiTaskLoss(LossType.BCE_WITH_LOGITS, ("like", "reply"), task_weights=[1.0, 2.0], mean_over="weights")
    logits, labels = torch.zeros(4, 2, requires_grad=True), torch.ones(4, 2)
    weights, normalizer = torch.ones(4), torch.tensor(10.0)
    heads = {task: torch.zeros(4) for task in TASKS}
    observed: Mapping[str, Tensor] = {task: torch.ones(4, 1) for task in TASKS}
    assert_type(loss(logits, labels), dict[str, Tensor])
    assert_type(loss(logits, labels, weights), dict[str, Tensor])
    assert_type(loss(heads, observed, dict.fromkeys(TASKS, weights)), dict[str, Tensor])
    assert_type(loss(heads, labels, weights=weights, normalizer=normalizer), dict[str, Tensor])
    assert_type(loss(logits=logits, labels=labels, normalizer=10), dict[str, Tensor])
    assert_type(loss.forward(logits, labels), dict[str, Tensor])
    assert_type(loss(logits, labels)["loss"].item(), float | int | bool)


def one_task_losses() -> None:
    """The one-task form."""
    loss = Loss("bce_with_logits", pos_weight=2.0, ignore_index=-1)
    logits, labels = torch.zeros(4), torch.ones(4)
    assert_type(loss(logits, labels), Tensor)
    assert_type(loss(logits, labels, labels, normalizer=4.0), Tensor)
    assert_type(loss.train_metric.compute(), dict[str, Tensor])
    assert_type(Loss(LossType.CROSS_ENTROPY)(torch.zeros(4, 3), torch.ones(4, dtype=torch.int64)), Tensor)


def callables() -> None:
    """Loss functions and reductions over tasks, each as a function, a lambda and a module."""
    logits, labels = torch.zeros(4, 2), torch.ones(4, 2)
    for loss_type in (squared_error, listwise, Pinball(), nn.BCEWithLogitsLoss(reduction="none")):
        assert_type(Loss(loss_type)(logits, labels), Tensor)
    MultiTaskLoss(squared_error, TASKS, "mean", mean_of_present, global_batch=True)
    loss = MultiTaskLoss(lambda x, y: (x - y) ** 2, TASKS, "mean", Uncertainty(), global_batch=True)
    assert_type(loss(logits, labels), dict[str, Tensor])
    MultiTaskLoss(torch.sub, TASKS, global_reduction=first, global_batch=True)
    MultiTaskLoss(torch.sub, TASKS, global_reduction=lambda losses: losses.square().mean(), global_batch=True)
    MultiTaskLoss("bce_with_logits", TASKS, pos_weights=torch.ones(2), task_weights=3)


def tasks_of_different_kinds() -> None:
    """A loss type for each task."""
    loss = MultiTaskLoss(
        {"like": "bce_with_logits", "reply": nn.MSELoss(reduction="none")},
        TASKS,
        pos_weights={"like": 2.0},
        ignore_index={"reply": -1},
    )
    assert_type(
        loss({"like": torch.zeros(4), "reply": torch.ones(0)}, {"like": torch.ones(4), "reply": torch.ones(0)}),
        dict[str, Tensor],
    )
    MultiTaskLoss({"like": LossType.BCE_WITH_LOGITS, "reply": lambda x, y: (x - y) ** 2}, TASKS)
    MultiTaskLoss({"like": squared_error, "reply": Pinball()}, TASKS)
    RankingQuality(TASKS, ignore_index={"like": -1})


def segments() -> None:
    """Rows told apart, by ids of a row, or of a row and task."""
    names = ["DE", "US"]
    loss = MultiTaskLoss("bce_with_logits", TASKS, segments={"country": names, "surface": 3}, quality=True)
    logits, labels, ids = torch.zeros(4, 2), torch.ones(4, 2), torch.zeros(4, dtype=torch.int64)
    by_task = dict.fromkeys(TASKS, ids)
    assert_type(loss(logits, labels, segments={"country": ids, "surface": by_task}), dict[str, Tensor])
    assert_type(loss.segments, dict[str, tuple[str, ...] | int] | None)
    one = Loss("bce_with_logits", segments={"day": 7})
    assert_type(one(logits[:, 0], labels[:, 0], segments={"day": ids}), Tensor)
    metric = GlobalLoss(TASKS, segments={"day": 7})
    assert_type(metric(torch.zeros(9, 2), torch.ones(9, 2)), dict[str, Tensor])
    quality = RankingQuality(TASKS, segments={"country": ("DE",)}, window=2)
    quality.update(logits, labels, segments={"country": ids})
    assert_type(quality(logits, labels, segments={"country": by_task}), dict[str, Tensor])
    assert_type(quality.segments, dict[str, tuple[str, ...] | int] | None)


def first(losses: Tensor) -> Tensor:
    """A reduction over tasks that is a function."""
    return losses[0]


def builders() -> None:
    """The functions that make the losses."""
    logits, labels = torch.zeros(4, 2), torch.ones(4, 2)
    assert_type(build_loss(LossType.BCE_WITH_LOGITS), Loss)
    assert_type(build_loss("bce_with_logits", reduction="mean")(logits, labels), Tensor)
    assert_type(build_multi_task_loss(squared_error, TASKS), MultiTaskLoss)
    losses = build_multi_task_loss("bce_with_logits", tasks=TASKS, pos_weights=[1.0, 27.3])(logits, labels)
    assert_type(losses, dict[str, Tensor])
    assert_type(get_global_loss_detached(losses["loss"], weight=4), Tensor)
    assert_type(get_global_loss_detached(nn.Parameter(torch.ones(()))), Tensor)
    assert_type(get_global_loss_detached(losses), dict[str, Tensor])
    assert_type(get_global_loss_detached(losses, weight=dict.fromkeys(losses, 4.0)), dict[str, Tensor])
    view: Mapping[str, Tensor] = losses
    assert_type(get_global_loss_detached(view, "mean", weight=torch.tensor(4)), dict[str, Tensor])


def over_a_mesh(mesh: DeviceMesh | None = None) -> None:
    """The ranks as a mesh."""
    Loss("bce_with_logits", process_group=mesh)
    MultiTaskLoss("bce_with_logits", TASKS, global_batch=True, process_group=mesh["dp"] if mesh else None)
    GlobalLoss(TASKS, process_group=mesh)
    assert_type(get_global_loss_detached(torch.ones(()), process_group=mesh), Tensor)
    assert_type(get_global_loss_detached({"loss": torch.ones(())}, process_group=mesh), dict[str, Tensor])


def metrics() -> None:
    """Running sums that other training code feeds."""
    metric = GlobalLoss(TASKS, "mean", "max", task_weights=[1.0, 2.0], nan_strategy="ignore", sync_on_compute=True)
    loss_sum, weight = torch.tensor([30.0, 10.0]), torch.tensor([100, 100])
    metric.update(loss_sum, weight)
    metric.update(loss_sum=loss_sum, weight=100)
    assert_type(metric.compute(), dict[str, Tensor])
    assert_type(metric(loss_sum, weight), dict[str, Tensor])
    assert_type(metric.scalar("loss/like").compute(), Tensor)
    assert_type(metric.scalar("loss")(loss_sum, weight), Tensor)
    metric.plot()
    metric.plot([metric.compute(), metric.compute()])
    GlobalLoss(None).update(torch.tensor(3.0), 10)
    quality = RankingQuality(TASKS, ignore_index=float("nan"), window=2)
    quality.update({task: torch.zeros(4) for task in TASKS}, torch.ones(4, 2))
    assert_type(quality.compute(), dict[str, Tensor])
    assert_type(quality(torch.zeros(4, 2), torch.ones(4, 2)), dict[str, Tensor])
    assert_type(LossType("cross_entropy"), LossType)
    assert_type([kind.value for kind in LossType], list[str])


class Above(TaskMetric):
    """A metric of one's own."""

    def __init__(self, tasks: Sequence[str], threshold: float, window: int | None = None) -> None:
        super().__init__(tasks, sums=2, window=window, rule={"threshold": threshold})
        self.threshold = threshold

    def update(self, values: Tensor) -> None:
        """Add a batch."""
        self._add(self._sum_batch(values))

    def _sum_batch(self, values: Tensor) -> Sequence[Tensor | float]:
        return (values > self.threshold).double().sum(0), len(values)

    def _keys(self) -> dict[str, bool | None]:
        return dict.fromkeys(self.tasks or (), True)

    def _results(self, sums: Tensor) -> Sequence[Tensor]:
        return (sums[0] / sums[1]).unbind()


def metrics_of_ones_own() -> None:
    """A subclass of the base of all."""
    metric = Above(TASKS, 0.5, window=3)
    metric.update(torch.ones(4, 2))
    assert_type(metric.compute(), dict[str, Tensor])
    assert_type(metric.compute_async().wait(), dict[str, Tensor])


PARTS = [
    train,
    multi_task_losses,
    one_task_losses,
    callables,
    tasks_of_different_kinds,
    segments,
    builders,
    over_a_mesh,
    metrics,
    metrics_of_ones_own,
]
