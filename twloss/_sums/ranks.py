"""The envelope in which sums travel over ranks, with their gradient or detached.

Sums come in, ``(rows, columns)``, and travel with a row of hashes of the columns' names; their sums over the ranks of a
process group go out, the same on every rank, by one collective. Without a process group the sum over ranks is the sum
at hand.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from twloss._arguments import list_some
from twloss._constants import TaskConstants
from twloss._precision import sum_dtype
from twloss._sums.pending import PendingResult, collective_error
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


def group_or_default(process_group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The group; for None the default one, where there is one."""
    if process_group is None and dist.is_available() and dist.is_initialized():
        return dist.group.WORLD
    return process_group


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


class ColumnNames:
    """The names of the columns of sums; the row of their hashes tells whether all ranks mean the same by a column.

    Args:
        names: one a column, in order.
        argument: the argument that the names come from, for the error.
        shown: what the error shows in place of the names.
    """

    def __init__(self, names: Iterable[str], argument: str = "tasks", shown: Collection[str] | None = None) -> None:
        names = [str(name) for name in names]
        self.hashes = TaskConstants(tuple(float(zlib.crc32(name.encode(errors="surrogatepass"))) for name in names))
        found = list_some(names if shown is None else shown, 12)
        self.fault = f"{argument}: got {found} on this rank, expected the same, in this order, on all ranks"

    def pack(self, sums: Tensor) -> Tensor:
        """The envelope in which sums travel: ``(rows, columns)``, or numbers ``(n,)``, and after them the hashes."""
        return torch.cat((sums, self._row(sums)))

    def unpack(self, total: Tensor, ranks: int) -> tuple[Tensor, Tensor]:
        """The sums in the total of so many envelopes, and whether all ranks have these names, 0-dim bool."""
        expected = self._row(total) * ranks
        sums, hashes = total.split((len(total) - len(expected), len(expected)))
        return sums, ((hashes - expected).abs() <= torch.finfo(total.dtype).eps * ranks * expected).all()

    def read_agreed(self, received: tuple[Tensor, Tensor]) -> Tensor:
        """The sums that ``unpack`` returned; a RuntimeError if the names do not agree, which it reads."""
        sums, agree = received
        if not agree:
            raise RuntimeError(self.fault)
        return sums

    def assert_agreed(self, received: tuple[Tensor, Tensor]) -> Tensor:
        """The same without reading: an accelerator raises the error when it gets there."""
        sums, agree = received
        assert_async(agree, self.fault)
        return sums

    def _row(self, like: Tensor) -> Tensor:
        hashes = self.hashes.like(like)
        assert hashes is not None
        return hashes.view(-1, *like.shape[1:])


def sum_over_ranks_with_gradient(
    sums: TaskSums, names: ColumnNames, process_group: dist.ProcessGroup | None
) -> TaskSums:
    """The sums of this step's rows of all ranks, in the widest dtype; for one rank the sums at hand.

    Args:
        sums: this rank's, ``(tasks,)``.
        names: of the tasks.
        process_group: the ranks; None: all.

    Raises:
        RuntimeError: where ranks have other names; on an accelerator when the device gets there. Where the collective
            fails, from the backend's; compiled code raises that itself.
    """
    ranks = world_size(process_group)
    if ranks == 1:
        return sums
    loss_sum = sums.loss_sum.to(sum_dtype(sums.loss_sum.device))
    weight = sums.weight if isinstance(sums.weight, Tensor) else torch.ones_like(loss_sum) * sums.weight
    packed = names.pack(torch.stack((loss_sum, weight)))
    total = _SumOverRanks.apply(packed, process_group, ranks)  # type: ignore[no-untyped-call]
    return TaskSums(*names.assert_agreed(names.unpack(total, ranks)).unbind(0))


def start_sum_over_ranks(
    sums: Tensor,
    names: ColumnNames,
    process_group: dist.ProcessGroup | None,
    call: str,
    *,
    gather: Callable[..., list[Tensor]] | None = None,
    is_async: bool = False,
) -> PendingResult[tuple[Tensor, Tensor]]:
    """Start the sum of detached sums over ranks, by one collective; its result is a tensor of its own.

    Args:
        sums: this rank's, ``(rows, columns)`` or numbers ``(n,)``.
        names: of the columns, or of what the numbers are.
        process_group: the ranks; None: all.
        call: the user's call that every rank has to make, for the error if the collective fails.
        gather: a ``dist_sync_fn``, which gives each rank's tensor, to be called in place of the all-reduce.
        is_async: whether to return while the collective is under way.

    Returns:
        The sums of all ranks, and whether the names agree, 0-dim bool: if not, the sums mean nothing.

    Raises:
        RuntimeError: from the backend's, where the collective fails; of an asynchronous one ``wait()`` raises it.
    """
    total, work, ranks = names.pack(sums.detach()), None, world_size(process_group)
    if gather is not None:
        parts = gather(total, group=process_group)
        total, ranks = torch.stack(parts).sum(0), len(parts)
    elif ranks > 1:
        try:
            work = dist.all_reduce(total, group=process_group, async_op=is_async)
        except RuntimeError as error:
            raise collective_error(call, error) from error
    return PendingResult(work, lambda: names.unpack(total, ranks), call)


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
        total = values.clone(memory_format=torch.contiguous_format)
        if torch.compiler.is_compiling():  # compiled code does not run the handler
            dist.all_reduce(total, group=process_group)
            return total
        try:
            dist.all_reduce(total, group=process_group)
        except RuntimeError as error:
            advice = ", one that has run out of rows with an empty batch"
            raise collective_error("forward with global_batch=True", error, advice) from error
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * ctx.ranks, None, None
