"""The loss of each row and task, unreduced: the formula of each loss.

Logits ``(rows, tasks)`` or ``(rows, tasks, classes)`` and labels ``(rows, tasks)`` come in; a loss of the labels' shape
goes out. No weights, no sums, no state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import Enum
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twloss._arguments import LossName, check_dense


class TakesValid(Protocol):
    """An unreduced loss that wants to know which rows count."""

    def __call__(self, logits: Tensor, labels: Tensor, /, *, valid: Tensor) -> Tensor:
        """The loss, of the labels' shape."""


LossFunction = Callable[[Tensor, Tensor], Tensor] | TakesValid

# F.cross_entropy silently drops labels equal to its ignore_index, -100 by default. No label may vanish unasked, so it
# is given a value that no label can have.
_NO_LABEL = torch.iinfo(torch.int64).min

# Beyond it, softplus(x) is x to the last bit of a float64.
_THRESHOLD = 50.0


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


def loss_type_name(loss_type: LossType | LossFunction) -> str:
    """A text that tells types apart, in another process too; a callable's ends in "()"."""
    if isinstance(loss_type, LossType):
        return loss_type.value
    return f"{getattr(loss_type, '__qualname__', type(loss_type).__qualname__)}()"


def row_losses(
    loss_type: LossType | LossFunction,
    logits: Tensor,
    labels: Tensor,
    pos_weight: Tensor | None = None,
    valid: Tensor | None = None,
    *,
    shape: torch.Size | None = None,
) -> Tensor:
    """The loss of each row and task, for autograd to differentiate.

    Args:
        loss_type: what to compute.
        logits: ``(rows, tasks)``, or ``(rows, tasks, classes)`` against class indices.
        labels: ``(rows, tasks)``; for a callable also ``(rows, tasks, classes)``.
        pos_weight: ``(tasks,)``, the factor p of the positive term; BCE_WITH_LOGITS only.
        valid: ``(rows, tasks)`` bool, for a callable that has a parameter of this name; else None.
        shape: ``(rows, tasks)``, what a callable has to give; None: the labels' own.

    Returns:
        A tensor of that shape and the logits' dtype.
    """
    if loss_type is LossType.BCE_WITH_LOGITS:
        return _bce(logits, labels, pos_weight)
    if loss_type is LossType.CROSS_ENTROPY:
        rows = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none", ignore_index=_NO_LABEL)
        return rows.view(labels.shape)
    assert not isinstance(loss_type, LossType)
    loss = _call(loss_type, logits, labels, valid)
    shape = labels.shape if shape is None else shape
    if loss.shape != shape or loss.device != labels.device:
        raise ValueError(
            f"loss_type: the callable gave a loss of shape {tuple(loss.shape)} on {loss.device}, expected the labels' "
            f"shape {tuple(shape)} (unreduced: reduction='none') on {labels.device}"
        )
    return loss.to(logits.dtype)


def _call(function: Callable[..., Tensor], logits: Tensor, labels: Tensor, valid: Tensor | None) -> Tensor:
    """What a callable makes of the rows."""
    if isinstance(function, (nn.CrossEntropyLoss, nn.NLLLoss)) and logits.ndim > 2:
        # To these, and to no others of torch's, the classes are the second dimension.
        labels = labels.movedim(-1, 1) if labels.ndim == logits.ndim else labels
        logits = logits.movedim(-1, 1)
    loss = function(logits, labels) if valid is None else function(logits, labels, valid=valid)
    check_dense("loss_type", loss, verb="the callable gave", kind="floating")
    return loss


@torch.no_grad()
def has_soft_labels(loss_type: LossFunction, logits: Tensor, labels: Tensor, *, takes_valid: bool) -> bool:
    """Whether the labels' last dimension is one of classes, over which a callable gives one loss.

    Its answer to 0 rows tells: a loss may have the shape of labels such as (rows, 4), or be (rows,). A callable that
    can't answer has to give the labels' shape.
    """
    no_rows, no_labels = logits[:0], labels[:0]
    # That of rows: an elementwise callable can't answer to it.
    valid = torch.ones_like(no_labels[..., 0], dtype=torch.bool) if takes_valid else None
    try:
        loss = _call(loss_type, no_rows, no_labels, valid)
    except (IndexError, RuntimeError):
        return False
    return loss.shape == no_labels.shape[:-1]


def _bce(logits: Tensor, labels: Tensor, pos_weight: Tensor | None) -> Tensor:
    """``(1-y)·softplus(x) + p·y·softplus(-x)``, whose derivative autograd gets right at 0 and at infinite logits too.

    torch's own ``(1-y)·x - log σ(x)`` is the difference of two large numbers where a negative is predicted with
    confidence: in float32 an error of 5 % at a probability of 1e-5.
    """
    positive = labels if pos_weight is None else labels * pos_weight
    return _term(1.0 - labels, logits) + _term(positive, -logits)


def _term(factor: Tensor, z: Tensor) -> Tensor:
    softplus = F.softplus(z, threshold=_THRESHOLD)
    # The limit, where the product would be 0·inf.
    return factor * softplus.masked_fill(z.isinf() & (factor == 0), 0.0)


def bce_values(logits: Tensor, labels: Tensor, pos_weight: Tensor | None) -> Tensor:
    """The same binary cross-entropy as a value, not to be differentiated: twice as fast on a CPU.

    ``|x|·c + (1-y+p·y)·log(1 + exp(-|x|))``, where c is 1-y at positive logits and p·y at others. In place wherever it
    can be: on a CPU, a kernel that writes to new memory takes up to three times as long.
    """
    # As numbers, since a bool tensor takes three times as long.
    is_positive = torch.gt(logits, 0, out=torch.empty_like(logits))
    if pos_weight is None:
        # 0 for the NaN of 0·inf: the limit. A label of NaN goes with it; 0·y brings it back.
        linear = is_positive.sub_(labels).mul_(logits).nan_to_num_(0.0, math.inf, -math.inf)
        return linear.add_(F.softplus(torch.copysign(logits, -1.0))).add_(labels, alpha=0)
    positive, factor = labels * pos_weight, 1.0 - labels
    # lerp() by 0 or 1 selects; where() takes five times as long.
    linear = torch.lerp(positive, factor, is_positive, out=is_positive)
    factor.add_(positive)
    magnitude = torch.abs(logits, out=positive)
    linear.mul_(magnitude).nan_to_num_(0.0, math.inf, -math.inf)
    return linear.addcmul_(factor, magnitude.neg_().exp_().log1p_())


def bce_at_once(logits: Tensor, labels: Tensor, pos_weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The values with the pos_weight and without it, and σ(x), for a compiler that makes one kernel of all three.

    They share an exponential and a logarithm, which it would not see in one function for each.
    """
    magnitude, negative = logits.abs(), 1.0 - labels
    exponential = magnitude.neg().exp()
    logarithm = exponential.log1p()

    def values(positive: Tensor, weight: Tensor | float) -> Tensor:
        factor = negative.where(logits > 0, positive)
        # The limit, where the product would be 0·inf.
        return (factor * magnitude).where(factor != 0, 0.0) + weight * logarithm

    plain = values(labels, 1.0)
    sigmoid = exponential.where(logits < 0, 1.0) / (1.0 + exponential)
    if pos_weight is None:
        return plain, plain, sigmoid
    positive = labels * pos_weight
    return values(positive, negative + positive), plain, sigmoid


def bce_slopes(sigmoid: Tensor, labels: Tensor, pos_weight: Tensor | None) -> Tensor:
    """The derivative of binary cross-entropy by the logit, ``σ(x) + y·((p-1)·σ(x) - p)``, in place of σ(x)."""
    if pos_weight is None:
        return sigmoid.sub_(labels)
    return sigmoid.addcmul_(torch.addcmul(-pos_weight, sigmoid, pos_weight - 1), labels)
