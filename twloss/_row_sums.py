"""From a batch to its sums: weight times loss, exactly 0 where a row is left out, summed over the rows.

A ``Batch`` ``(rows, tasks)`` comes in; two ``TaskSums`` ``(tasks,)`` go out: one to train on, and one, detached and in
the widest dtype, for the running sums.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from twloss._accumulator import sum_wide
from twloss._arguments import MeanOver
from twloss._batch import Batch, without_left_out
from twloss._loss_type import LossFunction, LossType, bce_slopes, bce_values, row_losses
from twloss._torch import is_batch_of_gradients, is_transformed, weigh, weigh_


class TaskSums(NamedTuple):
    """What is known of each task's loss: sums, which add up over batches, steps and ranks. Division comes last."""

    loss_sum: Tensor
    """``(tasks,)``: Σ w·l over the valid rows."""
    weight: Tensor | float
    """``(tasks,)``: the number of valid rows, or Σ w; a plain number where all tasks share it."""


def sum_rows(
    loss_type: LossType | LossFunction, batch: Batch, pos_weight: Tensor | None, tasks: int, mean_over: MeanOver
) -> tuple[TaskSums, TaskSums | None]:
    """Sum a batch over its rows.

    Args:
        loss_type: the loss.
        batch: ``(rows, tasks)``; of one task, any shape.
        pos_weight: ``(tasks,)``, the factor of the positive term; BCE_WITH_LOGITS only.
        tasks: the number of tasks.
        mean_over: "rows" counts valid rows, "weights" adds their weights.

    Returns:
        The sums in the logits' dtype, with their gradient; and the same, detached, in the widest dtype, or None where a
        transform runs the forward, which may then run any number of times and counts as none.
    """
    if loss_type is LossType.BCE_WITH_LOGITS and batch.logits.ndim == 0:
        # One row of one task, to which pos_weight (1,) and the sums' gradient (1,) can be broadcast.
        batch = Batch(*(None if values is None else values.unsqueeze(0) for values in batch))  # type: ignore[arg-type]
    logits, labels, weights, _ = batch
    weight = sum_weights(batch, tasks, mean_over)
    is_compiled = torch.compiler.is_compiling()
    is_traced = is_transformed(logits, labels, weights)
    # Only the logits' derivative can be asked for, and by the backward pass; the compiler fuses the plain form.
    is_closed = not (
        is_compiled or is_traced or labels.requires_grad or (weights is not None and weights.requires_grad)
    )
    if loss_type is LossType.BCE_WITH_LOGITS and is_closed:
        loss_sum, wide = _SummedBCE.apply(logits, labels, weights, pos_weight, tasks)  # type: ignore[no-untyped-call]
    else:
        loss = _weighted_losses(loss_type, logits, labels, weights, pos_weight)
        loss_sum, wide = loss.reshape(-1, tasks).sum(0), None if is_traced else sum_wide(loss.detach(), tasks)
    return TaskSums(loss_sum, weight), None if wide is None else TaskSums(wide, weight)


def sum_weights(batch: Batch, tasks: int, mean_over: MeanOver) -> Tensor | float:
    """What a mean divides by, ``(tasks,)``: the number of valid rows ("rows"), or Σ of their weights ("weights")."""
    if batch.weights is not None and mean_over == "weights":
        return sum_wide(batch.weights, tasks)
    if batch.valid is not None:
        return sum_wide(batch.valid, tasks)
    return batch.labels.numel() // tasks


def _weighted_losses(
    loss_type: LossType | LossFunction,
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    pos_weight: Tensor | None,
) -> Tensor:
    """Weight times loss, of the labels' shape."""
    loss = row_losses(loss_type, *without_left_out(logits, labels, weights), pos_weight)
    if weights is not None and isinstance(loss_type, LossType):
        return loss * weights
    # Of a callable it is not known that it is finite at the zeros that stand for what is left out.
    return weigh(loss, weights)


class _SummedBCE(torch.autograd.Function):
    """Σ w·l of binary cross-entropy, with its derivative in closed form.

    It keeps no tensor but the caller's own, and takes fewer kernels than the derivatives of the single operations do,
    which serve for all else that may be asked for.
    """

    @staticmethod
    def forward(  # noqa: PLR0917 (apply() takes no keywords)
        ctx: Any, logits: Tensor, labels: Tensor, weights: Tensor | None, pos_weight: Tensor | None, tasks: int
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(logits, labels, weights, pos_weight)
        wide = sum_wide(weigh_(bce_values(logits, labels, pos_weight), weights), tasks)
        ctx.mark_non_differentiable(wide)
        ctx.set_materialize_grads(False)
        # A copy where the dtype is the same: one tensor can't be both outputs.
        return wide.to(logits.dtype, copy=True), wide

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 5
        logits, labels, weights, pos_weight = ctx.saved_tensors
        if torch.is_grad_enabled():  # To be differentiated again.
            loss = _weighted_losses(LossType.BCE_WITH_LOGITS, logits, labels, weights, pos_weight)
            return *torch.autograd.grad(loss, logits, grad.expand_as(loss), create_graph=True), None, None, None, None
        slope = bce_slopes(logits, labels, pos_weight)
        slope = weigh(slope * grad, weights) if is_batch_of_gradients(grad) else weigh_(slope.mul_(grad), weights)
        return slope, None, None, None, None
