"""The running sums of every row seen: a torchmetrics ``Metric`` that adds ``TaskSums`` and divides at compute().

``(tasks,)`` sums come in at each step; the losses of all steps and ranks go out, by the two reductions of
``task_sums.py``, which the forward pass applies to one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from twloss.arguments import (
    TASK_REDUCTIONS,
    PerTask,
    check_choice,
    check_dense,
    check_global_reduction,
    check_number,
    per_task_numbers,
)
from twloss.per_task_metric import PerTaskMetric
from twloss.plots import plot_per_task
from twloss.task_sums import GlobalReduction, TaskSums, has_data, reduce_rows, reduce_tasks
from twloss.wide_sum import sum_dtype

__all__ = ["GlobalLoss"]


class GlobalLoss(PerTaskMetric):
    """The loss of all rows of all steps and ranks since reset(), as one process would get it from one batch.

    With S_t = Σ w·l and N_t the weight of task t, summed over every update of every rank, a task's loss is S_t / N_t
    ("mean") or S_t ("sum"), and the global loss is the reduction of the tasks' losses over the tasks with data. So
    compute() does not depend on how the rows were split over steps and ranks.

    ``MultiTaskLoss`` and ``Loss`` feed one of these for training and one for evaluation; any other training code may
    feed its own.

    compute() gives ``{"loss/<task>": …, "loss": …}``, 0-dim detached float64, NaN where there was no data.

    Args:
        tasks: the tasks' names, or None for the one-task form, whose only key is "loss".
        task_loss_reduction: "mean" or "sum".
        global_reduction: "mean", "sum", "min", "max", "median" or a callable from ``(tasks,)`` losses (0 for a task
            without data) to a 0-dim tensor. A module is used but not registered here: the loss that trains it owns it.
        task_weights: a factor for each task's loss inside the reduction over tasks.
        nan_strategy: what becomes of a task's sums in an update in which they are not finite. "warn" leaves them out,
            counts them and says so at compute(); "ignore" leaves them out silently; "error" raises at compute();
            "disable" lets them in.
        kwargs: ``Metric``'s own, such as ``process_group``. compute() is not cached (``compute_with_cache=False``): a
            rank with a cached value would leave the others waiting in the collective.

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

    is_differentiable = False
    higher_is_better = False
    plot_lower_bound = 0.0

    global_reduction: GlobalReduction

    def __init__(
        self,
        tasks: Sequence[str] | None,
        task_loss_reduction: str = "mean",
        global_reduction: GlobalReduction = "mean",
        *,
        task_weights: PerTask | None = None,
        nan_strategy: str = "warn",
        **kwargs: Any,
    ) -> None:
        check_choice("task_loss_reduction", task_loss_reduction, TASK_REDUCTIONS)
        check_global_reduction(global_reduction)
        super().__init__(tasks, 2, nan_strategy=nan_strategy, **kwargs)
        self.task_loss_reduction = task_loss_reduction
        self.task_weights = per_task_numbers("task_weights", task_weights, self.tasks or ("loss",))
        # In __dict__, where nn.Module does not look for submodules: the owner of the metric registers it.
        self.__dict__["global_reduction"] = global_reduction

    if TYPE_CHECKING:

        def __call__(self, loss_sum: Tensor, weight: Tensor | float) -> dict[str, Tensor]:
            """Run ``forward``; nn.Module's own ``__call__`` has no types."""

    def update(self, loss_sum: Tensor, weight: Tensor | float) -> None:
        """Add one batch's sums; nothing waits for the device, and nothing is added where an error is raised.

        Args:
            loss_sum: ``(tasks,)``, or 0-dim in the one-task form: Σ w·l over the batch's rows.
            weight: ``(tasks,)`` or a number that all tasks share: what the mean divides by.

        Raises:
            TypeError: for an argument of a wrong type or dtype.
            ValueError: for a wrong shape, a device other than the loss_sum's, or a number that is not finite.
            TorchMetricsUserError: between sync() and unsync(), where the update would be lost.
        """
        self._add(self._batch_sums(loss_sum, weight))

    def add(self, sums: TaskSums) -> None:
        """Add sums that need no check: detached, of the widest dtype."""
        self._add(self._counted(*sums))

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot a result as a bar for each task, or a list of results as a line for each; the global loss in black.

        Args:
            val: what compute() or forward() gave, or a list of such results, one a step; None calls compute(), which
                every rank has to do.
            ax: the matplotlib axes to draw on; None makes a figure with room for all names.

        Returns:
            The figure and the axes.

        Raises:
            ModuleNotFoundError: without matplotlib.
            TypeError: for a ``val`` that is neither of them.
            ValueError: for a ``val`` in which a task is missing.
        """
        return plot_per_task(
            self.compute() if val is None else val,
            ax,
            tasks=self.tasks or (),
            prefix="loss",
            summary="loss",
            ylabel="loss",
            lower_bound=self.plot_lower_bound,
        )

    def better(self, key: str) -> bool:  # noqa: ARG002 (the same for every key)
        """A lower loss is better."""
        return False

    def _keys(self) -> list[str]:
        return [*(f"loss/{task}" for task in self.tasks or ()), "loss"]

    def _batch_sums(self, loss_sum: Tensor, weight: Tensor | float) -> Tensor:
        return self._counted(*self._checked(loss_sum, weight))

    def _checked(self, loss_sum: Tensor, weight: Tensor | float) -> tuple[Tensor, Tensor | float]:
        """Detached ``(tasks,)`` sums of the widest dtype, and a weight of that kind or a number."""
        check_dense("loss_sum", loss_sum)
        tasks = 1 if self.tasks is None else len(self.tasks)
        if self.tasks is None and loss_sum.ndim == 0:
            loss_sum = loss_sum.unsqueeze(0)
        if loss_sum.shape != (tasks,):
            raise ValueError(f"loss_sum: got shape {tuple(loss_sum.shape)}, expected ({tasks},)")
        dtype = sum_dtype(loss_sum.device)
        if isinstance(weight, Tensor):
            check_dense("weight", weight)
            if weight.shape not in ((), (tasks,)):
                raise ValueError(f"weight: got shape {tuple(weight.shape)}, expected ({tasks},) or ()")
            if weight.device != loss_sum.device:
                raise ValueError(f"weight: got a tensor on {weight.device}, expected {loss_sum.device} as for loss_sum")
            weight = weight.detach().to(dtype).expand(tasks)
        elif not torch.compiler.is_compiling():
            # A number of rows that is traced has no value to look at.
            check_number("weight", weight)
        return loss_sum.detach().to(dtype), weight

    def _values(self, sums: Tensor) -> Sequence[Tensor]:
        totals = TaskSums(sums[0], sums[1])
        present = has_data(totals)
        assert present is not None
        totals = TaskSums(totals.loss_sum.where(present, 0.0), totals.weight)
        losses = reduce_rows(totals, self.task_loss_reduction)
        values = losses.where(present, torch.nan).unbind(0)
        if self.tasks is None:
            return values
        seen = _as_input_of(self.global_reduction, losses)
        weights = None if self.task_weights is None else seen.new_tensor(self.task_weights)
        loss = reduce_tasks(seen, present, self.global_reduction, weights)
        return (*values, loss.to(losses).where(present.any(), torch.nan))


def _as_input_of(reduction: GlobalReduction, losses: Tensor) -> Tensor:
    """The losses on the device and in the dtype of a module's parameters, at least float32; others take float64."""
    if isinstance(reduction, nn.Module):
        for parameter in reduction.parameters():
            return losses.to(parameter.device, torch.promote_types(parameter.dtype, torch.float32))
    return losses
