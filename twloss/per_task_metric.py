"""Running sums of each task, and what every metric of theirs does alike: names, NaN rules, results, views and plots.

``(tasks,)`` sums of a batch come in and are added, where they are finite; at compute() the sums of all steps and ranks
go to the subclass, which turns them into the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics.utilities.prints import rank_zero_warn

from twloss.arguments import check_choice, check_process_group, check_tasks
from twloss.ranks import detached_sum_over_ranks
from twloss.running_sums import RunningSums
from twloss.scalar_view import ScalarView

__all__ = ["NAN_STRATEGIES", "PerTaskMetric"]

NAN_STRATEGIES = ("warn", "error", "ignore", "disable")


class PerTaskMetric(RunningSums):
    """Sums of each task, ``(rows, tasks)``: the subclass's own, then the updates that were finite, then all updates.

    Args:
        tasks: the tasks' names, or None for the one-task form, whose keys have no name in them.
        sums: how many sums a task has.
        nan_strategy: what becomes of a task's sums in an update in which they are not finite.
        kwargs: ``Metric``'s own.
    """

    def __init__(self, tasks: Sequence[str] | None, sums: int, *, nan_strategy: str, **kwargs: Any) -> None:
        check_choice("nan_strategy", nan_strategy, NAN_STRATEGIES)
        check_process_group(kwargs.get("process_group"))
        tasks = None if tasks is None else check_tasks(tasks)
        super().__init__((sums + 2, 1 if tasks is None else len(tasks)), **kwargs)
        self.tasks = tasks
        self.nan_strategy = nan_strategy

    def keys(self) -> list[str]:
        """The keys of the result, in its order."""
        raise NotImplementedError

    def better(self, key: str) -> bool | None:
        """Whether higher values of a key are better; None where neither is."""
        raise NotImplementedError

    def _batch_sums(self, *args: Any, **kwargs: Any) -> Tensor:
        """What an update with these arguments adds, as _counted() gives it."""
        raise NotImplementedError

    def _results(self, sums: Tensor) -> dict[str, Tensor]:
        """The result from a state's sums."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Add a batch, as update() does, and return the result of this batch alone."""
        batch = self._batch_sums(*args, **kwargs)
        over_ranks = detached_sum_over_ranks(batch, self.process_group) if self.dist_sync_on_step else batch
        results = self._results(over_ranks)
        self._add(batch)
        self._forward_cache: Any = results
        return results

    def compute(self) -> dict[str, Tensor]:
        """The result from all rows since reset(), over all ranks; one collective, so every rank has to call it.

        Returns:
            0-dim detached float64 values; NaN where there was no data.

        Raises:
            RuntimeError: with ``nan_strategy="error"``, if an update was not finite.
        """
        sums = self.summed
        counted, offered = sums[-2:].tolist()
        if not any(offered):
            name = type(self).__name__
            rank_zero_warn(f"{name}.compute() was called before update() on any rank; every value is NaN")
        self._report_non_finite([int(n - k) for n, k in zip(offered, counted)])
        return self._results(sums)

    def scalar(self, key: str) -> ScalarView:
        """One key of the result as a ``Metric`` whose compute() is that value, for what wants a metric with one number.

        It shares the sums and costs none of its own. Its reset() starts the view anew and leaves these sums and the
        other views alone, so that Lightning, for one, may log and reset each as it likes.

        Args:
            key: a key of compute()'s result, such as "loss/like".

        Raises:
            ValueError: for an unknown key.
        """
        check_choice("key", key, tuple(self.keys()))
        return ScalarView(self, key, self.better(key))

    @property
    def update_count(self) -> int:
        """The number of updates since reset(), on this rank."""
        return 0 if self.totals.is_meta else int(self.summed[-1, 0])

    @property
    def update_called(self) -> bool:
        """Whether there was an update since reset(), on this rank."""
        return self.update_count > 0

    def describe(self) -> dict[str, Any]:
        """The tasks, which sums of other tasks must not be mixed with."""
        return {"tasks": None if self.tasks is None else list(self.tasks)}

    @torch.no_grad()
    def _counted(self, *sums: Tensor | float) -> Tensor:
        """A batch's sums with 1 below them for a finite update, 0 where they are not, and 1 for every update."""
        like = next(each for each in sums if isinstance(each, Tensor))
        one = torch.ones_like(like)
        rows = [each if isinstance(each, Tensor) else torch.full_like(like, each) for each in sums]
        packed = torch.stack((*rows, one, one))
        if self.nan_strategy == "disable":
            return packed
        counted = packed.nan_to_num(0.0, 0.0, 0.0)
        counted[:-1].mul_(counted.eq(packed).all(0))
        return counted

    def _report_non_finite(self, skipped: list[int]) -> None:
        if self.nan_strategy not in ("warn", "error") or not any(skipped):
            return
        counts = {task: n for task, n in zip(self.tasks or ("loss",), skipped) if n}
        message = f"{type(self).__name__}: sums that were not finite, left out of the running sums: {counts} updates"
        if self.nan_strategy == "error":
            raise RuntimeError(message)
        rank_zero_warn(message)
