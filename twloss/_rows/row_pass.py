"""The one pass over the rows of a batch: weight times loss, summed over the rows, with the sums of the quality.

A ``Batch`` ``(rows, tasks)`` comes in; ``BatchSums`` ``(tasks,)`` go out. The weighted rows are made in one of three
ways: by single kernels, or compiled, both with the gradient by the logits in closed form; or by operations that
autograd differentiates, where any other derivative may be asked for.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from twloss._arguments import MeanOver, RowReduction
from twloss._constants import TaskConstants
from twloss._precision import SUM_DTYPES, sum_dtype
from twloss._rows.batch import Batch
from twloss._rows.binary_cross_entropy import fused_bce, values_of_bce
from twloss._rows.differentiable import mask_tasks, weigh_losses
from twloss._rows.row_loss import RowLoss
from twloss._sums.reduction import Reduction
from twloss._sums.running_sums import pack_update
from twloss._sums.sums import BatchSums, TaskSums
from twloss._torch import is_batch_of_gradients, is_transformed, mask, runs_compiled, tile, weigh, weigh_

Inputs = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""Logits, labels, weights, valid ``(rows, tasks)``; pos_weights, logit_shift ``(abreast · tasks,)``; task_weights."""
Run = Callable[..., tuple[BatchSums, Tensor | None]]
QualitySums = tuple[Tensor, Tensor | float, Tensor, Tensor, int]

# So many rows are seen as one, so that a sum over rows fills vectors even with few tasks.
_MOST_ABREAST = 16
_FEWEST_ROWS = 2 * _MOST_ABREAST  # to call compiled code for; a size of 1 would be compiled anew
_MANY_ROWS = 16_384
_MANY_ROWS_WITH_VECTORS = 512  # a kernel takes a call for each row where an operand is a vector as short as the tasks


class Plan(NamedTuple):
    """Which results one pass over a batch produces. Hashable: each distinct plan is compiled once."""

    reduction: Reduction | None
    """How sums become losses, without keys; None: they are returned as they are, to be reduced later."""
    mean_over: MeanOver
    """The divisor of a mean: the number of valid rows or Σ w."""
    over_rows: RowReduction
    """How a task's rows are reduced."""
    tracks: bool
    """True if the pass packs its sums. False if several groups are joined first."""
    drops_non_finite: bool = True
    """Whether the running sums leave out what is not finite."""
    quality: bool = False
    """Whether the pass also computes the sums of the quality of predictions."""
    quality_drops_non_finite: bool = True
    """Whether the sums of the quality leave out what is not finite."""
    quality_counts_rows: bool = False
    """Whether the sums of the quality have the number of rows beside them."""
    validates: bool = False
    """Whether invalid labels and negative weights are counted."""
    fused: bool = False
    """Whether the pass is compiled, where its gradient is in closed form."""


def sum_batch(  # noqa: PLR0917 (a plan, a batch, and its tasks)
    plan: Plan,
    row_loss: RowLoss,
    batch: Batch,
    tasks: int,
    pos_weights: TaskConstants,
    task_weights: TaskConstants,
    places: TaskConstants,
    *,
    has_rows: bool,
    logit_shift: TaskConstants | None = None,
) -> BatchSums:
    """One pass over a batch.

    Args:
        plan: the results to produce.
        row_loss: the loss.
        batch: ``(rows, tasks)``, or with ``has_rows=False`` as the inputs came.
        tasks: the number of tasks.
        pos_weights: the factors of the positive terms.
        task_weights: the factors of the losses of all tasks in the global one.
        places: the places of these tasks among all; None: they are all.
        has_rows: False for a callable of one task, whose result tells the rows.
        logit_shift: what the quality adds to the logits.
    """
    logits, labels, weights, _ = batch
    if plan.quality and not row_loss.is_binary:
        plan = plan._replace(quality=False)
    is_traced = is_transformed(logits, labels, weights)
    global_weights = None if plan.reduction is None else task_weights.like(logits)
    by_logits_alone = not (is_traced or labels.requires_grad or (weights is not None and weights.requires_grad))
    if not (row_loss.has_closed_form and by_logits_alone):
        shift = None if logit_shift is None else logit_shift.like(logits)
        # Compiled code must not depend on the numbers; they are constants of an export, which has no functions of ours.
        is_compiled = torch.compiler.is_compiling()
        if has_rows and (not is_traced if is_compiled else 0.0 in (task_weights.numbers or ())):
            own, index = task_weights.like(logits), places.like(logits)
            if own is not None:
                own = own if index is None else own.index_select(0, index)
                batch = batch._replace(logits=mask_tasks(logits, own))
        invalid = row_loss.invalid_labels(logits, labels) if plan.validates else None
        factors = pos_weights.like(logits)
        rows, batch = weigh_losses(row_loss, batch, factors, invalid, has_rows=has_rows, is_traced=is_traced)
        return _sum_differentiable(plan, rows, batch, (shift, global_weights), invalid, is_traced=is_traced)
    run: Run = _run
    count, abreast = logits.shape[0], 1
    if plan.fused and count >= _FEWEST_ROWS and runs_compiled(logits):
        run, abreast = _run_compiled, _MOST_ABREAST
    elif torch.compiler.is_compiling():
        # The only guard on a number of rows: of 16, one row would be left, and a size of 1 is compiled as a constant.
        abreast = _MOST_ABREAST if count % (2 * _MOST_ABREAST) == 0 else 1
    elif count >= (_MANY_ROWS if pos_weights.numbers is None else _MANY_ROWS_WITH_VECTORS) and logits.is_contiguous():
        # For a small batch the second sum costs more than it saves. So does a copy of logits that are not contiguous.
        abreast = math.gcd(count, _MOST_ABREAST)
    shift = None if logit_shift is None else logit_shift.like(logits, repeats=abreast)
    inputs = (*batch, pos_weights.like(logits, repeats=abreast), shift, global_weights)
    if torch.is_grad_enabled() and logits.requires_grad:
        how = run, plan, row_loss, tasks, abreast
        losses, loss, sums = _ClosedForm.apply(how, *inputs)  # type: ignore[no-untyped-call]
        if torch.compiler.is_compiling():
            # The compiler takes tensors in a tuple for outputs with a gradient, too.
            _, _, *detached = [each.detach() if isinstance(each, Tensor) else each for each in sums]
            return BatchSums(losses, loss, *detached)
        return sums._replace(losses=losses, loss=loss)  # type: ignore[no-any-return]
    with torch.no_grad():
        seen = inputs if abreast == 1 else _see(inputs, tasks, abreast)
        return run(plan, row_loss, False, count, tasks, *seen)[0]


def _see(inputs: Inputs, tasks: int, abreast: int) -> Inputs:
    """The inputs of ``_run`` with ``abreast`` rows seen as one, the last one filled up.

    The filling adds 0 to each sum: a label of 0 that is predicted with certainty, of weight 0.
    """
    missing = -inputs[0].shape[0] % abreast
    seen: list[Tensor | None] = []
    for each, filling in zip(inputs, (-math.inf, 0.0, 0.0, False)):
        if each is None:
            seen.append(None)
            continue
        # Detached, since the compiler looks at the gradient of what a view is of, and would warn where that has none.
        values = each.detach().contiguous()
        if missing:
            values = F.pad(values, (0, 0, 0, missing), value=filling)
        seen.append(values.view(-1, abreast * tasks))
    return *seen, *inputs[4:]  # type: ignore[return-value]


def _run(  # noqa: PLR0917 (the compiled one takes no keywords)
    plan: Plan,
    row_loss: RowLoss,
    with_slopes: bool,
    rows: int,
    tasks: int,
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    valid: Tensor | None,
    pos_weight: Tensor | None,
    shift: Tensor | None,
    task_weights: Tensor | None,
) -> tuple[BatchSums, Tensor | None]:
    """The pass over rows ``(⌈rows / abreast⌉, abreast · tasks)``, with no gradient of its own.

    ``rows`` is their number without what fills up the last ones.
    The compiled pass also returns the weighted slopes, its only output of the batch's size.
    """
    weight = sum_weights(plan, weights, valid, rows, tasks)
    plain = slopes = sigmoid = None
    if torch.compiler.is_compiling():
        losses, plain, slopes, sigmoid = row_loss.fused(logits, labels, pos_weight)
        slopes = weigh(slopes, weights) if with_slopes else None
    else:
        losses = row_loss.values(logits, labels, pos_weight)
    loss_sum = sum_rows(losses if weights is None else weigh_(losses, weights), tasks)
    quality = None
    if plan.quality:
        # Without pos_weights the log loss is the loss.
        log_loss = loss_sum if pos_weight is None else None
        quality = sum_quality(logits, labels, weights, rows, tasks, shift, log_loss, plain, sigmoid)
    faults = None
    if plan.validates:
        faults = count_faults(row_loss.invalid_labels(logits, labels), weights, loss_sum)
    sums = TaskSums(loss_sum, weight)
    return _reduce(plan, sums, loss_sum, quality, faults, task_weights, logits.dtype), slopes


def _sum_differentiable(
    plan: Plan,
    rows: Tensor,
    batch: Batch,
    constants: tuple[Tensor | None, Tensor | None],
    invalid: Tensor | None,
    *,
    is_traced: bool,
) -> BatchSums:
    """The pass over weighted rows ``(rows, tasks)``, with the gradient that autograd computes.

    The constants are the last two of ``Inputs``.
    """
    shift, task_weights = constants
    count, tasks = rows.shape
    weight = sum_weights(plan, batch.weights, batch.valid, count, tasks)
    if is_traced and not isinstance(weight, Tensor):
        # A program of torch.export would take for granted that there are rows.
        weight = torch.full((tasks,), weight, dtype=sum_dtype(rows.device), device=rows.device)
    loss_sum = None if is_traced else sum_rows(rows.detach(), tasks)
    quality = None
    if plan.quality and loss_sum is not None:
        quality = sum_quality(batch.logits, batch.labels, batch.weights, count, tasks, shift)
    faults = count_faults(invalid, batch.weights, loss_sum) if plan.validates and loss_sum is not None else None
    return _reduce(plan, TaskSums(rows.sum(0), weight), loss_sum, quality, faults, task_weights, rows.dtype)


def _reduce(  # noqa: PLR0917
    plan: Plan,
    sums: TaskSums,
    loss_sum: Tensor | None,
    quality: QualitySums | None,
    faults: Tensor | None,
    task_weights: Tensor | None,
    dtype: torch.dtype,
) -> BatchSums:
    """Pack the sums and, if planned, reduce them to losses.

    Args:
        plan: the results to produce.
        sums: to train on.
        loss_sum: the same, detached and in the widest dtype; None where a transform runs the forward, which may then
            run any number of times and counts as none.
        quality: what ``sum_quality`` returns.
        faults: what ``count_faults`` returns.
        task_weights: ``(tasks,)``
        dtype: of the losses.
    """
    tracked = loss_sum
    if plan.tracks and loss_sum is not None:
        tracked = pack_update((loss_sum, sums.weight), drops_non_finite=plan.drops_non_finite, faults=faults)
        faults = None
    packed = None
    if quality is not None:
        *of_quality, count = quality
        rows = count if plan.quality_counts_rows else None
        packed = pack_update(of_quality, drops_non_finite=plan.quality_drops_non_finite, rows=rows)
    if plan.reduction is None:
        # A copy in any case: what is tracked may be the same tensor, which compiled code would give no gradient.
        losses = sums.loss_sum.to(dtype, copy=True)
        return BatchSums(losses, None, sums.weight, tracked, packed, faults)
    losses, loss = plan.reduction.values(sums, task_weights, dtype, is_final=False)
    return BatchSums(losses, loss, sums.weight, tracked, packed, faults)


def sum_rows(values: Tensor, tasks: int) -> Tensor:
    """The sum over rows ``(tasks,)`` of ``(rows, tasks)``, in the widest dtype; several rows may be seen as one."""
    total = values.sum(0, dtype=SUM_DTYPES.get(values.device.type, torch.float64))
    return total if total.numel() == tasks else total.view(-1, tasks).sum(0)


def sum_weights(plan: Plan, weights: Tensor | None, valid: Tensor | None, rows: int, tasks: int) -> Tensor | float:
    """The divisor of a mean, ``(tasks,)``: the number of valid rows ("rows"), or Σ of their weights ("weights").

    For a sum it only tells whether there is data, hence Σ|w|: weights that cancel are data.
    """
    if weights is not None and plan.mean_over == "weights":
        return sum_rows(weights if plan.over_rows == "mean" else weights.abs(), tasks)
    return rows if valid is None else sum_rows(valid, tasks)


def count_faults(invalid: Tensor | None, weights: Tensor | None, like: Tensor) -> Tensor:
    """The rows with an invalid label, of those that count, and those of negative weight, ``(2, tasks)``.

    Args:
        invalid: ``(rows, tasks)``, what ``RowLoss.invalid_labels`` returns; several rows may be seen as one.
        weights: likewise; None: 1.
        like: ``(tasks,)``, in the dtype of the counts.
    """
    tasks, labels, negative = like.numel(), torch.zeros_like(like), torch.zeros_like(like)
    if invalid is not None:
        labels = sum_rows(invalid if weights is None else invalid & (weights != 0), tasks)
    if weights is not None:
        negative = sum_rows(weights < 0, tasks)
    return torch.stack((labels, negative))


@torch.no_grad()
def sum_quality(  # noqa: PLR0917 (a batch, and what is known of it)
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    rows: int,
    tasks: int,
    shift: Tensor | None = None,
    log_loss: Tensor | None = None,
    plain: Tensor | None = None,
    sigmoid: Tensor | None = None,
) -> QualitySums:
    """The sums of the quality of binary predictions.

    Args:
        logits: ``(rows, tasks)``, and so the next two; several rows may be seen as one.
        labels: in [0, 1].
        weights: None: 1.
        rows: the number of rows.
        tasks: the number of tasks.
        shift: added to the logits ``(tasks,)``; what follows is then of other logits, and not used.
        log_loss: Σ w·l ``(tasks,)``, where it is known.
        plain: the binary cross-entropy of each row without a pos_weight, where it is known.
        sigmoid: σ(x), where it is known.

    Returns:
        Σ w·l, Σ w, Σ w·y and Σ w·σ(x), each ``(tasks,)`` or a number, and the number of rows.
    """
    if shift is not None:
        logits, log_loss, plain, sigmoid = logits + shift, None, None, None
    if plain is None and log_loss is None:
        if torch.compiler.is_compiling() or is_transformed(logits, labels, weights):
            _, plain, _, sigmoid = fused_bce(logits, labels, None)
        else:
            plain = values_of_bce(logits, labels, None)
    sigmoid = logits.sigmoid() if sigmoid is None else sigmoid
    positives, predicted = weigh(labels, weights), weigh(sigmoid, weights)
    if log_loss is None:
        assert plain is not None
        log_loss = sum_rows(weigh(plain, weights), tasks)
    weight = rows if weights is None else sum_rows(weights, tasks)
    return log_loss, weight, sum_rows(positives, tasks), sum_rows(predicted, tasks), rows


@functools.cache
def _compiled(
    plan: Plan, row_loss: RowLoss, with_slopes: bool, _: tuple[torch.dtype | None, ...]
) -> Callable[..., tuple[BatchSums, Tensor | None]]:
    """``_run`` of a plan on inputs of these dtypes, which is compiled when it is called, for any number of rows."""

    def run(*inputs: Any) -> tuple[BatchSums, Tensor | None]:
        return _run(plan, row_loss, with_slopes, *inputs)

    # Of one code object torch compiles no more than eight forms, and then none at all, so each has one of its own.
    return torch.compile(FunctionType(run.__code__.replace(), run.__globals__, closure=run.__closure__), dynamic=True)


def _run_compiled(
    plan: Plan, row_loss: RowLoss, with_slopes: bool, rows: int, tasks: int, *inputs: Tensor | None
) -> tuple[BatchSums, Tensor | None]:
    try:
        dtypes = tuple([None if each is None else each.dtype for each in inputs])
        return _compiled(plan, row_loss, with_slopes, dtypes)(rows, tasks, *inputs)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        first, *_ = f"{error}\n".splitlines()
        raise RuntimeError(
            "fused: got True where torch.compile fails, expected what it needs, a C++ compiler for tensors on a CPU "
            f"and Triton for those on a GPU, or fused=False: {type(error).__name__}: {first}"
        ) from error


How = tuple[Run, Plan, RowLoss, int, int]
"""How a batch is passed over: by what, the plan, the loss, the number of tasks, and how many rows are seen as one."""


class _ClosedForm(torch.autograd.Function):
    """A pass, with the derivative by the logits in closed form.

    It keeps the caller's own tensors and, where the pass made them, the slopes, which the first backward pass turns
    into its result. A later backward pass recomputes them and gets the same bits.
    """

    @staticmethod
    def forward(ctx: Any, how: How, *inputs: Any) -> tuple[Tensor, Tensor | None, BatchSums]:
        run, plan, row_loss, tasks, abreast = how
        seen = inputs if abreast == 1 else _see(inputs, tasks, abreast)
        sums, slopes = run(plan, row_loss, True, inputs[0].shape[0], tasks, *seen)
        # The constants are the loss's own, which no one changes in place: nothing to save, nor to offload.
        *batch, pos_weight, shift, task_weights = inputs
        ctx.save_for_backward(*batch)
        ctx.how, ctx.constants, ctx.weight = how, (pos_weight, shift, task_weights), sums.weight
        ctx.slopes, ctx.makes_slopes = slopes, slopes is not None
        ctx.set_materialize_grads(False)
        return sums.losses, sums.loss, sums

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor | None, grad_loss: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        return None, _gradient(ctx, grad_losses, grad_loss), None, None, None, None, None, None


def _gradient(ctx: Any, grad_losses: Tensor | None, grad_loss: Tensor | None) -> Tensor | None:
    """The gradient by the logits ``(rows, tasks)`` from those by the tasks' losses ``(tasks,)`` and the global one."""
    run, plan, row_loss, tasks, abreast = ctx.how
    logits, labels, weights, valid = ctx.saved_tensors
    pos_weight, shift, task_weights = ctx.constants
    grad = grad_losses
    if plan.reduction is not None and not (grad_losses is None and grad_loss is None):
        grad = plan.reduction.gradient(ctx.weight, task_weights, grad_losses, grad_loss, tasks)
    if grad is None:
        return None
    if torch.is_grad_enabled():
        pos_weight = None if pos_weight is None else pos_weight[:tasks]
        losses, _ = weigh_losses(row_loss, Batch(logits, labels, weights, valid), pos_weight)
        gradient: Tensor = torch.autograd.grad(losses, logits, grad.expand_as(losses), create_graph=True)[0]
        # Only what is not finite: the derivative by a factor of 0 is the slope.
        return gradient if grad.ndim == 0 else gradient.where((grad != 0) | gradient.isfinite(), 0.0)
    factor = grad if grad.ndim == 0 else tile(grad.to(logits.dtype), abreast)
    slopes = ctx.slopes
    inputs: Inputs = (logits, labels, weights, valid, pos_weight, shift, task_weights)
    seen = inputs if slopes is not None or abreast == 1 else _see(inputs, tasks, abreast)
    if ctx.makes_slopes and slopes is None:
        slopes = run(plan, row_loss, True, logits.shape[0], tasks, *seen)[1]
    # With no second reference to it, the gradient of a leaf is this tensor and no copy.
    ctx.slopes = None
    if ctx.makes_slopes and torch.compiler.is_compiling():
        # 0 where the slope or the factor is 0, whatever the other is: here it costs no kernel.
        gradient = (slopes * factor).where((slopes != 0) & (factor != 0), 0.0)
        return _unsee(gradient, logits, tasks)
    # A vmap of many gradients takes nothing in place.
    is_batch = is_batch_of_gradients(grad)
    if ctx.makes_slopes:
        gradient = slopes * factor if is_batch else slopes.mul_(factor)
    else:
        gradient = row_loss.gradient(seen[0], seen[1], pos_weight, factor.to(logits.dtype))
        gradient = (weigh if is_batch else weigh_)(gradient, seen[2])
    if factor.ndim:
        gradient = mask(gradient, factor, in_place=not is_batch)
    gradient = _unsee(gradient, logits, tasks)
    return gradient if slopes is None or weights is None else mask(gradient, weights, in_place=not is_batch)


def _unsee(values: Tensor, logits: Tensor, tasks: int) -> Tensor:
    """The rows that were seen as one, by themselves again, without what filled up the last ones."""
    if values.shape == logits.shape:
        return values
    values = values.view(-1, tasks)
    return values if values.shape == logits.shape else values[: logits.shape[0]]
