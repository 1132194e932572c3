"""Where a batch enters: what the caller passes becomes aligned tensors, or a clear error.

Logits, labels and weights come in, tensors or mappings task -> tensor; a ``Batch`` of one shape, device and floating
dtype goes out. Checks look at types, shapes, dtypes and devices only, never at values: reading a value would wait for
the device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from twloss._accumulator import sum_dtype
from twloss._arguments import check_dense, check_names, list_some

TaskTensors = Tensor | Mapping[str, Tensor]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Batch(NamedTuple):
    """Aligned inputs; ``(rows, tasks)`` stands for the labels' shape, which is any shape for a one-task loss."""

    logits: Tensor
    """``(rows, tasks)`` or ``(rows, tasks, classes)``, float32 or float64."""
    labels: Tensor
    """``(rows, tasks)``: of the logits' dtype, or int64 class indices."""
    weights: Tensor | None
    """``(rows, tasks)`` of the logits' dtype, 0 where the label is missing; None: every row counts once."""
    valid: Tensor | None
    """``(rows, tasks)`` bool, False where the label is missing; None: no label can be missing."""


def align(
    logits: TaskTensors,
    labels: TaskTensors,
    weights: TaskTensors | None,
    tasks: tuple[str, ...] | None,
    *,
    has_classes: bool | None,
    ignore_index: float | None,
) -> Batch:
    """Check the inputs, against each other too, and bring them to one shape and dtype.

    Args:
        logits: ``(rows, tasks)`` or ``(rows, tasks, classes)``, floating; with tasks also a mapping task ->
            ``(rows,)``, ``(rows, 1)`` or ``(rows, classes)``, and so for the others.
        labels: ``(rows, tasks)``, any real dtype; of one task any shape.
        weights: ``(rows, tasks)``, ``(rows, 1)`` or ``(rows,)``; of one task what broadcasts to the labels.
        tasks: the names of the columns; None: one task, and no mappings.
        has_classes: whether the logits have a dimension of classes; None: as their number of dimensions says.
        ignore_index: the label that says "missing"; NaN is allowed.
    """
    valid = None
    if tasks is not None:
        if isinstance(logits, Mapping):
            logits = _stack("logits", _columns("logits", logits, tasks, has_classes is True))
        if isinstance(labels, Mapping):
            columns = _columns("labels", labels, tasks, has_classes=False)
            labels, valid = _stack("labels", columns), _are_valid(columns, ignore_index)
        if isinstance(weights, Mapping):
            weights = _stack("weights", _columns("weights", weights, tasks, has_classes=False))
    logits, labels, weights = _check_tensors(logits, labels, weights)
    if has_classes is None:
        has_classes = logits.ndim == labels.ndim + 1 and not labels.is_floating_point()
    elif has_classes and tasks is None and labels.ndim != 1:
        # torch's own (rows, classes, positions) would be taken for (rows, positions, classes).
        shapes = f"{tuple(logits.shape)} with labels {tuple(labels.shape)}"
        raise ValueError(f"logits: got shape {shapes}, expected (rows, classes) with labels (rows,)")
    _check_shapes(logits, labels, has_classes, None if tasks is None else len(tasks))
    # A bfloat16 sum of 1025 ones is 1024.
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    if weights is not None:
        weights = weights.to(dtype)
        if weights.shape != labels.shape:
            weights = _expand_weights(weights, labels, by_row=tasks is not None)
    if ignore_index is not None:
        valid = _is_valid(labels, ignore_index) if valid is None else valid
        weights = valid.to(dtype) if weights is None else weights.where(valid, 0.0)
    return Batch(logits.to(dtype), labels.to(torch.int64 if has_classes else dtype), weights, valid)


def find_proxy(*inputs: object) -> Proxy | None:
    """What stands for a tensor among the inputs, or in one that is a mapping, where torch.fx traces the model."""
    for each in inputs:
        if isinstance(each, Proxy):
            return each
        if isinstance(each, Mapping):
            for value in each.values():
                if isinstance(value, Proxy):
                    return value
    return None


def record_call(proxy: Proxy, module: nn.Module, method: str | None, *args: object, **kwargs: object) -> Any:
    """What stands for the result of a module, or of a method of it, when the graph that is being traced runs."""
    tracer: Any = proxy.tracer
    path = tracer.path_of_module(module)
    if not path:
        raise ValueError("logits: got a Proxy from a trace of the loss alone, expected a trace of a model that has it")
    inputs = tuple(dict(each) if isinstance(each, Mapping) else each for each in args)
    if method is None:
        return tracer.create_proxy("call_module", path, inputs, kwargs)
    return tracer.create_proxy("call_method", method, (tracer.create_proxy("get_attr", path, (), {}), *inputs), kwargs)


def _check_tensors(logits: Any, labels: Any, weights: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    for name, values in (("logits", logits), ("labels", labels), ("weights", weights)):
        if name == "weights" and values is None:
            break
        # What check_dense() looks at, in the hot path called only to raise.
        if type(values) is not Tensor or values.layout != torch.strided or values.is_nested or values.is_complex():
            check_dense(name, values)
        if name == "logits" and values.dtype not in _FLOATS:
            _refuse_dtype("logits", values)
        if values.device != logits.device:
            raise ValueError(f"{name}: got a tensor on {values.device}, expected {logits.device}, where the logits are")
    return logits, labels, weights


def _refuse_dtype(name: str, logits: Tensor) -> NoReturn:
    raise TypeError(f"{name}: got {logits.dtype}, expected float16, bfloat16, float32 or float64")


def _check_shapes(logits: Tensor, labels: Tensor, has_classes: bool, tasks: int | None) -> None:
    if tasks is not None and (labels.ndim != 2 or labels.shape[1] != tasks):
        raise ValueError(f"labels: got shape {tuple(labels.shape)}, expected (rows, {tasks})")
    shape = logits.shape[:-1] if has_classes else logits.shape
    if labels.shape != shape or (has_classes and logits.ndim < 2):
        expected = "the labels' shape and a last dimension of classes" if has_classes else "the labels' shape"
        raise ValueError(
            f"logits: got shape {tuple(logits.shape)} with labels {tuple(labels.shape)}, expected {expected}"
        )
    if has_classes and logits.shape[-1] == 0:
        raise ValueError(f"logits: got shape {tuple(logits.shape)}, expected at least one class")
    if has_classes and labels.is_floating_point():
        raise TypeError(f"labels: got {labels.dtype}, expected class indices of an integer dtype")


def _expand_weights(weights: Tensor, labels: Tensor, *, by_row: bool) -> Tensor:
    """Weights in the labels' shape."""
    expected = f"one that broadcasts to the labels' {tuple(labels.shape)}"
    if by_row:
        rows, tasks = labels.shape
        expected = f"({rows}, {tasks}), ({rows}, 1) or ({rows},)"
        weights = weights.unsqueeze(1) if weights.shape == (rows,) else weights
    if not by_row or weights.shape == (rows, 1):
        try:
            # Contiguous, because elementwise kernels take the slow path on an expanded operand.
            return weights.expand(labels.shape).contiguous()
        except RuntimeError:
            pass
    raise ValueError(f"weights: got shape {tuple(weights.shape)}, expected {expected}")


def _is_valid(labels: Tensor, ignore_index: float) -> Tensor:
    if math.isnan(ignore_index):
        return ~labels.isnan()
    if not labels.is_floating_point():
        # A comparison wraps the number into the labels' dtype (156 == -100 in uint8); int64 holds every label.
        labels = labels.to(torch.int64)
    return labels != ignore_index


def _are_valid(columns: list[Tensor], ignore_index: float | None) -> Tensor | None:
    """As ``_is_valid``, of columns that differ in dtype, each in its own: once widened, a -999 of bfloat16 is -1000."""
    if ignore_index is None or len({column.dtype for column in columns}) == 1:
        return None
    return torch.stack([_is_valid(column, ignore_index) for column in columns], dim=1)


def _columns(name: str, values: Mapping[str, Tensor], tasks: tuple[str, ...], has_classes: bool) -> list[Tensor]:
    """The tasks' own tensors, ``(rows,)`` or ``(rows, classes)``, which fit one another."""
    check_names(name, values, tasks)
    columns = [_column(f"{name}[{task!r}]", values[task], has_classes) for task in tasks]
    rows = _one_task_of_each(tasks, [column.shape[0] for column in columns])
    if len(rows) > 1:
        raise ValueError(f"{name}: got {list_some(rows)} rows, expected the same number for every task")
    devices = _one_task_of_each(tasks, [str(column.device) for column in columns])
    if len(devices) > 1:
        raise ValueError(f"{name}: got {list_some(devices)}, expected the same device for every task")
    if name == "logits":
        for task, column in zip(tasks, columns):
            if column.dtype not in _FLOATS:
                _refuse_dtype(f"logits[{task!r}]", column)
    return columns


def _one_task_of_each(tasks: tuple[str, ...], values: list[Any]) -> dict[str, Any]:
    """The first task with each of the values: all that a message of a hundred thousand tasks has to tell."""
    of_value: dict[Any, str] = {}
    for task, value in zip(tasks, values):
        of_value.setdefault(value, task)
    return {task: value for value, task in of_value.items()}


def _stack(name: str, columns: list[Tensor]) -> Tensor:
    """One ``(rows, tasks)`` or ``(rows, tasks, classes)`` tensor.

    Where the class counts differ, the missing classes get a logit of -inf: probability 0, gradient 0, and a loss of
    infinity for a label that is one of them.
    """
    columns = _of_one_dtype(name, columns)
    if columns[0].ndim > 1:
        classes = max(column.shape[1] for column in columns)
        columns = [F.pad(column, (0, classes - column.shape[1]), value=-math.inf) for column in columns]
    return torch.stack(columns, dim=1)


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


def _of_one_dtype(name: str, columns: list[Tensor]) -> list[Tensor]:
    """Columns whose dtypes differ, in one that holds their values: torch.stack would round 2^24 + 1 to float32."""
    dtypes = {column.dtype for column in columns}
    if len(dtypes) == 1:
        return columns
    if not any(dtype.is_floating_point for dtype in dtypes):
        wide = torch.int64
    elif name == "logits":
        wide = torch.float64 if torch.float64 in dtypes else torch.float32
    else:
        wide = sum_dtype(columns[0].device)
    return [column.to(wide) for column in columns]
