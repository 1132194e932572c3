"""The sums of a batch, and the one rule that turns sums into losses.

``TaskSums`` of shape ``(tasks,)``, which merge by addition, come in; the tasks' losses and the global loss go out. The
forward pass and the running metric both reduce here, so they cannot drift.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from twloss.arguments import check_dense

__all__ = ["GlobalReduction", "TaskSums", "has_data", "reduce_rows", "reduce_tasks"]

GlobalReduction = str | Callable[[Tensor], Tensor]


class TaskSums(NamedTuple):
    """What is known of each task's loss: sums, which add up over batches, steps and ranks. Division comes last."""

    loss_sum: Tensor
    """``(tasks,)``: Σ w·l over the valid rows."""
    weight: Tensor | float
    """``(tasks,)``: the number of valid rows, or Σ w; a plain number where all tasks share it."""


def has_data(sums: TaskSums) -> Tensor | None:
    """``(tasks,)`` bool: which tasks have data; None where all tasks do or none does."""
    return sums.weight != 0 if isinstance(sums.weight, Tensor) else None


def reduce_rows(sums: TaskSums, reduction: str) -> Tensor:
    """The tasks' losses, ``(tasks,)``: ``loss_sum / weight`` for "mean", ``loss_sum`` for "sum"; 0 without data."""
    if reduction == "sum":
        return sums.loss_sum
    if isinstance(sums.weight, Tensor):
        weight = sums.weight.to(sums.loss_sum.dtype)
        return sums.loss_sum / weight.where(weight != 0, 1.0)
    return sums.loss_sum / (sums.weight or 1)


def reduce_tasks(
    losses: Tensor, present: Tensor | None, reduction: GlobalReduction, task_weights: Tensor | None
) -> Tensor:
    """The global loss, 0-dim, of the tasks with data; 0 where there is none.

    Args:
        losses: ``(tasks,)``, 0 for a task without data.
        present: ``(tasks,)`` bool, which tasks have data; None: all, or none.
        reduction: "mean", "sum", "min", "max", "median" (the lower one of an even count; ties share the gradient), or a
            callable from ``(tasks,)`` to 0-dim.
        task_weights: ``(tasks,)`` factors of the losses; None: 1.
    """
    if task_weights is not None:
        losses = losses * task_weights
    if callable(reduction):
        # A copy: what it does in place must not reach the tasks' own entries.
        return _called(reduction, losses.clone())
    if reduction == "sum":
        return losses.sum()
    if reduction == "mean":
        return losses.mean() if present is None else losses.sum() / present.sum().clamp(min=1)
    if present is not None:
        losses = _with_neutral_absents(losses, present, reduction)
    loss: Tensor = getattr(losses, _METHODS[reduction])()
    return loss if present is None else loss.where(present.any(), 0.0)


_METHODS = {"min": "amin", "max": "amax", "median": "median"}


def _with_neutral_absents(losses: Tensor, present: Tensor, reduction: str) -> Tensor:
    """Losses in which the absent tasks' are such that the reduction passes them over."""
    if reduction != "median":
        return losses.masked_fill(~present, math.inf if reduction == "min" else -math.inf)
    # With k of the absent at -inf and the others at +inf, the lower median of all is that of the present. Unlike
    # nanmedian, this keeps a loss of NaN visible.
    absent = ~present
    k = (present.numel() - 1) // 2 - (present.sum() - 1).clamp(min=0) // 2
    low = absent.cumsum(0) <= k
    return losses.masked_fill(absent & low, -math.inf).masked_fill(absent & ~low, math.inf)


def _called(reduction: Callable[[Tensor], Tensor], losses: Tensor) -> Tensor:
    loss = reduction(losses)
    check_dense("global_reduction", loss, verb="the callable gave", tensor="a 0-dim Tensor", kind="floating")
    if loss.ndim != 0 or loss.device != losses.device:
        raise ValueError(
            f"global_reduction: the callable gave shape {tuple(loss.shape)} on {loss.device}, "
            f"expected a 0-dim Tensor on {losses.device}"
        )
    return loss
