"""Binary cross-entropy from a batch to its losses in one autograd function, by single kernels or by one compiled one.

A ``Batch`` ``(rows, tasks)`` comes in; the sums of the tasks, or where the reductions add up the losses themselves, go
out with a gradient in closed form, and beside them what the running sums are to be given.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from twloss._arguments import MeanOver, RowReduction
from twloss._constants import TaskConstants
from twloss._precision import sum_wide
from twloss._rows.batch import Batch
from twloss._rows.row_loss import LossType, bce_at_once, bce_slopes, bce_values
from twloss._rows.row_sums import at_least_one_row, sum_quality, sum_weights, weigh_losses
from twloss._sums.reduction import Reduction
from twloss._sums.running_sums import pack_update
from twloss._sums.sums import TaskSums
from twloss._torch import is_batch_of_gradients, is_transformed, runs_compiled, weigh, weigh_

# As many rows are seen as one, so that what is summed over rows has full vectors of columns, also of few tasks.
_MOST_ABREAST = 16


class Pass(NamedTuple):
    """What is to be made of a batch; each that differs is compiled by itself."""

    reduction: Reduction | None
    """How sums become losses, without keys; None: they are wanted as they are."""
    mean_over: MeanOver
    over_rows: RowReduction
    drops_non_finite: bool | None
    """Whether the running sums drop what is not finite; None: they are to be joined with other tasks', unpacked."""
    quality: bool | None
    """Whether the sums of the quality drop what is not finite; None: there are none."""
    counts_rows: bool = False
    """Whether they have the number of rows beside them."""
    with_slopes: bool = False
    """Whether a backward pass may follow."""


class Sums(NamedTuple):
    """What became of a batch, or of those tasks of it that share a loss type."""

    losses: Tensor
    """``(tasks,)``: Σ w·l, or after a reduction the tasks' losses."""
    loss: Tensor | None
    """The global loss; None: there was no reduction."""
    weight: Tensor | float
    """``(tasks,)``, or a number that all tasks share."""
    update: Tensor | None
    """For the running sums: packed, or Σ w·l ``(tasks,)``; None where a transform runs the forward."""
    quality: Tensor | None
    """For those of the quality, packed."""
    slopes: Tensor | None
    """The derivatives of Σ w·l by the logits."""


def is_closed_form(loss_type: object, batch: Batch) -> bool:
    """Whether only the derivative by the logits can be asked for, and by a backward pass, outside of compiled code."""
    logits, labels, weights, _, _ = batch
    return loss_type is LossType.BCE_WITH_LOGITS and not (
        torch.compiler.is_compiling()
        or labels.requires_grad
        or (weights is not None and weights.requires_grad)
        or is_transformed(logits, labels, weights)
    )


def sum_bce(
    batch: Batch, tasks: int, what: Pass, pos_weights: TaskConstants, task_weights: Tensor | None, *, fused: bool
) -> Sums:
    """One pass over a batch of binary cross-entropy that ``is_closed_form``.

    Args:
        batch: ``(rows, tasks)``; of one task, any shape.
        tasks: the number of tasks.
        what: to compute.
        pos_weights: the factors of the positive terms.
        task_weights: ``(tasks,)``, the factors of the tasks' losses in the global one; None: 1.
        fused: whether to have the pass compiled.
    """
    batch = at_least_one_row(batch)
    logits = batch.logits
    rows = batch.shape.numel() // tasks
    abreast = min(math.gcd(rows, _MOST_ABREAST), max(rows // 2, 1))
    others = _Others(pos_weights.like(logits, repeats=abreast), task_weights, tasks, abreast * tasks)
    # For sizes of 0 and 1 torch would compile it anew.
    run = _run_compiled if fused and rows > 1 and runs_compiled(logits) else run_pass
    if not (torch.is_grad_enabled() and logits.requires_grad):
        with torch.no_grad():
            return run(what, *others.with_batch(batch))
    what = what._replace(with_slopes=True)
    losses, loss, sums = _ClosedForm.apply(logits, batch, others, run, what)  # type: ignore[no-untyped-call]
    return sums._replace(losses=losses, loss=loss)  # type: ignore[no-any-return]


class _Others(NamedTuple):
    """What a pass is given beside the batch."""

    pos_weight: Tensor | None
    """``(columns,)``"""
    task_weights: Tensor | None
    tasks: int
    columns: int
    """Those of all the rows that are seen as one."""

    def with_batch(self, batch: Batch) -> list[Any]:
        """The arguments of ``run_pass``."""
        # Detached, since the compiler looks at the gradient of what a view is of, and would warn where that has none.
        seen = [None if each is None else each.detach().contiguous().view(-1, self.columns) for each in batch[:4]]
        return [*seen, self.pos_weight, self.task_weights, self.tasks]


def run_pass(  # noqa: PLR0917 (the compiled one takes no keywords)
    what: Pass,
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    valid: Tensor | None,
    pos_weight: Tensor | None,
    task_weights: Tensor | None,
    tasks: int,
) -> Sums:
    """The pass over rows ``(rows / abreast, abreast · tasks)``, with no gradient of its own.

    Compiled, it makes the slopes on the way, and they are all of the batch's size that it leaves.
    """
    batch = Batch(logits, labels, weights, valid, logits.shape)
    slopes = sigmoid = plain = None
    if torch.compiler.is_compiling():
        values, plain, sigmoid = bce_at_once(logits, labels, pos_weight)
        if what.with_slopes:
            slopes = weigh(bce_slopes(sigmoid.clone(), labels, pos_weight), weights)
    else:
        values = bce_values(logits, labels, pos_weight)
    loss_sum = sum_wide(weigh_(values, weights), tasks)
    sums = TaskSums(loss_sum, sum_weights(batch, tasks, what.mean_over, what.over_rows))
    update, quality = loss_sum, None
    if what.drops_non_finite is not None:
        update = pack_update(sums, drops_non_finite=what.drops_non_finite)
    if what.quality is not None:
        # Without pos_weights the log loss is the loss.
        log_loss = loss_sum if pos_weight is None else None
        if log_loss is None and plain is not None:
            log_loss = sum_wide(weigh(plain, weights), tasks)
        *four, count = sum_quality(batch, tasks, log_loss, sigmoid)
        assert not isinstance(count, Tensor)
        quality = pack_update(four, drops_non_finite=what.quality, rows=count if what.counts_rows else None)
    if what.reduction is None:
        losses, loss = loss_sum.to(logits.dtype), None
    else:
        losses, loss = what.reduction.values(sums, task_weights, logits.dtype, is_final=False)
    return Sums(losses, loss, sums.weight, update, quality, slopes)


@functools.cache
def _compiled(what: Pass, _: tuple[torch.dtype | bool, ...]) -> Callable[..., Sums]:
    """``run_pass`` of it on inputs of these dtypes, which is compiled when it is called, for any number of rows."""

    def run(*inputs: Any) -> Sums:
        return run_pass(what, *inputs)

    # Of one code object torch compiles no more than eight forms, and then none at all, so each has one of its own.
    return torch.compile(FunctionType(run.__code__.replace(), run.__globals__, closure=run.__closure__), dynamic=True)


def _run_compiled(what: Pass, *inputs: Any) -> Sums:
    try:
        kinds = [isinstance(each, Tensor) and each.dtype for each in inputs]
        return _compiled(what, tuple(kinds))(*inputs)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        first, *_ = f"{error}\n".splitlines()
        raise RuntimeError(
            "fused: got True where torch.compile fails, expected what it needs, a C++ compiler for tensors on a CPU "
            f"and Triton for those on a GPU, or fused=False: {type(error).__name__}: {first}"
        ) from error


class _ClosedForm(torch.autograd.Function):
    """A pass, with the derivative by the logits in closed form.

    It keeps the caller's own tensors and, where the pass made them, the slopes, which the first backward pass turns
    into its result. For any other they are made again, in the same way, so that the result is the same to the bit.
    """

    @staticmethod
    def forward(  # noqa: PLR0917 (apply() takes no keywords)
        ctx: Any, logits: Tensor, batch: Batch, others: _Others, run: Callable[..., Sums], what: Pass
    ) -> tuple[Tensor, Tensor | None, Sums]:
        sums = run(what, *others.with_batch(batch))
        ctx.save_for_backward(logits, *batch[1:4])
        ctx.shape, ctx.others, ctx.run, ctx.what = logits.shape, others, run, what
        ctx.weight, ctx.slopes, ctx.makes_slopes = sums.weight, sums.slopes, sums.slopes is not None
        ctx.set_materialize_grads(False)
        return sums.losses, sums.loss, sums._replace(slopes=None)

    @staticmethod
    def backward(
        ctx: Any, grad_losses: Tensor | None, grad_loss: Tensor | None, _: None
    ) -> tuple[Tensor | None, None, None, None, None]:
        return _ClosedForm._gradient(ctx, grad_losses, grad_loss), None, None, None, None

    @staticmethod
    def _gradient(ctx: Any, grad_losses: Tensor | None, grad_loss: Tensor | None) -> Tensor | None:
        grad, others = grad_losses, ctx.others
        if ctx.what.reduction is not None and not (grad_losses is None and grad_loss is None):
            grad = ctx.what.reduction.gradient(ctx.weight, others.task_weights, grad_losses, grad_loss, others.tasks)
        if grad is None:
            return None
        if torch.is_grad_enabled():
            return _differentiate(ctx, grad)
        slopes, weights = _slopes(ctx)
        if is_batch_of_gradients(grad):
            return weigh(slopes.view(ctx.shape) * grad, None if weights is None else weights.view(ctx.shape))
        # With no second reference to it, the gradient of a leaf is this tensor and no copy.
        ctx.slopes = None
        slopes.mul_(grad if grad.ndim == 0 else grad.repeat(others.columns // others.tasks))
        return weigh_(slopes, weights).view(ctx.shape)


def _slopes(ctx: Any) -> tuple[Tensor, Tensor | None]:
    """The derivatives by the logits, rows abreast, and the weights that are not in them yet."""
    if ctx.slopes is not None:
        return ctx.slopes, None
    inputs = ctx.others.with_batch(_saved_batch(ctx))
    slopes: Tensor | None = ctx.run(ctx.what, *inputs).slopes if ctx.makes_slopes else None
    if slopes is not None:
        return slopes, None
    logits, labels, weights, _, pos_weight, *_ = inputs
    return bce_slopes(logits.sigmoid(), labels, pos_weight), weights


def _saved_batch(ctx: Any) -> Batch:
    logits, labels, weights, valid = ctx.saved_tensors
    return Batch(logits, labels, weights, valid, ctx.shape)


def _differentiate(ctx: Any, grad: Tensor) -> Tensor:
    """The gradient by the logits, to be differentiated again."""
    batch, (pos_weight, _, tasks, _) = _saved_batch(ctx), ctx.others
    pos_weight = None if pos_weight is None else pos_weight[:tasks]
    loss = weigh_losses(LossType.BCE_WITH_LOGITS, batch, pos_weight, tasks)
    gradient: Tensor = torch.autograd.grad(loss, batch.logits, grad.expand_as(loss), create_graph=True)[0]
    return gradient
