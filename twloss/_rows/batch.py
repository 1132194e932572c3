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
from twloss._rows.mappings import FLOATS, TaskTensors, is_valid, refuse_dtype, stack_inputs
from twloss._rows.row_loss import LossFunction, LossType, has_soft_labels


class Batch(NamedTuple):
    """Aligned inputs; ``(rows, tasks)`` stands for the loss's shape, which is any shape for a one-task loss."""

    logits: Tensor
    """``(rows, tasks)`` or ``(rows, tasks, classes)``, float32 or float64."""
    labels: Tensor
    """``(rows, tasks)``: of the logits' dtype, or int64 class indices; a callable's also ``(rows, tasks, classes)``."""
    weights: Tensor | None
    """``(rows, tasks)`` of the logits' dtype, 0 where the label is missing; None: every row counts once."""
    valid: Tensor | None
    """``(rows, tasks)`` bool, False where the label is missing; None: no label can be missing."""
    shape: torch.Size
    """``(rows, tasks)``"""


def align(  # noqa: PLR0917 (a batch, and what it is of)
    logits: TaskTensors,
    labels: TaskTensors,
    weights: TaskTensors | None,
    tasks: tuple[str, ...] | None,
    loss_type: LossType | LossFunction,
    ignore_index: IgnoreIndex,
    *,
    takes_valid: bool = False,
) -> Batch:
    """Check the inputs, against each other too, and bring them to one shape and dtype.

    Args:
        logits: ``(rows, tasks)`` or ``(rows, tasks, classes)``, floating; with tasks also a mapping task ->
            ``(rows,)``, ``(rows, 1)`` or ``(rows, classes)``, and so for the others; each task may have rows of its
            own, which all three then are mappings of.
        labels: ``(rows, tasks)``, any real dtype; of one task any shape; for a callable also
            ``(rows, tasks, classes)``.
        weights: ``(rows, tasks)``, ``(rows, 1)`` or ``(rows,)``; of one task what broadcasts to its rows.
        tasks: the names of the columns; None: one task, and no mappings.
        loss_type: what the batch is for: only CROSS_ENTROPY and callables can have a dimension of classes.
        ignore_index: the label that says "missing"; NaN is allowed.
        takes_valid: whether a callable wants to know which rows count.
    """
    valid, is_soft = None, False
    has_classes = loss_type is LossType.CROSS_ENTROPY if isinstance(loss_type, LossType) else None
    if tasks is not None and (
        isinstance(logits, Mapping) or isinstance(labels, Mapping) or isinstance(weights, Mapping)
    ):
        logits, labels, weights, valid = stack_inputs(
            logits, labels, weights, tasks, has_classes=has_classes, ignore_index=ignore_index
        )
    logits, labels, weights = _check_tensors(logits, labels, weights)
    # A bfloat16 sum of 1025 ones is 1024.
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    if has_classes is None:
        has_classes = logits.ndim == labels.ndim + 1 and not labels.is_floating_point()
        is_soft = not has_classes and labels.ndim > (1 if tasks is None else 2)
    elif has_classes and tasks is None and labels.ndim != 1:
        # torch's own (rows, classes, positions) would be taken for (rows, positions, classes).
        shapes = f"{tuple(logits.shape)} with labels {tuple(labels.shape)}"
        raise ValueError(f"logits: got shape {shapes}, expected (rows, classes) with labels (rows,)")
    _check_shapes(logits, labels, None if tasks is None else len(tasks), has_classes=has_classes, is_soft=is_soft)
    logits = logits.to(dtype)
    if is_soft and tasks is None:
        assert not isinstance(loss_type, LossType)
        is_soft = has_soft_labels(loss_type, logits, labels.to(dtype), takes_valid=takes_valid)
    shape = labels.shape[:-1] if is_soft else labels.shape
    if weights is not None:
        weights = weights.to(dtype)
        if weights.shape != shape:
            weights = _expand_weights(weights, shape, by_row=tasks is not None)
    if ignore_index is not None and valid is None:
        valid = is_valid(labels, tasks, ignore_index, is_soft=is_soft)
    if valid is not None:
        weights = valid.to(dtype) if weights is None else weights.where(valid, 0.0)
    return Batch(logits, labels.to(torch.int64 if has_classes else dtype), weights, valid, shape)


def _check_tensors(logits: Any, labels: Any, weights: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    for name, values in (("logits", logits), ("labels", labels), ("weights", weights)):
        if name == "weights" and values is None:
            break
        # What check_dense() looks at, in the hot path called only to raise.
        if type(values) is not Tensor or values.layout != torch.strided or values.is_nested or values.is_complex():
            check_dense(name, values)
        if name == "logits" and values.dtype not in FLOATS:
            refuse_dtype("logits", values)
        if values.device != logits.device:
            raise ValueError(f"{name}: got a tensor on {values.device}, expected {logits.device}, where the logits are")
    return logits, labels, weights


def _check_shapes(logits: Tensor, labels: Tensor, tasks: int | None, *, has_classes: bool, is_soft: bool) -> None:
    if tasks is not None and (labels.ndim != 2 + is_soft or labels.shape[1] != tasks):
        raise ValueError(f"labels: got shape {tuple(labels.shape)}, expected (rows, {tasks})")
    shape = logits.shape[:-1] if has_classes else logits.shape
    if labels.shape != shape or (has_classes and logits.ndim < 2):
        expected = "the labels' shape and a last dimension of classes" if has_classes else "the labels' shape"
        raise ValueError(
            f"logits: got shape {tuple(logits.shape)} with labels {tuple(labels.shape)}, expected {expected}"
        )
    if has_classes and logits.shape[-1] == 0:
        raise ValueError(f"logits: got shape {tuple(logits.shape)}, expected at least one class")
    if has_classes and labels.is_floating_point():
        raise TypeError(f"labels: got {labels.dtype}, expected class indices of an integer dtype")


def _expand_weights(weights: Tensor, shape: torch.Size, *, by_row: bool) -> Tensor:
    """Weights in the loss's shape."""
    expected = f"one that broadcasts to the labels' {tuple(shape)}"
    if by_row:
        rows, tasks = shape
        expected = f"({rows}, {tasks}), ({rows}, 1) or ({rows},)"
        weights = weights.unsqueeze(1) if weights.shape == (rows,) else weights
    if not by_row or weights.shape == (rows, 1):
        try:
            # Contiguous, because elementwise kernels take the slow path on an expanded operand.
            return weights.expand(shape).contiguous()
        except RuntimeError:
            pass
    raise ValueError(f"weights: got shape {tuple(weights.shape)}, expected {expected}")
