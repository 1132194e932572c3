"""Tasks by their loss: those that share one are computed in one call, whatever their number.

A loss's options come in and become groups of tasks. A batch's inputs go out by group, and the groups' sums ``(tasks,)``
come back as those of all tasks, in the tasks' order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from twloss._arguments import IgnoreIndex, MeanOver, labels_of
from twloss._constants import TaskConstants
from twloss._precision import sum_dtype
from twloss._rows.batch import align, align_labels
from twloss._rows.cell_sums import cells_of
from twloss._rows.mappings import TaskTensors, by_task
from twloss._rows.row_loss import LossFunction, LossType, identity_of, row_loss_of
from twloss._rows.row_pass import Plan, divisors_of, sum_batch, sum_rows
from twloss._rows.segments import SegmentIds, Segments, refuse_ids
from twloss._sums.running_sums import pack_update
from twloss._sums.sums import BatchSums

Inputs = tuple[TaskTensors, TaskTensors, TaskTensors | None]
"""Logits, labels and weights."""


class TaskGroup:
    """The tasks that share a loss.

    Args:
        loss_type: of all of them.
        tasks: their names; None: the one task of a ``Loss``, which has no name.
        pos_weights: the factors of their positive terms; None: 1.
        ignore_index: of these tasks, or of more.
        places: the places of these tasks among those of the loss; None: the loss has no others.
        segments: of the loss.
        has_other_tasks: whether inputs may have the rows of other tasks as well.
    """

    def __init__(
        self,
        loss_type: LossType | LossFunction,
        tasks: tuple[str, ...] | None,
        pos_weights: tuple[float, ...] | None,
        ignore_index: IgnoreIndex,
        *,
        places: tuple[int, ...] | None = None,
        segments: Segments | None = None,
        has_other_tasks: bool = False,
    ) -> None:
        self.places = TaskConstants(places, dtype=torch.int64)
        self.has_other_tasks = has_other_tasks
        self.loss_type = loss_type
        self.row_loss = row_loss_of(loss_type)
        self.tasks = tasks
        self.columns = 1 if tasks is None else len(tasks)
        self.has_rows = tasks is not None or self.row_loss.has_classes is not None
        self.pos_weights = TaskConstants(pos_weights)
        self.segments = segments
        self.logit_shift: TaskConstants | None = None  # that of the quality of these tasks, where there is one
        self.ignore_index = ignore_index if tasks is None else labels_of(ignore_index, tasks)
        self.row_loss.check_ignore_index(self.ignore_index)

    @property
    def constants(self) -> tuple[TaskConstants, ...]:
        """The numbers of its tasks, as tensors of a device."""
        return self.pos_weights, self.places

    def sums(
        self, inputs: Inputs, plan: Plan, task_weights: TaskConstants, segments: SegmentIds | None = None
    ) -> BatchSums:
        """The sums of a batch of these tasks."""
        has_others = self.has_other_tasks
        batch = align(*inputs, self.tasks, self.row_loss, self.ignore_index, has_other_tasks=has_others)
        if self.segments is not None:
            batch = self.segments.add_to(
                batch, segments, inputs[1], self.tasks, has_rows=self.has_rows, has_other_tasks=has_others
            )
        elif segments is not None:
            refuse_ids(segments)
        return sum_batch(
            plan,
            self.row_loss,
            batch,
            self.columns,
            self.pos_weights,
            task_weights,
            self.places,
            has_rows=self.has_rows,
            logit_shift=self.logit_shift,
        )

    def count(self, labels: TaskTensors, weights: TaskTensors | None, mean_over: MeanOver) -> Tensor:
        """The divisor of a mean over the rows of these labels ``(tasks,)``, without a gradient."""
        labels, weights, valid = align_labels(
            labels, weights, self.tasks, self.row_loss, self.ignore_index, has_other_tasks=self.has_other_tasks
        )
        plan = Plan(None, mean_over, "mean", tracks=False)
        divisors = divisors_of(plan, weights, valid)
        if divisors is not None:
            return sum_rows(divisors, self.columns)
        return torch.full((self.columns,), labels.shape[0], dtype=sum_dtype(labels.device), device=labels.device)


def group_tasks(
    loss_type: LossType | LossFunction | dict[str, LossType | LossFunction],
    tasks: tuple[str, ...] | None,
    pos_weights: tuple[float, ...] | None,
    ignore_index: IgnoreIndex,
    segments: Segments | None,
) -> tuple[TaskGroup, ...]:
    """The groups of the tasks that have rows, in the order of their first tasks."""
    if not isinstance(loss_type, dict):
        is_given = row_loss_of(loss_type).is_given
        return () if is_given else (TaskGroup(loss_type, tasks, pos_weights, ignore_index, segments=segments),)
    members: dict[object, list[str]] = {}
    for task, each in loss_type.items():
        if not row_loss_of(each).is_given:
            members.setdefault(identity_of(each), []).append(task)
    numbers = dict(zip(loss_type, pos_weights or ()))
    place = {task: index for index, task in enumerate(loss_type)}
    groups = []
    for names in members.values():
        each = loss_type[names[0]]
        # Numbers are there for the binary losses alone; the others' is 1.
        own = tuple(numbers[task] for task in names) if numbers and row_loss_of(each).is_binary else None
        places = tuple(place[task] for task in names) if len(names) < len(place) else None
        has_others = len(members) > 1
        options: dict[str, Any] = {"places": places, "segments": segments, "has_other_tasks": has_others}
        groups.append(TaskGroup(each, tuple(names), own, ignore_index, **options))
    return tuple(groups)


def order_of_groups(
    groups: Sequence[TaskGroup], given: tuple[str, ...], tasks: tuple[str, ...] | None
) -> TaskConstants:
    """The place of each task in the groups, one after the other, and then in ``given``; None: that is their order."""
    grouped = [*(task for group in groups for task in group.tasks or ()), *given]
    place = {task: index for index, task in enumerate(grouped)}
    order = None if grouped == list(tasks or ()) else tuple(place[task] for task in tasks or ())
    return TaskConstants(order, dtype=torch.int64)


def inputs_by_task(tasks: tuple[str, ...], inputs: Inputs) -> Inputs:
    """Logits, labels and weights as mappings, of which each group takes its own tasks."""
    logits, labels, weights = inputs
    return (
        by_task("logits", logits, tasks),
        by_task("labels", labels, tasks),
        None if weights is None else by_task("weights", weights, tasks),
    )


def join(sums: Sequence[BatchSums], order: TaskConstants, plan: Plan) -> BatchSums:
    """The sums of several groups of tasks, neither reduced nor packed, as those of all, packed."""
    loss_sums, tracked, quality = [], [], None
    weight, is_shared = sums[0].weight, True
    for each in sums:
        loss_sums.append(each.losses)
        is_shared = is_shared and not isinstance(each.weight, Tensor) and each.weight == weight
        if each.tracked is not None:
            tracked.append(each.tracked)
        quality = each.quality if quality is None else quality
        if each.losses.device != loss_sums[0].device:
            raise _different_devices("logits", [each.losses for each in sums])
    if not is_shared:
        dtype = sum_dtype(loss_sums[0].device)
        weight = _restore_order([torch.zeros_like(each.losses, dtype=dtype) + each.weight for each in sums], order)
    packed = None
    if len(tracked) == len(sums):
        of_all: Sequence[Tensor | float]
        if plan.segments:
            of_all = _restore_order([_with_cells(each, cells_of(plan.segments)) for each in sums], order).unbind(0)
        else:
            of_all = _restore_order(tracked, order), weight
        faults = _join_faults(sums, order) if plan.validates else None
        packed = pack_update(of_all, drops_non_finite=plan.drops_non_finite, faults=faults)
    return BatchSums(_restore_order(loss_sums, order), None, weight, packed, quality, None)


def count_rows(  # noqa: PLR0917 (a loss, and a batch without logits)
    groups: Sequence[TaskGroup],
    tasks: tuple[str, ...],
    given: int,
    order: TaskConstants,
    mean_over: MeanOver,
    labels: TaskTensors,
    weights: TaskTensors | None,
) -> Tensor:
    """The divisors of means over the rows of these labels, in the tasks' order.

    Args:
        groups: of the tasks that have rows.
        tasks: these.
        given: the number of tasks that have none, of which a loss counts as one row.
        order: as ``order_of_groups`` returns it.
        mean_over: the divisor.
        labels: as for forward, and so the weights.
        weights: None: 1.
    """
    if not groups:
        raise ValueError("loss_type: got GIVEN alone, whose tasks have no rows to count, expected no call of count()")
    if len(groups) > 1:
        labels = by_task("labels", labels, tasks)
        weights = None if weights is None else by_task("weights", weights, tasks)
    counts = [group.count(labels, weights, mean_over) for group in groups]
    if any(each.device != counts[0].device for each in counts):
        raise _different_devices("labels", counts)
    return _restore_order([*counts, counts[0].new_ones(given)], order) if given or len(groups) > 1 else counts[0]


def _different_devices(name: str, parts: Sequence[Tensor]) -> ValueError:
    devices = [str(part.device) for part in parts]
    return ValueError(f"{name}: got {devices}, expected the same device for every task")


def _join_faults(sums: Sequence[BatchSums], order: TaskConstants) -> Tensor:
    """``(2, tasks)`` of each group as one, in the tasks' order."""
    faults = [each.faults for each in sums if each.faults is not None]
    return torch.stack([_restore_order(each, order) for each in zip(*faults)])


def _with_cells(sums: BatchSums, cells: int) -> Tensor:
    """What is tracked of a group, ``(2, 1 + cells, tasks)``; sums made elsewhere are in no cell."""
    assert sums.tracked is not None
    if sums.tracked.ndim > 1:
        return sums.tracked
    totals = torch.stack((sums.tracked, torch.ones_like(sums.tracked) * sums.weight))
    return F.pad(totals.unsqueeze(1), (0, 0, 0, cells))


def _restore_order(parts: Sequence[Tensor], order: TaskConstants) -> Tensor:
    """``(…, tasks)`` of each group as one, in the tasks' order."""
    joined = torch.cat(list(parts), -1)
    index = order.like(joined)
    return joined if index is None else joined.index_select(-1, index)
