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

from twloss._arguments import list_some
from twloss._constants import TaskConstants
from twloss._precision import sum_dtype
from twloss._sums.sums import TaskSums
from twloss._torch import assert_async, process_group_named


def world_size(process_group: dist.ProcessGroup | None) -> int:
    """The number of ranks of the group (None: of the default one); 1 without a process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    ranks: int = dist.get_world_size(process_group)
    if ranks < 1:
        raise ValueError("process_group: got one that this process is not in, expected one that it is in")
    return ranks


def place_in(process_group: dist.ProcessGroup | None) -> tuple[int, int]:
    """This rank in the group, and the number of ranks: (0, 1) without a process group, (-1, -1) outside of this one."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(process_group), dist.get_world_size(process_group)


def group_to_state(state: dict[str, Any]) -> dict[str, Any]:
    """The attributes of an object to be copied or pickled; its ``process_group``, which can't be, by name and ranks."""
    group = state["process_group"]
    return {**state, "process_group": (group.group_name, _ranks_of(group))} if hasattr(group, "group_name") else state


def group_from_state(state: dict[str, Any]) -> dict[str, Any]:
    """The attributes with the group of this process that has the name and the ranks; none, with a warning, if none has.

    In another run, another group may have the name.
    """
    if not isinstance(state["process_group"], tuple):
        return state
    name, ranks = state["process_group"]
    group = process_group_named(name)
    if group is None or _ranks_of(group) != ranks:
        group = None
        message = f"process_group: the group {name!r} does not exist in this process, so sums are over all ranks"
        warnings.warn(message, UserWarning, stacklevel=2)
    return {**state, "process_group": group}


def _ranks_of(group: dist.ProcessGroup) -> list[int]:
    """The ranks of a group among all; none of one that was destroyed."""
    try:
        return dist.get_process_group_ranks(group)
    except KeyError:
        return []


def sum_over_ranks(values: Tensor, process_group: dist.ProcessGroup | None) -> Tensor:
    """A detached sum over ranks, in a tensor of its own; one collective where there are ranks to sum over."""
    total, work = start_sum_over_ranks(values, process_group, is_async=False)
    assert work is None
    return total


def start_sum_over_ranks(
    values: Tensor, process_group: dist.ProcessGroup | None, *, is_async: bool
) -> tuple[Tensor, dist.Work | None]:
    """A detached sum over ranks, and what to wait for before it is one; None: nothing."""
    total = values.detach().clone(memory_format=torch.contiguous_format)
    if world_size(process_group) == 1:
        return total, None
    return total, dist.all_reduce(total, group=process_group, async_op=is_async)


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
        return _are_equal(total, self.row(total) * ranks, ranks).all()


def _are_equal(total: Tensor, expected: Tensor, ranks: int) -> Tensor:
    """Whether sums over ranks are what they should be, of numbers that are not negative, but for rounding."""
    return (total - expected).abs() <= torch.finfo(total.dtype).eps * ranks * expected


def contribution(sums: Tensor, rank: int) -> Tensor:
    """What a rank of the process group adds to the sums of all ``(…)``.

    Args:
        sums: ``(2, …)``, those that were added here, and those of a checkpoint that are carried. All ranks carry the
            same ones, or the first rank alone, so that the first adds them.
        rank: this one's in the group.
    """
    return sums.sum(0) if rank == 0 else sums[0]


def pack_running_sums(sums: Tensor, names: ColumnNames, rank: int) -> Tensor:
    """What a rank sends of its running sums ``(rows, tasks)``, with what tells whether all ranks mean the same by them.

    Args:
        sums: ``(2, parts, …, tasks)``, as for ``contribution``, those of all updates first; a rank that does not add
            what it carries sends a mark of it.
        names: of the tasks.
        rank: this one's in the group.
    """
    # Those of a window are no part of the mark: they leave it as this rank goes on.
    mark = sums[1, 0].nan_to_num(0.0, 0.0, 0.0).abs().sum(0)
    sums = sums.flatten(1, -2)
    nothing = torch.zeros_like(mark)
    marks = (mark, nothing, nothing) if rank == 0 else (nothing, mark, (mark != 0).to(mark))
    return torch.cat((contribution(sums, rank), torch.stack((names.row(mark), *marks))))


def unpack_running_sums(total: Tensor, names: ColumnNames, ranks: int) -> Tensor:
    """The sums of so many ranks ``(rows, tasks)``, of the total of what they sent.

    Raises:
        RuntimeError: if the ranks have different tasks, or carry what they would not all count.
    """
    *_, row, first, others, carriers = total
    if not names.agree(row, ranks):
        raise RuntimeError(names.fault)
    if not _are_equal(others, carriers * first, ranks).all():
        raise RuntimeError(
            "got sums of a checkpoint that the first rank of the process group does not have, expected one file, "
            "loaded on all ranks or on the first"
        )
    return total[:-4]


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
