"""Sums over ranks: one that gradients flow through, and one for detached values.

Sums come in, their sums over the ranks of a process group go out, the same on every rank, at the cost of one
collective. Without a process group the sum over ranks is the sum at hand.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from twloss._accumulator import sum_dtype
from twloss._arguments import TaskConstants, list_some
from twloss._row_sums import TaskSums
from twloss._torch import assert_async, process_group_named


def world_size(process_group: dist.ProcessGroup | None) -> int:
    """The number of ranks of the group (None: of the default one); 1 without a process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    ranks: int = dist.get_world_size(process_group)
    if ranks < 1:
        raise ValueError("process_group: got one that this process is not in, expected one that it is in")
    return ranks


def group_to_state(state: dict[str, Any]) -> dict[str, Any]:
    """The attributes of an object that is copied or pickled, with its ``process_group``, which can't be, by name."""
    group = state["process_group"]
    return {**state, "process_group": group.group_name} if hasattr(group, "group_name") else state


def group_from_state(state: dict[str, Any]) -> dict[str, Any]:
    """The attributes with the group of this process that has the name; with a warning and no group if there is none."""
    name = state["process_group"]
    if not isinstance(name, str):
        return state
    group = process_group_named(name)
    if group is None:
        message = f"process_group: the group {name!r} does not exist in this process, so sums are over all ranks"
        warnings.warn(message, UserWarning, stacklevel=2)
    return {**state, "process_group": group}


def sum_over_ranks(values: Tensor, process_group: dist.ProcessGroup | None) -> Tensor:
    """A detached sum over ranks, in a tensor of its own; one collective where there are ranks to sum over."""
    total = values.detach().clone(memory_format=torch.contiguous_format)
    if world_size(process_group) > 1:
        dist.all_reduce(total, group=process_group)
    return total


class ColumnNames:
    """The names of the columns of sums, as a row of hashes that travels with them: do all ranks mean the same?"""

    def __init__(self, names: Iterable[str], argument: str = "tasks") -> None:
        names = [str(name) for name in names]
        self.hashes = TaskConstants(tuple(float(zlib.crc32(name.encode(errors="surrogatepass"))) for name in names))
        self.fault = (
            f"{argument}: got {list_some(names, 12)} on this rank, expected the same, in this order, on all ranks"
        )

    def row(self, sums: Tensor) -> Tensor:
        """The row to be sent with sums ``(…, columns)``."""
        hashes = self.hashes.like(sums)
        assert hashes is not None
        return hashes

    def agree(self, total: Tensor, ranks: int) -> Tensor:
        """Whether a row that is the sum of so many ranks' is that of one name a column, 0-dim bool."""
        expected = self.row(total) * ranks
        # Exact in float64; a device without it rounds.
        return ((total - expected).abs() <= torch.finfo(total.dtype).eps * ranks * expected).all()


def sum_over_ranks_with_gradient(
    sums: TaskSums, names: ColumnNames, process_group: dist.ProcessGroup | None
) -> TaskSums:
    """The sums of this step's rows of all ranks, in the widest dtype; for one rank the sums at hand.

    Args:
        sums: this rank's.
        names: of the tasks, which are the same on all ranks; else a RuntimeError.
        process_group: the ranks; None: all.
    """
    ranks = world_size(process_group)
    if ranks == 1:
        return sums
    loss_sum = sums.loss_sum.to(sum_dtype(sums.loss_sum.device))
    weight = sums.weight if isinstance(sums.weight, Tensor) else torch.full_like(loss_sum, sums.weight)
    packed = torch.stack((loss_sum, weight, names.row(loss_sum)))
    loss_sum, weight, row = _SumOverRanks.apply(packed, process_group, ranks).unbind(0)  # type: ignore[no-untyped-call]
    assert_async(names.agree(row, ranks), names.fault)
    return TaskSums(loss_sum, weight)


def scale_gradient(values: Tensor, factor: float) -> Tensor:
    """The values, whose gradient is multiplied by a factor."""
    scaled: Tensor = _ScaledGradient.apply(values, factor)  # type: ignore[no-untyped-call]
    return scaled


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return values.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


class _SumOverRanks(torch.autograd.Function):
    """Forward: Σ over ranks. Backward: the gradient times the number of ranks, with no collective.

    Every rank computes the same loss L of the same sum S = Σ_r s_r, so each knows dL/dS = dL/ds_r, its own part of the
    one process's gradient. DDP then averages over ranks; the factor undoes the average's division.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, process_group: dist.ProcessGroup | None, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return sum_over_ranks(values, process_group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * ctx.ranks, None, None
