"""The losses that are attached to a model: one batch from the caller's tensors to the losses to train on.

Logits, labels and weights come in; the tasks' losses and the global one go out, and the batch's detached sums are added
to ``train_metric`` or ``eval_metric``, by the module's mode.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from twloss._accumulator import sum_dtype
from twloss._arguments import (
    LossName,
    MeanOver,
    PerTask,
    RowReduction,
    TaskConstants,
    check_choice,
    check_dense,
    check_global_reduction,
    check_ignore_index,
    check_number,
    check_process_group,
    check_tasks,
    is_same_label,
    per_task_numbers,
    warn_unless_mean,
)
from twloss._batch import Batch, TaskTensors, align
from twloss._global_loss import GlobalLoss
from twloss._loss_type import LossFunction, LossType, resolve_loss_type
from twloss._ranking_quality import RankingQuality
from twloss._ranks import group_from_state, group_to_state, sum_over_ranks_with_gradient
from twloss._reduction import GlobalReduction, Reduction
from twloss._row_sums import TaskSums, sum_rows


class _TaskLosses(nn.Module):
    """What the losses of one task and of several share: all but their signatures."""

    train_metric: GlobalLoss
    eval_metric: GlobalLoss
    train_quality: RankingQuality
    eval_quality: RankingQuality

    def __init__(
        self,
        loss_type: LossType | LossName | LossFunction,
        tasks: tuple[str, ...] | None,
        reduction: Reduction,
        *,
        pos_weights: tuple[float, ...] | None,
        task_weights: tuple[float, ...] | None,
        mean_over: MeanOver,
        ignore_index: float | None,
        global_batch: bool,
        process_group: dist.ProcessGroup | None,
        quality: bool | RankingQuality,
    ) -> None:
        super().__init__()
        self.loss_type = resolve_loss_type(loss_type)
        name = "pos_weight" if tasks is None else "pos_weights"
        if pos_weights is not None and self.loss_type is not LossType.BCE_WITH_LOGITS:
            raise ValueError(f"{name}: got one with {self.loss_type}, expected it with BCE_WITH_LOGITS only")
        if pos_weights is not None and min(pos_weights) < 0:
            raise ValueError(f"{name}: got {pos_weights}, expected numbers >= 0")
        check_process_group(process_group)
        check_choice("mean_over", mean_over, get_args(MeanOver))
        if not isinstance(global_batch, bool):
            raise TypeError(f"global_batch: got {type(global_batch).__name__}, expected a bool")
        self.tasks = tasks
        self.mean_over = mean_over
        self.ignore_index = check_ignore_index(ignore_index)
        self.global_batch = global_batch
        self.process_group = process_group
        self._reduction = reduction
        # A module is trained with the loss, as its submodule.
        self.task_loss_reduction, self.global_reduction = reduction.over_rows, reduction.over_tasks
        self._pos_weights, self._task_weights = TaskConstants(pos_weights), TaskConstants(task_weights)
        arguments = (tasks, reduction.over_rows, reduction.over_tasks)
        for name in ("train_metric", "eval_metric"):
            metric = GlobalLoss(*arguments, task_weights=task_weights, process_group=process_group)
            self.add_module(name, metric)
        self._has_quality = quality is not False
        for name in ("train_quality", "eval_quality") if self._has_quality else ():
            self.add_module(name, self._own_quality(quality))

    def extra_repr(self) -> str:
        """The settings, for repr()."""
        name = getattr(self.loss_type, "value", self.loss_type)
        return f"{name}, tasks={self.tasks}, reduction={self.task_loss_reduction}, global_batch={self.global_batch}"

    def _losses(
        self,
        logits: TaskTensors,
        labels: TaskTensors,
        weights: TaskTensors | None,
        normalizer: Tensor | float | None,
    ) -> dict[str, Tensor]:
        """The losses of a batch, whose sums are added to the running ones."""
        has_classes = self.loss_type is LossType.CROSS_ENTROPY if isinstance(self.loss_type, LossType) else None
        batch = align(logits, labels, weights, self.tasks, has_classes=has_classes, ignore_index=self.ignore_index)
        tasks = 1 if self.tasks is None else len(self.tasks)
        if normalizer is not None:
            normalizer = self._check_normalizer(normalizer, tasks, batch.logits.device)
        sums, counted = sum_rows(self.loss_type, batch, self._pos_weights.like(batch.logits), tasks, self.mean_over)
        if self.global_batch:
            sums = sum_over_ranks_with_gradient(sums, self.process_group)
        if normalizer is not None:
            sums = TaskSums(sums.loss_sum, normalizer)
        dtype = batch.logits.dtype
        losses = self._reduction.reduce(sums, self._task_weights.like(batch.logits), dtype, is_final=False)
        # Last, so that a batch whose loss could not be computed is not in the running sums either.
        if counted is not None:
            self._track(batch, counted)
        return losses

    def _track(self, batch: Batch, sums: TaskSums) -> None:
        """Add a batch and its detached sums to the metrics of this mode; to none of them where one refuses it."""
        mode = "train" if self.training else "eval"
        metric: GlobalLoss = getattr(self, f"{mode}_metric")
        packed = metric._pack(sums)
        if self._has_quality:
            quality: RankingQuality = getattr(self, f"{mode}_quality")
            # Without pos_weights its log loss is the loss.
            known = sums.loss_sum if self._pos_weights.numbers is None else None
            quality._put(quality._pack(quality._sum_aligned(batch, known)))
        metric._put(packed)

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name not in ("train_quality", "eval_quality"):
                raise
        raise AttributeError(f"{name}: got a loss with quality=False, expected one that is made with quality=True")

    def _own_quality(self, quality: bool | RankingQuality) -> RankingQuality:
        """A metric for the quality of this loss's logits, as the argument says."""
        if not isinstance(quality, (bool, RankingQuality)):
            raise TypeError(f"quality: got {type(quality).__name__}, expected a bool or a RankingQuality")
        if self.loss_type is not LossType.BCE_WITH_LOGITS:
            raise ValueError(f"quality: got {quality} with {self.loss_type}, expected it with BCE_WITH_LOGITS only")
        if isinstance(quality, bool):
            return RankingQuality(self.tasks, ignore_index=self.ignore_index, process_group=self.process_group)
        found, expected = (f"tasks={each.tasks}, ignore_index={each.ignore_index}" for each in (quality, self))
        if quality.tasks != self.tasks or not is_same_label(quality.ignore_index, self.ignore_index):
            raise ValueError(f"quality: got one with {found}, expected {expected} as for the loss")
        if quality.process_group not in (None, self.process_group):
            raise ValueError("quality: got one with another process_group, expected that of the loss, or none")
        own = copy.deepcopy(quality)
        own.process_group = self.process_group
        own.reset()
        return own

    def _check_normalizer(self, normalizer: Tensor | float, tasks: int, device: torch.device) -> Tensor | float:
        if self.task_loss_reduction != "mean" or self.global_reduction not in ("mean", "sum"):
            rule = f"reduction={self.task_loss_reduction!r}"
            if self.tasks is not None:
                rule = f"task_loss_{rule} and global_reduction={self.global_reduction!r}"
            raise ValueError(
                f"normalizer: got one with {rule}, expected 'mean' over rows, and 'mean' or 'sum' over tasks: no other "
                "loss is the sum of those of its parts"
            )
        if not isinstance(normalizer, Tensor):
            return check_number("normalizer", normalizer)
        check_dense("normalizer", normalizer)
        if normalizer.shape not in ((), (tasks,)):
            raise ValueError(f"normalizer: got shape {tuple(normalizer.shape)}, expected () or ({tasks},)")
        if normalizer.device != device:
            raise ValueError(f"normalizer: got a tensor on {normalizer.device}, expected {device}")
        return normalizer.detach().to(sum_dtype(device)).expand(tasks)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _TaskLosses:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for constants in (self._pos_weights, self._task_weights):
            constants.place(fn(torch.empty(0, device=self.train_metric.device)).device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return group_to_state(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(group_from_state(state))  # type: ignore[no-untyped-call]


class Loss(_TaskLosses):
    """The loss of one task, with its running sums.

    Its other arguments, its attributes and its errors are those of ``MultiTaskLoss``.

    Args:
        reduction: "mean" or "sum", over rows.
        pos_weight: the factor of the positive term; BCE_WITH_LOGITS only.

    Raises:
        TypeError: for an argument of a wrong type.
        ValueError: for an argument of a wrong value.

    Examples:
        >>> import torch
        >>> from twloss import Loss
        >>> loss = Loss("bce_with_logits")
        >>> loss(torch.tensor([0.0, 2.0]), torch.tensor([1, 1]))
        tensor(0.4100)
        >>> loss.train_metric.compute()
        {'loss': tensor(0.4100, dtype=torch.float64)}
    """

    def __init__(
        self,
        loss_type: LossType | LossName | LossFunction,
        reduction: RowReduction = "mean",
        *,
        pos_weight: float | Tensor | None = None,
        mean_over: MeanOver = "rows",
        ignore_index: float | None = None,
        global_batch: bool = False,
        process_group: dist.ProcessGroup | None = None,
        quality: bool | RankingQuality = False,
    ) -> None:
        check_choice("reduction", reduction, get_args(RowReduction))
        super().__init__(
            loss_type,
            None,
            Reduction.of(None, reduction, "mean"),
            pos_weights=per_task_numbers("pos_weight", pos_weight, ("loss",)),
            task_weights=None,
            mean_over=mean_over,
            ignore_index=ignore_index,
            global_batch=global_batch,
            process_group=process_group,
            quality=quality,
        )
        warn_unless_mean(global_batch, reduction=reduction)

    def forward(
        self, logits: Tensor, labels: Tensor, weights: Tensor | None = None, *, normalizer: Tensor | float | None = None
    ) -> Tensor:
        """The loss of a batch.

        Args:
            logits: the labels' shape, or ``(rows, classes)`` for CROSS_ENTROPY.
            labels: any shape, in [0, 1]; class indices ``(rows,)`` for CROSS_ENTROPY.
            weights: broadcastable to the labels' shape; None: 1.
            normalizer: 0-dim; as for ``MultiTaskLoss``.

        Returns:
            The loss, 0-dim, float64 for float64 logits and float32 for all others.

        Raises:
            TypeError: for an input of a wrong type or dtype.
            ValueError: for shapes or devices that do not fit, or a normalizer with "sum".
        """
        return self._losses(logits, labels, weights, normalizer)["loss"]

    if TYPE_CHECKING:
        __call__ = forward  # nn.Module's own has no types


class MultiTaskLoss(_TaskLosses):
    """The losses of several tasks and the global loss that reduces them, with their running sums.

    With l the unreduced loss, w the weights and the sums over a task's valid rows, its loss is ``Σ w·l / N`` ("mean"),
    where N is the number of rows (``mean_over="rows"``) or ``Σ w`` ("weights"), or ``Σ w·l`` ("sum"); "loss" is their
    reduction over the tasks with data.

    Args:
        loss_type: a ``LossType``, its name, or a callable ``(logits, labels) -> loss`` that gives the unreduced loss in
            the labels' shape ``(rows, tasks)``.
        tasks: the tasks' names, in the order of the columns.
        task_loss_reduction: "mean" or "sum", over rows.
        global_reduction: "mean", "sum", "min", "max", "median", or a callable ``(tasks,) -> 0-dim``, which may be a
            module with parameters (it is then a submodule of the loss). A callable gets 0 for a task without data.
        pos_weights: the factors of the positive terms; a number, or one a task. BCE_WITH_LOGITS only.
        task_weights: factors of the tasks' losses inside the reduction over tasks; their own entries stay raw.
        mean_over: "rows" divides by the number of valid rows, "weights" by the sum of their weights.
        ignore_index: the label that says "missing", NaN allowed; such rows are in no sum and get no gradient.
        global_batch: return, on every rank, the losses of this step's rows of all ranks, with the gradient that makes
            DDP's average the gradient of one process. One collective in forward, in evaluation too, so every rank
            has to call it equally often: a rank that has run out of rows with an empty batch.
        process_group: the ranks to sum over; None: all.
        quality: True, or a ``RankingQuality`` to be copied, for running sums of the quality of the predictions, without
            the pos_weights, from the logits at hand; BCE_WITH_LOGITS only.

    Attributes:
        train_metric: the ``GlobalLoss`` that forward feeds in training mode.
        eval_metric: the one that it feeds in evaluation mode.
        train_quality: with ``quality``, the ``RankingQuality`` that forward feeds in training mode.
        eval_quality: with ``quality``, the one that it feeds in evaluation mode.

    Raises:
        TypeError: for an argument of a wrong type.
        ValueError: for an argument of a wrong value.

    Examples:
        >>> import torch
        >>> from twloss import MultiTaskLoss
        >>> loss = MultiTaskLoss("bce_with_logits", ["like", "reply"])
        >>> losses = loss(torch.tensor([[0.0, 2.0], [1.0, -1.0]]), torch.tensor([[1, 1], [1, 0]]))
        >>> {key: round(value.item(), 4) for key, value in losses.items()}
        {'loss/like': 0.5032, 'loss/reply': 0.2201, 'loss': 0.3616}
    """

    def __init__(
        self,
        loss_type: LossType | LossName | LossFunction,
        tasks: Sequence[str],
        task_loss_reduction: RowReduction = "mean",
        global_reduction: GlobalReduction = "mean",
        pos_weights: PerTask | None = None,
        *,
        task_weights: PerTask | None = None,
        mean_over: MeanOver = "rows",
        ignore_index: float | None = None,
        global_batch: bool = False,
        process_group: dist.ProcessGroup | None = None,
        quality: bool | RankingQuality = False,
    ) -> None:
        tasks = check_tasks(tasks)
        check_choice("task_loss_reduction", task_loss_reduction, get_args(RowReduction))
        check_global_reduction(global_reduction)
        super().__init__(
            loss_type,
            tasks,
            Reduction.of(tasks, task_loss_reduction, global_reduction),
            pos_weights=per_task_numbers("pos_weights", pos_weights, tasks),
            task_weights=per_task_numbers("task_weights", task_weights, tasks),
            mean_over=mean_over,
            ignore_index=ignore_index,
            global_batch=global_batch,
            process_group=process_group,
            quality=quality,
        )
        warn_unless_mean(global_batch, task_loss_reduction=task_loss_reduction, global_reduction=global_reduction)

    def forward(
        self,
        logits: TaskTensors,
        labels: TaskTensors,
        weights: TaskTensors | None = None,
        *,
        normalizer: Tensor | float | None = None,
    ) -> dict[str, Tensor]:
        """The losses of a batch.

        Each of the three inputs may also be a mapping task -> ``(rows,)`` or ``(rows, 1)``; with CROSS_ENTROPY the
        logits map to ``(rows, classes)``, and the numbers of classes may differ.

        Args:
            logits: ``(rows, tasks)``, or ``(rows, tasks, classes)`` for CROSS_ENTROPY.
            labels: ``(rows, tasks)``, in [0, 1], any dtype; class indices for CROSS_ENTROPY.
            weights: ``(rows, tasks)``, ``(rows, 1)`` or ``(rows,)``; None: 1.
            normalizer: what the means divide by in place of the batch's own weights, 0-dim or ``(tasks,)``: the total
                over all micro-batches and ranks of one optimizer step, which makes gradient accumulation exact.

        Returns:
            The loss of each task under ``"loss/<task>"``, in the tasks' order, and the global one under ``"loss"``;
            0-dim, float64 for float64 logits and float32 for all others. A task without data has a loss of 0 with a
            gradient of 0.

        Raises:
            TypeError: for an input of a wrong type or dtype.
            ValueError: for names, shapes or devices that do not fit, or a normalizer with a reduction that does not add
                up over micro-batches.
        """
        return self._losses(logits, labels, weights, normalizer)

    if TYPE_CHECKING:
        __call__ = forward
