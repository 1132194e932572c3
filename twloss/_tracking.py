"""A loss's running sums: the metrics of training and of evaluation, made when the loss is made, and moved with it.

``LossOptions`` come in and become groups of tasks, the plans of their passes, and a metric for each mode, which
``_losses.py`` feeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from twloss._arguments import warn_local_normalizer
from twloss._metrics.global_loss import GlobalLoss
from twloss._metrics.ranking_quality import RankingQuality, own_quality
from twloss._metrics.task_metric import TaskMetric
from twloss._metrics.together import FeedsMetrics
from twloss._options import LossOptions
from twloss._rows.mappings import TaskTensors
from twloss._rows.row_pass import Plan
from twloss._rows.segments import Segments
from twloss._rows.task_group import count_rows, group_tasks, order_of_groups
from twloss._settings import METRICS, QUALITY, HasSettings
from twloss._sums.made_elsewhere import Given, sum_given
from twloss._sums.ranks import ColumnNames, world_size
from twloss._sums.sums import BatchSums
from twloss._torch import hidden_from_jit, refuse_trace


@hidden_from_jit
class TracksSums(HasSettings, FeedsMetrics):
    """The base of the losses: what they keep, and what few batches come with.

    Args:
        options: the settings.
        task_weights: the one that can be set later.
        quality: the argument, of which ``options`` know only whether it is there.
    """

    train_metric: GlobalLoss
    eval_metric: GlobalLoss
    train_quality: RankingQuality
    eval_quality: RankingQuality

    # TorchRec's pipelines then trace into forward, whose result has the keys; of a leaf they would know none.
    _is_pytorch_fx_traceable = True

    def __init__(
        self, options: LossOptions, task_weights: tuple[float, ...] | None, quality: bool | RankingQuality
    ) -> None:
        segments = None if options.segments is None else Segments(options.segments)
        groups = group_tasks(options.loss_type, options.tasks, options.pos_weights, options.ignore_index, segments)
        types = {f"loss_type_{index}": group.loss_type for index, group in enumerate(groups)}
        super().__init__(
            options, task_weights, types if isinstance(options.loss_type, dict) else {"loss_type": options.loss_type}
        )
        self._reduction = options.reduction
        self._groups = groups
        self._segments = segments
        self._names = ColumnNames(options.columns)
        self._given, given = options.given_tasks, set(options.given_tasks)
        self._tasks_with_rows = tuple(task for task in options.columns if task not in given)
        self._order = order_of_groups(groups, self._given if options.tasks else (), options.tasks)
        rule = options.describe()
        for name in METRICS:
            metric = GlobalLoss(
                options.tasks,
                options.task_loss_reduction,
                options.global_reduction,
                segments=options.segments,
                validate_args=options.validate_args,
                process_group=options.process_group,
            )
            metric._become_part_of(self._task_weights, rule)
            self.add_module(name, metric)
        for name in QUALITY if options.quality else ():
            group = next(group for group in groups if group.row_loss.is_binary)
            own = own_quality(quality, group.tasks, group.ignore_index, options.process_group, segments)
            self.add_module(name, own)
            if own.logit_shift is not None:
                group.logit_shift = own._shift  # the same in both modes
        counts_rows = options.quality and self.train_quality.window_rows is not None
        self._plans = options.plans(len(groups) + bool(self._given), counts_rows=counts_rows)
        self._pair_metrics()

    def _pair_metrics(self) -> None:
        """Tell the metrics of training and evaluation of each other."""
        metrics: Any = self._modules
        for names in (METRICS, QUALITY):
            for name, mode, other in zip(names, ("train()", "eval()"), reversed(names)):
                if name in metrics:
                    metrics[name]._pair_with(name, mode, other, metrics[other])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._pair_metrics()  # whose copies have forgotten each other

    def count(self, labels: TaskTensors, weights: TaskTensors | None = None) -> Tensor:
        """What the means of these rows divide by, as forward counts it: of this rank, without a collective.

        Summed over the micro-batches of an optimizer step, and over ranks by one all-reduce, it is the ``normalizer``.
        No running sum changes. It is for the training loop: a model that torch.fx traces can't call it.

        Args:
            labels: as for forward; of a ``Loss`` with a callable ``(rows,)``, as nothing else tells what is a row.
            weights: as for forward.

        Returns:
            The number of valid rows, or with ``mean_over="weights"`` the sum of their weights, ``(tasks,)``; 1 for a
            task of type GIVEN, as for a loss that comes without a weight. Detached, on the labels' device, float64
            where the device has it.

        Raises:
            TypeError: for an input of a wrong type or dtype.
            ValueError: for names, shapes or devices that do not fit.
        """
        given, mean_over = len(self._given), self._options.mean_over
        return count_rows(self._groups, self._tasks_with_rows, given, self._order, mean_over, labels, weights)

    def _check_normalizer(self, normalizer: Tensor | float, loss_sum: Tensor) -> Tensor | float:
        options = self._options
        is_averaged = options.gradient_reduction == "mean" and not options.global_batch
        if is_averaged and not torch.compiler.is_compiling() and world_size(options.process_group) > 1:
            warn_local_normalizer()
        return self._reduction.check_normalizer(normalizer, loss_sum)

    def _sum_given(self, given: Given | None, plan: Plan, parts: Sequence[BatchSums]) -> BatchSums:
        """The sums of the tasks of type GIVEN, on the device of the others."""
        if not self._groups:
            raise ValueError("loss_type: got GIVEN alone, whose tasks have no rows, expected a call of from_sums()")
        if not self._given:
            raise ValueError("given: got one for a loss without tasks of type GIVEN, expected None")
        device = parts[0].losses.device
        return sum_given(given, self._given, plan.over_rows, device, validates=plan.validates)

    def _slow_forward(self, *_: Any, **__: Any) -> None:
        refuse_trace(self)

    def _idle_metrics(self) -> Iterable[TaskMetric]:
        metrics: Any = self._modules
        idle = [names[int(self.training)] for names in (METRICS, QUALITY)]
        return [metrics[name] for name in idle if name in metrics]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TracksSums:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = fn(torch.empty(0, device=self.train_metric.device)).device
        for constants in (
            self._order,
            self._task_weights,
            self._names.hashes,
            *(each for group in self._groups for each in group.constants),
        ):
            constants.place(device)
        return self
