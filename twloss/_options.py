"""The settings of a loss: checked once, when it is made, and never changed.

The arguments of ``Loss`` and ``MultiTaskLoss`` come in; ``LossOptions`` go out, from which all settings are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, get_args

from torch import Tensor

from twloss._arguments import (
    GradientReduction,
    IgnoreIndex,
    LossName,
    MeanOver,
    RowReduction,
    check_bool,
    check_choice,
    check_global_reduction,
    check_ignore_index,
    check_names,
    check_process_group,
    check_segments,
    check_some_of,
    check_tasks,
    label_name,
    list_some,
    per_task_numbers,
)
from twloss._rows.row_loss import LossFunction, LossType, RowLoss, resolve_loss_type, row_loss_of
from twloss._rows.row_pass import Plan
from twloss._rows.segments import Segments
from twloss._sums.ranks import group_from_state, group_to_state
from twloss._sums.reduction import GlobalReduction, Reduction

# The enum last: jsonargparse would have it write a function into a configuration, which it can't.
TaskLossType = LossName | LossFunction | LossType

_NAMES_OF_ONE = {"task_loss_reduction": "reduction", "pos_weights": "pos_weight"}


@dataclass(frozen=True)
class LossOptions:
    """The settings of a loss, by the names of ``MultiTaskLoss``, checked and each in one form.

    Raises:
        TypeError: for a setting of a wrong type.
        ValueError: for a setting of a wrong value.
    """

    loss_type: Any
    """A ``LossType`` or a callable, or a dict task -> one of these."""
    tasks: Any
    """The names of the tasks, a tuple; None: the one task of a ``Loss``."""
    task_loss_reduction: RowReduction
    global_reduction: GlobalReduction
    pos_weights: Any
    """One number a task, a tuple; None: 1."""
    mean_over: MeanOver
    ignore_index: IgnoreIndex
    global_batch: bool
    gradient_reduction: GradientReduction
    process_group: Any
    """A ``ProcessGroup``, of a ``DeviceMesh`` its own; None: all ranks."""
    quality: bool
    segments: Any
    """The names of each dimension's ids, or their number; None: no segments."""
    validate_args: bool
    fused: bool

    def __post_init__(self) -> None:
        if self.tasks is not None:
            self._set("tasks", check_tasks(self.tasks))
        check_choice(self._public("task_loss_reduction"), self.task_loss_reduction, get_args(RowReduction))
        check_global_reduction(self.global_reduction)
        self._set("loss_type", _resolve_loss_types(self.loss_type, self.tasks))
        self._set("pos_weights", self._resolve_pos_weights())
        self._set("process_group", check_process_group(self.process_group))
        check_choice("mean_over", self.mean_over, get_args(MeanOver))
        check_bool("global_batch", self.global_batch)
        check_bool("validate_args", self.validate_args)
        check_bool("fused", self.fused)
        check_choice("gradient_reduction", self.gradient_reduction, get_args(GradientReduction))
        if isinstance(self.ignore_index, Mapping) and self.given_tasks:
            with_labels = [task for task in self.columns if task not in self.given_tasks]
            check_some_of("ignore_index", self.ignore_index, with_labels, "tasks that have labels")
        self._set("ignore_index", check_ignore_index(self.ignore_index, self.tasks))
        self._set("segments", check_segments(self.segments))
        if self.segments is not None and all(row_loss.is_given for _, row_loss in self._row_losses()):
            found = list_some(self.segments)
            raise ValueError(f"segments: got {found} with GIVEN alone, which has no rows, expected None")
        for setting in ("fused", "quality"):
            if getattr(self, setting) and not self._binary_tasks():
                raise self._not_binary(setting, True)

    @property
    def settings(self) -> dict[str, Any]:
        """All settings, by their public names; ``Loss`` names two differently."""
        return {self._public(name): value for name, value in vars(self).items()}

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns of sums."""
        return self.tasks or ("loss",)

    @property
    def given_tasks(self) -> tuple[str, ...]:
        """The tasks of type GIVEN, which have no rows."""
        return tuple(task for task, row_loss in self._row_losses() if row_loss.is_given)

    @property
    def reduction(self) -> Reduction:
        """How sums become losses."""
        return Reduction.of(self.tasks, self.task_loss_reduction, self.global_reduction)

    def describe(self) -> dict[str, Any]:
        """The settings that define the sums, in JSON types. Checkpoints compare them."""
        types = self.loss_type
        return {
            "loss_type": [row_loss_of(each).name for each in types.values()]
            if isinstance(types, dict)
            else row_loss_of(types).name,
            "mean_over": self.mean_over,
            "pos_weights": None if self.pos_weights is None else list(self.pos_weights),
            "ignore_index": label_name(self.ignore_index),
        }

    def plans(self, groups: int, *, counts_rows: bool) -> list[list[Plan]]:
        """The plans of a pass, indexed by whether the loss metric and the quality metric drop non-finite sums.

        Args:
            groups: the number of groups of tasks, each with a pass of its own or with sums made elsewhere.
            counts_rows: whether the sums of the quality have the number of rows beside them.
        """
        reduction = self.reduction
        # Factors alone lead from these sums to the losses: no other tasks, ranks or order of tasks.
        reduces = groups == 1 and reduction.adds_up and not self.global_batch
        plan = Plan(
            reduction.without_keys() if reduces else None,
            self.mean_over,
            self.task_loss_reduction,
            tracks=groups == 1,
            quality=self.quality,
            quality_counts_rows=counts_rows,
            validates=self.validate_args,
            fused=self.fused,
            segments=() if self.segments is None else Segments(self.segments).sizes,
        )
        return [
            [plan._replace(drops_non_finite=own, quality_drops_non_finite=of_quality) for of_quality in (False, True)]
            for own in (False, True)
        ]

    def _binary_tasks(self) -> list[str]:
        """The tasks whose logits predict the probability of a positive label."""
        return [task for task, row_loss in self._row_losses() if row_loss.is_binary]

    def _row_losses(self) -> list[tuple[str, RowLoss]]:
        """The loss of each task."""
        types = self.loss_type
        if not isinstance(types, dict):
            return [(task, row_loss) for row_loss in [row_loss_of(types)] for task in self.columns]
        return [(task, row_loss_of(types[task])) for task in self.columns]

    def _not_binary(self, setting: str, value: object) -> ValueError:
        types = list_some(self.loss_type) if isinstance(self.loss_type, dict) else self.loss_type
        return ValueError(f"{setting}: got {value} with {types}, expected it with BCE_WITH_LOGITS only")

    def _resolve_pos_weights(self) -> tuple[float, ...] | None:
        """One number a task, which only those with BCE_WITH_LOGITS can have; the others' is 1."""
        given = self.pos_weights
        if given is None:
            return None
        name, tasks, binary = self._public("pos_weights"), self.columns, self._binary_tasks()
        if isinstance(self.loss_type, dict) and isinstance(given, Mapping):
            check_some_of(name, given, binary, "tasks with BCE_WITH_LOGITS")
            given = {**dict.fromkeys(tasks, 1.0), **given}
        numbers = per_task_numbers(name, given, tasks)
        assert numbers is not None
        if not binary:
            raise self._not_binary(name, "one")
        of_task = dict(zip(tasks, numbers))
        resolved = {**dict.fromkeys(tasks, 1.0), **{task: of_task[task] for task in binary}}
        is_one = isinstance(given, Real) or (isinstance(given, Tensor) and given.ndim == 0)
        if not is_one and (unweighted := [task for task in tasks if of_task[task] != resolved[task]]):
            raise ValueError(
                f"{name}: got numbers for {list_some(unweighted)}, expected them for tasks with BCE_WITH_LOGITS only: "
                f"{list_some(binary)}"
            )
        if min(resolved.values()) < 0:
            raise ValueError(f"{name}: got {list_some(numbers)}, expected numbers >= 0")
        return tuple(resolved.values())

    def _public(self, name: str) -> str:
        return _NAMES_OF_ONE.get(name, name) if self.tasks is None else name

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def __getstate__(self) -> dict[str, Any]:
        return group_to_state(vars(self))

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(group_from_state(state))


def _resolve_loss_types(loss_type: Any, tasks: Sequence[str] | None) -> Any:
    """The type of all tasks, or that of each by its name."""
    if tasks is None or not isinstance(loss_type, Mapping):
        return resolve_loss_type(loss_type)
    check_names("loss_type", loss_type, tasks, "got the tasks")
    return {task: resolve_loss_type(loss_type[task], f"loss_type[{task!r}]") for task in tasks}
