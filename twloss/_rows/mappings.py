"""Mappings task -> tensor, stacked into one tensor, in which a task with fewer rows than others is padded.

Tensors ``(rows,)`` or ``(rows, classes)`` come in, as many as there are tasks; ``(rows, tasks)`` or
``(rows, tasks, classes)`` go out, by a number of kernels that does not depend on how many they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from twloss._arguments import IgnoreIndex, check_dense, check_names, label_of
from twloss._precision import sum_dtype

TaskTensors = Tensor | Mapping[str, Tensor]
TENSOR_OR_MAPPING = "a Tensor or a mapping task -> Tensor"

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def stack_inputs(
    logits: TaskTensors | None,
    labels: TaskTensors,
    weights: TaskTensors | None,
    tasks: tuple[str, ...],
    *,
    has_classes: bool | None,
    ignore_index: IgnoreIndex,
    has_other_tasks: bool,
) -> tuple[Any, Any, Any, Tensor | None]:
    """Stack the inputs that are mappings.

    Args:
        logits: a tensor, or a mapping task -> ``(rows,)``, ``(rows, 1)`` or ``(rows, …)``; None: there are none.
        labels: as the logits.
        weights: a tensor, or a mapping task -> ``(rows,)`` or ``(rows, 1)``; None: 1.
        tasks: the names of the columns.
        has_classes: as ``RowLoss`` has it.
        ignore_index: the label that says "missing".
        has_other_tasks: whether mappings may have other tasks as well, and have been checked.

    Returns:
        Logits, labels and weights as tensors, what was one unchecked; and ``(rows, tasks)`` bool, False where a task
        has no such row or its label is missing, or None where that was not looked at.
    """
    inputs: dict[str, Any] = {"logits": logits, "labels": labels, "weights": weights}
    for name in () if has_other_tasks else inputs:
        if isinstance(inputs[name], Mapping):
            check_task_names(name, inputs[name], tasks)
    columns = {name: [each[task] for task in tasks] for name, each in inputs.items() if isinstance(each, Mapping)}
    is_ragged = False
    if has_classes or not _are_alike(columns):
        dimensions = {"logits": has_classes, "labels": None if has_classes is None else False, "weights": False}
        columns = {name: columns_of(name, each, tasks, dimensions[name]) for name, each in columns.items()}
        is_ragged = _is_ragged(inputs, columns, tasks)
    for name, each in columns.items():
        inputs[name] = stack_columns(name, each, with_classes=name == "logits" and has_classes is True)
    valid = None
    if "labels" in columns and (is_ragged or ignore_index is not None):
        valid = _are_valid(columns["labels"], inputs["labels"], tasks, ignore_index, is_ragged=is_ragged)
    return inputs["logits"], inputs["labels"], inputs["weights"], valid


def by_task(name: str, values: TaskTensors, tasks: tuple[str, ...]) -> Mapping[str, Tensor]:
    """A tensor's columns under their tasks' names, for tasks that are computed apart; a mapping as it is."""
    if isinstance(values, Mapping):
        check_task_names(name, values, tasks)
        return values
    check_dense(name, values, tensor=TENSOR_OR_MAPPING)
    if name == "weights" and (values.ndim == 1 or values.shape[1:] == (1,)):
        return dict.fromkeys(tasks, values)
    if values.ndim < 2 or values.shape[1] != len(tasks):
        raise ValueError(f"{name}: got shape {tuple(values.shape)}, expected (rows, {len(tasks)})")
    return dict(zip(tasks, values.unbind(1)))


def check_task_names(name: str, values: Mapping[str, Tensor], tasks: tuple[str, ...]) -> None:
    """Raise unless a mapping has the tasks' names, and no others."""
    if values.keys() != set(tasks):
        advice = "; a task that has no rows in this batch is given tensors of 0 rows"
        check_names(name, values, tasks, if_missing=advice)


def is_valid(labels: Tensor, tasks: tuple[str, ...] | None, ignore_index: IgnoreIndex) -> Tensor:
    """A mask of the labels that differ from ``ignore_index``, of the labels' shape.

    Where tasks differ in it, the labels are ``(rows, tasks, …)``.
    """
    if not isinstance(ignore_index, Mapping):
        return _differ(labels, ignore_index)
    assert tasks is not None
    own = [label_of(ignore_index, task) for task in tasks]
    # Numbers that came from Python would make a GPU's host wait.
    yes, no = (torch.full((), value, device=labels.device) for value in (True, False))
    valid = torch.ones_like(labels, dtype=torch.bool)
    done: list[float] = []
    for label in ignore_index.values():
        if any(_is_same(label, each) for each in done):
            continue
        done.append(label)
        others = torch.stack([no if _is_same(label, each) else yes for each in own])
        valid = valid & (_differ(labels, label) | others.view(-1, *(1,) * (labels.ndim - 2)))
    return valid


def all_valid(valid: Tensor, dimensions: int) -> Tensor:
    """A mask of the rows whose labels are all valid; rows are the first so many dimensions."""
    return valid if valid.ndim <= dimensions else valid.flatten(dimensions).all(-1)


def _differ(labels: Tensor, ignore_index: float | None) -> Tensor:
    if ignore_index is None:
        return torch.ones_like(labels, dtype=torch.bool)
    if _is_nan(ignore_index):
        return ~labels.isnan()
    if labels.is_floating_point():
        return labels != ignore_index
    # A comparison wraps the number into the labels' dtype (156 == -100 in uint8); int64 holds every label.
    return labels.to(torch.int64) != ignore_index


def _is_nan(number: float | None) -> bool:
    """``math.isnan``, which torch.compile does not know of a symbolic number; so is a float with ``dynamic=True``."""
    return number != number  # noqa: PLR0124


def _is_same(label: float, other: float | None) -> bool:
    return label == other or (_is_nan(label) and _is_nan(other))


def _are_valid(
    columns: list[Tensor], labels: Tensor, tasks: tuple[str, ...], ignore_index: IgnoreIndex, *, is_ragged: bool
) -> Tensor | None:
    """A mask of the valid rows, False also for padding; None if all are valid."""
    if ignore_index is not None and any(column.dtype != columns[0].dtype for column in columns):
        # Each in its own: once widened, a -999 of bfloat16 is -1000.
        own = [label_of(ignore_index, task) for task in tasks]
        differ = [all_valid(_differ(column, label), 1) for column, label in zip(columns, own)]
        return stack_columns("mask", differ)
    there = None
    if is_ragged:
        yes = torch.ones(labels.shape[0], dtype=torch.bool, device=labels.device)
        there = stack_columns("mask", [yes[: column.shape[0]] for column in columns])
    if ignore_index is None:
        return there
    valid = all_valid(is_valid(labels, tasks, ignore_index), 2)
    return valid if there is None else valid & there


def _are_alike(columns: Mapping[str, list[Tensor]]) -> bool:
    """Whether all columns are dense ``(rows,)``, and those of a mapping share a dtype and device: the usual case."""
    shape = None
    for name, each in columns.items():
        dtype = device = None
        for column in each:
            if type(column) is not Tensor or column.is_nested or column.layout != torch.strided:
                return False
            if dtype is None:
                dtype, device, shape = column.dtype, column.device, column.shape if shape is None else shape
            if column.shape != shape or column.dtype != dtype or column.device != device:
                return False
        if dtype is None or dtype.is_complex or (name == "logits" and dtype not in FLOATS):
            return False
    return shape is not None and len(shape) == 1


def columns_of(name: str, given: list[Tensor], tasks: tuple[str, ...], has_classes: bool | None) -> list[Tensor]:
    """The tasks' own tensors, checked, ``(rows,)`` or ``(rows, …)``; of different numbers of rows."""
    columns: list[Tensor] = []
    for task, column in zip(tasks, given):
        # What _column() and check_dense() look at, called only for anything else.
        is_plain = type(column) is Tensor and column.layout == torch.strided and not column.is_nested
        if not is_plain or column.is_complex() or has_classes or column.ndim != 1:
            column = _column(f"{name}[{task!r}]", column, has_classes)  # noqa: PLW2901
        if name == "logits" and column.dtype not in FLOATS:
            refuse_dtype(f"logits[{task!r}]", column)
        columns.append(column)
        first = columns[0]
        if column.device != first.device:
            devices = {tasks[0]: str(first.device), task: str(column.device)}
            raise ValueError(f"{name}: got {devices}, expected the same device for every task")
        if has_classes is None and column.shape[1:] != first.shape[1:]:
            shapes = {tasks[0]: tuple(first.shape), task: tuple(column.shape)}
            raise ValueError(
                f"{name}: got shapes {shapes}, expected one number of classes for the tasks of one callable"
            )
    return columns


def _column(name: str, values: Tensor, has_classes: bool | None) -> Tensor:
    """One task's ``(rows,)``, or ``(rows, classes)`` where there are classes; None: with any further dimensions."""
    check_dense(name, values)
    if has_classes:
        if values.ndim != 2 or values.shape[1] == 0:
            raise ValueError(f"{name}: got shape {tuple(values.shape)}, expected (rows, classes), at least one class")
        return values
    if has_classes is None and values.ndim > 1 and values.shape[1:] != (1,):
        return values
    if values.ndim == 2 and values.shape[1] == 1:
        return values.squeeze(1)
    if values.ndim != 1:
        raise ValueError(f"{name}: got shape {tuple(values.shape)}, expected (rows,) or (rows, 1)")
    return values


def _is_ragged(inputs: dict[str, Any], columns: dict[str, list[Tensor]], tasks: tuple[str, ...]) -> bool:
    """Whether tasks differ in their numbers of rows; each has as many in every mapping."""
    uneven = None
    leader, expected = next((name, [column.shape[0] for column in each]) for name, each in columns.items())
    for name, each in columns.items():
        rows = [column.shape[0] for column in each]
        if rows != expected:
            task, count, of_leader = next(found for found in zip(tasks, rows, expected) if found[1] != found[2])
            raise ValueError(f"{name}[{task!r}]: got {count} rows, expected {of_leader} as in {leader}[{task!r}]")
        if uneven is None and rows.count(rows[0]) < len(rows):
            uneven = name
    if uneven is None:
        return False
    tensors = [name for name, values in inputs.items() if values is not None and name not in columns]
    if tensors:
        first, *others = zip(tasks, map(len, columns[uneven]))
        found = dict([first, next(other for other in others if other[1] != first[1])])
        raise ValueError(
            f"{uneven}: got {found} rows, expected the same number for every task, as {tensors[0]} is no mapping"
        )
    return True


def stack_columns(name: str, columns: list[Tensor], *, with_classes: bool = False) -> Tensor:
    """``(rows, tasks, …)``, padded with the task's first row, or another's if it has none; the name "mask": with False.

    So a callable sees real rows there too, and no logit that it can't take.
    """
    if len(columns) == 1:
        return columns[0].unsqueeze(1)
    for column in columns:
        if column.dtype != columns[0].dtype:
            columns = _of_one_dtype(name, columns)
            break
    if with_classes:
        columns = _with_as_many_classes(columns)
    rows = [column.shape[0] for column in columns]
    longest = max(rows)
    fullest = columns[rows.index(longest)]
    parts = columns
    if min(rows) < longest:
        no = fullest.new_zeros(1) if name == "mask" else None
        parts = []
        for column in columns:
            parts.append(column)
            if missing := longest - column.shape[0]:
                row = (column if column.shape[0] else fullest)[:1].detach() if no is None else no
                parts.append(row.expand(missing, *row.shape[1:]))
    # One kernel, and one in backward: that of torch.stack would leave a copy to each of the heads.
    return torch.cat(parts).view(len(columns), longest, *fullest.shape[1:]).transpose(0, 1)


def _with_as_many_classes(columns: list[Tensor]) -> list[Tensor]:
    """Logits of classes, -inf for the classes that a task does not have.

    That is probability 0, gradient 0, and a loss of infinity for a label that is one of them.
    """
    classes = max(column.shape[1] for column in columns)
    return [
        column if column.shape[1] == classes else F.pad(column, (0, classes - column.shape[1]), value=-math.inf)
        for column in columns
    ]


def _of_one_dtype(name: str, columns: list[Tensor]) -> list[Tensor]:
    """Columns whose dtypes differ, in one that holds their values: torch.stack would round 2^24 + 1 to float32."""
    dtypes = {column.dtype for column in columns}
    if not any(dtype.is_floating_point for dtype in dtypes):
        wide = torch.int64
    elif name == "logits":
        wide = torch.float64 if torch.float64 in dtypes else torch.float32
    else:
        wide = sum_dtype(columns[0].device)
    return [column.to(wide) for column in columns]


def refuse_dtype(name: str, logits: Tensor) -> NoReturn:
    """Say which dtypes logits may have."""
    raise TypeError(f"{name}: got {logits.dtype}, expected float16, bfloat16, float32 or float64")
