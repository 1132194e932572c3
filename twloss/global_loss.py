"""The running sums of every row seen: a torchmetrics ``Metric`` that adds ``TaskSums`` and divides at compute().

``(tasks,)`` sums come in at each step; the losses of all steps and ranks go out, by the two reductions of
``task_sums.py``, which the forward pass applies to one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.utilities.prints import rank_zero_warn

from twloss.arguments import (
    TASK_REDUCTIONS,
    PerTask,
    check_choice,
    check_dense,
    check_global_reduction,
    check_number,
    check_process_group,
    check_tasks,
    per_task_numbers,
)
from twloss.ranks import detached_sum_over_ranks
from twloss.running_sums import RunningSums
from twloss.task_sums import GlobalReduction, TaskSums, has_data, reduce_rows, reduce_tasks
from twloss.wide_sum import sum_dtype

__all__ = ["NAN_STRATEGIES", "GlobalLoss"]

NAN_STRATEGIES = ("warn", "error", "ignore", "disable")


class GlobalLoss(RunningSums):
    """The loss of all rows of all steps and ranks since reset(), as one process would get it from one batch.

    With S_t = Σ w·l and N_t the weight of task t, summed over every update of every rank, a task's loss is S_t / N_t
    ("mean") or S_t ("sum"), and the global loss is the reduction of the tasks' losses over the tasks with data. So
    compute() does not depend on how the rows were split over steps and ranks.

    ``MultiTaskLoss`` and ``Loss`` feed one of these for training and one for evaluation; any other training code may
    feed its own.

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

    Example:
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
        check_choice("nan_strategy", nan_strategy, NAN_STRATEGIES)
        check_process_group(kwargs.get("process_group"))
        tasks = None if tasks is None else check_tasks(tasks)
        super().__init__((4, 1 if tasks is None else len(tasks)), **kwargs)
        self.tasks = tasks
        self.task_loss_reduction = task_loss_reduction
        self.task_weights = per_task_numbers("task_weights", task_weights, self.tasks or ("loss",))
        self.nan_strategy = nan_strategy
        # In __dict__, where nn.Module does not look for submodules: the owner of the metric registers it.
        self.__dict__["global_reduction"] = global_reduction

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
        self._add(self._batch_totals(loss_sum, weight))

    def forward(self, loss_sum: Tensor, weight: Tensor | float) -> dict[str, Tensor]:
        """Add one batch's sums, as update() does, and return the losses of this batch alone."""
        batch = self._batch_totals(loss_sum, weight)
        over_ranks = detached_sum_over_ranks(batch, self.process_group) if self.dist_sync_on_step else batch
        losses = self._losses(over_ranks)
        self._add(batch)
        self._forward_cache: Any = losses
        return losses

    def compute(self) -> dict[str, Tensor]:
        """The losses of all rows since reset(), over all ranks; one collective, so every rank has to call it.

        Returns:
            ``{"loss/<task>": …, "loss": …}``, 0-dim detached float64; NaN where there was no data.

        Raises:
            RuntimeError: with ``nan_strategy="error"``, if an update was not finite.
        """
        totals = self.summed
        counted, offered = totals[2:].tolist()
        if not any(offered):
            rank_zero_warn("GlobalLoss.compute() was called before update() on any rank; every value is NaN")
        self._report_non_finite([int(n - k) for n, k in zip(offered, counted)])
        return self._losses(totals)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot a result of compute(), or a list of them as a line for each key.

        Args:
            val: what compute() or forward() gave, or a list of such results; None calls compute().
            ax: the matplotlib axes to draw on; None makes new ones.

        Returns:
            The figure and the axes.
        """
        return self._plot(val, ax)

    @property
    def update_count(self) -> int:
        """The number of updates since reset(), on this rank."""
        return 0 if self.totals.is_meta else int(self.summed[3, 0])

    @property
    def update_called(self) -> bool:
        """Whether there was an update since reset(), on this rank."""
        return self.update_count > 0

    def describe(self) -> dict[str, Any]:
        """The tasks, which sums of other tasks must not be mixed with."""
        return {"tasks": None if self.tasks is None else list(self.tasks)}

    @torch.no_grad()
    def _batch_totals(self, loss_sum: Tensor, weight: Tensor | float) -> Tensor:
        """What an update adds, ``(4, tasks)``: loss_sum, weight, the number of finite updates (0 or 1) and of all."""
        loss_sum, weight = self._checked(loss_sum, weight)
        if self.nan_strategy == "disable":
            finite = torch.ones_like(loss_sum)
        else:
            # In the sums' dtype: a bool times a Python float is float32.
            clean = loss_sum.nan_to_num(0.0, 0.0, 0.0)
            finite = clean.eq(loss_sum).to(clean.dtype)
            loss_sum = clean
            if isinstance(weight, Tensor):
                clean = weight.nan_to_num(0.0, 0.0, 0.0)
                finite = finite * clean.eq(weight)
                loss_sum, weight = loss_sum * finite, clean
        return torch.stack((loss_sum, finite * weight, finite, torch.ones_like(loss_sum)))

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

    @torch.no_grad()
    def _losses(self, totals: Tensor) -> dict[str, Tensor]:
        """The result of compute() from summed totals ``(4, tasks)``."""
        sums = TaskSums(totals[0], totals[1])
        present = has_data(sums)
        assert present is not None
        sums = TaskSums(sums.loss_sum.where(present, 0.0), sums.weight)
        losses = reduce_rows(sums, self.task_loss_reduction)
        if self.tasks is None:
            return {"loss": losses.where(present, torch.nan).squeeze(0)}
        seen = _as_input_of(self.global_reduction, losses)
        weights = None if self.task_weights is None else seen.new_tensor(self.task_weights)
        loss = reduce_tasks(seen, present, self.global_reduction, weights)
        keys = [f"loss/{task}" for task in self.tasks]
        values = losses.where(present, torch.nan).unbind(0)
        return {**dict(zip(keys, values)), "loss": loss.to(losses).where(present.any(), torch.nan)}

    def _report_non_finite(self, skipped: list[int]) -> None:
        if self.nan_strategy not in ("warn", "error") or not any(skipped):
            return
        counts = {task: n for task, n in zip(self.tasks or ("loss",), skipped) if n}
        message = f"GlobalLoss: sums that were not finite, left out of the running sums: {counts} updates"
        if self.nan_strategy == "error":
            raise RuntimeError(message)
        rank_zero_warn(message)


def _as_input_of(reduction: GlobalReduction, losses: Tensor) -> Tensor:
    """The losses on the device and in the dtype of a module's parameters, at least float32; others take float64."""
    if isinstance(reduction, nn.Module):
        for parameter in reduction.parameters():
            return losses.to(parameter.device, torch.promote_types(parameter.dtype, torch.float32))
    return losses
