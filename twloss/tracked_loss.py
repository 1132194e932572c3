"""One batch through all stages, with the running sums beside it: what the one-task and multi-task losses share.

An aligned ``Batch`` comes in; the tasks' losses ``(tasks,)`` and the global loss go out, and the batch's detached sums
are added to ``train_metric`` or ``eval_metric``, by the module's mode.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from twloss.arguments import (
    MEAN_OVER,
    check_choice,
    check_dense,
    check_ignore_index,
    check_number,
    check_process_group,
    is_same_label,
)
from twloss.batch import Batch
from twloss.global_loss import GlobalLoss
from twloss.loss_type import LossFunction, LossType, resolve_loss_type
from twloss.ranking_quality import RankingQuality
from twloss.ranks import group_from_state, group_to_state, task_sums_over_ranks
from twloss.summed_loss import sum_rows, takes_one_derivative
from twloss.task_sums import GlobalReduction, TaskSums, has_data, reduce_rows, reduce_tasks
from twloss.wide_sum import sum_dtype

__all__ = ["TrackedLoss"]


class TrackedLoss(nn.Module):
    """Weighting, sums, running metrics and reductions; the subclasses bring the signatures."""

    train_metric: GlobalLoss
    eval_metric: GlobalLoss
    train_quality: RankingQuality | None
    eval_quality: RankingQuality | None

    def __init__(
        self,
        loss_type: LossType | str | LossFunction,
        tasks: tuple[str, ...] | None,
        task_loss_reduction: str,
        global_reduction: GlobalReduction,
        *,
        pos_weights: tuple[float, ...] | None,
        task_weights: tuple[float, ...] | None,
        mean_over: str,
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
        check_choice("mean_over", mean_over, MEAN_OVER)
        if not isinstance(global_batch, bool):
            raise TypeError(f"global_batch: got {type(global_batch).__name__}, expected a bool")
        self.tasks = tasks
        self.task_loss_reduction = task_loss_reduction
        self.global_reduction = global_reduction
        self.pos_weights, self.task_weights = pos_weights, task_weights
        self.mean_over = mean_over
        self.ignore_index = check_ignore_index(ignore_index)
        self.global_batch = global_batch
        self.process_group = process_group
        self._place_constants(torch.get_default_device())
        for name in ("train_metric", "eval_metric"):
            metric = GlobalLoss(
                tasks, task_loss_reduction, global_reduction, task_weights=task_weights, process_group=process_group
            )
            self.add_module(name, metric)
        for name in ("train_quality", "eval_quality"):
            self.add_module(name, self._own_quality(quality))

    def extra_repr(self) -> str:
        """The settings, for repr()."""
        name = self.loss_type.value if isinstance(self.loss_type, LossType) else self.loss_type
        return f"{name}, tasks={self.tasks}, reduction={self.task_loss_reduction}, global_batch={self.global_batch}"

    def _losses(self, batch: Batch, normalizer: Tensor | float | None) -> tuple[Tensor, Tensor]:
        """The tasks' losses ``(tasks,)`` and the global loss of a batch, whose sums are added to the running ones."""
        tasks = 1 if self.tasks is None else len(self.tasks)
        normalizer = self._checked_normalizer(normalizer, tasks, batch.logits.device)
        pos_weights = self._constants("pos_weights", batch.logits)
        sums, detached = sum_rows(self.loss_type, batch, pos_weights, tasks, self.mean_over)
        if self.global_batch:
            sums = task_sums_over_ranks(sums, self.process_group)
        if normalizer is not None:
            sums = TaskSums(sums.loss_sum, normalizer)
        losses = reduce_rows(sums, self.task_loss_reduction).to(batch.logits.dtype)
        task_weights = self._constants("task_weights", losses)
        global_loss = reduce_tasks(losses, has_data(sums), self.global_reduction, task_weights)
        # Last, so that a batch whose loss could not be computed is not in the running sums either.
        self._track(batch, detached)
        return losses, global_loss

    def _track(self, batch: Batch, sums: TaskSums) -> None:
        """Add a batch and its detached sums to the metrics of this mode; to none of them where one refuses it."""
        metric, quality = self.train_metric, self.train_quality
        if not self.training:
            metric, quality = self.eval_metric, self.eval_quality
        if quality is not None:
            quality.refuse_between_syncs("update")
        metric.add(sums)
        if quality is not None:
            # Without pos_weights it is the loss, unless that was torch's operator, which loses digits.
            is_known = self.pos_weights is None and takes_one_derivative(batch)
            quality.add(batch, sums.loss_sum if is_known else None)

    def _own_quality(self, quality: bool | RankingQuality) -> RankingQuality | None:
        """A metric for the quality of this loss's logits, as the argument says; None for False."""
        if not isinstance(quality, (bool, RankingQuality)):
            raise TypeError(f"quality: got {type(quality).__name__}, expected a bool or a RankingQuality")
        if quality is False:
            return None
        if self.loss_type is not LossType.BCE_WITH_LOGITS:
            raise ValueError(f"quality: got {quality} with {self.loss_type}, expected it with BCE_WITH_LOGITS only")
        if quality is True:
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

    def _checked_normalizer(
        self, normalizer: Tensor | float | None, tasks: int, device: torch.device
    ) -> Tensor | float | None:
        if normalizer is None:
            return None
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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TrackedLoss:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._place_constants(fn(torch.empty(0, device=self._constants_device)).device)
        return self

    def _constants(self, name: str, like: Tensor) -> Tensor | None:
        """The pos_weights or task_weights, on the device and in the dtype of a tensor."""
        if self._constants_device != like.device:
            # FSDP moves no module without parameters.
            self._place_constants(like.device)
        return self._placed.get((name, like.dtype))

    def _place_constants(self, device: torch.device) -> None:
        """Put the constants on a device, anew from their Python numbers, which no cast and no meta device can harm.

        They are no registered buffers: with one, DDP would broadcast buffers at every forward.
        """
        self._constants_device = device
        with torch.inference_mode(False):
            self._placed = {
                (name, dtype): torch.tensor(values, dtype=dtype, device=device)
                for name, values in (("pos_weights", self.pos_weights), ("task_weights", self.task_weights))
                for dtype in {torch.float32, sum_dtype(device)}
                if values is not None
            }

    def __getstate__(self) -> dict[str, Any]:
        return group_to_state(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(group_from_state(state))  # type: ignore[no-untyped-call]
