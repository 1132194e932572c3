"""Where a batch of several tasks enters: one column a task, from tensors or from mappings task -> tensor.

Logits, labels and weights come in, each in its form; an aligned ``Batch`` goes out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from twloss.arguments import check_dense
from twloss.batch import Batch, align, compute_dtype
from twloss.wide_sum import sum_dtype

__all__ = ["TaskTensors", "align_tasks"]

TaskTensors = Tensor | Mapping[str, Tensor]


def align_tasks(
    logits: TaskTensors,
    labels: TaskTensors,
    weights: TaskTensors | None,
    tasks: tuple[str, ...],
    *,
    has_classes: bool | None,
    ignore_index: float | None,
) -> Batch:
    """Check the inputs, each a tensor or a mapping task -> tensor, and bring them to one shape and dtype.

    Args:
        logits: ``(rows, tasks)`` or ``(rows, tasks, classes)``; task -> ``(rows,)``, ``(rows, 1)`` or with classes.
        labels: ``(rows, tasks)``.
        weights: ``(rows, tasks)``, ``(rows, 1)`` or ``(rows,)``.
        tasks: the names of the columns.
        has_classes: whether the logits have a dimension of classes; None: as their number of dimensions says.
        ignore_index: the label that says "missing"; NaN is allowed.

    Raises:
        TypeError: for something that is no tensor, or of a dtype that can't be used.
        ValueError: for names, shapes or devices that do not fit.
    """
    logits = _stacked("logits", logits, tasks, has_classes=has_classes is True)
    labels = _check_columns(_stacked("labels", labels, tasks, has_classes=False), tasks)
    if weights is not None:
        weights = _per_row(_stacked("weights", weights, tasks, has_classes=False), labels)
    return align(logits, labels, weights, has_classes=has_classes, ignore_index=ignore_index)


def _stacked(name: str, values: Tensor | Mapping[str, Tensor], tasks: Sequence[str], *, has_classes: bool) -> Tensor:
    """One ``(rows, tasks)`` or ``(rows, tasks, classes)`` tensor from a mapping; a tensor stays what it is.

    Where the class counts differ, the missing classes get a logit of -inf: probability 0, gradient 0, and a loss of
    infinity for a label that is one of them.

    Raises:
        TypeError: if a value is no tensor.
        ValueError: if names are missing or unknown, or shapes do not fit.
    """
    if not isinstance(values, Mapping):
        return values
    if set(values) != set(tasks):
        missing = [task for task in tasks if task not in values]
        unknown = [task for task in values if task not in tasks]
        raise ValueError(
            f"{name}: got {list(values)}, expected {list(tasks)}: missing tasks {missing}, unknown tasks {unknown}"
        )
    columns = [_column(f"{name}[{task!r}]", values[task], has_classes) for task in tasks]
    rows = {task: column.shape[0] for task, column in zip(tasks, columns)}
    if len(set(rows.values())) > 1:
        raise ValueError(f"{name}: got {rows} rows, expected the same number for every task")
    devices = {task: str(column.device) for task, column in zip(tasks, columns)}
    if len(set(devices.values())) > 1:
        raise ValueError(f"{name}: got {devices}, expected the same device for every task")
    dtypes = [compute_dtype(f"{name}[{t!r}]", c) if name == "logits" else c.dtype for t, c in zip(tasks, columns)]
    columns = _of_one_dtype(columns, dtypes)
    if has_classes:
        classes = max(column.shape[1] for column in columns)
        columns = [torch.nn.functional.pad(c, (0, classes - c.shape[1]), value=-math.inf) for c in columns]
    return torch.stack(columns, dim=1)


def _of_one_dtype(columns: list[Tensor], dtypes: list[torch.dtype]) -> list[Tensor]:
    """Columns whose dtypes differ, in one that holds their values: torch.stack would round 2^24 + 1 to float32."""
    if len({column.dtype for column in columns}) == 1:
        return columns
    if any(dtype.is_floating_point for dtype in dtypes):
        wide = torch.float32 if set(dtypes) == {torch.float32} else sum_dtype(columns[0].device)
    else:
        wide = torch.int64
    return [column.to(wide) for column in columns]


def _column(name: str, values: Tensor, has_classes: bool) -> Tensor:
    """One task's ``(rows,)`` values, or ``(rows, classes)`` logits."""
    check_dense(name, values)
    if has_classes:
        if values.ndim != 2 or values.shape[1] == 0:
            raise ValueError(f"{name}: got shape {tuple(values.shape)}, expected (rows, classes), at least one class")
        return values
    if values.ndim == 2 and values.shape[1] == 1:
        return values.squeeze(1)
    if values.ndim != 1:
        raise ValueError(f"{name}: got shape {tuple(values.shape)}, expected (rows,) or (rows, 1)")
    return values


def _check_columns(labels: Tensor, tasks: tuple[str, ...]) -> Tensor:
    if isinstance(labels, Tensor) and (labels.ndim != 2 or labels.shape[1] != len(tasks)):
        raise ValueError(f"labels: got shape {tuple(labels.shape)}, expected (rows, {len(tasks)})")
    return labels


def _per_row(weights: Tensor, labels: Tensor) -> Tensor:
    """Weights as ``(rows, tasks)`` or ``(rows, 1)``; what is no tensor is left for align() to refuse."""
    if not (isinstance(weights, Tensor) and isinstance(labels, Tensor)):
        return weights
    rows, tasks = labels.shape
    if weights.shape == (rows,):
        return weights.unsqueeze(1)
    if weights.shape not in ((rows, tasks), (rows, 1)):
        raise ValueError(
            f"weights: got shape {tuple(weights.shape)}, expected ({rows}, {tasks}), ({rows}, 1) or ({rows},)"
        )
    return weights
