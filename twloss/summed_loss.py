"""From a batch to its sums: weight times loss, exactly 0 where a row is left out, summed over the rows.

A ``Batch`` ``(rows, tasks)`` comes in; two ``TaskSums`` ``(tasks,)`` go out: one to train on, and one, detached and in
the widest dtype, for the running sums.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from twloss.batch import Batch, keep_where_nonzero, without_left_out, zero_where_zero_
from twloss.loss_type import LossFunction, LossType, log_loss, unreduced_loss
from twloss.task_sums import TaskSums
from twloss.wide_sum import sum_dtype

__all__ = ["sum_of_weights", "sum_rows", "takes_one_derivative", "wide_sum_of_rows"]


def sum_rows(
    loss_type: LossType | LossFunction, batch: Batch, pos_weight: Tensor | None, tasks: int, mean_over: str
) -> tuple[TaskSums, TaskSums]:
    """Sum a batch over its rows.

    Args:
        loss_type: the loss.
        batch: ``(rows, tasks)``; of one task, any shape.
        pos_weight: ``(tasks,)``, the factor of the positive term; BCE_WITH_LOGITS only.
        tasks: the number of tasks.
        mean_over: "rows" counts valid rows, "weights" adds their weights.

    Returns:
        The sums in the logits' dtype, with their gradient; and the same, detached, in the widest dtype.
    """
    if loss_type is LossType.BCE_WITH_LOGITS and batch.logits.ndim == 0:
        # One row of one task, to which pos_weight (1,) and the sums' gradient (1,) can be broadcast.
        batch = batch.each(lambda values: values.unsqueeze(0))
    if loss_type is LossType.BCE_WITH_LOGITS and takes_one_derivative(batch):
        loss_sum, wide = _SummedBCE.apply(*batch[:3], pos_weight, tasks)  # type: ignore[no-untyped-call]
    else:
        loss = _weighted_loss(loss_type, batch, pos_weight)
        loss_sum, wide = loss.reshape(-1, tasks).sum(0), wide_sum_of_rows(loss.detach(), tasks)
    weight = sum_of_weights(batch, tasks, mean_over)
    return TaskSums(loss_sum, weight), TaskSums(wide, weight)


def _weighted_loss(loss_type: LossType | LossFunction, batch: Batch, pos_weight: Tensor | None) -> Tensor:
    """Weight times loss, of the labels' shape."""
    logits, labels = without_left_out(*batch[:3])
    loss = unreduced_loss(loss_type, logits, labels, pos_weight)
    if batch.weights is None:
        return loss
    loss = loss * batch.weights
    # Of a callable it is not known that it is finite at the zeros that stand for what is left out.
    return loss if isinstance(loss_type, LossType) else keep_where_nonzero(loss, batch.weights)


def wide_sum_of_rows(values: Tensor, tasks: int) -> Tensor:
    """The sum over rows ``(tasks,)`` in the widest dtype."""
    return values.reshape(-1, tasks).sum(0, dtype=sum_dtype(values.device))


def sum_of_weights(batch: Batch, tasks: int, mean_over: str) -> Tensor | float:
    """What a mean divides by, ``(tasks,)``: the number of valid rows ("rows"), or Σ of their weights ("weights")."""
    if batch.weights is not None and mean_over == "weights":
        return wide_sum_of_rows(batch.weights, tasks)
    if batch.valid is not None:
        return wide_sum_of_rows(batch.valid, tasks)
    return batch.labels.numel() // tasks


def takes_one_derivative(batch: Batch) -> bool:
    """Whether only the logits' derivative can be asked for, by autograd's backward pass."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if torch.autograd.forward_ad._current_level >= 0:
        return False
    return not (batch.labels.requires_grad or (batch.weights is not None and batch.weights.requires_grad))


class _SummedBCE(torch.autograd.Function):
    """Σ w·l of binary cross-entropy, with its derivative in closed form: ``w·(σ(x) + y·((p-1)·σ(x) - p))``.

    It keeps no tensor but the caller's own, and takes fewer kernels than the derivatives of the single operations do,
    which serve for all else that may be asked for.
    """

    @staticmethod
    def forward(  # noqa: PLR0917 (apply() takes no keywords)
        ctx: Any, logits: Tensor, labels: Tensor, weights: Tensor | None, pos_weight: Tensor | None, tasks: int
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(logits, labels, weights, pos_weight)
        if pos_weight is not None:
            loss = F.binary_cross_entropy_with_logits(logits, labels, weights, pos_weight=pos_weight, reduction="none")
        else:
            loss = log_loss(logits, labels)
            if weights is not None:
                loss.mul_(weights)
        if weights is not None:
            zero_where_zero_(loss, weights)
        wide = wide_sum_of_rows(loss, tasks)
        ctx.mark_non_differentiable(wide)
        ctx.set_materialize_grads(False)
        # A copy where the dtype is the same: one tensor can't be both outputs.
        return wide.to(logits.dtype, copy=True), wide

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 5
        logits, labels, weights, pos_weight = ctx.saved_tensors
        if torch.is_grad_enabled() or _is_batch_of_gradients(grad):
            # Differentiated again, where a NaN that is only left out at the end would stay in the derivative; or for
            # many gradients at once, which can't be put in the place of one.
            logits, labels = without_left_out(logits, labels, weights)
            slope = _slope(logits.sigmoid(), labels, pos_weight) * grad
            if weights is not None:
                slope = keep_where_nonzero(slope * weights, weights)
            return slope, None, None, None, None
        # In place wherever it can be: on a CPU, a kernel that writes to new memory takes up to three times as long.
        slope = logits.sigmoid()
        if pos_weight is None:
            slope.sub_(labels)
        else:
            slope.addcmul_(torch.addcmul(-pos_weight, slope, pos_weight - 1), labels)
        slope.mul_(grad)
        if weights is not None:
            zero_where_zero_(slope.mul_(weights), weights)
        return slope, None, None, None, None


def _is_batch_of_gradients(grad: Tensor) -> bool:
    """Whether torch.vmap, or autograd's older ``is_grads_batched``, runs this for many gradients at once."""
    functorch = torch._C._functorch
    return functorch.is_functorch_wrapped_tensor(grad) or functorch.is_legacy_batchedtensor(grad)


def _slope(probability: Tensor, labels: Tensor, pos_weight: Tensor | None) -> Tensor:
    if pos_weight is None:
        return probability - labels
    return torch.addcmul(probability, torch.addcmul(-pos_weight, probability, pos_weight - 1), labels)
