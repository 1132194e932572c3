"""Tasks by their loss type: those that share one are computed in one call, whatever their number.

A loss's arguments come in and become groups of tasks. A batch's inputs go out by group, and the groups' sums
``(tasks,)`` come back as those of all tasks, in the tasks' order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from twloss._arguments import (
    IgnoreIndex,
    LossName,
    PerTask,
    check_class_labels,
    check_names,
    check_some_of,
    labels_of,
    list_some,
    per_task_numbers,
)
from twloss._constants import TaskConstants
from twloss._precision import sum_dtype
from twloss._rows.mappings import TaskTensors, split_by_task
from twloss._rows.row_loss import LossFunction, LossType, resolve_loss_type
from twloss._sums.sums import TaskSums
from twloss._torch import takes_keyword

# The enum last: jsonargparse would have it write a function into a configuration, which it can't.
TaskLossType = LossName | LossFunction | LossType
ResolvedTypes = LossType | LossFunction | dict[str, LossType | LossFunction]


class TypeGroup(NamedTuple):
    """The tasks that share a loss type."""

    attribute: str
    """Of the loss, which holds the type there: a module is trained as its submodule."""
    tasks: tuple[str, ...] | None
    """None: the one task of a ``Loss``, which has no name."""
    pos_weights: TaskConstants
    ignore_index: IgnoreIndex
    takes_valid: bool


def resolve_loss_types(
    loss_type: TaskLossType | Mapping[str, TaskLossType], tasks: tuple[str, ...] | None
) -> ResolvedTypes:
    """The type of all tasks, or that of each by its name."""
    if tasks is None or not isinstance(loss_type, Mapping):
        return resolve_loss_type(loss_type)  # type: ignore[arg-type]
    check_names("loss_type", loss_type, tasks, "got the tasks")
    return {task: resolve_loss_type(loss_type[task], f"loss_type[{task!r}]") for task in tasks}


def resolve_pos_weights(
    pos_weights: PerTask | None, loss_type: ResolvedTypes, tasks: tuple[str, ...] | None
) -> tuple[float, ...] | None:
    """One number a task, which only those with BCE_WITH_LOGITS can have; the others' is 1."""
    name, names = ("pos_weight", ("loss",)) if tasks is None else ("pos_weights", tasks)
    if pos_weights is None:
        return None
    types = loss_type if isinstance(loss_type, dict) else dict.fromkeys(names, loss_type)
    binary = [task for task in names if types[task] is LossType.BCE_WITH_LOGITS]
    if isinstance(loss_type, dict) and isinstance(pos_weights, Mapping):
        check_some_of(name, pos_weights, binary, "tasks with BCE_WITH_LOGITS")
        pos_weights = {**dict.fromkeys(names, 1.0), **pos_weights}
    numbers = per_task_numbers(name, pos_weights, names)
    assert numbers is not None
    given = dict(zip(names, numbers))
    if not binary:
        found = list_some(loss_type) if isinstance(loss_type, dict) else loss_type
        raise ValueError(f"{name}: got one with {found}, expected it with BCE_WITH_LOGITS only")
    of_task = {**dict.fromkeys(names, 1.0), **{task: given[task] for task in binary}}
    is_one = isinstance(pos_weights, Real) or (isinstance(pos_weights, Tensor) and pos_weights.ndim == 0)
    if not is_one and (others := [task for task in names if given[task] != of_task[task]]):
        raise ValueError(
            f"{name}: got numbers for {list_some(others)}, expected them for tasks with BCE_WITH_LOGITS only: "
            f"{list_some(binary)}"
        )
    if min(of_task.values()) < 0:
        raise ValueError(f"{name}: got {list_some(numbers)}, expected numbers >= 0")
    return tuple(of_task.values())


def group_by_type(
    loss_type: ResolvedTypes,
    tasks: tuple[str, ...] | None,
    pos_weights: tuple[float, ...] | None,
    ignore_index: IgnoreIndex,
) -> list[tuple[TypeGroup, LossType | LossFunction]]:
    """The groups, in the order of their first tasks, and the type of each."""
    if not isinstance(loss_type, dict):
        return [(_make_group("loss_type", loss_type, tasks, pos_weights, ignore_index), loss_type)]
    numbers = dict(zip(loss_type, pos_weights or ()))
    members: dict[object, list[str]] = {}
    for task, each in loss_type.items():
        # A bound method is a new object whenever it is asked for.
        same = (id(each.__self__), each.__func__) if isinstance(each, MethodType) else id(each)
        members.setdefault(same, []).append(task)
    groups = []
    for index, names in enumerate(members.values()):
        each = loss_type[names[0]]
        is_weighed = each is LossType.BCE_WITH_LOGITS and pos_weights is not None
        own = tuple(numbers[task] for task in names) if is_weighed else None
        groups.append((_make_group(f"loss_type_{index}", each, tuple(names), own, ignore_index), each))
    return groups


def _make_group(
    attribute: str,
    loss_type: LossType | LossFunction,
    tasks: tuple[str, ...] | None,
    pos_weights: tuple[float, ...] | None,
    ignore_index: IgnoreIndex,
) -> TypeGroup:
    ignore_index = ignore_index if tasks is None else labels_of(ignore_index, tasks)
    if loss_type is LossType.CROSS_ENTROPY:
        check_class_labels(ignore_index)
    takes_valid = not isinstance(loss_type, LossType) and takes_keyword(loss_type, "valid")
    return TypeGroup(attribute, tasks, TaskConstants(pos_weights), ignore_index, takes_valid)


def order_of_groups(groups: Sequence[TypeGroup], tasks: tuple[str, ...] | None) -> TaskConstants:
    """Where each task stands in the groups, one after the other; None where that is the tasks' own order."""
    grouped = [task for group in groups for task in group.tasks or ()]
    place = {task: index for index, task in enumerate(grouped)}
    order = None if grouped == list(tasks or ()) else tuple(place[task] for task in tasks or ())
    return TaskConstants(order, dtype=torch.int64)


def split_inputs(
    groups: Sequence[TypeGroup],
    tasks: tuple[str, ...],
    logits: TaskTensors,
    labels: TaskTensors,
    weights: TaskTensors | None,
) -> list[tuple[Any, ...]]:
    """Logits, labels and weights of each of the groups."""
    inputs = (("logits", logits), ("labels", labels), ("weights", weights))
    columns = [None if values is None else split_by_task(name, values, tasks) for name, values in inputs]
    return [
        tuple(None if each is None else {task: each[task] for task in group.tasks or ()} for each in columns)
        for group in groups
    ]


def join_sums(sums: Sequence[TaskSums], order: TaskConstants) -> TaskSums:
    """The sums of several groups as those of all tasks."""
    loss_sums = [each.loss_sum for each in sums]
    if any(each.device != loss_sums[0].device for each in loss_sums):
        devices = list(dict.fromkeys(str(each.device) for each in loss_sums))
        raise ValueError(f"logits: got {devices}, expected the same device for every task")
    weight = sums[0].weight
    if any(isinstance(each.weight, Tensor) or each.weight != weight for each in sums):
        dtype = sum_dtype(loss_sums[0].device)
        weight = join_tasks([torch.zeros_like(each.loss_sum, dtype=dtype) + each.weight for each in sums], order)
    return TaskSums(join_tasks(loss_sums, order), weight)


def join_tasks(parts: Sequence[Tensor], order: TaskConstants) -> Tensor:
    """``(tasks,)`` of each group as one, in the tasks' order."""
    joined = torch.cat(list(parts))
    index = order.like(joined)
    return joined if index is None else joined.index_select(0, index)
