"""Where a batch enters: what the caller passes becomes aligned tensors, or a clear error.

Logits, labels and weights come in, tensors or mappings task -> tensor; a ``Batch`` of one shape, device and floating
dtype goes out. Checks look at types, shapes, dtypes and devices only, never at values: reading a value would wait for
the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from twloss._arguments import IgnoreIndex, check_dense
from twloss._precision import sum_dtype
from twloss._rows.mappings import (
    FLOATS,
    TENSOR_OR_MAPPING,
    TaskTensors,
    all_valid,
    is_valid,
    refuse_dtype,
    stack_inputs,
)
from twloss._rows.row_loss import RowLoss


class Batch(NamedTuple):
    """Aligned inputs, ``(rows, tasks)``; of one task for a callable as they came, since its result tells the rows."""

    logits: Tensor
    """``(rows, tasks, …)``, float32 or float64."""
    labels: Tensor
    """``(rows, tasks, …)``, in the dtype that the loss asks for."""
    weights: Tensor | None
    """``(rows, tasks)`` in the logits' dtype, 0 where the label is missing; None: every row counts once."""
    valid: Tensor | None
    """``(rows, tasks)`` bool, False where the label is missing; None: no label can be missing."""
    segments: Tensor | None = None
    """``(dimensions, rows, 1 or tasks)`` int64, the row's id in each dimension; None: no segments."""


def align(  # noqa: PLR0917 (a batch and its columns)
    logits: TaskTensors,
    labels: TaskTensors,
    weights: TaskTensors | None,
    tasks: tuple[str, ...] | None,
    row_loss: RowLoss,
    ignore_index: IgnoreIndex,
    *,
    has_other_tasks: bool = False,
) -> Batch:
    """Check the inputs, against each other too, and bring them to one shape and dtype.

    Args:
        logits: ``(rows, tasks)`` or what the loss takes, such as ``(rows, tasks, classes)``, floating; with tasks also
            a mapping task -> ``(rows,)``, ``(rows, 1)`` or ``(rows, …)``, as for the others; each task may have rows
            of its own, which all three then are mappings of.
        labels: ``(rows, tasks)``, any real dtype; of one task any shape; for a callable also ``(rows, tasks, …)``.
        weights: ``(rows, tasks)``, ``(rows, 1)`` or ``(rows,)``; of one task what broadcasts to its rows. They are
            rounded to the dtype of the logits, float32 at least.
        tasks: the names of the columns; None: one task, and no mappings.
        row_loss: the loss that will be computed.
        ignore_index: the label that says "missing"; NaN is allowed.
        has_other_tasks: whether mappings may have other tasks as well.
    """
    valid = None
    # isinstance(…, Mapping) is slow: plain tensors, the usual case, are not asked.
    is_plain = type(logits) is type(labels) is Tensor and (weights is None or type(weights) is Tensor)
    if not is_plain and tasks is not None and any(isinstance(each, Mapping) for each in (logits, labels, weights)):
        logits, labels, weights, valid = stack_inputs(
            logits,
            labels,
            weights,
            tasks,
            has_classes=row_loss.has_classes,
            ignore_index=ignore_index,
            has_other_tasks=has_other_tasks,
        )
    logits, labels, weights = _check_tensors(logits, labels, weights, tasks)
    columns, label_dtype = None if tasks is None else len(tasks), logits.dtype
    is_elementwise = row_loss.has_classes is False and labels.shape == logits.shape
    # What the check of an elementwise loss looks at, in the hot path called only to raise.
    if not is_elementwise or (tasks is not None and labels.shape[1:] != (columns,)):
        label_dtype = row_loss.check(logits, labels, columns)
    # A bfloat16 sum of 1025 ones is 1024.
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    if ignore_index is not None and valid is None:
        valid = is_valid(labels, tasks, ignore_index)
    logits, labels = logits.to(dtype), labels.to(dtype if label_dtype.is_floating_point else label_dtype)
    if weights is not None and weights.dtype != dtype:
        weights = round_weights(weights, dtype)
    batch = Batch(logits, labels, weights, valid)
    if tasks is not None:
        is_aligned = valid is None and (weights is None or weights.shape == labels.shape[:2])
        return batch if is_aligned else align_rows(batch, labels.shape[:2], by_row=True)
    if row_loss.has_classes is None:
        return batch
    columns_of_one = logits.reshape(-1, 1, *logits.shape[labels.ndim :]), labels.reshape(-1, 1)
    return Batch(*columns_of_one, *align_weights(weights, valid, labels.shape, dtype, by_row=False))


def align_labels(
    labels: TaskTensors,
    weights: TaskTensors | None,
    tasks: tuple[str, ...] | None,
    row_loss: RowLoss,
    ignore_index: IgnoreIndex,
    *,
    has_other_tasks: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Check labels and weights that come without logits, and bring them to one shape.

    Args:
        labels: as ``align`` takes them, and so the others; of one task for a callable ``(rows,)``.
        weights: see there. They are not rounded, unless the device has no float64.
        tasks: see there.
        row_loss: see there.
        ignore_index: see there.
        has_other_tasks: see there.

    Returns:
        Labels ``(rows, tasks, …)`` in their own dtype; weights and valid as ``Batch`` has them, without a gradient.
    """
    valid = None
    if tasks is not None and (isinstance(labels, Mapping) or isinstance(weights, Mapping)):
        _, labels, weights, valid = stack_inputs(
            None,
            labels,
            weights,
            tasks,
            has_classes=row_loss.has_classes,
            ignore_index=ignore_index,
            has_other_tasks=has_other_tasks,
        )
    labels, weights = _check_labels(labels, weights, tasks)
    row_loss.check_labels(labels, None if tasks is None else len(tasks))
    if tasks is None and row_loss.has_classes is None and labels.ndim > 1:
        raise ValueError(
            f"labels: got shape {tuple(labels.shape)}, expected (rows,), since of one task only the result of a "
            "callable tells which dimensions are rows; a MultiTaskLoss of one task takes (rows, 1, …)"
        )
    if ignore_index is not None and valid is None:
        valid = is_valid(labels, tasks, ignore_index)
    dtype = sum_dtype(labels.device)
    if weights is not None:
        weights = weights.detach()
        weights = weights if weights.dtype == dtype else round_weights(weights, dtype)
    if tasks is not None:
        return labels, *align_weights(weights, valid, labels.shape[:2], dtype, by_row=True)
    return labels.reshape(-1, 1), *align_weights(weights, valid, labels.shape, dtype, by_row=False)


def align_rows(batch: Batch, shape: torch.Size, *, by_row: bool) -> Batch:
    """The batch with weights and valid ``(rows, tasks)``, and weights of 0 where a row is missing.

    A callable of one task is called before this, since its result tells which of the labels' dimensions are rows.

    Args:
        batch: with weights and valid as ``align_weights`` takes them.
        shape: see there, and so the next.
        by_row: see there.
    """
    logits, labels, weights, valid, segments = batch
    segments = segments if segments is None or by_row else flatten_ids(segments, shape)
    return Batch(logits, labels, *align_weights(weights, valid, shape, logits.dtype, by_row=by_row), segments)


def align_weights(
    weights: Tensor | None, valid: Tensor | None, shape: torch.Size, dtype: torch.dtype, *, by_row: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Weights and valid ``(rows, tasks)``, with weights of 0 where a row is missing.

    Args:
        weights: that broadcast to the rows, in this dtype.
        valid: of the labels' shape.
        shape: of the rows; ``(rows, tasks)``, or of one task any.
        dtype: of weights that are made of valid.
        by_row: whether weights ``(rows,)`` are those of the rows ``(rows, tasks)``; False: of one task.
    """
    if weights is not None and weights.shape != shape:
        weights = expand_weights(weights, shape, by_row=by_row)
    if valid is not None:
        valid = all_valid(valid, len(shape))
        weights = valid.to(dtype) if weights is None else weights.where(valid, 0.0)
    if not by_row:
        weights, valid = (None if each is None else each.reshape(-1, 1) for each in (weights, valid))
    return weights, valid


def flatten_ids(segments: Tensor, shape: torch.Size) -> Tensor:
    """The ids of one task's rows ``(dimensions, rows, 1)``, from ids that broadcast to the rows' shape."""
    # The rows' own dimensions fit from the last one on, and before them is that of the segments.
    missing = (1,) * (len(shape) + 1 - segments.ndim)
    try:
        aligned = segments.view(len(segments), *missing, *segments.shape[1:])
        return aligned.expand(len(segments), *shape).reshape(len(segments), -1, 1)
    except RuntimeError:
        raise ValueError(
            f"segments: got ids of shape {tuple(segments.shape[1:])}, expected one that broadcasts to {tuple(shape)}"
        ) from None


def round_weights(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights in the dtype of the computation; a finite one stays finite, as the largest number that the dtype has."""
    if weights.dtype == torch.float64:
        most = torch.finfo(dtype).max
        weights = weights.clamp(-most, most).where(weights.isfinite(), weights)
    return weights.to(dtype)


def _check_tensors(
    logits: Any, labels: Any, weights: Any, tasks: tuple[str, ...] | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    for name, values in (("logits", logits), ("labels", labels), ("weights", weights)):
        if name == "weights" and values is None:
            break
        # What check_dense() looks at, in the hot path called only to raise.
        if type(values) is not Tensor or values.layout != torch.strided or values.is_nested or values.is_complex():
            check_dense(name, values, tensor="a Tensor" if tasks is None else TENSOR_OR_MAPPING)
        if name == "logits" and values.dtype not in FLOATS:
            refuse_dtype("logits", values)
        if values.device != logits.device:
            raise ValueError(f"{name}: got a tensor on {values.device}, expected {logits.device}, where the logits are")
    return logits, labels, weights


def _check_labels(labels: Any, weights: Any, tasks: tuple[str, ...] | None) -> tuple[Tensor, Tensor | None]:
    for name, values in (("labels", labels), ("weights", weights)):
        if name == "weights" and values is None:
            break
        check_dense(name, values, tensor="a Tensor" if tasks is None else TENSOR_OR_MAPPING)
        if values.device != labels.device:
            raise ValueError(f"{name}: got a tensor on {values.device}, expected {labels.device}, where the labels are")
    return labels, weights


def expand_weights(weights: Tensor, shape: torch.Size, *, by_row: bool) -> Tensor:
    """Weights in the shape of the rows."""
    if by_row:
        rows, tasks = shape
        weights = weights.unsqueeze(1) if weights.shape == (rows,) else weights
    if not by_row or weights.shape == (rows, 1):
        try:
            # Contiguous, because elementwise kernels take the slow path on an expanded operand.
            return weights.expand(shape).contiguous()
        except RuntimeError:
            pass
    # Not before: in compiled code a text of a number of rows makes it a constant.
    expected = (
        f"({rows}, {tasks}), ({rows}, 1) or ({rows},)"
        if by_row
        else f"one that broadcasts to the labels' {tuple(shape)}"
    )
    raise ValueError(f"weights: got shape {tuple(weights.shape)}, expected {expected}")
