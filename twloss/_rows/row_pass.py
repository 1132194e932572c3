"""The one pass over the rows of a batch: weight times loss, summed over the rows, with the sums of the quality.

A ``Batch`` ``(rows, tasks)`` comes in; ``BatchSums`` ``(tasks,)`` go out. The weighted rows are made in one of three
ways: by single kernels, or compiled, both with the gradient by the logits in closed form; or by operations that
autograd differentiates, where any other derivative may be asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from twloss._arguments import MeanOver, RowReduction
from twloss._constants import TaskConstants
from twloss._precision import SUM_DTYPES, sum_dtype
from twloss._rows.batch import Batch
from twloss._rows.binary_cross_entropy import fused_bce, values_of_bce
from twloss._rows.cell_sums import append_cells
from twloss._rows.compiled import run_compiled
from twloss._rows.differentiable import mask_tasks, weigh_losses
from twloss._rows.row_loss import RowLoss
from twloss._sums.reduction import Reduction
from twloss._sums.running_sums import pack_update
from twloss._sums.sums import BatchSums, TaskSums
from twloss._torch import is_batch_of_gradients, is_transformed, mask, runs_compiled, tile, weigh, weigh_

Inputs = tuple[Any, ...]
"""A ``Batch``; pos_weights, logit_shift ``(abreast · tasks,)``; task_weights."""
Run = Callable[..., tuple[BatchSums, Tensor | None]]
Sums = list[Tensor | float]

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
    segments: tuple[int, ...] = ()
    """The number of ids of each dimension of segments; (): none."""


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
    logits, labels, weights, *_ = batch
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
    return *seen, *inputs[4:]


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
    segments: Tensor | None,
    pos_weight: Tensor | None,
    shift: Tensor | None,
    task_weights: Tensor | None,
) -> tuple[BatchSums, Tensor | None]:
    """The pass over rows ``(⌈rows / abreast⌉, abreast · tasks)``, with no gradient of its own.

    ``rows`` is their number without what fills up the last ones.
    The compiled pass also returns the weighted slopes, its only output of the batch's size.
    """
    divisors = divisors_of(plan, weights, valid)
    weight = rows if divisors is None else sum_rows(divisors, tasks)
    plain = slopes = sigmoid = None
    if torch.compiler.is_compiling():
        losses, plain, slopes, sigmoid = row_loss.fused(logits, labels, pos_weight)
        slopes = weigh(slopes, weights) if with_slopes else None
    else:
        losses = row_loss.values(logits, labels, pos_weight)
    losses = losses if weights is None else weigh_(losses, weights)
    loss_sum = sum_rows(losses, tasks)
    sums: Sums = [loss_sum, weight]
    summed: list[Tensor | None] = []
    if plan.quality:
        # Without pos_weights the log loss is the loss.
        log_loss = (loss_sum, losses) if pos_weight is None else None
        quality, summed = sum_quality(logits, labels, weights, rows, tasks, shift, log_loss, plain, sigmoid)
        sums += quality
    if segments is not None:
        sums = append_cells(sums, [losses, divisors, *summed], segments, plan.segments, fused=plan.fused)
    faults = None
    if plan.validates:
        faults = count_faults(row_loss.invalid_labels(logits, labels), weights, loss_sum)
    return _reduce(plan, TaskSums(loss_sum, weight), sums, rows, faults, task_weights, logits.dtype), slopes


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
    divisors = divisors_of(plan, batch.weights, batch.valid)
    weight: Tensor | float = count if divisors is None else sum_rows(divisors, tasks)
    if is_traced and not isinstance(weight, Tensor):
        # A program of torch.export would take for granted that there are rows.
        weight = torch.full((tasks,), weight, dtype=sum_dtype(rows.device), device=rows.device)
    logits, labels, weights, _, segments = batch
    tracked: Sums = []
    faults = None
    if not is_traced:
        losses = rows.detach()
        loss_sum = sum_rows(losses, tasks)
        tracked = [loss_sum, weight]
        summed: list[Tensor | None] = []
        if plan.quality:
            quality, summed = sum_quality(logits, labels, weights, count, tasks, shift)
            tracked += quality
        if segments is not None:
            summed = [losses, divisors, *summed]
            tracked = append_cells(tracked, summed, segments, plan.segments, fused=plan.fused)
        faults = count_faults(invalid, weights, loss_sum) if plan.validates else None
    return _reduce(plan, TaskSums(rows.sum(0), weight), tracked, count, faults, task_weights, rows.dtype)


def _reduce(  # noqa: PLR0917
    plan: Plan,
    sums: TaskSums,
    tracked: Sums,
    rows: int,
    faults: Tensor | None,
    task_weights: Tensor | None,
    dtype: torch.dtype,
) -> BatchSums:
    """Pack the sums and, if planned, reduce them to losses.

    Args:
        plan: the results to produce.
        sums: to train on.
        tracked: the same, detached and in the widest dtype, and those of the quality, all with the cells of segments;
            none where a transform runs the forward, which may then run any number of times and counts as none.
        rows: their number.
        faults: what ``count_faults`` returns.
        task_weights: ``(tasks,)``
        dtype: of the losses.
    """
    own: Any = None
    packed = None
    if tracked:
        own, *_ = of_loss = tracked[:2]
        if plan.tracks:
            own, faults = pack_update(of_loss, drops_non_finite=plan.drops_non_finite, faults=faults), None
        elif plan.segments:
            own = torch.stack(of_loss)  # type: ignore[arg-type]
    if of_quality := tracked[2:]:
        counted = rows if plan.quality_counts_rows else None
        packed = pack_update(of_quality, drops_non_finite=plan.quality_drops_non_finite, rows=counted)
    if plan.reduction is None:
        # A copy in any case: what is tracked may be the same tensor, which compiled code would give no gradient.
        losses = sums.loss_sum.to(dtype, copy=True)
        return BatchSums(losses, None, sums.weight, own, packed, faults)
    losses, loss = plan.reduction.values(sums, task_weights, dtype, is_final=False)
    return BatchSums(losses, loss, sums.weight, own, packed, faults)


def sum_rows(values: Tensor, tasks: int) -> Tensor:
    """The sum over rows ``(tasks,)`` of ``(rows, tasks)``, in the widest dtype; several rows may be seen as one."""
    total = values.sum(0, dtype=SUM_DTYPES.get(values.device.type, torch.float64))
    return total if total.numel() == tasks else total.view(-1, tasks).sum(0)


def divisors_of(plan: Plan, weights: Tensor | None, valid: Tensor | None) -> Tensor | None:
    """What each row adds to the divisor of a mean, ``(rows, tasks)``: 1 if it is valid, or its weight; None: 1 of each.

    For a sum it only tells whether there is data, hence |w|: weights that cancel are data.
    """
    if weights is not None and plan.mean_over == "weights":
        return weights if plan.over_rows == "mean" else weights.abs()
    return valid


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
    log_loss: tuple[Tensor, Tensor] | None = None,
    plain: Tensor | None = None,
    sigmoid: Tensor | None = None,
) -> tuple[Sums, list[Tensor | None]]:
    """The sums of the quality of binary predictions.

    Args:
        logits: ``(rows, tasks)``, and so the next two; several rows may be seen as one.
        labels: in [0, 1].
        weights: None: 1.
        rows: the number of rows.
        tasks: the number of tasks.
        shift: added to the logits ``(tasks,)``; what follows is then of other logits, and not used.
        log_loss: Σ w·l ``(tasks,)``, and w·l of each row, where they are known.
        plain: the binary cross-entropy of each row without a pos_weight, where it is known.
        sigmoid: σ(x), where it is known.

    Returns:
        Σ w·l, Σ w, Σ w·y and Σ w·σ(x), each ``(tasks,)`` or a number; and what is summed, ``(rows, tasks)``, or None
        for 1 of each row.
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
        losses = weigh(plain, weights)
        log_loss = sum_rows(losses, tasks), losses
    loss_sum, losses = log_loss
    weight = rows if weights is None else sum_rows(weights, tasks)
    sums: Sums = [loss_sum, weight, sum_rows(positives, tasks), sum_rows(predicted, tasks)]
    return sums, [losses, weights, positives, predicted]


def _run_compiled(plan: Plan, row_loss: RowLoss, with_slopes: bool, *inputs: Any) -> tuple[BatchSums, Tensor | None]:
    return run_compiled(_run, (plan, row_loss, with_slopes), *inputs)  # type: ignore[no-any-return]


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
        *batch, _, pos_weight, shift, task_weights = inputs
        ctx.save_for_backward(*batch)
        ctx.how, ctx.constants, ctx.weight = how, (pos_weight, shift, task_weights), sums.weight
        ctx.slopes, ctx.makes_slopes = slopes, slopes is not None
        ctx.set_materialize_grads(False)
        return sums.losses, sums.loss, sums

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor | None, grad_loss: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        return None, _gradient(ctx, grad_losses, grad_loss), *(None,) * 7


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
    inputs: Inputs = (logits, labels, weights, valid, None, pos_weight, shift, task_weights)
    seen = inputs if slopes is not None or abreast == 1 else _see(inputs, tasks, abreast)
    if ctx.makes_slopes and slopes is None:
        # Without ids: cells have no slopes.
        slopes = run(plan._replace(segments=()), row_loss, True, logits.shape[0], tasks, *seen)[1]
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
