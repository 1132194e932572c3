"""The losses that are attached to a model: what the caller passes, checked and aligned, through the stages.

Logits, labels and weights of a batch come in, the losses to train on go out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

from twloss.arguments import (
    TASK_REDUCTIONS,
    PerTask,
    check_choice,
    check_global_reduction,
    check_tasks,
    per_task_numbers,
    warn_unless_mean,
)
from twloss.batch import align
from twloss.loss_type import LossFunction, LossType
from twloss.ranking_quality import RankingQuality
from twloss.task_columns import TaskTensors, align_tasks
from twloss.task_sums import GlobalReduction
from twloss.tracked_loss import TrackedLoss

__all__ = ["Loss", "MultiTaskLoss"]


class Loss(TrackedLoss):
    """The loss of one task, with its running sums.

    With l the unreduced loss, w the weights and the sums over the valid rows: ``Σ w·l / N`` ("mean"), where N is the
    number of rows (``mean_over="rows"``) or ``Σ w`` ("weights"), or ``Σ w·l`` ("sum").

    Args:
        loss_type: a ``LossType``, its name, or a callable ``(logits, labels) -> loss`` that gives the unreduced loss in
            the labels' shape.
        reduction: "mean" or "sum".
        pos_weight: the factor of the positive term; BCE_WITH_LOGITS only.
        mean_over: "rows" or "weights".
        ignore_index: the label that says "missing", NaN allowed; such rows are in no sum and get no gradient.
        global_batch: return, on every rank, the loss of this step's rows of all ranks, with the gradient that makes
            DDP's average the gradient of one process. One collective in forward, in evaluation too, so every rank
            has to call it equally often: a rank that has run out of rows with an empty batch.
        process_group: the ranks to sum over; None: all.
        quality: True, or a ``RankingQuality`` to be copied, for running sums of the quality of the predictions, without
            the pos_weights, from the logits at hand; BCE_WITH_LOGITS only.

    Attributes:
        train_metric: the ``GlobalLoss`` that forward feeds in training mode; compute() gives ``{"loss": …}``.
        eval_metric: the one that it feeds in evaluation mode.
        train_quality: with ``quality``, the ``RankingQuality`` that forward feeds in training mode; else None.
        eval_quality: with ``quality``, the one that it feeds in evaluation mode; else None.

    Raises:
        TypeError: for an argument of a wrong type.
        ValueError: for an argument of a wrong value.

    Examples:
        >>> import torch
        >>> from twloss import Loss
        >>> loss = Loss("bce_with_logits")
        >>> loss(torch.tensor([0.0, 2.0]), torch.tensor([1, 1]))
        tensor(0.4100)
        >>> loss.train_metric.compute()
        {'loss': tensor(0.4100, dtype=torch.float64)}
    """

    def __init__(
        self,
        loss_type: LossType | str | LossFunction,
        reduction: str = "mean",
        *,
        pos_weight: float | Tensor | None = None,
        mean_over: str = "rows",
        ignore_index: float | None = None,
        global_batch: bool = False,
        process_group: dist.ProcessGroup | None = None,
        quality: bool | RankingQuality = False,
    ) -> None:
        check_choice("reduction", reduction, TASK_REDUCTIONS)
        super().__init__(
            loss_type,
            None,
            reduction,
            "mean",
            pos_weights=per_task_numbers("pos_weight", pos_weight, ("loss",)),
            task_weights=None,
            mean_over=mean_over,
            ignore_index=ignore_index,
            global_batch=global_batch,
            process_group=process_group,
            quality=quality,
        )
        warn_unless_mean(global_batch, reduction=reduction)

    if TYPE_CHECKING:

        def __call__(
            self,
            logits: Tensor,
            labels: Tensor,
            weights: Tensor | None = None,
            *,
            normalizer: Tensor | float | None = None,
        ) -> Tensor:
            """Run ``forward``, with the hooks; nn.Module's own ``__call__`` has no types."""

    def forward(
        self, logits: Tensor, labels: Tensor, weights: Tensor | None = None, *, normalizer: Tensor | float | None = None
    ) -> Tensor:
        """The loss of a batch.

        Args:
            logits: the labels' shape, or ``(rows, classes)`` for CROSS_ENTROPY.
            labels: any shape, in [0, 1]; class indices ``(rows,)`` for CROSS_ENTROPY.
            weights: broadcastable to the labels' shape; None: 1.
            normalizer: what to divide by in place of the batch's own weight: the total over all micro-batches and ranks
                of one optimizer step, which makes gradient accumulation exact.

        Returns:
            The loss, 0-dim, float64 for float64 logits and float32 for all others.

        Raises:
            TypeError: for an input of a wrong type or dtype.
            ValueError: for shapes or devices that do not fit, or a normalizer with "sum".
        """
        has_classes = _has_classes(self.loss_type)
        batch = align(logits, labels, weights, has_classes=has_classes, ignore_index=self.ignore_index)
        # The mean over the one task, for a result that is no view: FSDP2 warns of views that a model returns.
        return self._losses(batch, normalizer)[1]


class MultiTaskLoss(TrackedLoss):
    """The losses of several tasks and the global loss that reduces them, with their running sums.

    Each task's loss is that of ``Loss``; "loss" is their reduction over the tasks with data.

    Args:
        loss_type: a ``LossType``, its name, or a callable ``(logits, labels) -> loss`` that gives the unreduced loss in
            the labels' shape ``(rows, tasks)``.
        tasks: the tasks' names, in the order of the columns.
        task_loss_reduction: "mean" or "sum", over rows.
        global_reduction: "mean", "sum", "min", "max", "median", or a callable ``(tasks,) -> 0-dim``, which may be a
            module with parameters (it is then a submodule of the loss). A callable gets 0 for a task without data.
        pos_weights: the factors of the positive terms; a number, or one a task. BCE_WITH_LOGITS only.
        task_weights: factors of the tasks' losses inside the reduction over tasks; their own entries stay raw.
        mean_over: "rows" divides by the number of valid rows, "weights" by the sum of their weights.
        ignore_index: the label that says "missing", NaN allowed; such rows are in no sum and get no gradient.
        global_batch: return, on every rank, the losses of this step's rows of all ranks, with the gradient that makes
            DDP's average the gradient of one process. One collective in forward, in evaluation too, so every rank
            has to call it equally often: a rank that has run out of rows with an empty batch.
        process_group: the ranks to sum over; None: all.
        quality: True, or a ``RankingQuality`` to be copied, for running sums of the quality of the predictions, without
            the pos_weights, from the logits at hand; BCE_WITH_LOGITS only.

    Attributes:
        train_metric: the ``GlobalLoss`` that forward feeds in training mode.
        eval_metric: the one that it feeds in evaluation mode.
        train_quality: with ``quality``, the ``RankingQuality`` that forward feeds in training mode; else None.
        eval_quality: with ``quality``, the one that it feeds in evaluation mode; else None.

    Raises:
        TypeError: for an argument of a wrong type.
        ValueError: for an argument of a wrong value.

    Examples:
        >>> import torch
        >>> from twloss import MultiTaskLoss
        >>> loss = MultiTaskLoss("bce_with_logits", ["like", "reply"])
        >>> losses = loss(torch.tensor([[0.0, 2.0], [1.0, -1.0]]), torch.tensor([[1, 1], [1, 0]]))
        >>> {key: round(value.item(), 4) for key, value in losses.items()}
        {'loss/like': 0.5032, 'loss/reply': 0.2201, 'loss': 0.3616}
    """

    def __init__(
        self,
        loss_type: LossType | str | LossFunction,
        tasks: Sequence[str],
        task_loss_reduction: str = "mean",
        global_reduction: GlobalReduction = "mean",
        pos_weights: PerTask | None = None,
        *,
        task_weights: PerTask | None = None,
        mean_over: str = "rows",
        ignore_index: float | None = None,
        global_batch: bool = False,
        process_group: dist.ProcessGroup | None = None,
        quality: bool | RankingQuality = False,
    ) -> None:
        tasks = check_tasks(tasks)
        check_choice("task_loss_reduction", task_loss_reduction, TASK_REDUCTIONS)
        check_global_reduction(global_reduction)
        super().__init__(
            loss_type,
            tasks,
            task_loss_reduction,
            global_reduction,
            pos_weights=per_task_numbers("pos_weights", pos_weights, tasks),
            task_weights=per_task_numbers("task_weights", task_weights, tasks),
            mean_over=mean_over,
            ignore_index=ignore_index,
            global_batch=global_batch,
            process_group=process_group,
            quality=quality,
        )
        warn_unless_mean(global_batch, task_loss_reduction=task_loss_reduction, global_reduction=global_reduction)

    if TYPE_CHECKING:

        def __call__(
            self,
            logits: TaskTensors,
            labels: TaskTensors,
            weights: TaskTensors | None = None,
            *,
            normalizer: Tensor | float | None = None,
        ) -> dict[str, Tensor]:
            """Run ``forward``, with the hooks; nn.Module's own ``__call__`` has no types."""

    def forward(
        self,
        logits: TaskTensors,
        labels: TaskTensors,
        weights: TaskTensors | None = None,
        *,
        normalizer: Tensor | float | None = None,
    ) -> dict[str, Tensor]:
        """The losses of a batch.

        Each of the three inputs may also be a mapping task -> ``(rows,)`` or ``(rows, 1)``; with CROSS_ENTROPY the
        logits map to ``(rows, classes)``, and the numbers of classes may differ.

        Args:
            logits: ``(rows, tasks)``, or ``(rows, tasks, classes)`` for CROSS_ENTROPY.
            labels: ``(rows, tasks)``, in [0, 1], any dtype; class indices for CROSS_ENTROPY.
            weights: ``(rows, tasks)``, ``(rows, 1)`` or ``(rows,)``; None: 1.
            normalizer: what the means divide by in place of the batch's own weights, 0-dim or ``(tasks,)``: the total
                over all micro-batches and ranks of one optimizer step, which makes gradient accumulation exact.

        Returns:
            The loss of each task under ``"loss/<task>"``, in the tasks' order, and the global one under ``"loss"``;
            0-dim, float64 for float64 logits and float32 for all others. A task without data has a loss of 0 with a
            gradient of 0.

        Raises:
            TypeError: for an input of a wrong type or dtype.
            ValueError: for names, shapes or devices that do not fit, or a normalizer with a reduction that does not add
                up over micro-batches.
        """
        assert self.tasks is not None
        has_classes = _has_classes(self.loss_type)
        batch = align_tasks(
            logits, labels, weights, self.tasks, has_classes=has_classes, ignore_index=self.ignore_index
        )
        losses, loss = self._losses(batch, normalizer)
        return {**{f"loss/{task}": value for task, value in zip(self.tasks, losses.unbind(0))}, "loss": loss}


def _has_classes(loss_type: LossType | LossFunction) -> bool | None:
    """Whether the logits have a dimension of classes; None where only their shape tells."""
    return loss_type is LossType.CROSS_ENTROPY if isinstance(loss_type, LossType) else None
