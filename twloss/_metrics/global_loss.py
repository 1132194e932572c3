"""The running loss of every row seen: a ``TaskMetric`` of (loss_sum, weight), which divides at compute().

``(tasks,)`` sums come in at each step; the losses of all steps and ranks go out, by the ``Reduction`` that the forward
pass applies to one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from twloss._arguments import (
    NanStrategy,
    PerTask,
    RowReduction,
    SegmentNames,
    check_choice,
    check_global_reduction,
    per_task_numbers,
)
from twloss._constants import TaskConstants
from twloss._metrics.checkpoint import ANY
from twloss._metrics.task_metric import TaskMetric
from twloss._sums.made_elsewhere import check_sums, count_negative
from twloss._sums.reduction import GlobalReduction, Reduction
from twloss._sums.sums import TaskSums


class GlobalLoss(TaskMetric):
    """The loss of all rows of all steps and ranks since reset(), as one process would get it from one batch.

    With S_t = Σ w·l and N_t the weight of task t, summed over every update of every rank, a task's loss is S_t / N_t
    ("mean") or S_t ("sum"), and the global loss is the reduction of the tasks' losses over the tasks with data. So
    compute() does not depend on how the rows were split over steps and ranks.

    compute() gives ``{"loss/<task>": …, "loss": …}``, 0-dim detached float64, NaN where there was no data.
    ``MultiTaskLoss`` and ``Loss`` feed two of these; any other training code may feed its own.

    Args:
        tasks: the tasks' names, or None for the one-task form, whose only key is "loss".
        task_loss_reduction: "mean" or "sum".
        global_reduction: as for ``MultiTaskLoss``. A module is used but not registered here: the loss that trains it
            owns it.
        task_weights: a factor for each task's loss inside the reduction over tasks.
        segments: as for ``MultiTaskLoss``. update() then takes sums ``(1 + cells, tasks)``: first those of all rows,
            and then those of each cell, dimension by dimension, "other" last in each.
        validate_args: count the updates of negative weight; compute() warns with the counts by task. The metrics of a
            loss count rows, those with an invalid label too.
        nan_strategy: what becomes of a task's sums in an update in which they are not finite. "warn" leaves them out,
            counts them and says so at compute(); "ignore" leaves them out silently; "error" raises at compute();
            "disable" lets them in.
        kwargs: ``Metric``'s own, such as ``process_group``, which may be a 1-D ``DeviceMesh``; ``compute_with_cache``
            can't be True.

    Raises:
        TypeError: for an argument of a wrong type.
        ValueError: for an argument of a wrong value.

    Examples:
        >>> import torch
        >>> from twloss import GlobalLoss
        >>> metric = GlobalLoss(["like", "reply"])
        >>> metric.update(loss_sum=torch.tensor([30.0, 10.0]), weight=torch.tensor([100, 100]))
        >>> metric.update(loss_sum=torch.tensor([3.0, 0.0]), weight=torch.tensor([10, 0]))
        >>> metric.compute()["loss/like"]
        tensor(0.3000, dtype=torch.float64)
    """

    higher_is_better = False

    def __init__(
        self,
        tasks: Sequence[str] | None,
        task_loss_reduction: RowReduction = "mean",
        global_reduction: GlobalReduction = "mean",
        *,
        task_weights: PerTask | None = None,
        segments: SegmentNames | None = None,
        validate_args: bool = False,
        nan_strategy: NanStrategy = "warn",
        **kwargs: Any,
    ) -> None:
        check_choice("task_loss_reduction", task_loss_reduction, get_args(RowReduction))
        check_global_reduction(global_reduction)
        # A sum keeps the absolute weights, and a mean those that cancel. The rest of the rule a loss alone knows.
        rule = {"task_loss_reduction": task_loss_reduction}
        settings = {"global_reduction": getattr(global_reduction, "__qualname__", str(global_reduction))}
        checks: dict[str, Any] = {"validate_args": validate_args, "nan_strategy": nan_strategy}
        super().__init__(tasks, 2, segments=segments, **checks, rule=rule, settings=settings, options=kwargs)
        self._become_of({ANY: "unknown"})
        # Within it a module is no submodule: the loss that trains it registers it.
        self._reduction = Reduction.of(self.tasks, task_loss_reduction, global_reduction)
        self._task_weights = TaskConstants(per_task_numbers("task_weights", task_weights, self.tasks or ("loss",)))

    def _become_part_of(self, task_weights: TaskConstants, rule: dict[str, Any]) -> None:
        """Take a loss's task_weights, as they are at any time, and the rule by which it makes the sums."""
        self._task_weights = task_weights
        self._become_of(rule)

    def _become_of(self, rule: dict[str, Any]) -> None:
        """Say by which rule the sums are made."""
        known = {name: value for name, value in self._description.items() if name != ANY}
        self._description = {**known, **rule}
        self._describe_state()

    if TYPE_CHECKING:

        def __call__(self, loss_sum: Tensor, weight: Tensor | float) -> dict[str, Tensor]:
            """Run ``forward``; nn.Module's own ``__call__`` has no types."""

    def update(self, loss_sum: Tensor, weight: Tensor | float) -> None:
        """Add one batch's sums; nothing waits for the device, and nothing is added where an error is raised.

        Args:
            loss_sum: ``(tasks,)``, or 0-dim in the one-task form: Σ w·l over the batch's rows. With segments
                ``(1 + cells, tasks)``, or ``(1 + cells,)``.
            weight: ``(tasks,)`` or a number that all tasks share: what the mean divides by. With segments the shape of
                the loss_sum.

        Raises:
            TypeError: for an argument of a wrong type or dtype.
            ValueError: for a wrong shape, a device other than the loss_sum's, or a number that is not finite.
            TorchMetricsUserError: between sync() and unsync(), where the update would be lost.
        """
        self._add(self._sum_batch(loss_sum, weight))

    def _sum_batch(self, loss_sum: Tensor, weight: Tensor | float) -> Sequence[Any]:
        cells = 0 if self._segments is None else self._segments.cells
        loss_sum, weight = check_sums(loss_sum, weight, self.tasks, cells)
        faults = (count_negative(loss_sum, weight),) if self.validate_args else ()
        if self._reduction.over_rows == "sum":
            # It only tells whether there is data, and weights that cancel are.
            weight = weight.abs() if isinstance(weight, Tensor) else abs(weight)
        return loss_sum, weight, *faults

    def _keys(self) -> dict[str, bool | None]:
        return dict.fromkeys(self._columns(self._reduction.keys), False)

    def _results_of_now(self, *, is_async: bool) -> Callable[[Tensor], Sequence[Tensor]]:
        reduction = self._reduction.of_now(is_async=is_async)
        numbers = self._task_weights.numbers
        tasks, has_cells = len(self.tasks or ("loss",)), self._segments is not None

        def results(sums: Tensor) -> Sequence[Tensor]:
            weights = None if numbers is None else sums.new_tensor(numbers)
            if has_cells:
                sums = sums.unflatten(1, (-1, tasks))
            losses, loss = reduction.values(TaskSums(*sums), weights, sums.dtype, is_final=True)
            loss = loss.unsqueeze(-1)
            return (loss if len(reduction.keys) == 1 else torch.cat((losses, loss), -1)).flatten().unbind()

        return results
