"""The losses, one class each: what a loss needs of a batch, and its formula, of each row and task, unreduced.

Logits ``(rows, tasks, …)`` and labels ``(rows, tasks, …)`` come in; a loss ``(rows, tasks)`` goes out. No weights, no
sums, no state. All that differs between losses is behind ``RowLoss``; no other file asks which one it has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from enum import Enum
from types import MethodType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twloss._arguments import IgnoreIndex, LossName, check_dense
from twloss._rows.binary_cross_entropy import differentiable_bce, fused_bce, gradient_of_bce, values_of_bce
from twloss._torch import takes_keyword


class TakesValid(Protocol):
    """An unreduced loss that takes a mask of the rows that count."""

    def __call__(self, logits: Tensor, labels: Tensor, /, *, valid: Tensor) -> Tensor:
        """The loss of each row."""


LossFunction = Callable[[Tensor, Tensor], Tensor] | TakesValid

# F.cross_entropy silently drops labels equal to its ignore_index, -100 by default. No label may vanish unasked, so it
# is given a value that no label can have.
_NO_LABEL = torch.iinfo(torch.int64).min


class LossType(str, Enum):
    """The losses that are known by name; a string equal to a value is accepted wherever a ``LossType`` is.

    Examples:
        >>> from twloss import LossType
        >>> LossType("bce_with_logits") is LossType.BCE_WITH_LOGITS
        True
    """

    BCE_WITH_LOGITS = "bce_with_logits"
    """Binary cross-entropy of a logit x against a label y in [0, 1]: ``-p·y·log σ(x) - (1-y)·log(1 - σ(x))``."""

    CROSS_ENTROPY = "cross_entropy"
    """Cross-entropy of the classes' logits against a class index c: ``-log softmax(x)[c]``."""

    GIVEN = "given"
    """A loss that is computed elsewhere: it comes as a sum over rows, by ``given`` or ``from_sums()``."""


class RowLoss:
    """A loss of each row and task: its formula, and what it needs of a batch."""

    name: str
    """Tells losses apart in a checkpoint, in another process too."""
    is_given = False
    """Whether its sums are made elsewhere, so that it has no rows."""
    has_classes: bool | None = False
    """Whether the logits have a last dimension of classes; None: both may have any further dimensions."""
    is_binary = False
    """Whether σ of a logit predicts a label in [0, 1], which pos_weights and the quality of predictions are about."""
    has_closed_form = False
    """True if ``values``, ``gradient`` and ``fused`` are implemented."""
    is_row_by_row = True
    """Whether no row's loss depends on another row."""
    takes_valid = False
    """Whether ``losses`` takes the mask of the rows that count."""

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of a loss has the same one, and so finds what was compiled for it.
        return row_loss_of, (LossType(self.name),)

    def check_ignore_index(self, ignore_index: IgnoreIndex) -> None:
        """Raise unless a label can be equal to it."""

    def check_labels(self, labels: Tensor, tasks: int | None) -> None:
        """Raise for what can't be labels, whatever the logits are; arguments as for ``check``."""
        if tasks is not None and (labels.ndim != 2 or labels.shape[1] != tasks):
            raise ValueError(f"labels: got shape {tuple(labels.shape)}, expected (rows, {tasks})")

    def check(self, logits: Tensor, labels: Tensor, tasks: int | None) -> torch.dtype:
        """The dtype that the formula takes labels in. Raises for shapes that do not fit.

        Args:
            logits: as they came, or stacked.
            labels: as they came, or stacked.
            tasks: the number of columns; None: one task, of any shape.
        """
        self.check_labels(labels, tasks)
        if labels.shape != logits.shape:
            raise _wrong_shapes(logits, labels, "the labels' shape")
        return logits.dtype

    def replace_masked(self, labels: Tensor, counted: Tensor, valid: Tensor | None, logits: Tensor) -> Tensor:
        """Labels in which masked entries are replaced by values the formula accepts.

        Args:
            labels: ``(rows, tasks, …)``.
            counted: ``(rows, tasks)`` bool, where there is a weight and a label.
            valid: ``(rows, tasks)`` bool, where there is a label, or of more of the labels' dimensions; None: anywhere.
            logits: ``(rows, tasks, …)``.
        """
        return labels

    def invalid_labels(self, logits: Tensor, labels: Tensor) -> Tensor | None:
        """A mask of the labels that have no meaning, ``(rows, tasks)``; None: any has."""
        return None

    def losses(self, logits: Tensor, labels: Tensor, pos_weight: Tensor | None, valid: Tensor | None) -> Tensor:
        """The loss, for autograd to differentiate.

        Args:
            logits: ``(rows, tasks, …)``.
            labels: ``(rows, tasks, …)``.
            pos_weight: ``(tasks,)``; of binary losses only.
            valid: ``(rows, tasks)`` bool, for a loss that ``takes_valid``; else None.
        """
        raise NotImplementedError

    def values(self, logits: Tensor, labels: Tensor, pos_weight: Tensor | None) -> Tensor:
        """The loss as a value in new memory, not to be differentiated."""
        raise NotImplementedError

    def gradient(self, logits: Tensor, labels: Tensor, pos_weight: Tensor | None, grad: Tensor) -> Tensor:
        """The derivative of the loss by the logits, times a gradient ``(tasks,)`` or 0-dim, in new memory."""
        raise NotImplementedError

    def fused(self, logits: Tensor, labels: Tensor, pos_weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The loss, the loss without the pos_weight, the slopes and σ(x), for a compiler to make one kernel of."""
        raise NotImplementedError


class BinaryCrossEntropy(RowLoss):
    """``-p·y·log σ(x) - (1-y)·log(1 - σ(x))``: binary cross-entropy."""

    name = LossType.BCE_WITH_LOGITS.value
    is_binary = True
    has_closed_form = True
    values = staticmethod(values_of_bce)
    gradient = staticmethod(gradient_of_bce)
    fused = staticmethod(fused_bce)

    def invalid_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Those outside of [0, 1], NaN included."""
        return ~((labels >= 0) & (labels <= 1))

    def losses(self, logits: Tensor, labels: Tensor, pos_weight: Tensor | None, valid: Tensor | None) -> Tensor:
        """The loss, for autograd to differentiate."""
        return differentiable_bce(logits, labels, pos_weight)


class CrossEntropy(RowLoss):
    """``-log softmax(x)[c]``: cross-entropy of classes."""

    name = LossType.CROSS_ENTROPY.value
    has_classes = True

    def check_ignore_index(self, ignore_index: IgnoreIndex) -> None:
        """Raise unless class indices can be equal to it."""
        for label in ignore_index.values() if isinstance(ignore_index, Mapping) else [ignore_index]:
            if label is not None and not float(label).is_integer():
                raise ValueError(
                    f"ignore_index: got {label} with CROSS_ENTROPY, expected an integer, as class indices are"
                )

    def check_labels(self, labels: Tensor, tasks: int | None) -> None:
        """Raise unless labels are class indices."""
        super().check_labels(labels, tasks)
        if labels.is_floating_point():
            raise TypeError(f"labels: got {labels.dtype}, expected class indices of an integer dtype")

    def check(self, logits: Tensor, labels: Tensor, tasks: int | None) -> torch.dtype:
        """The dtype of class indices, int64."""
        super().check_labels(labels, tasks)
        if logits.ndim < 1 or labels.shape != logits.shape[:-1]:
            raise _wrong_shapes(logits, labels, "the labels' shape and a last dimension of classes")
        if logits.shape[-1] == 0:
            raise ValueError(f"logits: got shape {tuple(logits.shape)}, expected at least one class")
        self.check_labels(labels, tasks)
        return torch.int64

    def replace_masked(self, labels: Tensor, counted: Tensor, valid: Tensor | None, logits: Tensor) -> Tensor:
        """Clamp masked labels to valid classes; they may hold any value."""
        return labels.where(counted, labels.clamp(0, logits.shape[-1] - 1))

    def invalid_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Indices of no class, or of one whose logit is -inf, as those are that a task has not, but others have."""
        classes = labels.clamp(0, logits.shape[-1] - 1)
        logit = logits.detach().gather(-1, classes.unsqueeze(-1)).squeeze(-1)
        return (labels != classes) | logit.eq(-math.inf)

    def losses(self, logits: Tensor, labels: Tensor, pos_weight: Tensor | None, valid: Tensor | None) -> Tensor:
        """The loss, for autograd to differentiate."""
        rows = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none", ignore_index=_NO_LABEL)
        return rows.view(labels.shape)


class CallableLoss(RowLoss):
    """The loss that a callable computes of logits and labels of any further dimensions.

    Args:
        function: the callable; a module is called where the loss that trains it has it.
    """

    has_classes = None
    is_row_by_row = False

    def __init__(self, function: LossFunction) -> None:
        self.function = function
        self.name = f"{getattr(function, '__qualname__', type(function).__qualname__)}()"
        self.takes_valid = takes_keyword(function, "valid")

    def __reduce__(self) -> tuple[Any, ...]:
        return CallableLoss, (self.function,)

    def check_labels(self, labels: Tensor, tasks: int | None) -> None:
        """Raise unless labels have the tasks as their second dimension."""
        if tasks is not None and (labels.ndim < 2 or labels.shape[1] != tasks):
            raise ValueError(f"labels: got shape {tuple(labels.shape)}, expected (rows, {tasks}, …)")

    def check(self, logits: Tensor, labels: Tensor, tasks: int | None) -> torch.dtype:
        """The dtype of the logits; int64 for indices into a further dimension."""
        self.check_labels(labels, tasks)
        rows = 1 if tasks is None else 2
        if labels.shape[:rows] != logits.shape[:rows]:
            raise _wrong_shapes(logits, labels, "the labels' rows and tasks" if tasks else "the labels' rows")
        return torch.int64 if labels.ndim < logits.ndim and not labels.is_floating_point() else logits.dtype

    def replace_masked(self, labels: Tensor, counted: Tensor, valid: Tensor | None, logits: Tensor) -> Tensor:
        """The task's first real label in place of each missing one, which has no value.

        Of a task that has none, a callable sees 0.5, or class 0: what most losses are finite at.
        """
        if valid is None or self.takes_valid or valid.numel() == 0:
            return labels
        rows = valid.view(*(valid.shape or (1,)), *(1,) * (labels.ndim - valid.ndim))
        columns = labels.view(labels.shape or (1,))
        first = rows.byte().argmax(0, keepdim=True)
        real = columns.detach().gather(0, first.expand(1, *columns.shape[1:]))
        real = real.where(rows.any(0), 0.5 if labels.is_floating_point() else 0)
        return columns.where(rows, real).view(labels.shape)

    def losses(self, logits: Tensor, labels: Tensor, pos_weight: Tensor | None, valid: Tensor | None) -> Tensor:
        """The callable's result, dtype and layout checked. The caller checks the shape."""
        function: Any = self.function
        if isinstance(function, (nn.CrossEntropyLoss, nn.NLLLoss)) and logits.ndim > 2:
            # To these, and to no others of torch's, the classes are the second dimension.
            labels = labels.movedim(-1, 1) if labels.ndim == logits.ndim else labels
            logits = logits.movedim(-1, 1)
        loss: Tensor = function(logits, labels) if valid is None else function(logits, labels, valid=valid)
        check_dense("loss_type", loss, verb="the callable gave", kind="floating")
        return loss


class GivenLoss(RowLoss):
    """A loss of which sums come, and no rows."""

    name = LossType.GIVEN.value
    is_given = True


_BY_TYPE: Mapping[LossType, RowLoss] = {
    LossType.BCE_WITH_LOGITS: BinaryCrossEntropy(),
    LossType.CROSS_ENTROPY: CrossEntropy(),
    LossType.GIVEN: GivenLoss(),
}


def row_loss_of(loss_type: LossType | LossFunction) -> RowLoss:
    """The class behind a name, or around a callable."""
    return _BY_TYPE[loss_type] if isinstance(loss_type, LossType) else CallableLoss(loss_type)


def resolve_loss_type(
    loss_type: LossType | LossName | LossFunction, argument: str = "loss_type"
) -> LossType | LossFunction:
    """The ``LossType`` of a name; a callable stays what it is."""
    if isinstance(loss_type, str):
        try:
            return LossType(loss_type)
        except ValueError:
            names = [member.value for member in LossType]
            raise ValueError(f"{argument}: got {loss_type!r}, expected one of {names} or a callable") from None
    # A class is callable too, but what it makes is no loss: nn.BCEWithLogitsLoss without its parentheses.
    if not callable(loss_type) or isinstance(loss_type, type):
        raise TypeError(f"{argument}: got {type(loss_type).__name__}, expected a LossType, its name or a callable")
    reduction = getattr(loss_type, "reduction", "none")
    if isinstance(loss_type, nn.Module) and isinstance(reduction, str) and reduction != "none":
        raise ValueError(
            f"{argument}: got a {type(loss_type).__name__} with reduction={reduction!r}, expected one made with "
            "reduction='none', which gives the loss of each row"
        )
    return loss_type


def identity_of(loss_type: LossType | LossFunction) -> object:
    """A key that is the same for loss types that are computed in one call."""
    # A bound method is a new object whenever it is asked for.
    return (id(loss_type.__self__), loss_type.__func__) if isinstance(loss_type, MethodType) else id(loss_type)


def _wrong_shapes(logits: Tensor, labels: Tensor, expected: str) -> ValueError:
    return ValueError(f"logits: got shape {tuple(logits.shape)} with labels {tuple(labels.shape)}, expected {expected}")
