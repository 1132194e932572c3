"""First stage: the loss of each row and task, unreduced.

logits ``(rows, tasks)`` or ``(rows, tasks, classes)`` and labels ``(rows, tasks)`` come in; a loss of the labels' shape
goes out. Pure and differentiable: no weights, no sums, no state.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor

from twloss.arguments import check_dense

__all__ = ["LossFunction", "LossType", "resolve_loss_type", "unreduced_loss"]

LossFunction = Callable[[Tensor, Tensor], Tensor]

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


def resolve_loss_type(loss_type: LossType | str | LossFunction) -> LossType | LossFunction:
    """The ``LossType`` of a name; a callable stays what it is."""
    if isinstance(loss_type, str):
        try:
            return LossType(loss_type)
        except ValueError:
            names = [member.value for member in LossType]
            raise ValueError(f"loss_type: got {loss_type!r}, expected one of {names} or a callable") from None
    # A class is callable too, but what it makes is no loss: nn.BCEWithLogitsLoss without its parentheses.
    if callable(loss_type) and not isinstance(loss_type, type):
        return loss_type
    raise TypeError(f"loss_type: got {type(loss_type).__name__}, expected a LossType, its name or a callable")


def unreduced_loss(
    loss_type: LossType | LossFunction, logits: Tensor, labels: Tensor, pos_weight: Tensor | None = None
) -> Tensor:
    """The loss of each row and task.

    Args:
        loss_type: what to compute.
        logits: ``(rows, tasks)``, or ``(rows, tasks, classes)`` against class indices.
        labels: ``(rows, tasks)``.
        pos_weight: ``(tasks,)``, the factor p of the positive term; BCE_WITH_LOGITS only.

    Returns:
        A tensor of the labels' shape and the logits' dtype.

    Raises:
        TypeError: if a callable gives no floating tensor.
        ValueError: if a callable gives another shape than the labels', or another device.
    """
    if loss_type is LossType.BCE_WITH_LOGITS:
        return F.binary_cross_entropy_with_logits(logits, labels, pos_weight=pos_weight, reduction="none")
    if loss_type is LossType.CROSS_ENTROPY:
        rows = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none", ignore_index=_NO_LABEL)
        return rows.view(labels.shape)
    assert not isinstance(loss_type, LossType)
    return _checked(loss_type(logits, labels), labels).to(logits.dtype)


def log_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy as a value, not to be differentiated: ``max(x, 0) - x·y + log(1 + exp(-|x|))``.

    torch's ``(1-y)·x - log σ(x)`` is the difference of two large numbers where a negative is predicted with confidence:
    in float32 an error of 5 % at a probability of 1e-5, the same one for every row with that logit.
    """
    # First, because it needs the most memory.
    log_sigmoid = F.logsigmoid(logits.abs())
    # In place, as new memory is slow, unless vmap may give the labels a dimension that the logits have not.
    addcmul = torch.addcmul if torch._C._are_functorch_transforms_active() else Tensor.addcmul_
    return addcmul(logits.clamp(min=0.0), logits, labels, value=-1).sub_(log_sigmoid)


def _checked(loss: object, labels: Tensor) -> Tensor:
    """What a callable gave."""
    check_dense("loss_type", loss, verb="the callable gave", kind="floating")
    assert isinstance(loss, Tensor)
    if loss.shape != labels.shape or loss.device != labels.device:
        raise ValueError(
            f"loss_type: the callable gave a loss of shape {tuple(loss.shape)} on {loss.device}, expected the labels' "
            f"shape {tuple(labels.shape)} (unreduced: reduction='none') on {labels.device}"
        )
    return loss
