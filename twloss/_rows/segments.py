"""Segments: the ids of a batch's rows, aligned with it, and the sums of rows by the cells that the ids stand for.

A dimension, such as a country, has a cell for each of its ids and one for "other". Ids ``(rows,)`` or ``(rows, tasks)``
of each dimension come in; ``(dimensions, rows, 1 or tasks)`` go out, by which rows are summed to ``(cells, tasks)``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from twloss._arguments import check_dense, check_segments, list_some
from twloss._precision import SUM_DTYPES
from twloss._rows.batch import Batch, flatten_ids
from twloss._rows.mappings import TENSOR_OR_MAPPING, TaskTensors, by_task, check_task_names, columns_of, stack_columns
from twloss._torch import define_operator

SegmentIds = Mapping[str, TaskTensors]
"""The ids of each dimension: ``(rows,)``, ``(rows, 1)``, ``(rows, tasks)``, or task -> ``(rows,)``."""

_OTHER = "other"
_ROWS_A_PLACE = 16  # from so many on, a table of all pairs of cells costs less than it saves
_CHUNK = 8192
_LARGEST = 2**27  # numbers of a metric's state: 1 GiB


class Segments:
    """The dimensions by which rows are told apart, and their cells: dimension by dimension, "other" last in each.

    Args:
        dimensions: the names of the ids of each dimension, or their number; checked.
    """

    def __init__(self, dimensions: Mapping[str, tuple[str, ...] | int]) -> None:
        self.dimensions = dict(dimensions)
        self.sizes = tuple(ids if isinstance(ids, int) else len(ids) for ids in self.dimensions.values())
        self.cells = cells_of(self.sizes)

    @classmethod
    def of(cls, segments: object, tasks: tuple[str, ...] | None, numbers: int) -> Segments | None:
        """The segments that an argument asks for; None: none.

        Args:
            segments: the argument.
            tasks: of which the rows are; None: one without a name.
            numbers: how many numbers a metric's state has for each task and cell.

        Raises:
            TypeError: for an argument of a wrong type.
            ValueError: for one of a wrong value, that would make two equal keys, or too large a state.
        """
        dimensions = check_segments(segments)
        if dimensions is None:
            return None
        made, count = cls(dimensions), 1 if tasks is None else len(tasks)
        if (size := numbers * count * (1 + made.cells)) > _LARGEST:
            raise ValueError(
                f"segments: got {made.cells:,} cells for {count} tasks, a state of {size:,} numbers, expected at most "
                f"{_LARGEST:,}"
            )
        names = tasks or ()
        keys = Counter((*names, *made.names, *(f"{task}/{cell}" for task in names for cell in made.names)))
        if equal := [key for key, times in keys.items() if times > 1]:
            raise ValueError(
                f"segments: got {list_some(made.dimensions)} for the tasks {list_some(names)}, expected names "
                f"that make no two equal keys: {list_some(equal)}"
            )
        return made

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The cells' names, such as "country=DE", in order."""
        named = {name: range(ids) if isinstance(ids, int) else ids for name, ids in self.dimensions.items()}
        return tuple(f"{name}={each}" for name, ids in named.items() for each in (*ids, _OTHER))

    def columns(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Names of totals ``(tasks,)`` as those of ``(1 + cells, tasks)``: the totals, and then cell by cell."""
        return (*names, *(f"{name}/{cell}" for cell in self.names for name in names))

    def by_task(self, ids: SegmentIds, tasks: tuple[str, ...]) -> SegmentIds:
        """The ids of tasks that are computed apart: each dimension's as a mapping, or one tensor for all of them."""
        self._check_dimensions(ids)
        return {
            name: each
            if isinstance(each, Tensor) and (each.ndim == 1 or each.shape[1:] == (1,))
            else by_task(_argument(name), each, tasks)
            for name, each in ids.items()
        }

    def add_to(
        self,
        batch: Batch,
        ids: SegmentIds | None,
        labels: TaskTensors,
        tasks: tuple[str, ...] | None,
        *,
        has_rows: bool = True,
        has_other_tasks: bool = False,
    ) -> Batch:
        """A batch with the ids of its rows.

        Args:
            batch: aligned.
            ids: of each dimension.
            labels: as they came, which tell the number of each task's rows.
            tasks: the names of the columns; None: one task, and no mappings.
            has_rows: False where the batch is as it came, for a callable of one task; its ids are then, too.
            has_other_tasks: whether mappings may have other tasks as well.
        """
        self._check_dimensions(ids)
        assert ids is not None
        rows = {task: len(labels[task]) for task in tasks or ()} if isinstance(labels, Mapping) else None
        columns = []
        for name in self.dimensions:
            argument, each = _argument(name), ids[name]
            if tasks is not None and isinstance(each, Mapping):
                if not has_other_tasks:
                    check_task_names(argument, each, tasks)
                columns.append(_stack(argument, [each[task] for task in tasks], tasks, rows, batch.labels))
                continue
            each = _check_ids(argument, each, batch.labels, "a Tensor" if tasks is None else TENSOR_OR_MAPPING)
            columns.append(each if tasks is None else _by_row(argument, each, rows, batch.labels))
        segments = self._join(columns)
        if tasks is None and has_rows:
            assert isinstance(labels, Tensor)
            segments = flatten_ids(segments, labels.shape)
        return batch._replace(segments=segments)

    def _join(self, columns: Sequence[Tensor]) -> Tensor:
        """The ids of all dimensions, of shapes that broadcast, as one int64 tensor."""
        columns = [each.to(torch.int64) for each in columns]
        if any(each.shape != columns[0].shape for each in columns):
            try:
                columns = torch.broadcast_tensors(*columns)
            except RuntimeError:
                shapes = {name: tuple(each.shape) for name, each in zip(self.dimensions, columns)}
                raise ValueError(f"segments: got shapes {shapes}, expected those of the same rows") from None
        return torch.stack(list(columns)) if len(columns) > 1 else columns[0].unsqueeze(0)

    def _check_dimensions(self, ids: Any) -> None:
        expected = list_some(list(self.dimensions))
        if not isinstance(ids, Mapping):
            raise TypeError(f"segments: got {type(ids).__name__}, expected a mapping of {expected} to ids")
        if ids.keys() != self.dimensions.keys():
            raise ValueError(f"segments: got {list_some(list(ids))}, expected ids of {expected}")


def sum_by_cell(
    rows: Sequence[Tensor], segments: Segments | None, ids: SegmentIds | None, tasks: tuple[str, ...] | None
) -> Sequence[Tensor | float]:
    """The sums over rows ``(rows, tasks)``, each ``(tasks,)``, or with segments ``(1 + cells, tasks)``."""
    totals = [each.detach().sum(0, dtype=SUM_DTYPES.get(each.device.type, torch.float64)) for each in rows]
    if segments is None:
        refuse_ids(ids)
        return totals
    first = rows[0]
    _, _, _, _, aligned = segments.add_to(Batch(first, first, None, None), ids, first, tasks or ("loss",))
    assert aligned is not None
    return append_cells(totals, [each.detach() for each in rows], aligned, segments.sizes)


def refuse_ids(ids: object) -> None:
    """Raise for ids where nothing is told apart by them."""
    if ids is not None:
        raise ValueError("segments: got ids, expected None, as this was made with segments=None")


def cells_of(sizes: Sequence[int]) -> int:
    """The number of cells of dimensions of so many ids."""
    return sum(sizes) + len(sizes)


@torch.no_grad()
def append_cells(
    totals: Sequence[Tensor | float], rows: Sequence[Tensor | None], ids: Tensor, sizes: tuple[int, ...]
) -> list[Tensor | float]:
    """Sums of a batch with those of each cell below them, ``(1 + cells, tasks)``.

    Args:
        totals: ``(tasks,)`` each, after the first one also numbers that all tasks share.
        rows: what each is the sum of, ``(rows, tasks)``; several rows may be seen as one, and the last be filled up.
            None: 1 of each row. Neither has to be detached.
        ids: as for ``sum_cells``, and so the next.
        sizes: see there.
    """
    first = totals[0]
    assert isinstance(first, Tensor)
    distinct: list[Tensor] = []
    for each in rows:
        if each is not None and not any(each is other for other in distinct):
            distinct.append(each)
    add = _SUM_CELLS if torch.compiler.is_compiling() else sum_cells
    by_cell = add(distinct, first.numel(), ids, sizes, any(each is None for each in rows)).unbind(0)
    found: list[Tensor | float] = []
    for total, each in zip(totals, rows):
        place = -1 if each is None else next(i for i, other in enumerate(distinct) if other is each)
        # Not full(): the compiler would make a constant of a number.
        total = total if isinstance(total, Tensor) else torch.ones_like(first) * total  # noqa: PLW2901
        found.append(torch.cat((total.to(first).unsqueeze(0), by_cell[place])))
    return found


def sum_cells(rows: Sequence[Tensor], tasks: int, ids: Tensor, sizes: Sequence[int], counts: bool) -> Tensor:
    """The sums of some values over the rows of each cell, ``(sums, cells, tasks)``, in the widest dtype.

    It is an operator too, which compiled code calls: what the compiler makes of it takes several times as long.

    Args:
        rows: the values, ``(rows, tasks)`` each; several rows may be seen as one, and the last be filled up. Here they
            are seen as they are, as the compiler would compute them once more in another shape.
        tasks: the number of tasks.
        ids: ``(dimensions, rows, 1 or tasks)`` int64; those outside of 0…size-1 are of the cell "other".
        sizes: the number of ids of each dimension.
        counts: whether to count the rows too, last.
    """
    # Dimensions are told apart together, in a table of all pairs of cells, where this has fewer places than a pass.
    rows = [each.reshape(-1, tasks)[: ids.shape[1]] for each in rows]
    groups: list[list[int]] = []
    places = 0
    for dimension, size in enumerate(sizes):
        places *= size + 2
        if groups and _ROWS_A_PLACE * places <= ids.shape[1]:
            groups[-1].append(dimension)
        else:
            groups.append([dimension])
            places = size + 2
    found = []
    for group in groups:
        own = [sizes[each] for each in group]
        table = _sum_places(rows, tasks, ids[group[0] : group[-1] + 1], own, counts)
        for axis in range(1, len(group) + 1):
            others = [each for each in range(1, len(group) + 1) if each != axis]
            below, cells = (table.sum(others) if others else table).tensor_split((1,), 1)
            cells[:, -1:] += below
            found.append(cells)
    return torch.cat(found, 1)


def _sum_places(rows: Sequence[Tensor], tasks: int, ids: Tensor, sizes: Sequence[int], counts: bool) -> Tensor:
    """The sums ``(sums, size + 2 of each dimension, tasks)`` of the ids, those below 0 first, and those above last."""
    _, count, columns = ids.shape
    dtype = SUM_DTYPES.get(ids.device.type, torch.float64)
    shape = [size + 2 for size in sizes]
    sums = ids.new_zeros(len(rows), math.prod(shape) * tasks, dtype=dtype)
    counted, one = ids.new_zeros(math.prod(shape) * columns, dtype=dtype), ids.new_ones((), dtype=dtype)
    # So many rows as a cache holds; to an accelerator each call is dear.
    most = min(count, _CHUNK) if ids.is_cpu else count
    columns_of_task = torch.arange(tasks, device=ids.device)
    index, wide = ids.new_empty(most, tasks), ids.new_empty(most, tasks, dtype=dtype)
    for start in range(0, count, max(1, most)):
        part = ids[:, start : start + most]
        place = torch.zeros_like(part[0])
        for each, size in zip(part.unbind(0), sizes):
            place.mul_(size + 2).add_(each.clamp(-1, size)).add_(1)
        index, wide = index[: len(place)], wide[: len(place)]
        torch.add(columns_of_task, place, alpha=tasks, out=index)
        for sum_, values in zip(sums.unbind(0), rows):
            wide.copy_(values[start : start + most])
            sum_.scatter_add_(0, index.view(-1), wide.view(-1))
        if counts:
            at = (place if columns == 1 else index).view(-1)
            counted.scatter_add_(0, at, one.expand(at.shape))
    if counts:
        sums = torch.cat((sums, counted.view(1, -1, columns).expand(1, -1, tasks).reshape(1, -1)))
    return sums.view(-1, *shape, tasks)


def _fake_sum_cells(rows: Sequence[Tensor], tasks: int, ids: Tensor, sizes: Sequence[int], counts: bool) -> Tensor:
    dtype = SUM_DTYPES.get(ids.device.type, torch.float64)
    return ids.new_empty(len(rows) + counts, cells_of(sizes), tasks, dtype=dtype)


# Once: a reload finds it defined.
if "_LIBRARY" not in globals():
    _SCHEMA = "sum_cells(Tensor[] rows, SymInt tasks, Tensor ids, int[] sizes, bool counts) -> Tensor"
    _LIBRARY, _SUM_CELLS = define_operator(_SCHEMA, sum_cells, _fake_sum_cells)


def _argument(name: str) -> str:
    return f"segments[{name!r}]"


def _check_ids(argument: str, ids: Any, labels: Tensor, tensor: str) -> Tensor:
    check_dense(argument, ids, tensor=tensor)
    if ids.dtype == torch.bool or ids.is_floating_point():
        raise TypeError(f"{argument}: got {ids.dtype}, expected integers; a text has to be looked up first")
    if ids.device != labels.device:
        raise ValueError(f"{argument}: got a tensor on {ids.device}, expected {labels.device}, where the labels are")
    return ids  # type: ignore[no-any-return]


def _by_row(argument: str, ids: Tensor, rows: Mapping[str, int] | None, labels: Tensor) -> Tensor:
    """The ids ``(rows, 1)`` or ``(rows, tasks)``."""
    count, tasks = labels.shape[:2]
    if rows is not None and any(each != count for each in rows.values()):
        raise TypeError(f"{argument}: got a Tensor for tasks of {dict(rows)} rows, expected a mapping task -> Tensor")
    if ids.shape == (count,):
        return ids.unsqueeze(1)
    if ids.shape not in ((count, 1), (count, tasks)):
        raise ValueError(
            f"{argument}: got shape {tuple(ids.shape)}, expected ({count},), ({count}, 1) or ({count}, {tasks})"
        )
    return ids


def _stack(
    argument: str, ids: list[Tensor], tasks: tuple[str, ...], rows: Mapping[str, int] | None, labels: Tensor
) -> Tensor:
    """The ids ``(rows, tasks)`` of each task's own, padded as the labels are."""
    columns = columns_of(argument, ids, tasks, False)
    for task, column in zip(tasks, columns):
        own = f"{argument}[{task!r}]"
        _check_ids(own, column, labels, "a Tensor")
        expected = labels.shape[0] if rows is None else rows[task]
        if len(column) != expected:
            raise ValueError(f"{own}: got {len(column)} rows, expected {expected}")
    return stack_columns(argument, columns)
