"""Weight times loss of each row, by operations that autograd differentiates: of any loss, by any input.

A ``Batch`` ``(rows, tasks)`` comes in; weight times loss ``(rows, tasks)`` goes out, exactly 0 where a row is left out,
as are the gradients there.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from twloss._rows.batch import Batch, align_rows, expand_weights
from twloss._rows.mappings import all_valid
from twloss._rows.row_loss import RowLoss
from twloss._torch import weigh


def mask_tasks(logits: Tensor, task_weights: Tensor) -> Tensor:
    """The logits ``(rows, tasks, …)``, whose gradient is 0 where it is not finite and its task has a weight of 0."""
    if torch.compiler.is_compiling():
        mask = (task_weights != 0).view(-1, *(1,) * (logits.ndim - 2))
        return _FiniteGradient.apply(logits, mask)  # type: ignore[no-untyped-call, no-any-return]
    rows = _Rows(logits.shape[:2])
    return _MaskedGradient.apply(logits, task_weights, None, rows, True)  # type: ignore[no-untyped-call, no-any-return]


def weigh_losses(
    row_loss: RowLoss,
    batch: Batch,
    pos_weight: Tensor | None,
    invalid: Tensor | None = None,
    *,
    has_rows: bool = True,
    is_traced: bool = False,
    shape: torch.Size | None = None,
) -> tuple[Tensor, Batch]:
    """Weight times loss, of which the gradient by a weight is the row's loss, also at weight 0.

    Args:
        row_loss: the loss.
        batch: ``(rows, tasks)``, or with ``has_rows=False`` as the inputs came.
        pos_weight: ``(tasks,)``, the factor of the positive term; of binary losses only.
        invalid: ``(rows, tasks)`` bool, labels that the formula does not take; None: they are not looked for.
        has_rows: False for a callable of one task, of which the result tells which of the labels' dimensions are rows.
        is_traced: whether a transform of torch.func, or forward-mode differentiation, runs this.
        shape: of the rows, where it is known without ``has_rows``.

    Returns:
        Weight times loss ``(rows, tasks)``, and the batch with weights and valid of this shape.
    """
    logits, labels, weights, valid, _ = batch
    rows = _Rows(labels.shape[:2] if has_rows else shape or _likely_rows(labels, weights))
    # The derivative by a weight may be requested, also of the gradient. torch.compile supports no second order.
    by_weight = is_traced or (weights is not None and weights.requires_grad and not torch.compiler.is_compiling())
    is_masked = weights is not None or valid is not None
    given = _given_mask(row_loss, rows, batch, has_rows=has_rows)
    if is_masked:
        # Of several tasks, the weights of missing rows are 0 already.
        missing = None if has_rows else valid
        counted = rows.counted(weights, missing)
        is_late = by_weight or not has_rows
        logits = rows.mask_gradient(logits, counted, weights, missing, row_loss, is_late=is_late)
        labels = rows.mask_gradient(labels, counted, weights, missing, row_loss, is_late=is_late)
        if missing is None:
            labels = row_loss.replace_masked(labels, counted, valid, logits)
        else:
            column, mask = labels.reshape(-1, 1), missing.reshape(-1, 1)
            labels = row_loss.replace_masked(column, mask, mask, logits).view(labels.shape)
    if invalid is not None and row_loss.has_classes:
        loss = _losses_of_classes(row_loss, logits, labels, given, invalid)
    else:
        loss = row_loss.losses(logits, labels, pos_weight, given)
    if not has_rows:
        found = labels.shape[: max(loss.ndim, min(labels.ndim, 1))]
        if is_masked and found != rows.shape and torch.compiler.is_compiling():
            # The mask is in the graph already. What is traced twice runs once: nothing uses the first result.
            return weigh_losses(row_loss, batch, pos_weight, has_rows=False, is_traced=is_traced, shape=found)
        rows.shape = found
        batch = align_rows(batch, found, by_row=False)
        weights = batch.weights
    if loss.shape != rows.shape or loss.device != labels.device:
        raise ValueError(
            f"loss_type: the callable gave a loss of shape {tuple(loss.shape)} on {loss.device}, expected the labels' "
            f"shape {tuple(rows.shape)} (unreduced: reduction='none') on {labels.device} for logits "
            f"{tuple(logits.shape)}"
        )
    loss = loss.to(logits.dtype)
    loss = loss if has_rows else loss.reshape(-1, 1)
    if weights is None:
        return loss, batch
    if by_weight or weights.requires_grad:
        return loss.where((weights != 0) | loss.isfinite(), 0.0) * weights, batch
    return weigh(loss, weights), batch


def _losses_of_classes(
    row_loss: RowLoss, logits: Tensor, labels: Tensor, valid: Tensor | None, invalid: Tensor
) -> Tensor:
    """The loss, which is infinite for a class that does not exist: its probability is 0."""
    labels = row_loss.replace_masked(labels, ~invalid, None, logits)
    return row_loss.losses(logits, labels, None, valid).masked_fill(invalid, math.inf)


class _Rows:
    """The shape of the rows, a prefix of the labels' shape. A callable's result may correct it."""

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape

    def counted(self, weights: Tensor | None, valid: Tensor | None) -> Tensor:
        """A mask of the rows with a weight and all labels."""
        if weights is None:
            assert valid is not None
            return all_valid(valid, len(self.shape))
        counted = (weights if weights.shape == self.shape else expand_weights(weights, self.shape, by_row=False)) != 0
        return counted if valid is None else counted & all_valid(valid, len(self.shape))

    def mask_gradient(
        self,
        values: Tensor,
        counted: Tensor,
        weights: Tensor | None,
        valid: Tensor | None,
        row_loss: RowLoss,
        *,
        is_late: bool,
    ) -> Tensor:
        """The values, whose gradient is exactly 0 where a row does not count, whatever comes back to it.

        A callable that takes ``valid`` masks by itself, and its rows may be coupled: its gradient is that of the loss
        that it returns, and only what is not finite is made 0.

        Args:
            values: the logits or the labels.
            counted: as ``counted`` returns it.
            weights: of the batch, and so the next.
            valid: see there.
            row_loss: the loss.
            is_late: whether to ask in the backward pass which rows count.
        """
        if not values.is_floating_point() or not (is_late or values.requires_grad):
            return values
        if is_late and not torch.compiler.is_compiling():
            keeps_finite = row_loss.is_row_by_row or row_loss.takes_valid
            inputs = values, weights, valid, self, keeps_finite
            return _MaskedGradient.apply(*inputs)  # type: ignore[no-untyped-call, no-any-return]
        if row_loss.takes_valid:
            return _FiniteGradient.apply(values, _like(counted, values))  # type: ignore[no-untyped-call, no-any-return]
        return values.where(_like(counted, values), values.detach())


def _likely_rows(labels: Tensor, weights: Tensor | None) -> torch.Size:
    """The fewest of the labels' first dimensions that weights fit; all, where no weights tell."""
    if weights is None or weights.numel() == 1:
        return labels.shape
    for size in range(max(weights.ndim, 1), labels.ndim):
        shape = labels.shape[:size]
        if all(found in (1, rows) for found, rows in zip(weights.shape[::-1], shape[::-1])):
            return shape
    return labels.shape


def _given_mask(row_loss: RowLoss, rows: _Rows, batch: Batch, *, has_rows: bool) -> Tensor | None:
    """The mask for a callable that takes ``valid``: of the rows, or of one task of the labels' shape."""
    if not row_loss.takes_valid:
        return None
    _, labels, weights, valid, _ = batch
    shape = rows.shape if has_rows else labels.shape
    if weights is None and valid is None:
        return torch.ones(shape, dtype=torch.bool, device=labels.device)
    if has_rows:
        return rows.counted(weights, None)
    counted = torch.ones_like(labels, dtype=torch.bool) if valid is None else valid
    return counted if weights is None else counted & _like(rows.counted(weights, None), labels)


def _like(counted: Tensor, values: Tensor) -> Tensor:
    """A mask of rows that broadcasts to values of further dimensions."""
    return counted.view((*counted.shape, *(1,) * (values.ndim - counted.ndim)))


class _FiniteGradient(torch.autograd.Function):
    """The values, whose gradient is 0 where it is not finite and a row does not count."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, counted: Tensor) -> Tensor:
        ctx.save_for_backward(counted)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (counted,) = ctx.saved_tensors
        return grad.where(counted | grad.isfinite(), 0.0), None


class _MaskedGradient(torch.autograd.Function):
    """The values, whose gradient is exactly 0 where a row does not count, but not its derivative.

    The gradient by a logit is w·l'(x): 0 at w = 0, with the derivative l'(x) by w, from which weights that start at 0
    are learned. Where rows are independent, or a callable masks by itself, only non-finite values are masked. Otherwise
    the value is masked and the derivative kept.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, _: Tensor | None, __: Tensor | None, ___: _Rows, ____: bool) -> Tensor:
        return values.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor | None, Tensor | None, _Rows, bool], _: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:3])
        ctx.save_for_forward(*inputs[1:3])
        ctx.rows, ctx.keeps_finite = inputs[3:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return _MaskedGradient._mask(ctx, grad), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _MaskedGradient._mask(ctx, tangent)

    @staticmethod
    def _mask(ctx: Any, grad: Tensor) -> Tensor:
        counted = _like(ctx.rows.counted(*ctx.saved_tensors), grad)
        masked = grad
        if not ctx.keeps_finite:
            with torch.no_grad():
                value = grad * 1.0  # detach() can't be batched by is_grads_batched
            masked = grad - value
        return grad.where(counted, masked.nan_to_num(0.0, 0.0, 0.0))
