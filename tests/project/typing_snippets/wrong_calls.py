# mypy: ignore-errors
"""Calls that a type checker must refuse: the comment behind each has mypy's error codes. See ``test_typing.py``.

None of it runs, but for the definitions; the first line is for the check of this repository's own files.
"""

from __future__ import annotations

import torch
from torch import Tensor

from twloss import (
    GlobalLoss,
    Loss,
    LossType,
    MultiTaskLoss,
    RankingQuality,
    build_loss,
    build_multi_task_loss,
    get_global_loss_detached,
)

TASKS = ["like", "reply"]


def of_one_argument(logits: Tensor) -> Tensor:
    """No loss function: it has no labels."""
    return logits


def to_a_number(losses: Tensor) -> float:
    """No reduction over tasks: it leaves the graph."""
    return losses.sum().item()


def losses_of_one_task() -> None:
    """Loss's arguments."""
    Loss()  # E: call-arg
    Loss(5)  # E: arg-type
    Loss(None)  # E: arg-type
    Loss(of_one_argument)  # E: arg-type
    Loss(LossType.BCE)  # E: attr-defined
    Loss("bce_with_logits", 1)  # E: arg-type
    Loss("bce_with_logits", "mean", 2.0)  # E: call-arg
    Loss("bce_with_logits", reductions="mean")  # E: call-arg
    Loss("bce_with_logits", "avg")  # E: arg-type
    Loss("bce")  # E: arg-type
    MultiTaskLoss("bce_with_logits", TASKS, global_reduction="avg")  # E: arg-type
    MultiTaskLoss("bce_with_logits", TASKS, mean_over="tasks")  # E: arg-type
    Loss("bce_with_logits", pos_weights=2.0)  # E: call-arg
    Loss("bce_with_logits", pos_weight="2")  # E: arg-type
    Loss("bce_with_logits", mean_over=["rows"])  # E: arg-type
    Loss("bce_with_logits", ignore_index="-1")  # E: arg-type
    Loss("bce_with_logits", global_batch="yes")  # E: arg-type
    Loss("bce_with_logits", process_group=[0, 1])  # E: arg-type
    Loss("bce_with_logits", quality="ne")  # E: arg-type


def losses_of_many_tasks() -> None:
    """MultiTaskLoss's arguments."""
    MultiTaskLoss("bce_with_logits")  # E: call-arg
    MultiTaskLoss("bce_with_logits", 3)  # E: arg-type
    MultiTaskLoss("bce_with_logits", {"like", "reply"})  # E: arg-type
    MultiTaskLoss("bce_with_logits", [1, 2])  # E: list-item
    MultiTaskLoss("bce_with_logits", TASKS, None)  # E: arg-type
    MultiTaskLoss("bce_with_logits", TASKS, global_reduction=0)  # E: arg-type
    MultiTaskLoss("bce_with_logits", TASKS, global_reduction=to_a_number)  # E: arg-type
    MultiTaskLoss("bce_with_logits", TASKS, pos_weights="1")  # E: arg-type
    MultiTaskLoss("bce_with_logits", TASKS, pos_weights={"like": "1"})  # E: dict-item
    MultiTaskLoss("bce_with_logits", TASKS, pos_weight=1.0)  # E: call-arg
    MultiTaskLoss("bce_with_logits", TASKS, task_weight=1.0)  # E: call-arg
    MultiTaskLoss("bce_with_logits", TASKS, "mean", "mean", None, [1.0, 1.0])  # E: call-arg
    MultiTaskLoss("bce_with_logits", TASKS, window=10)  # E: call-arg


def calls(logits: Tensor, labels: Tensor) -> None:
    """What a loss is called with, and what it gives."""
    numbers: list[float] = []
    one, many = Loss("bce_with_logits"), MultiTaskLoss("bce_with_logits", TASKS)
    one(logits)  # E: call-arg
    one(logits, labels, weights="1")  # E: arg-type
    one(logits, labels, weight=labels)  # E: call-arg
    one(logits, labels, labels, 4.0)  # E: call-arg
    one(logits, labels, normalizer="4")  # E: arg-type
    one({"loss": logits}, labels)  # E: arg-type
    one(logits, [1, 0])  # E: arg-type
    one(logits, labels).keys()  # E: attr-defined
    many(logits)  # E: call-arg
    many(logits, target=labels)  # E: call-arg
    many([logits, logits], labels)  # E: arg-type
    many(logits, labels, weights=1.0)  # E: arg-type
    many(logits, labels, None, 4.0)  # E: call-arg
    many(logits, labels, normalizer=[4.0])  # E: arg-type
    many(logits, labels).backward()  # E: attr-defined
    many(logits, labels)[0].item()  # E: index
    many(logits, labels)["loss"] = 0.0  # E: assignment
    numbers.append(many(logits, labels)["loss"])  # E: arg-type
    one.train_metrics.compute()  # E: operator, union-attr
    many.train_qualities.compute()  # E: operator, union-attr


def metrics(loss_sum: Tensor) -> None:
    """What a metric is made of and called with, and what it gives."""
    GlobalLoss()  # E: call-arg
    GlobalLoss(2)  # E: arg-type
    GlobalLoss(TASKS, nan_strategy=None)  # E: arg-type
    GlobalLoss(TASKS, segments=["country"])  # E: arg-type
    GlobalLoss(TASKS, segments={"country": 2.0})  # E: dict-item
    metric = GlobalLoss(TASKS)
    metric.update(loss_sum)  # E: call-arg
    metric.update(loss_sum, weights=loss_sum)  # E: call-arg
    metric.update([30.0, 10.0], 100)  # E: arg-type
    metric(loss_sum, weight="100")  # E: arg-type
    metric.compute("loss")  # E: call-arg
    metric.compute().loss.item()  # E: attr-defined
    metric.scalar()  # E: call-arg
    metric.scalar(0)  # E: arg-type
    metric.scalar("loss").compute()["loss/like"]  # E: index
    metric.plot(axes=None)  # E: call-arg
    RankingQuality(TASKS, -1)  # E: call-arg
    RankingQuality(TASKS, window="10")  # E: arg-type
    RankingQuality(TASKS).update(loss_sum)  # E: call-arg
    RankingQuality(TASKS, segments={"day": 7}).update(loss_sum, loss_sum, segments=loss_sum)  # E: arg-type
    RankingQuality(TASKS, segments={"day": 7}).update(loss_sum, loss_sum, None, {"day": loss_sum})  # E: call-arg
    RankingQuality(TASKS)(loss_sum, loss_sum, "1")  # E: arg-type


def builders(loss: Tensor, losses: dict[str, Tensor]) -> None:
    """The functions' arguments, and what they give."""
    build_loss(5)  # E: arg-type
    build_loss("bce_with_logits", pos_weight=2.0)  # E: call-arg
    build_multi_task_loss("bce_with_logits", tasks=3)  # E: arg-type
    build_multi_task_loss("bce_with_logits", TASKS, task_weights=[1.0, 1.0])  # E: call-arg
    build_multi_task_loss("bce_with_logits", TASKS)(loss, loss).item()  # E: attr-defined
    get_global_loss_detached(3.0)  # E: call-overload
    get_global_loss_detached([loss])  # E: call-overload
    get_global_loss_detached(loss, "mean", 4.0)  # E: call-overload
    get_global_loss_detached(loss, weights=4.0)  # E: call-overload
    get_global_loss_detached(loss, weight={"loss": 4.0})  # E: call-overload
    get_global_loss_detached({"loss": 3.0})  # E: dict-item
    get_global_loss_detached(losses).item()  # E: attr-defined
    torch.abs(get_global_loss_detached(losses))  # E: arg-type
    torch.compile(Loss("bce_with_logits"))(loss)  # E: call-arg
