"""Where a batch enters: what the caller passes becomes aligned tensors, or a clear error.

Logits, labels and weights come in; a ``Batch`` of one shape, device and floating dtype goes out. Checks look at types,
shapes, dtypes and devices only, never at values: reading a value would wait for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from twloss.arguments import check_dense

__all__ = ["Batch", "align", "compute_dtype", "keep_where_nonzero", "weighted", "without_left_out", "zero_where_zero_"]


class Batch(NamedTuple):
    """Aligned inputs; ``(rows, tasks)`` stands for the labels' shape, which is any shape for a one-task loss."""

    logits: Tensor
    """``(rows, tasks)`` or ``(rows, tasks, classes)``, float32 or float64."""
    labels: Tensor
    """``(rows, tasks)``: of the logits' dtype, or int64 class indices."""
    weights: Tensor | None
    """``(rows, tasks)`` of the logits' dtype, 0 where the label is missing; None: every row counts once."""
    valid: Tensor | None
    """``(rows, tasks)`` bool, False where the label is missing; None: no label can be missing."""

    def each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same change of every tensor that there is."""
        weights, valid = (None if values is None else change(values) for values in (self.weights, self.valid))
        return Batch(change(self.logits), change(self.labels), weights, valid)


def align(
    logits: Tensor, labels: Tensor, weights: Tensor | None, *, has_classes: bool | None, ignore_index: float | None
) -> Batch:
    """Check the inputs against each other and bring them to one dtype.

    Args:
        logits: ``(rows, tasks)`` or ``(rows, tasks, classes)``, floating.
        labels: ``(rows, tasks)``, any real dtype.
        weights: broadcastable to the labels' shape, any real dtype.
        has_classes: whether the logits have a dimension of classes; None: as their number of dimensions says.
        ignore_index: the label that says "missing"; NaN is allowed.

    Raises:
        TypeError: for something that is no tensor, or of a dtype that can't be used.
        ValueError: for shapes or devices that do not fit.
    """
    dtype = compute_dtype("logits", logits)
    check_dense("labels", labels)
    if has_classes is None:
        has_classes = logits.ndim == labels.ndim + 1
    _check_shapes(logits, labels, has_classes)
    _check_device("labels", labels, logits)
    if has_classes and labels.is_floating_point():
        raise TypeError(f"labels: got {labels.dtype}, expected class indices of an integer dtype")

    if weights is not None:
        weights = _expanded(weights, logits, labels, dtype)
    valid = _is_valid(labels, ignore_index)
    if valid is not None:
        weights = valid.to(dtype) if weights is None else weights.where(valid, 0.0)
    logits = logits.to(dtype)
    labels = labels.to(torch.int64 if has_classes else dtype)
    return Batch(logits, labels, weights, valid)


def without_left_out(logits: Tensor, labels: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logits and labels with zeros, at which a loss is finite, where the weight is 0; so too for their gradients."""
    if weights is None:
        return logits, labels
    if labels.is_floating_point():
        return keep_where_nonzero(logits, weights), keep_where_nonzero(labels, weights)
    # A label that is left out need not be a class: 0 always is.
    return keep_where_nonzero(logits, weights.unsqueeze(-1).expand_as(logits)), labels * (weights != 0)


def keep_where_nonzero(values: Tensor, weights: Tensor) -> Tensor:
    """``values`` where ``weights != 0``, and exactly 0 elsewhere, NaN and infinity included; so too for the gradient.

    A product would not do (0·NaN is NaN), and ``where(weights == 0, 0, values)`` takes several times as long. The
    gradient of a threshold is this selection in one kernel, differentiable any number of times, and keeps the values at
    weights of NaN. (That of hardshrink, which needs no ``abs``, does so at some places of a vector and not at others.)
    The compiler fuses the plain form.
    """
    if torch.compiler.is_compiling():
        return values.where(weights != 0, 0.0)
    kept: Tensor = torch.ops.aten.threshold_backward(values, weights.abs(), 0.0)
    return kept


def weighted(values: Tensor, weights: Tensor | None) -> Tensor:
    """``values * weights``, and exactly 0 where the weight is 0; for sums, not for gradients."""
    if weights is None:
        return values
    product = values * weights
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return keep_where_nonzero(product, weights)
    zero_where_zero_(product, weights)
    return product


def zero_where_zero_(values: Tensor, weights: Tensor) -> None:
    """``keep_where_nonzero`` in place, where nothing is differentiated or compiled."""
    torch.ops.aten.threshold_backward.grad_input(values, weights.abs(), 0.0, grad_input=values)


def compute_dtype(name: str, logits: Tensor) -> torch.dtype:
    """float64 for float64 logits, float32 for all others: a bfloat16 sum of 1025 ones is 1024."""
    check_dense(name, logits)
    if logits.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"{name}: got {logits.dtype}, expected float16, bfloat16, float32 or float64")
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _check_device(name: str, values: Tensor, like: Tensor) -> None:
    if values.device != like.device:
        raise ValueError(f"{name}: got a tensor on {values.device}, expected {like.device}, where the logits are")


def _check_shapes(logits: Tensor, labels: Tensor, has_classes: bool) -> None:
    shape = logits.shape[:-1] if has_classes else logits.shape
    if labels.shape == shape and not (has_classes and logits.ndim < 2):
        if has_classes and logits.shape[-1] == 0:
            raise ValueError(f"logits: got shape {tuple(logits.shape)}, expected at least one class")
        return
    expected = "the labels' shape and a last dimension of classes" if has_classes else "the labels' shape"
    raise ValueError(f"logits: got shape {tuple(logits.shape)} with labels {tuple(labels.shape)}, expected {expected}")


def _expanded(weights: Tensor, logits: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    check_dense("weights", weights)
    _check_device("weights", weights, logits)
    if weights.shape == labels.shape:
        return weights.to(dtype)
    try:
        # Contiguous, because elementwise kernels take the slow path on an expanded operand.
        return weights.to(dtype).expand(labels.shape).contiguous()
    except RuntimeError:
        raise ValueError(
            f"weights: got shape {tuple(weights.shape)}, expected one that broadcasts to the labels' "
            f"{tuple(labels.shape)}"
        ) from None


def _is_valid(labels: Tensor, ignore_index: float | None) -> Tensor | None:
    if ignore_index is None:
        return None
    if math.isnan(ignore_index):
        return ~labels.isnan()
    if not labels.is_floating_point():
        # A comparison wraps the number into the labels' dtype (156 == -100 in uint8); int64 holds every label.
        labels = labels.to(torch.int64)
    return labels != ignore_index
