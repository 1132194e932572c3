"""The constructors' arguments, checked: what comes out is what the later stages may rely on."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from numbers import Real

import torch
from torch import Tensor

__all__ = [
    "GLOBAL_REDUCTIONS",
    "MEAN_OVER",
    "TASK_REDUCTIONS",
    "PerTask",
    "check_choice",
    "check_global_reduction",
    "check_ignore_index",
    "check_tasks",
    "per_task_numbers",
    "warn_unless_mean",
]

PerTask = float | Sequence[float] | Mapping[str, float] | Tensor

TASK_REDUCTIONS = ("mean", "sum")
GLOBAL_REDUCTIONS = ("mean", "sum", "min", "max", "median")
MEAN_OVER = ("rows", "weights")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise unless ``value`` is one of the strings.

    Raises:
        TypeError: if it is no string.
        ValueError: if it is another string.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name}: got {type(value).__name__}, expected one of {list(choices)}")
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {list(choices)}")


def check_global_reduction(value: object) -> None:
    """Raise unless ``value`` is a known reduction over tasks or a callable."""
    if not callable(value):
        check_choice("global_reduction", value, GLOBAL_REDUCTIONS)


def check_tasks(tasks: Sequence[str]) -> tuple[str, ...]:
    """The names of the tasks, after checks.

    Raises:
        TypeError: if it is no sequence of strings.
        ValueError: if there is none, or a name is empty or stands twice.
    """
    if isinstance(tasks, str) or not isinstance(tasks, Sequence):
        raise TypeError(f"tasks: got {type(tasks).__name__}, expected a sequence of names")
    for task in tasks:
        if not isinstance(task, str):
            raise TypeError(f"tasks: got a name of type {type(task).__name__}, expected str")
    if not tasks or "" in tasks or len(set(tasks)) < len(tasks):
        raise ValueError(f"tasks: got {list(tasks)}, expected one or more names, each once and not empty")
    return tuple(tasks)


def per_task_numbers(name: str, values: PerTask | None, tasks: Sequence[str]) -> tuple[float, ...] | None:
    """One finite float a task, from a number for all, a sequence, a tensor or a mapping task -> number.

    Raises:
        TypeError: for anything else.
        ValueError: for a wrong number of values or one that is not finite.
    """
    if values is None:
        return None
    if isinstance(values, Tensor):
        if values.ndim > 1 or values.is_complex() or values.dtype == torch.bool:
            raise ValueError(
                f"{name}: got {values.dtype} of shape {tuple(values.shape)}, expected ({len(tasks)},) numbers"
            )
        values = values.tolist()
    if isinstance(values, Mapping):
        if set(values) != set(tasks):
            raise ValueError(f"{name}: got the tasks {list(values)}, expected {list(tasks)}")
        values = [values[task] for task in tasks]
    numbers = list(values) if isinstance(values, Sequence) and not isinstance(values, str) else [values] * len(tasks)
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, Real):
            raise TypeError(f"{name}: got {number!r} of type {type(number).__name__}, expected a number")
    if len(numbers) != len(tasks):
        raise ValueError(f"{name}: got {len(numbers)} values, expected {len(tasks)}, one for each of {list(tasks)}")
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError(f"{name}: got {numbers}, expected finite numbers")
    return tuple(float(number) for number in numbers)


def check_ignore_index(ignore_index: object) -> float | None:
    """The label that says "missing": None, or a number, NaN included."""
    if ignore_index is None:
        return None
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, (int, float)):
        raise TypeError(f"ignore_index: got {type(ignore_index).__name__}, expected a number or None")
    return ignore_index


def warn_unless_mean(global_batch: bool, **reductions: object) -> None:
    """Warn once of reductions whose gradient depends on the split over ranks; ``global_batch`` mends it."""
    others = [f"{name}={value!r}" for name, value in reductions.items() if value != "mean"]
    if others and not global_batch:
        warnings.warn(
            f"{', '.join(others)}: the gradient that DistributedDataParallel averages over ranks then differs from "
            "that of one process on the whole batch; global_batch=True makes them equal",
            UserWarning,
            stacklevel=_callers_level(),
        )


def _callers_level() -> int:
    """The stacklevel, for warn_unless_mean, of the first frame outside of this package."""
    frame, level = sys._getframe(2), 2
    while frame.f_back is not None and frame.f_globals.get("__package__") == __package__:
        frame, level = frame.f_back, level + 1
    return level
