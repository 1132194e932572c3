"""Sums over ranks: one that gradients flow through, and one for detached values.

Sums come in, their sums over the ranks of a process group go out, the same on every rank, at the cost of one
collective. Without a process group the sum over ranks is the sum at hand.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from twloss.task_sums import TaskSums

__all__ = ["detached_sum_over_ranks", "task_sums_over_ranks", "world_size"]


def world_size(process_group: dist.ProcessGroup | None) -> int:
    """The number of ranks of the group (None: of the default one); 1 without a process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size(process_group)


def detached_sum_over_ranks(values: Tensor, process_group: dist.ProcessGroup | None) -> Tensor:
    """A detached sum over ranks, in a tensor of its own; one collective where there are ranks to sum over."""
    total = values.detach().clone(memory_format=torch.contiguous_format)
    if world_size(process_group) > 1:
        dist.all_reduce(total, group=process_group)
    return total


def task_sums_over_ranks(sums: TaskSums, process_group: dist.ProcessGroup | None) -> TaskSums:
    """The sums of this step's rows of all ranks, in float64; for one rank the sums at hand.

    The gradient is such that DDP's or FSDP's average over ranks is the gradient of one process.
    """
    ranks = world_size(process_group)
    if ranks == 1:
        return sums
    loss_sum = sums.loss_sum.to(torch.float64)
    weight = sums.weight if isinstance(sums.weight, Tensor) else torch.full_like(loss_sum, sums.weight)
    packed = torch.stack((loss_sum, weight))
    loss_sum, weight = _SumOverRanks.apply(packed, process_group, ranks).unbind(0)  # type: ignore[no-untyped-call]
    return TaskSums(loss_sum, weight)


class _SumOverRanks(torch.autograd.Function):
    """Forward: Σ over ranks. Backward: the gradient times the number of ranks, with no collective.

    Every rank computes the same loss L of the same sum S = Σ_r s_r, so each knows dL/dS = dL/ds_r, its own part of the
    one process's gradient. DDP then averages over ranks; the factor undoes the average's division.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, process_group: dist.ProcessGroup | None, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return detached_sum_over_ranks(values, process_group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * ctx.ranks, None, None
