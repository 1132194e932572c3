"""Sums that the caller made, of losses that have no rows here: checked, and in the form of a pass's own.

``(tasks,)`` tensors, or mappings task -> 0-dim, come in with their graph; ``TaskSums`` ``(tasks,)`` go out. Checks look
at types, shapes, dtypes and devices only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from twloss._arguments import RowReduction, check_dense, check_names, check_number
from twloss._precision import sum_dtype
from twloss._sums.sums import BatchSums, TaskSums
from twloss._torch import is_transformed

LossSums = Tensor | Mapping[str, Tensor]
Weights = Tensor | float | Mapping[str, Tensor | float]
Given = Mapping[str, Tensor | tuple[Tensor, Tensor | float]]


def check_sums(loss_sum: Tensor, weight: Tensor | float, tasks: tuple[str, ...] | None, cells: int = 0) -> TaskSums:
    """Sums ``(tasks,)``, with the graph and the dtype that they came with; weights in the widest one.

    Args:
        loss_sum: ``(tasks,)``, with cells ``(1 + cells, tasks)``; of one task also without this dimension.
        weight: the same, or without cells a number that all tasks share. It is detached.
        tasks: the tasks' names; None: one task.
        cells: the number of cells of segments.

    Raises:
        TypeError: for an argument of a wrong type or dtype.
        ValueError: for wrong shapes or devices, or a number that is not finite.
    """
    check_dense("loss_sum", loss_sum)
    columns = 1 if tasks is None else len(tasks)
    shape = (1 + cells, columns) if cells else (columns,)
    if tasks is None and loss_sum.shape == shape[:-1]:
        loss_sum = loss_sum.unsqueeze(-1)
    if loss_sum.shape != shape:
        raise ValueError(f"loss_sum: got shape {tuple(loss_sum.shape)}, expected {shape}")
    if isinstance(weight, Tensor):
        check_dense("weight", weight)
        if tasks is None and weight.shape == shape[:-1]:
            weight = weight.unsqueeze(-1)
        if weight.shape != shape and (cells or weight.ndim > 0):
            raise ValueError(f"weight: got shape {tuple(weight.shape)}, expected {shape}{'' if cells else ' or ()'}")
        if weight.device != loss_sum.device:
            raise ValueError(f"weight: got a tensor on {weight.device}, expected {loss_sum.device} as for loss_sum")
        # Not every integer dtype can be added, compared with another, or has an abs().
        weight = weight.detach().to(sum_dtype(weight.device)).expand(shape)
    elif cells:
        raise TypeError(
            f"weight: got {type(weight).__name__}, expected a Tensor {shape}, since segments were asked for"
        )
    else:
        # A number of rows that is traced has no value to look at.
        weight = weight if torch.compiler.is_compiling() else check_number("weight", weight)
        if is_transformed():
            # A program of torch.export would take for granted that there are rows.
            weight = torch.full_like(loss_sum, weight, dtype=sum_dtype(loss_sum.device))
    return TaskSums(loss_sum, weight)


def stack_sums(loss_sum: Any, weight: Any, tasks: tuple[str, ...] | None) -> tuple[Any, Any]:
    """Mappings task -> number as ``(tasks,)``; all else as it is, for ``check_sums``.

    Args:
        loss_sum: a mapping task -> 0-dim, or a tensor.
        weight: a mapping task -> 0-dim or number, or a tensor or number.
        tasks: the tasks' names, which both have to have; None: one task, and no mappings.
    """
    if tasks is None:
        return loss_sum, weight
    if isinstance(loss_sum, Mapping):
        check_names("loss_sum", loss_sum, tasks)
        loss_sum = _stack({f"loss_sum[{task!r}]": loss_sum[task] for task in tasks}, None)
    check_dense("loss_sum", loss_sum, tensor="a Tensor or a mapping task -> Tensor")
    if isinstance(weight, Mapping):
        check_names("weight", weight, tasks)
        weight = _stack_weights({f"weight[{task!r}]": weight[task] for task in tasks}, loss_sum.device)
    return loss_sum, weight


def sum_given(
    given: Given | None, tasks: tuple[str, ...], over_rows: RowReduction, device: torch.device, *, validates: bool
) -> BatchSums:
    """The sums of the tasks whose losses a caller gives beside a batch.

    Args:
        given: task -> its loss, 0-dim, which has a weight of 1, or a pair of its sum and its weight.
        tasks: those that it has to name.
        over_rows: the reduction of a task's rows.
        device: where the losses have to be.
        validates: whether negative weights are counted.
    """
    if not isinstance(given, Mapping):
        expected = f"a mapping of {list(tasks)} to losses or (loss_sum, weight)"
        raise TypeError(f"given: got {type(given).__name__}, expected {expected}, as these are of type GIVEN")
    check_names("given", given, tasks)
    pairs: dict[str, Any] = {task: _pair(task, given[task]) for task in tasks}
    loss_sum = _stack({f"given[{task!r}]": pair[0] for task, pair in pairs.items()}, device)
    weight = _stack_weights({f"given[{task!r}][1]": pair[1] for task, pair in pairs.items()}, device)
    faults = count_negative(loss_sum, weight) if validates else None
    if over_rows == "sum":
        weight = weight.abs()
    tracked = None if is_transformed(loss_sum, weight) else loss_sum.detach().to(sum_dtype(device))
    return BatchSums(in_float(loss_sum), None, weight, tracked, None, faults)


def count_negative(loss_sum: Tensor, weight: Tensor | float) -> Tensor:
    """Faults ``(2, tasks)`` of sums: no invalid labels, and 1 where a weight, of the total or a cell, is negative."""
    none = torch.zeros_like(loss_sum, dtype=sum_dtype(loss_sum.device))
    negative = none + (weight < 0)
    return torch.stack((none, negative) if none.ndim == 1 else (none[0], negative.amax(0)))


def _pair(task: str, value: object) -> tuple[object, object]:
    if isinstance(value, Tensor):
        return value, 1.0
    if isinstance(value, (tuple, list)) and len(value) == 2:
        loss_sum, weight = value
        return loss_sum, weight
    raise TypeError(f"given[{task!r}]: got {type(value).__name__}, expected a 0-dim Tensor or (loss_sum, weight)")


def _stack_weights(weights: Mapping[str, Any], device: torch.device) -> Tensor:
    """``_stack`` of weights, which may be numbers as well; detached, and in the widest dtype."""
    columns = {}
    for argument, weight in weights.items():
        column = weight
        if not isinstance(weight, Tensor):
            number = weight if torch.compiler.is_compiling() else check_number(argument, weight)
            # Not torch.full(): the compiler would make a constant of a float.
            column = torch.ones((), dtype=sum_dtype(device), device=device) * number
        columns[argument] = column
    return _stack(columns, device).detach().to(sum_dtype(device))


def _stack(columns: Mapping[str, Any], device: torch.device | None) -> Tensor:
    """``(tasks,)`` of 0-dim tensors, in a dtype that holds them all.

    Args:
        columns: the tensors, by the names of the arguments that they are.
        device: where they have to be; None: all on one.
    """
    for argument, column in columns.items():
        check_dense(argument, column)
        if column.ndim != 0:
            raise ValueError(f"{argument}: got shape {tuple(column.shape)}, expected a 0-dim Tensor")
        device = column.device if device is None else device
        if column.device != device:
            raise ValueError(f"{argument}: got a tensor on {column.device}, expected {device} as for the others")
    assert device is not None
    values = list(columns.values())
    dtypes = {value.dtype for value in values}
    if len(dtypes) > 1:
        is_small = all(dtype.is_floating_point and dtype != torch.float64 for dtype in dtypes)
        values = [value.to(torch.float32 if is_small else sum_dtype(device)) for value in values]
    return torch.stack(values)


def in_float(loss_sum: Tensor) -> Tensor:
    """A copy of a sum in the dtype of a loss: float64 if it is, float32 otherwise."""
    return loss_sum.to(torch.float64 if loss_sum.dtype == torch.float64 else torch.float32, copy=True)
