"""Arguments, checked: what comes out is what the later stages may rely on.

Types, shapes, dtypes and devices only, and the values of Python numbers: reading a tensor's would wait for its device.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import islice
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING or dist.is_available():
    from torch.distributed.device_mesh import DeviceMesh

    RankGroup = dist.ProcessGroup | DeviceMesh
else:  # a torch that was built without it
    RankGroup = object

SegmentNames = Mapping[str, Sequence[str] | int]
"""The names of each dimension's ids, or their number."""
PerTask = float | Sequence[float] | Mapping[str, float] | Tensor
IgnoreIndex = float | Mapping[str, float] | None

LossName = Literal["bce_with_logits", "cross_entropy", "given"]
RowReduction = Literal["mean", "sum"]
TaskReduction = Literal["mean", "sum", "min", "max", "median"]
MeanOver = Literal["rows", "weights"]
GradientReduction = Literal["mean", "sum"]
NanStrategy = Literal["warn", "error", "ignore", "disable"]

_LARGEST_INT = torch.iinfo(torch.int64).max
_LARGEST_FLOAT = torch.finfo(torch.float64).max


def list_some(values: Collection[object], most: int = 5) -> str:
    """The first of the values, so that a message of a hundred thousand tasks stays one that can be read."""
    items: Any = values.items() if isinstance(values, Mapping) else values
    kind = next((kind for kind in (dict, tuple) if isinstance(values, kind)), list)
    shown = str(kind(islice(items, most)))
    return shown if len(values) <= most else f"{shown[:-1]}, … {len(values):,} in all{shown[-1]}"


def list_counts(counts: Mapping[str, int], most: int = 12) -> str:
    """Numbers by name, "a: 1, b: 2", of the first names."""
    shown = ", ".join(f"{name}: {count}" for name, count in islice(counts.items(), most))
    return shown if len(counts) <= most else f"{shown}, … {len(counts):,} in all"


def check_names(
    name: str, values: Collection[str], tasks: Sequence[str], verb: str = "got", *, if_missing: str = ""
) -> None:
    """Raise unless the keys are the tasks' names; ``if_missing`` tells what to do about one that is not there."""
    known = set(tasks)
    missing, unknown = [task for task in tasks if task not in values], [key for key in values if key not in known]
    if missing or unknown:
        raise ValueError(
            f"{name}: {verb} {list_some(list(values))}, expected {list_some(list(tasks))}: "
            f"missing tasks {list_some(missing)}, unknown tasks {list_some(unknown)}{if_missing if missing else ''}"
        )


def check_some_of(name: str, values: Collection[str], tasks: Sequence[str], which: str = "tasks") -> None:
    """Raise unless the keys are names of some of the tasks."""
    known = set(tasks)
    if unknown := [key for key in values if key not in known]:
        raise ValueError(f"{name}: got {list_some(unknown)}, expected names of {which} only: {list_some(list(tasks))}")


def check_choice(name: str, value: object, choices: Collection[str], otherwise: str = "") -> None:
    """Raise unless ``value`` is one of the strings; ``otherwise`` tells what else would have been right."""
    if not isinstance(value, str):
        raise TypeError(
            f"{name}: got {type(value).__name__}, expected one of {list_some(list(choices), 12)}{otherwise}"
        )
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {list_some(list(choices), 12)}{otherwise}")


def check_bool(name: str, value: object) -> None:
    """Raise unless it is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a bool")


def check_global_reduction(value: object) -> None:
    """Raise unless ``value`` is a known reduction over tasks or a callable."""
    if not callable(value):
        check_choice("global_reduction", value, get_args(TaskReduction), " or a callable")


def check_tasks(tasks: Sequence[str]) -> tuple[str, ...]:
    """The names of the tasks, after checks."""
    if isinstance(tasks, str) or not isinstance(tasks, Sequence):
        raise TypeError(f"tasks: got {type(tasks).__name__}, expected a sequence of names")
    for task in tasks:
        if not isinstance(task, str):
            raise TypeError(f"tasks: got a name of type {type(task).__name__}, expected str")
    if not tasks or "" in tasks or len(set(tasks)) < len(tasks):
        twice = [task for task, count in Counter(tasks).items() if count > 1]
        found = f"{list_some(list(tasks))}{f' with {list_some(twice)} more than once' if twice else ''}"
        raise ValueError(f"tasks: got {found}, expected one or more names, each once and not empty")
    # Of an Enum of strings the values: in a key it would be written "Task.LIKE".
    return tuple(str.__str__(task) for task in tasks)


def check_window(window: object, window_rows: object) -> None:
    """Raise unless each is a number or None, and one of them None."""
    for name, value, unit in (("window", window, "update"), ("window_rows", window_rows, "row")):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: got {type(value).__name__}, expected a number of {unit}s or None")
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected at least one {unit}")
    if window is not None and window_rows is not None:
        raise ValueError(f"window_rows: got {window_rows} beside window={window}, expected one of the two")


def check_segments(segments: object) -> dict[str, tuple[str, ...] | int] | None:
    """The names of each dimension's ids, or their number, after checks; None: no segments."""
    if segments is None:
        return None
    if not isinstance(segments, Mapping):
        expected = 'a mapping such as {"country": ["DE", "US"], "surface": 3}'
        raise TypeError(f"segments: got {type(segments).__name__}, expected {expected}")
    if not segments:
        raise ValueError("segments: got an empty mapping, expected one or more dimensions, or None")
    return {_check_dimension(name): _check_segment_names(f"segments[{name!r}]", segments[name]) for name in segments}


def _check_dimension(name: object) -> str:
    if not isinstance(name, str):
        raise TypeError(f"segments: got a dimension of type {type(name).__name__}, expected str")
    if not name:
        raise ValueError("segments: got a dimension without a name, expected one that is not empty")
    return str.__str__(name)


def _check_segment_names(argument: str, names: object) -> tuple[str, ...] | int:
    if isinstance(names, Integral) and not isinstance(names, bool):
        if names < 1:
            raise ValueError(f"{argument}: got {names}, expected at least one id")
        return int(names)
    if isinstance(names, (str, bytes, bytearray)) or not isinstance(names, Sequence):
        raise TypeError(f"{argument}: got {type(names).__name__}, expected names or a number of ids")
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"{argument}: got a name of type {type(name).__name__}, expected str")
    if not names or "" in names or len({*names, "other"}) <= len(names):
        twice = [name for name, count in Counter([*names, "other"]).items() if count > 1]
        found = f"{list_some(list(names))}{f' with {list_some(twice)} more than once' if twice else ''}"
        expected = 'one or more names, each once and not empty; ids without a name are "other"'
        raise ValueError(f"{argument}: got {found}, expected {expected}")
    return tuple(str.__str__(name) for name in names)


def per_task_numbers(name: str, values: PerTask | None, tasks: Sequence[str]) -> tuple[float, ...] | None:
    """One finite float a task, from a number for all, a sequence, a tensor or a mapping task -> number."""
    if values is None:
        return None
    if isinstance(values, Tensor):
        check_dense(name, values)
        if values.ndim > 1 or values.is_meta or values.dtype == torch.bool:
            raise ValueError(
                f"{name}: got {values.dtype} of shape {tuple(values.shape)} on {values.device}, "
                f"expected ({len(tasks)},) numbers"
            )
        values = values.tolist()
    if isinstance(values, Mapping):
        check_names(name, values, tasks, "got the tasks")
        values = [values[task] for task in tasks]
    is_list = isinstance(values, Sequence) and not isinstance(values, (str, bytes, bytearray))
    numbers: list[Any] = [*values] if is_list else [values] * len(tasks)  # type: ignore[misc]
    if len(numbers) != len(tasks):
        raise ValueError(
            f"{name}: got {len(numbers)} values, expected {len(tasks)}, one for each of {list_some(list(tasks))}"
        )
    return tuple(float(check_number(name, number)) for number in numbers)


def check_number(name: str, value: object) -> float:
    """A Python number that a float can hold, and that is finite."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a Tensor or a number")
    # NumPy compares in its own dtype, float32 with infinity, and warns.
    number: Any = value.item() if not isinstance(value, (int, float)) and hasattr(value, "item") else value
    # Compared, as of a symbolic number torch.compile knows no isfinite().
    largest = _LARGEST_INT if isinstance(number, int) else _LARGEST_FLOAT
    if not -largest <= number <= largest:
        raise ValueError(f"{name}: got {value}, expected a finite number")
    return number if isinstance(number, (int, float)) else float(number)


def check_ignore_index(ignore_index: object, tasks: Sequence[str] | None) -> IgnoreIndex:
    """The label that says "missing": None, or a number, NaN included; with tasks also a mapping task -> number.

    A mapping comes back as one number, or None, where that says the same.
    """
    if isinstance(ignore_index, Mapping):
        if tasks is None:
            raise TypeError(f"ignore_index: got {type(ignore_index).__name__} for one task, expected a number or None")
        check_some_of("ignore_index", ignore_index, tasks)
        return labels_of(
            {task: _check_label(ignore_index[task]) for task in tasks if ignore_index.get(task) is not None}, tasks
        )
    return None if ignore_index is None else _check_label(ignore_index)


def _check_label(label: object) -> float:
    if isinstance(label, bool) or not isinstance(label, Real):
        raise TypeError(f"ignore_index: got {type(label).__name__}, expected a number or None")
    if isinstance(label, float) and math.isnan(label):
        return label
    return check_number("ignore_index", label) if isinstance(label, int) else float(label)


def label_of(ignore_index: IgnoreIndex, task: str) -> float | None:
    """The label that says "missing" for a task."""
    return ignore_index.get(task) if isinstance(ignore_index, Mapping) else ignore_index


def labels_of(ignore_index: IgnoreIndex, tasks: Sequence[str]) -> IgnoreIndex:
    """The part of an ``ignore_index`` that is these tasks'; one number, or None, where they all have it."""
    if not isinstance(ignore_index, Mapping):
        return ignore_index
    of_name = {label_name(label): label for label in (label_of(ignore_index, task) for task in tasks)}
    if len(of_name) == 1:
        return next(iter(of_name.values()))
    return {task: ignore_index[task] for task in tasks if task in ignore_index}


def label_name(ignore_index: IgnoreIndex) -> str | dict[str, str]:
    """The same text for the same label, NaN and numbers of other types included."""
    if isinstance(ignore_index, Mapping):
        return {task: str(float(label)) for task, label in ignore_index.items()}
    return str(None if ignore_index is None else float(ignore_index))


def check_dense(name: str, values: object, *, verb: str = "got", tensor: str = "a Tensor", kind: str = "real") -> None:
    """Raise unless it is a tensor of the layout that all operators take, and of a "real" or "floating" dtype."""
    fault = None
    if not isinstance(values, Tensor):
        fault = type(values).__name__
    elif values.is_nested or values.layout != torch.strided:
        fault = f"a {'nested' if values.is_nested else str(values.layout).removeprefix('torch.')} tensor"
    elif type(values) is not Tensor and hasattr(values, "to_local"):
        raise TypeError(
            f"{name}: {verb} a {type(values).__name__}, expected {tensor} of this rank, such as its .to_local()"
        )
    elif values.is_complex() or (kind == "floating" and not values.is_floating_point()):
        fault = str(values.dtype)
    if fault is not None:
        raise TypeError(f"{name}: {verb} {fault}, expected {tensor}, dense and of a {kind} dtype")


def check_process_group(process_group: Any) -> dist.ProcessGroup | None:
    """The group: None, what ``torch.distributed.new_group`` gives, to members or to others, or that of a 1-D mesh."""
    if process_group is None:
        return None
    found, advice = type(process_group).__name__, ""
    if dist.is_available():
        outside: Any = dist.GroupMember.NON_GROUP_MEMBER
        if isinstance(process_group, dist.ProcessGroup) or process_group is outside:
            return process_group
        if isinstance(process_group, DeviceMesh):
            if process_group.ndim == 1:
                # Asked of a rank outside of the mesh, get_group() raises an IndexError that does not say so.
                return outside if process_group.get_coordinate() is None else process_group.get_group()
            dimensions: object = process_group.mesh_dim_names or tuple(process_group.shape)
            found = f"a DeviceMesh of {process_group.ndim} dimensions {dimensions}"
            advice = ": slice it (mesh['dp']) or flatten it (mesh['dp', 'cp']._flatten())"
    raise TypeError(f"process_group: got {found}, expected a ProcessGroup, a 1-D DeviceMesh or None{advice}")


def warn_unless_mean(global_batch: bool, **reductions: object) -> None:
    """Warn once of reductions whose gradient depends on the split over ranks; ``global_batch`` mends it.

    Of a callable only where there are several ranks: which names may be wrong under DistributedDataParallel is known
    anywhere, as from the-algorithm-ml, and one who trains on a single device has no use for ``global_batch``.
    """
    if global_batch:
        return
    named = {name: value for name, value in reductions.items() if value != "mean"}
    others = [f"{name}={value!r}" for name, value in named.items() if isinstance(value, str) or _has_several_ranks()]
    if others:
        warnings.warn(
            f"{', '.join(others)}: the gradient that DistributedDataParallel averages over ranks then differs from "
            "that of one process on the whole batch; Loss and MultiTaskLoss with global_batch=True make them equal",
            UserWarning,
            stacklevel=_callers_level(),
        )


def _has_several_ranks() -> bool:
    """Whether this process is, or is about to be, one of several ranks."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size() > 1
    launched = os.environ.get("WORLD_SIZE", "")  # by torchrun and its like, before a process group exists
    return launched.isdecimal() and int(launched) > 1


def warn_local_normalizer() -> None:
    """Warn that DDP's average makes the gradient of a loss that is divided by the total of all ranks too small."""
    warnings.warn(
        "normalizer: got one on several ranks with global_batch=False, where the gradient that DistributedDataParallel "
        "averages is that of one process over the number of ranks; global_batch=True makes them equal",
        UserWarning,
        stacklevel=_callers_level(),
    )


def _callers_level() -> int:
    """The stacklevel, for a warning of this file's, of the first frame outside of this package."""
    frame, level = sys._getframe(2), 2
    while frame.f_back is not None and f"{frame.f_globals.get('__package__')}.".startswith(f"{__package__}."):
        frame, level = frame.f_back, level + 1
    return level
