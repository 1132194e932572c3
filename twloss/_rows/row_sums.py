"""From a batch to its sums: weight times loss, exactly 0 where a row is left out, summed over the rows.

A ``Batch`` ``(rows, tasks)`` comes in; what the mean divides by and two Σ w·l ``(tasks,)`` go out: one to train on, and
one, detached and in the widest dtype, for the running sums. Together they are ``TaskSums``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from twloss._arguments import MeanOver, RowReduction
from twloss._precision import sum_wide
from twloss._rows.batch import Batch
from twloss._rows.row_loss import LossFunction, LossType, bce_at_once, bce_values, row_losses
from twloss._torch import is_transformed, weigh


def sum_rows(
    loss_type: LossType | LossFunction,
    batch: Batch,
    pos_weight: Tensor | None,
    tasks: int,
    *,
    takes_valid: bool,
) -> tuple[Tensor, Tensor | None]:
    """Sum the weighted losses of a batch over its rows.

    Args:
        loss_type: the loss.
        batch: ``(rows, tasks)``; of one task, any shape.
        pos_weight: ``(tasks,)``, the factor of the positive term; BCE_WITH_LOGITS only.
        tasks: the number of tasks.
        takes_valid: whether a callable wants to know which rows count.

    Returns:
        The sums in the logits' dtype, with their gradient; and the same, detached, in the widest dtype, or None where a
        transform runs the forward, which may then run any number of times and counts as none.
    """
    if loss_type is LossType.BCE_WITH_LOGITS:
        batch = at_least_one_row(batch)
    logits, labels, weights, _, _ = batch
    is_traced = is_transformed(logits, labels, weights)
    loss = weigh_losses(loss_type, batch, pos_weight, tasks, takes_valid=takes_valid, is_traced=is_traced)
    return loss.reshape(-1, tasks).sum(0), None if is_traced else sum_wide(loss.detach(), tasks)


def at_least_one_row(batch: Batch) -> Batch:
    """A batch of 0-dim tensors as one row of one task, to which pos_weight ``(1,)`` can be broadcast; others as is."""
    if batch.logits.ndim:
        return batch
    weights, valid = (None if each is None else each.unsqueeze(0) for each in (batch.weights, batch.valid))
    return Batch(batch.logits.unsqueeze(0), batch.labels.unsqueeze(0), weights, valid, torch.Size([1]))


def sum_weights(batch: Batch, tasks: int, mean_over: MeanOver, over_rows: RowReduction) -> Tensor | float:
    """What a mean divides by, ``(tasks,)``: the number of valid rows ("rows"), or Σ of their weights ("weights").

    A sum divides by nothing, and only asks whether there is data: Σ|w|, since weights that cancel are.
    """
    if batch.weights is not None and mean_over == "weights":
        return sum_wide(batch.weights if over_rows == "mean" else batch.weights.abs(), tasks)
    if batch.valid is not None:
        return sum_wide(batch.valid, tasks)
    return batch.shape.numel() // tasks


def weigh_losses(
    loss_type: LossType | LossFunction,
    batch: Batch,
    pos_weight: Tensor | None,
    tasks: int,
    *,
    takes_valid: bool = False,
    is_traced: bool = False,
) -> Tensor:
    """Weight times loss, of the labels' shape, for autograd: exactly 0 at weight 0, and so are the gradients there.

    Only that by the weight is not: it is the row's loss.
    """
    logits, labels, weights, valid, shape = batch
    if weights is None:
        counted = torch.ones(shape, dtype=torch.bool, device=labels.device) if takes_valid else None
        return row_losses(loss_type, logits, labels, pos_weight, counted, shape=shape)
    counted = weights != 0
    # May the derivative by a weight be asked for, of the gradient too? The compiler knows none of the second order.
    by_weight = is_traced or (weights.requires_grad and not torch.compiler.is_compiling())
    if loss_type is LossType.CROSS_ENTROPY:
        # A label that is left out need not be a class.
        labels = labels.where(counted, labels.clamp(0, logits.shape[-1] - 1))
    elif valid is not None and not takes_valid and not isinstance(loss_type, LossType):
        labels = _fill_missing(labels, valid, tasks)
    logits, labels = (
        _mask_gradient(
            values,
            counted if values.ndim == counted.ndim else counted.unsqueeze(-1),
            by_weight=by_weight,
            is_by_row=isinstance(loss_type, LossType),
        )
        for values in (logits, labels)
    )
    loss = row_losses(loss_type, logits, labels, pos_weight, counted if takes_valid else None, shape=shape)
    if by_weight or weights.requires_grad:
        return loss.where(counted | loss.isfinite(), 0.0) * weights
    return weigh(loss, weights)


def _fill_missing(labels: Tensor, valid: Tensor, tasks: int) -> Tensor:
    """Labels in which the task's first real one stands for a missing one, which has no value.

    Of a task that has none, a callable sees 0.5, or class 0: what most losses are finite at.
    """
    columns, valid = labels.reshape(-1, tasks, *labels.shape[valid.ndim :]), valid.reshape(-1, tasks)
    if len(columns) == 0:
        return labels
    first, any_valid = valid.byte().argmax(0, keepdim=True), valid.any(0)
    if columns.ndim > 2:  # of soft labels the row's all
        first, any_valid, valid = first.unsqueeze(2), any_valid.unsqueeze(1), valid.unsqueeze(2)
    real = columns.gather(0, first.expand(1, *columns.shape[1:]))
    real = real.where(any_valid, 0.5 if labels.is_floating_point() else 0)
    return columns.where(valid, real).view(labels.shape)


def _mask_gradient(values: Tensor, counted: Tensor, *, by_weight: bool, is_by_row: bool) -> Tensor:
    """The values, whose gradient is exactly 0 where a row does not count, whatever comes back to it."""
    if not values.is_floating_point() or not (by_weight or values.requires_grad):
        return values
    if by_weight:
        return _MaskedGradient.apply(values, counted, is_by_row)  # type: ignore[no-untyped-call, no-any-return]
    return values.where(counted, values.detach())


class _MaskedGradient(torch.autograd.Function):
    """The values, whose gradient is exactly 0 where a row does not count, but not its derivative.

    The gradient by a logit is w·l'(x): 0 at w = 0, with the derivative l'(x) by w, from which weights that start at 0
    are learned. So where each row is known to be by itself, only what is not finite is masked; else all is, in value.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, _: Tensor, __: bool) -> Tensor:
        return values.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, bool], _: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])
        ctx.is_by_row = inputs[2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _MaskedGradient._mask(ctx, grad), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _MaskedGradient._mask(ctx, tangent)

    @staticmethod
    def _mask(ctx: Any, grad: Tensor) -> Tensor:
        (counted,) = ctx.saved_tensors
        masked = grad
        if not ctx.is_by_row:
            with torch.no_grad():
                value = grad * 1.0  # detach() can't be batched by is_grads_batched
            masked = grad - value
        return grad.where(counted, masked.nan_to_num(0.0, 0.0, 0.0))


@torch.no_grad()
def sum_quality(
    batch: Batch, tasks: int, loss_sum: Tensor | None = None, sigmoid: Tensor | None = None
) -> Sequence[Tensor | float]:
    """Σ w·l, Σ w, Σ w·y and Σ w·σ(x) ``(tasks,)``, and the number of rows; what is known of them is given."""
    logits, labels, weights, _, _ = batch
    if loss_sum is None:
        if torch.compiler.is_compiling() or is_transformed(logits, labels, weights):
            loss, _, sigmoid = bce_at_once(logits, labels, None)
        else:
            loss = bce_values(logits, labels, None)
        loss_sum = sum_wide(weigh(loss, weights), tasks)
    positives, predicted = weigh(labels, weights), weigh(logits.sigmoid() if sigmoid is None else sigmoid, weights)
    rows = labels.numel() // tasks
    weight = rows if weights is None else sum_wide(weights, tasks)
    return loss_sum, weight, sum_wide(positives, tasks), sum_wide(predicted, tasks), rows
