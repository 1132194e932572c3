"""The signatures that users of the-algorithm-ml know, on top of the modules.

A loss type and reductions come in, a loss module goes out; and the detached loss over all ranks, from a local one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args, overload

import torch
import torch.distributed as dist
from torch import Tensor

from twloss._arguments import (
    LossName,
    PerTask,
    RankGroup,
    RowReduction,
    check_choice,
    check_dense,
    check_number,
    check_process_group,
    list_some,
    warn_unless_mean,
)
from twloss._losses import Loss, MultiTaskLoss
from twloss._precision import sum_dtype
from twloss._rows.row_loss import LossFunction, LossType
from twloss._sums.ranks import ColumnNames, start_sum_over_ranks, world_size
from twloss._sums.reduction import GlobalReduction


def build_loss(loss_type: LossType | LossName | LossFunction, reduction: RowReduction = "mean") -> Loss:
    """The loss of one task: ``Loss(loss_type, reduction)``.

    Returns:
        A ``Loss``, called with logits, labels and, if wanted, weights.

    Raises:
        TypeError: for an argument of a wrong type.
        ValueError: for an argument of a wrong value.

    Examples:
        >>> import torch
        >>> from twloss import build_loss
        >>> build_loss("cross_entropy")(torch.tensor([[2.0, 0], [0, 0]]), torch.tensor([0, 1]))
        tensor(0.4100)
    """
    return Loss(loss_type, reduction)


def build_multi_task_loss(
    loss_type: LossType | LossName | LossFunction,
    tasks: Sequence[str],
    task_loss_reduction: RowReduction = "mean",
    global_reduction: GlobalReduction = "mean",
    pos_weights: PerTask | None = None,
) -> MultiTaskLoss:
    """The losses of several tasks: ``MultiTaskLoss`` of the same arguments.

    Returns:
        A ``MultiTaskLoss``, called with logits, labels and, if wanted, weights, each ``(rows, tasks)``.

    Raises:
        TypeError: for an argument of a wrong type.
        ValueError: for an argument of a wrong value.

    Examples:
        >>> import torch
        >>> from twloss import LossType, build_multi_task_loss
        >>> loss = build_multi_task_loss(LossType.BCE_WITH_LOGITS, ["like", "reply"])
        >>> list(loss(torch.zeros(4, 2), torch.ones(4, 2)))
        ['loss/like', 'loss/reply', 'loss']
    """
    return MultiTaskLoss(loss_type, tasks, task_loss_reduction, global_reduction, pos_weights)


@overload
def get_global_loss_detached(
    local_loss: Tensor,
    reduction: RowReduction = "mean",
    *,
    weight: Tensor | float | None = None,
    process_group: RankGroup | None = None,
) -> Tensor: ...


@overload
def get_global_loss_detached(
    local_loss: Mapping[str, Tensor],
    reduction: RowReduction = "mean",
    *,
    weight: Tensor | float | Mapping[str, Tensor | float] | None = None,
    process_group: RankGroup | None = None,
) -> dict[str, Tensor]: ...


def get_global_loss_detached(
    local_loss: Tensor | Mapping[str, Tensor],
    reduction: RowReduction = "mean",
    *,
    weight: Tensor | float | Mapping[str, Tensor | float] | None = None,
    process_group: RankGroup | None = None,
) -> Tensor | dict[str, Tensor]:
    """A local loss, or several, reduced over ranks and detached; one collective, and the argument stays as it is.

    "mean" is ``Σ_r l_r / R`` over R ranks, or ``Σ_r w_r·l_r / Σ_r w_r`` with a weight; of several ranks, one of weight
    0 is left out even where its loss is NaN, and if all are, there is no mean: NaN. "sum" is ``Σ_r l_r``, and warns
    that the gradient of such a loss depends on the split over ranks.

    Args:
        local_loss: this rank's loss, of any shape, or a mapping of them, which has the same keys on every rank.
        reduction: "mean" or "sum".
        weight: how much this rank counts, the number of its rows, say: a number or a tensor that broadcasts to the
            loss, or a mapping of them with the loss's keys. "mean" only.
        process_group: the ranks, also as a 1-D ``DeviceMesh``; None: all.

    Returns:
        The same shape and dtype; for a mapping a dict of them in its order. Without a process group a detached copy.

    Raises:
        TypeError: for an argument of a wrong type.
        ValueError: for an argument of a wrong value, or a group that this process is not in.
        RuntimeError: from the backend's, if a rank does not call it or is gone.

    Examples:
        >>> import torch
        >>> from twloss import get_global_loss_detached
        >>> loss = torch.tensor(4.0, requires_grad=True)
        >>> get_global_loss_detached(loss)
        tensor(4.)
    """
    check_choice("reduction", reduction, get_args(RowReduction))
    if weight is not None and reduction == "sum":
        raise ValueError("weight: got one with reduction='sum', expected none: only a mean is weighted")
    group = check_process_group(process_group)
    losses = _named(local_loss)
    weights = _named_weights(weight, local_loss, losses)
    warn_unless_mean(False, reduction=reduction)
    if world_size(group) == 1:
        means = {key: loss.detach().clone() for key, loss in losses.items()}
    else:
        means = _over_ranks(losses, weights, reduction, group)
    return {key: means[key] for key in local_loss} if isinstance(local_loss, Mapping) else means["local_loss"]


def _named(local_loss: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The losses by key, in an order that does not depend on the rank's."""
    if not isinstance(local_loss, Mapping):
        check_dense("local_loss", local_loss, kind="floating")
        return {"local_loss": local_loss}
    for key, loss in local_loss.items():
        check_dense(f"local_loss[{key!r}]", loss, kind="floating")
    devices = [str(loss.device) for loss in local_loss.values()]
    if len(set(devices)) != 1:
        raise ValueError(f"local_loss: got {list_some(devices)}, expected one or more tensors of one device")
    return {key: local_loss[key] for key in sorted(local_loss, key=str)}


def _named_weights(weight: Any, local_loss: object, losses: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """A weight of each loss's shape, in the widest dtype."""
    if weight is None:
        return None
    if not isinstance(weight, Mapping):
        return {key: _weight_like("weight", weight, loss) for key, loss in losses.items()}
    if not isinstance(local_loss, Mapping) or set(weight) != set(losses):
        found = f"the keys {list_some(list(weight))}"
        if missing := [key for key in losses if key not in weight]:
            found += f" without {list_some(missing)}"
        raise ValueError(f"weight: got {found}, expected a number, a Tensor or the keys of local_loss")
    return {key: _weight_like(f"weight[{key!r}]", weight[key], loss) for key, loss in losses.items()}


def _weight_like(name: str, weight: object, loss: Tensor) -> Tensor:
    if not isinstance(weight, Tensor):
        return torch.full_like(loss, check_number(name, weight), dtype=sum_dtype(loss.device))
    check_dense(name, weight)
    if weight.device != loss.device:
        raise ValueError(f"{name}: got a tensor on {weight.device}, expected {loss.device}")
    try:
        return weight.detach().to(sum_dtype(loss.device)).expand(loss.shape)
    except RuntimeError:
        expected = f"one that broadcasts to {tuple(loss.shape)}"
        raise ValueError(f"{name}: got shape {tuple(weight.shape)}, expected {expected}") from None


def _over_ranks(
    losses: dict[str, Tensor],
    weights: dict[str, Tensor] | None,
    reduction: RowReduction,
    process_group: dist.ProcessGroup | None,
) -> dict[str, Tensor]:
    """All losses over the ranks, through one collective, in the widest dtype."""
    values = torch.cat([loss.detach().to(sum_dtype(loss.device)).flatten() for loss in losses.values()])
    # With the shapes, since values are added by position.
    names = ColumnNames((f"{key}{list(loss.shape) or ''}" for key, loss in losses.items()), "local_loss")
    if weights is not None:
        weight = torch.cat([weights[key].flatten() for key in losses])
        values = torch.cat((torch.where(weight == 0, 0.0, values * weight), weight))
    call = "get_global_loss_detached()"
    total = start_sum_over_ranks(values, names, process_group, call).map(names.assert_agreed).wait()
    if weights is not None:
        loss_sum, weight = total.chunk(2)
        means = loss_sum / weight
    else:
        means = total if reduction == "sum" else total / world_size(process_group)
    parts = torch.split(means, [loss.numel() for loss in losses.values()])
    return {key: part.view(loss.shape).to(loss.dtype) for (key, loss), part in zip(losses.items(), parts)}
