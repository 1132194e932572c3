"""The losses that are attached to a model: one batch from the caller's tensors to the losses to train on.

Logits, labels and weights come in; the tasks' losses and the global one go out, and the batch's detached sums are added
to ``train_metric`` or ``eval_metric``, by the module's mode.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from twloss._arguments import (
    GradientReduction,
    IgnoreIndex,
    MeanOver,
    PerTask,
    RankGroup,
    RowReduction,
    SegmentNames,
    list_some,
    per_task_numbers,
    warn_unless_mean,
)
from twloss._fx import find_proxy, record_forward, record_losses
from twloss._metrics.global_loss import GlobalLoss
from twloss._metrics.ranking_quality import RankingQuality, is_wanted
from twloss._options import LossOptions, TaskLossType
from twloss._rows.mappings import TaskTensors
from twloss._rows.row_pass import Plan
from twloss._rows.segments import SegmentIds
from twloss._rows.task_group import inputs_by_task, join
from twloss._sums.made_elsewhere import Given, LossSums, Weights, in_float, stack_sums
from twloss._sums.ranks import sum_over_ranks_with_gradient, world_size
from twloss._sums.reduction import GlobalReduction
from twloss._sums.sums import BatchSums, TaskSums
from twloss._torch import hidden_from_jit, is_transformed
from twloss._tracking import TracksSums

_PLAIN = (Tensor, float, int, type(None))


@hidden_from_jit
class _TaskLosses(TracksSums):
    """The losses of one task or of several: all but their signatures and what they return."""

    def _losses(
        self,
        logits: TaskTensors,
        labels: TaskTensors,
        weights: TaskTensors | None,
        normalizer: Tensor | float | None = None,
        *,
        given: Given | None = None,
        segments: SegmentIds | None = None,
    ) -> dict[str, Tensor]:
        """The losses of a batch, whose sums are added to the running ones."""
        # These are no Proxy; all else is looked at.
        is_plain = type(logits) is type(labels) is Tensor and type(weights) in _PLAIN and type(normalizer) in _PLAIN
        if not is_plain or given is not None or segments is not None:
            proxy = find_proxy(logits, labels, weights, normalizer, given, segments)
            if proxy is not None:
                asked = {"normalizer": normalizer, "given": given, "segments": segments}
                return record_forward(proxy, self, self._reduction.keys, logits, labels, weights, **asked)
        groups, inputs = self._groups, (logits, labels, weights)
        metric, quality, plan = self._mode()
        if normalizer is not None:
            plan = plan._replace(reduction=None)
        if len(groups) == 1 and not self._given and given is None:
            sums = groups[0].sums(inputs, plan, self._task_weights, segments)
        else:
            if len(groups) > 1:
                inputs = inputs_by_task(self._tasks_with_rows, inputs)
                if self._segments is not None:
                    segments = self._segments.by_task(segments, self._tasks_with_rows)
            parts = [group.sums(inputs, plan, self._task_weights, segments) for group in groups]
            if self._given or given is not None:
                parts.append(self._sum_given(given, plan, parts))
            sums = join(parts, self._order, plan)
        if sums.loss is None:
            losses = self._reduce(TaskSums(sums.losses, sums.weight), normalizer)
        else:
            losses = self._reduction.by_key(sums.losses, sums.loss)
        # Last, so that a batch whose loss could not be computed is not in the running sums either.
        _keep(sums, metric, quality)
        return losses

    def _losses_of_sums(
        self, loss_sum: LossSums, weight: Weights, normalizer: Tensor | float | None = None
    ) -> dict[str, Tensor]:
        """The losses of sums made elsewhere, which are added to the running ones."""
        if self._segments is not None:
            found = list_some(list(self._segments.dimensions))
            raise ValueError(f"segments: got {found} and from_sums(), whose sums are of no cell, expected None")
        proxy = find_proxy(loss_sum, weight, normalizer)
        if proxy is not None:
            method = self._losses_of_sums.__name__
            return record_losses(proxy, self, method, self._reduction.keys, loss_sum, weight, normalizer=normalizer)
        metric, _, _ = self._mode()
        sums = metric._sum_batch(*stack_sums(loss_sum, weight, self._options.tasks))
        packed = None if is_transformed(*sums) else metric._pack(sums)
        own, divisor, *_ = sums
        losses = self._reduce(TaskSums(in_float(own), divisor), normalizer)
        if packed is not None:
            metric._add_packed(packed)
        return losses

    def _mode(self) -> tuple[GlobalLoss, RankingQuality | None, Plan]:
        """The metrics of the current mode and the plan of a pass that feeds them."""
        modules: Any = self._modules
        metric = modules["train_metric" if self.training else "eval_metric"]
        plans = self._plans[int(metric._drops_non_finite)]  # torch 2.11 compiles no index that is a bool
        if not self._options.quality:
            return metric, None, plans[1]
        quality = modules["train_quality" if self.training else "eval_quality"]
        return metric, quality, plans[int(quality._drops_non_finite)]

    def _reduce(self, local: TaskSums, normalizer: Tensor | float | None) -> dict[str, Tensor]:
        """The losses of this rank's sums, or of those of all ranks."""
        options, total, factor = self._options, local, 1.0
        if options.global_batch:
            total = sum_over_ranks_with_gradient(local, self._names, options.process_group)
            if options.gradient_reduction == "sum":
                # Each rank has the whole gradient of the reduction's own parameters too.
                factor = 1.0 / world_size(options.process_group)
        if normalizer is not None:
            total = TaskSums(total.loss_sum, self._check_normalizer(normalizer, local.loss_sum))
        dtype, task_weights = local.loss_sum.dtype, self._task_weights.like(local.loss_sum)
        return self._reduction.reduce(total, task_weights, dtype, is_final=False, gradient_factor=factor)


def _keep(sums: BatchSums, metric: GlobalLoss, quality: RankingQuality | None) -> None:
    """Add a batch to the metrics of its mode; to none of them where one refuses it."""
    if (tracked := sums.tracked) is None:
        return
    metric._prepare_for(tracked)
    if quality is not None and sums.quality is not None:
        quality._prepare_for(tracked)
        quality._add_packed(sums.quality)
    metric._add_packed(tracked)


@hidden_from_jit
class Loss(_TaskLosses):
    """The loss of one task, with its running sums.

    Its other arguments, its attributes and its errors are those of ``MultiTaskLoss``.

    Args:
        reduction: "mean" or "sum", over rows.
        pos_weight: the factor of the positive term; BCE_WITH_LOGITS only.

    Raises:
        TypeError: for an argument of a wrong type, or one that there is not.
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
        loss_type: TaskLossType,
        reduction: RowReduction = "mean",
        *,
        pos_weight: float | Tensor | None = None,
        mean_over: MeanOver = "rows",
        ignore_index: float | None = None,
        global_batch: bool = False,
        gradient_reduction: GradientReduction = "mean",
        process_group: RankGroup | None = None,
        quality: bool | RankingQuality = False,
        segments: SegmentNames | None = None,
        validate_args: bool = False,
        fused: bool = False,
    ) -> None:
        options = LossOptions(
            loss_type=loss_type,
            tasks=None,
            task_loss_reduction=reduction,
            global_reduction="mean",
            pos_weights=pos_weight,
            mean_over=mean_over,
            ignore_index=ignore_index,
            global_batch=global_batch,
            gradient_reduction=gradient_reduction,
            process_group=process_group,
            quality=is_wanted(quality),
            segments=segments,
            validate_args=validate_args,
            fused=fused,
        )
        super().__init__(options, None, quality)
        warn_unless_mean(global_batch, reduction=reduction)

    @torch.jit.unused
    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        weights: Tensor | None = None,
        *,
        normalizer: Tensor | float | None = None,
        segments: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """The loss of a batch.

        Args:
            logits: the labels' shape, or ``(…, classes)`` for CROSS_ENTROPY.
            labels: any shape, in [0, 1]; class indices for CROSS_ENTROPY.
            weights: broadcastable to the labels' shape; None: 1.
            normalizer: 0-dim; as for ``MultiTaskLoss``.
            segments: a mapping dimension -> ids, broadcastable to the labels' shape; as for ``MultiTaskLoss``.

        Returns:
            The loss, 0-dim, float64 for float64 logits and float32 for all others.

        Raises:
            TypeError: for an input of a wrong type or dtype.
            ValueError: for shapes or devices that do not fit, or a normalizer with "sum".
            RuntimeError: with ``fused``, where torch.compile fails, for want of a compiler above all; in
                torch.jit.trace, which would make the number of rows a constant.
        """
        return self._losses(logits, labels, weights, normalizer, segments=segments)["loss"]

    @torch.jit.unused
    def from_sums(
        self, loss_sum: Tensor, weight: Tensor | float, *, normalizer: Tensor | float | None = None
    ) -> Tensor:
        """The loss of a batch whose rows were summed elsewhere; see ``MultiTaskLoss.from_sums()``.

        Args:
            loss_sum: 0-dim, with its graph.
            weight: what the mean divides by, 0-dim or a number.
            normalizer: as for forward.

        Returns:
            The loss, as that of forward.

        Raises:
            TypeError: for an argument of a wrong type or dtype.
            ValueError: for shapes or devices that do not fit, or a number that is not finite.

        Examples:
            >>> import torch
            >>> from twloss import Loss
            >>> loss = Loss("given", global_batch=True)
            >>> loss.from_sums(torch.tensor(6.0), 4)
            tensor(1.5000)
        """
        return self._losses_of_sums(loss_sum, weight, normalizer)["loss"]

    if TYPE_CHECKING:
        reduction: RowReduction
        pos_weight: tuple[float, ...] | None
        __call__ = forward  # nn.Module's own has no types


@hidden_from_jit
class MultiTaskLoss(_TaskLosses):
    """The losses of several tasks and the global loss that reduces them, with their running sums.

    With l the unreduced loss, w the weights and the sums over a task's valid rows, its loss is ``Σ w·l / N`` ("mean"),
    where N is the number of rows (``mean_over="rows"``) or ``Σ w`` ("weights"), or ``Σ w·l`` ("sum"); "loss" is their
    reduction over the tasks with data.

    Args:
        loss_type: a ``LossType``, its name, or a callable ``(logits, labels) -> loss``, which gets logits and labels
            ``(rows, tasks, …)`` of any further dimensions and returns the loss of each row, ``(rows, tasks)``. One
            whose rows depend on each other needs a parameter ``valid``, the mask of the rows that count. Also a mapping
            task -> one of these; tasks with the same one are computed in one call. A module is trained with the loss,
            as its submodule. A task of type GIVEN has no rows here: its sums come by forward's ``given``, or those of
            all tasks by ``from_sums()``, the only way where all are GIVEN.
        tasks: the tasks' names, in the order of the columns.
        task_loss_reduction: "mean" or "sum", over rows.
        global_reduction: "mean", "sum", "min", "max", "median", or a callable ``(tasks,) -> 0-dim``, which may be a
            module with parameters (it is then a submodule of the loss). A callable gets 0 for a task without data.
        pos_weights: the factors of the positive terms; a number, or one a task. BCE_WITH_LOGITS only; where the types
            differ, a mapping that names some of the tasks that have it, or a number for all that do.
        task_weights: factors of the tasks' losses inside the reduction over tasks; their own entries stay raw.
        mean_over: "rows" divides by the number of valid rows, "weights" by the sum of their weights.
        ignore_index: the label that says "missing", NaN allowed; such rows are in no sum and get no gradient. Also a
            mapping task -> label; a task that is left out has none.
        global_batch: return, on every rank, the losses of this step's rows of all ranks, with the gradient that makes
            DDP's average the gradient of one process. One collective in forward, in evaluation and where activation
            checkpointing recomputes it in backward too, so every rank has to call it equally often: a rank that has
            run out of rows with an empty batch.
        gradient_reduction: what becomes of the ranks' gradients, their "mean" (DDP, FSDP) or their "sum"; with
            ``global_batch`` it is the gradient of one process. With "sum" so is that by inputs, which stays a rank's.
        process_group: the ranks to sum over, also as a 1-D ``DeviceMesh``; None: all.
        quality: True, or a ``RankingQuality`` to be copied, for running sums of the quality of the predictions, without
            the pos_weights, from the logits at hand; of the tasks with BCE_WITH_LOGITS, which a given one has to have.
        segments: dimensions by which the metrics also keep their sums: names of ids, or their number, such as
            ``{"country": ["DE", "US"], "surface": 3}``. A dimension has a cell for each id and "other" for the rest,
            which add up to the total. Each adds keys such as "loss/like/country=DE" and "loss/country=other" to the
            metrics' results. forward then has to be given the ids; its own result is the same with and without.
        validate_args: count the rows with an invalid label (outside of [0, 1], or no class) and those of negative
            weight, on the device and without waiting for it; ``compute()`` of ``train_metric`` and ``eval_metric``
            warns with the counts by task. Labels of a callable may be anything. A class that does not exist then has a
            loss of infinity, where torch otherwise raises on a CPU and aborts the process on a GPU.
        fused: compile the pass over the rows of the tasks with BCE_WITH_LOGITS into one kernel with ``torch.compile``:
            faster where batches are large. It needs a C++ compiler for tensors on a CPU, and Triton for those on a GPU.

    Attributes:
        train_metric: the ``GlobalLoss`` that forward feeds in training mode.
        eval_metric: the one that it feeds in evaluation mode.
        train_quality: with ``quality``, the ``RankingQuality`` that forward feeds in training mode.
        eval_quality: with ``quality``, the one that it feeds in evaluation mode.

    Raises:
        TypeError: for an argument of a wrong type, or one that there is not.
        ValueError: for an argument of a wrong value.

    Examples:
        >>> import torch
        >>> from twloss import MultiTaskLoss
        >>> loss = MultiTaskLoss("bce_with_logits", ["like", "reply"])
        >>> losses = loss(torch.tensor([[0.0, 2], [1, -1]]), torch.tensor([[1, 1], [1, 0]]))
        >>> {key: round(value.item(), 4) for key, value in losses.items()}
        {'loss/like': 0.5032, 'loss/reply': 0.2201, 'loss': 0.3616}
    """

    def __init__(
        self,
        # The mapping first: jsonargparse takes one for the arguments of a callable.
        loss_type: Mapping[str, TaskLossType] | TaskLossType,
        tasks: Sequence[str],
        task_loss_reduction: RowReduction = "mean",
        global_reduction: GlobalReduction = "mean",
        pos_weights: PerTask | None = None,
        *,
        task_weights: PerTask | None = None,
        mean_over: MeanOver = "rows",
        ignore_index: IgnoreIndex = None,
        global_batch: bool = False,
        gradient_reduction: GradientReduction = "mean",
        process_group: RankGroup | None = None,
        quality: bool | RankingQuality = False,
        segments: SegmentNames | None = None,
        validate_args: bool = False,
        fused: bool = False,
    ) -> None:
        options = LossOptions(
            loss_type=loss_type,
            tasks=tasks,
            task_loss_reduction=task_loss_reduction,
            global_reduction=global_reduction,
            pos_weights=pos_weights,
            mean_over=mean_over,
            ignore_index=ignore_index,
            global_batch=global_batch,
            gradient_reduction=gradient_reduction,
            process_group=process_group,
            quality=is_wanted(quality),
            segments=segments,
            validate_args=validate_args,
            fused=fused,
        )
        super().__init__(options, per_task_numbers("task_weights", task_weights, options.columns), quality)
        warn_unless_mean(global_batch, task_loss_reduction=task_loss_reduction, global_reduction=global_reduction)

    @torch.jit.unused
    def forward(
        self,
        logits: TaskTensors,
        labels: TaskTensors,
        weights: TaskTensors | None = None,
        *,
        normalizer: Tensor | float | None = None,
        given: Given | None = None,
        segments: SegmentIds | None = None,
    ) -> dict[str, Tensor]:
        """The losses of a batch.

        Each of the three inputs may also be a mapping task -> ``(rows,)`` or ``(rows, 1)``; with CROSS_ENTROPY the
        logits map to ``(rows, classes)``, and the numbers of classes may differ. Where all three are mappings, so may
        the numbers of rows; a task without any has tensors of 0 rows.

        Args:
            logits: ``(rows, tasks)``, or ``(rows, tasks, classes)`` for CROSS_ENTROPY.
            labels: ``(rows, tasks)``, in [0, 1], any dtype; class indices for CROSS_ENTROPY.
            weights: ``(rows, tasks)``, ``(rows, 1)`` or ``(rows,)``; None: 1.
            normalizer: what the means divide by in place of the batch's own weights, 0-dim or ``(tasks,)``: the total
                over all micro-batches and ranks of one optimizer step, which makes gradient accumulation exact.
            given: the losses of the tasks of type GIVEN, a mapping task -> (loss_sum, weight), as for ``from_sums()``,
                or -> a 0-dim loss, which counts as one row a rank and step. They have no column in the inputs.
            segments: a mapping dimension -> ids: integers ``(rows,)``, ``(rows, 1)`` or ``(rows, tasks)``, or a mapping
                task -> ``(rows,)``. An id is a name's place in its list; any other, such as -1, is in the cell "other".

        Returns:
            The loss of each task under ``"loss/<task>"``, in the tasks' order, and the global one under ``"loss"``;
            0-dim, float64 where the logits or a given loss are, and float32 otherwise. A task without data has a loss
            of 0 with a gradient of 0.

        Raises:
            TypeError: for an input of a wrong type or dtype.
            ValueError: for names, shapes or devices that do not fit, or a normalizer with a reduction that does not add
                up over micro-batches.
            RuntimeError: with ``fused``, where torch.compile fails, for want of a compiler above all; with
                ``global_batch``, from the backend's, if a rank does not call it or is gone; in torch.jit.trace, which
                would make the number of rows a constant.
        """
        return self._losses(logits, labels, weights, normalizer, given=given, segments=segments)

    @torch.jit.unused
    def from_sums(
        self, loss_sum: LossSums, weight: Weights, *, normalizer: Tensor | float | None = None
    ) -> dict[str, Tensor]:
        """The losses of a batch whose rows were summed elsewhere: all that forward does after its pass over the rows.

        Losses, running sums, ranks and gradients are those that forward would have given for the rows. The gradient
        that reaches ``loss_sum`` is one number a task. The sums are those of all tasks, of whatever type.

        Args:
            loss_sum: Σ w·l over the rows, with its graph: ``(tasks,)``, or a mapping task -> 0-dim.
            weight: what the mean divides by, the number of rows or Σ w: likewise, or a number that all tasks share. It
                is detached. 0: no data.
            normalizer: as for forward.

        Returns:
            The losses, as those of forward.

        Raises:
            TypeError: for an argument of a wrong type or dtype.
            ValueError: for names, shapes or devices that do not fit, or a number that is not finite.
            RuntimeError: as forward.

        Examples:
            >>> import torch
            >>> from twloss import MultiTaskLoss
            >>> loss = MultiTaskLoss("given", ["text", "image"])
            >>> losses = loss.from_sums(torch.tensor([6.0, 1.0]), weight={"text": 4, "image": 2})
            >>> {key: value.item() for key, value in losses.items()}
            {'loss/text': 1.5, 'loss/image': 0.5, 'loss': 1.0}
        """
        return self._losses_of_sums(loss_sum, weight, normalizer)

    if TYPE_CHECKING:
        tasks: tuple[str, ...]
        task_loss_reduction: RowReduction
        pos_weights: tuple[float, ...] | None
        __call__ = forward
