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

from twloss.arguments import check_choice, check_process_group, check_tasks, check_window
from twloss.ranks import detached_sum_over_ranks
from twloss.running_sums import RunningSums
from twloss.scalar_view import ScalarView
from twloss.wide_sum import add_and_keep_once, add_once

__all__ = ["NAN_STRATEGIES", "PerTaskMetric"]

NAN_STRATEGIES = ("warn", "error", "ignore", "disable")


class PerTaskMetric(RunningSums):
    """Sums of each task, ``(sums, tasks)``: the subclass's own, then the updates that were finite, then all updates.

    With a window, ``(1 + window, sums, tasks)``: those of all updates, and those of each of the last ones.

    Args:
        tasks: the tasks' names, or None for the one-task form, whose keys have no name in them.
        sums: how many sums a task has.
        nan_strategy: what becomes of a task's sums in an update in which they are not finite.
        window: how many of the last updates to give a result of as well, under keys with "window_" before them.
        kwargs: ``Metric``'s own.
    """

    def __init__(
        self, tasks: Sequence[str] | None, sums: int, *, nan_strategy: str, window: int | None = None, **kwargs: Any
    ) -> None:
        check_choice("nan_strategy", nan_strategy, NAN_STRATEGIES)
        check_process_group(kwargs.get("process_group"))
        check_window(window)
        tasks = None if tasks is None else check_tasks(tasks)
        shape = (sums + 2, 1 if tasks is None else len(tasks))
        super().__init__(shape if window is None else (1 + window, *shape), **kwargs)
        self.tasks = tasks
        self.nan_strategy = nan_strategy
        self.window = window

    def keys(self) -> list[str]:
        """The keys of the result, in its order."""
        keys = self._keys()
        return keys if self.window is None else [*keys, *(f"window_{key}" for key in keys)]

    def better(self, key: str) -> bool | None:
        """Whether higher values of a key are better; None where neither is."""
        raise NotImplementedError

    def _keys(self) -> list[str]:
        """The keys of the result of one set of sums, in its order."""
        raise NotImplementedError

    def _batch_sums(self, *args: Any, **kwargs: Any) -> Tensor:
        """What an update with these arguments adds, as _counted() gives it."""
        raise NotImplementedError

    def _values(self, sums: Tensor) -> Sequence[Tensor]:
        """The results from one set of sums ``(sums, tasks)``, 0-dim, in the order of the keys."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Add a batch, as update() does, and return the result of this batch alone."""
        batch = self._batch_sums(*args, **kwargs)
        over_ranks = detached_sum_over_ranks(batch, self.process_group) if self.dist_sync_on_step else batch
        results = self._results(over_ranks, over_ranks)
        # Not in place: the metrics of a collection's compute group have one state, and forward is called on each.
        with torch.inference_mode(False):
            self.totals = self.totals.clone()
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
        sums = self._lifetime
        counted, offered = sums[-2:].tolist()
        recent = sums if self.window is None else self.summed[1:].sum(0)
        if not any(offered) and not recent[-1].any():
            name = type(self).__name__
            rank_zero_warn(f"{name}.compute() was called before update() on any rank; without data, values are NaN")
        self._report_non_finite([int(n - k) for n, k in zip(offered, counted)])
        return self._results(sums, recent)

    @torch.no_grad()
    def _results(self, sums: Tensor, recent: Tensor) -> dict[str, Tensor]:
        values = self._values(sums)
        return dict(zip(self.keys(), values if self.window is None else (*values, *self._values(recent))))

    @property
    def _lifetime(self) -> Tensor:
        """The sums of all updates, ``(sums, tasks)`` in float64."""
        return self.summed if self.window is None else self.summed[0]

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
        return 0 if self.totals.is_meta else int(self._lifetime[-1, 0])

    @property
    def update_called(self) -> bool:
        """Whether there was an update since reset(), on this rank."""
        return self.update_count > 0

    def describe(self) -> dict[str, Any]:
        """The tasks and the window, for sums of others must not be mixed with these."""
        tasks = None if self.tasks is None else list(self.tasks)
        return {"tasks": tasks} if self.window is None else {"tasks": tasks, "window": self.window}

    # The window: what is added, shared, merged and remembered of it.

    def _put(self, batch: Tensor) -> None:
        (add_once if self.window is None else add_and_keep_once)(self.totals, batch)

    def _to_share(self, sums: Tensor) -> Tensor:
        return sums if self.window is None else torch.stack((sums[0], sums[1:].sum(0)))

    def _merged(self, sums: Tensor, incoming: Tensor) -> Tensor:
        if self.window is None:
            return sums + incoming
        # Newest to newest: the place of the next update is that of the sum of both counters.
        ours, theirs = int(sums[0, -1, 0]), int(incoming[0, -1, 0])
        merged = sums[1:].roll(theirs, 0) + incoming[1:].roll(ours, 0)
        return torch.cat((sums[:1] + incoming[:1], merged))

    def snapshot(self) -> Tensor:
        """As for all running sums; the window is of the last updates whatever came before them."""
        sums = super().snapshot()
        if self.window is not None:
            sums[1:] = 0.0
        return sums

    def _counted(self, *sums: Tensor | float) -> Tensor:
        """A batch's detached sums, below them 1 where they are finite, and 1 for every update."""
        like = next(each for each in sums if isinstance(each, Tensor))
        one = torch.ones_like(like)
        rows = [each if isinstance(each, Tensor) else torch.full_like(like, each) for each in sums]
        counted = torch.stack((*rows, one, one))
        if self.nan_strategy != "disable":
            # What is not finite less itself is NaN, which any() takes for true.
            counted[:-1].masked_fill_((counted - counted).any(0), 0.0)
        return counted

    def _report_non_finite(self, skipped: list[int]) -> None:
        if self.nan_strategy not in ("warn", "error") or not any(skipped):
            return
        counts = {task: n for task, n in zip(self.tasks or ("loss",), skipped) if n}
        message = f"{type(self).__name__}: sums that were not finite, left out of the running sums: {counts} updates"
        if self.nan_strategy == "error":
            raise RuntimeError(message)
        rank_zero_warn(message)
