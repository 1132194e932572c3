"""Segments: the ids of a batch's rows, aligned with it, and the sums of rows by the cells that the ids stand for.

A dimension, such as a country, has a cell for each of its ids and one for "other". Ids ``(rows,)`` or ``(rows, tasks)``
of each dimension come in; ``(dimensions, rows, 1 or tasks)`` go out, by which rows are summed to ``(cells, tasks)``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from twloss._arguments import check_dense, check_segments, list_some
from twloss._rows.batch import Batch, flatten_ids
from twloss._rows.cell_sums import append_cells, cells_of
from twloss._rows.mappings import TENSOR_OR_MAPPING, TaskTensors, by_task, check_task_names, columns_of, stack_columns
from twloss._rows.row_pass import sum_rows

SegmentIds = Mapping[str, TaskTensors]
"""The ids of each dimension: ``(rows,)``, ``(rows, 1)``, ``(rows, tasks)``, or task -> ``(rows,)``."""

_OTHER = "other"
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

    def describe(self) -> dict[str, Any]:
        """The dimensions, in their order, and what each has, in JSON's types."""
        return {"segments": list(self.dimensions), **{_argument(name): ids for name, ids in self.dimensions.items()}}

    def columns(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Names of totals ``(tasks,)`` as those of ``(1 + cells, tasks)``: the totals, and then cell by cell."""
        return (*names, *(f"{name}/{cell}" for cell in self.names for name in names))

    def by_task(self, ids: SegmentIds | None, tasks: tuple[str, ...]) -> SegmentIds:
        """The ids of tasks that are computed apart: each dimension's as a mapping, or one tensor for all of them."""
        ids = self._check_dimensions(ids)
        return {
            name: each
            if isinstance(each, Tensor) and (each.ndim != 2 or each.shape[1] == 1)
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
        ids = self._check_dimensions(ids)
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

    def _check_dimensions(self, ids: Any) -> SegmentIds:
        if isinstance(ids, Mapping) and ids.keys() == self.dimensions.keys():
            return ids
        expected = list_some(list(self.dimensions))
        if not isinstance(ids, Mapping):
            raise TypeError(f"segments: got {type(ids).__name__}, expected a mapping of {expected} to ids")
        raise ValueError(f"segments: got {list_some(list(ids))}, expected ids of {expected}")


def sum_by_cell(
    rows: Sequence[Tensor], segments: Segments | None, ids: SegmentIds | None, tasks: tuple[str, ...] | None
) -> Sequence[Tensor | float]:
    """The sums over rows ``(rows, tasks)``, each ``(tasks,)``, or with segments ``(1 + cells, tasks)``.

    Raises:
        ValueError: for rows of another shape, or ids that do not fit them.
    """
    shape = len(rows[0]) if rows[0].ndim else "rows", len(tasks or ("loss",))
    for each in rows:
        if each.shape != shape:
            expected = f"({shape[0]}, {shape[1]})"
            raise ValueError(f"_sum_rows: got shape {tuple(each.shape)}, expected {expected}, (rows, tasks)")
    totals = [sum_rows(each.detach(), len(tasks or ("loss",))) for each in rows]
    if segments is None:
        refuse_ids(ids)
        return totals
    first = rows[0]
    _, _, _, _, aligned = segments.add_to(Batch(first, first, None, None), ids, first, tasks or ("loss",))
    assert aligned is not None
    return append_cells(totals, rows, aligned, segments.sizes)


def refuse_ids(ids: object) -> None:
    """Raise for ids where nothing is told apart by them."""
    if ids is not None:
        raise ValueError("segments: got ids, expected None, as this was made with segments=None")


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
