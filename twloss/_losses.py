"""The losses that are attached to a model: one batch from the caller's tensors to the losses to train on.

Logits, labels and weights come in; the tasks' losses and the global one go out, and the batch's detached sums are added
to ``train_metric`` or ``eval_metric``, by the module's mode.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.fx import Proxy

from twloss._arguments import (
    GradientReduction,
    IgnoreIndex,
    MeanOver,
    PerTask,
    RowReduction,
    check_choice,
    check_global_reduction,
    check_ignore_index,
    check_process_group,
    check_tasks,
    label_name,
    list_some,
    per_task_numbers,
    warn_local_normalizer,
    warn_unless_mean,
)
from twloss._constants import TaskConstants
from twloss._fx import find_proxy, record_call
from twloss._metrics.global_loss import GlobalLoss
from twloss._metrics.ranking_quality import RankingQuality
from twloss._rows.batch import align
from twloss._rows.mappings import TaskTensors
from twloss._rows.row_loss import LossType, loss_type_name
from twloss._rows.row_pass import Pass, Sums, is_closed_form, sum_bce
from twloss._rows.row_sums import sum_quality, sum_rows, sum_weights
from twloss._rows.task_group import (
    TaskLossType,
    TypeGroup,
    group_by_type,
    join_sums,
    join_tasks,
    order_of_groups,
    resolve_loss_types,
    resolve_pos_weights,
    split_inputs,
)
from twloss._sums.ranks import group_from_state, group_to_state, sum_over_ranks_with_gradient, world_size
from twloss._sums.reduction import GlobalReduction, Reduction
from twloss._sums.sums import TaskSums
from twloss._torch import has_forward_hooks


class _TaskLosses(nn.Module):
    """What the losses of one task and of several share: all but their signatures."""

    if TYPE_CHECKING:  # In the class itself, torch.jit would read the annotations and know none of the types.
        train_metric: GlobalLoss
        eval_metric: GlobalLoss
        train_quality: RankingQuality
        eval_quality: RankingQuality

    __jit_unused_properties__: ClassVar = ["task_weights"]
    # TorchRec's pipelines then trace into forward, whose result has the keys; of a leaf they would know none.
    _is_pytorch_fx_traceable = True

    # What is read-only once a loss is made.
    _settings = frozenset({
        "loss_type", "tasks", "reduction", "task_loss_reduction", "global_reduction", "pos_weight", "pos_weights",
        "mean_over", "ignore_index", "global_batch", "gradient_reduction", "process_group", "quality", "fused",
        "train_metric", "eval_metric", "train_quality", "eval_quality",
    })  # fmt: skip

    def __init__(
        self,
        loss_type: TaskLossType | Mapping[str, TaskLossType],
        tasks: tuple[str, ...] | None,
        reduction: Reduction,
        *,
        pos_weights: PerTask | None,
        task_weights: tuple[float, ...] | None,
        mean_over: MeanOver,
        ignore_index: IgnoreIndex,
        global_batch: bool,
        gradient_reduction: GradientReduction,
        process_group: dist.ProcessGroup | None,
        quality: bool | RankingQuality,
        fused: bool,
    ) -> None:
        super().__init__()
        types = resolve_loss_types(loss_type, tasks)
        numbers = resolve_pos_weights(pos_weights, types, tasks)
        check_process_group(process_group)
        check_choice("mean_over", mean_over, get_args(MeanOver))
        for name, value in (("global_batch", global_batch), ("fused", fused)):
            if not isinstance(value, bool):
                raise TypeError(f"{name}: got {type(value).__name__}, expected a bool")
        check_choice("gradient_reduction", gradient_reduction, get_args(GradientReduction))
        self.loss_type = types
        self.tasks = tasks
        self.mean_over = mean_over
        self.ignore_index = check_ignore_index(ignore_index, tasks)
        self.global_batch = global_batch
        self.gradient_reduction = gradient_reduction
        self.process_group = process_group
        setattr(self, "pos_weight" if tasks is None else "pos_weights", numbers)
        groups = group_by_type(types, tasks, numbers, self.ignore_index)
        for group, own_type in groups:
            setattr(self, group.attribute, own_type)
        self._groups = tuple(group for group, _ in groups)
        self._order = order_of_groups(self._groups, tasks)
        if fused:
            self._binary_group("fused", fused)
        self.fused = fused
        self._reduction = reduction
        self._rule = replace(reduction, keys=())
        # A module is trained with the loss, as its submodule.
        self.global_reduction = reduction.over_tasks
        setattr(self, "reduction" if tasks is None else "task_loss_reduction", reduction.over_rows)
        self._task_weights = TaskConstants(task_weights, (1.0,) * len(tasks or ("loss",)))
        self.quality = quality is not False
        for name in ("train_metric", "eval_metric"):
            metric = GlobalLoss(tasks, reduction.over_rows, reduction.over_tasks, process_group=process_group)
            metric._become_part_of(self._task_weights, self._describe(numbers))
            self.add_module(name, metric)
        for name in ("train_quality", "eval_quality") if self.quality else ():
            self.add_module(name, self._own_quality(quality))

    def _describe(self, pos_weights: tuple[float, ...] | None) -> dict[str, Any]:
        """What the sums are of, in JSON's types."""
        types = self.loss_type
        return {
            "loss_type": list(map(loss_type_name, types.values()))
            if isinstance(types, dict)
            else loss_type_name(types),
            "mean_over": self.mean_over,
            "pos_weights": None if pos_weights is None else list(pos_weights),
            "ignore_index": label_name(self.ignore_index),
        }

    def extra_repr(self) -> str:
        """The settings, for repr()."""
        types = self.loss_type
        name = list_some(types, 12) if isinstance(types, dict) else getattr(types, "value", types)
        rule = self._reduction.over_rows
        tasks = None if self.tasks is None else list_some(self.tasks, 12)
        return f"{name}, tasks={tasks}, reduction={rule}, global_batch={self.global_batch}"

    def _losses(
        self,
        logits: TaskTensors,
        labels: TaskTensors,
        weights: TaskTensors | None,
        normalizer: Tensor | float | None,
    ) -> dict[str, Tensor]:
        """The losses of a batch, whose sums are added to the running ones."""
        if (proxy := find_proxy(logits, labels, weights, normalizer)) is not None:
            return self._record(proxy, logits, labels, weights, normalizer)
        groups, parts = self._groups, [(logits, labels, weights)]
        if self.tasks is not None and len(groups) > 1:
            parts = split_inputs(groups, self.tasks, logits, labels, weights)
        is_direct = len(groups) == 1 and self._reduction.adds_up and not self.global_batch and normalizer is None
        metrics = self._metrics()
        sums = [self._sum(group, part, metrics, is_direct=is_direct) for group, part in zip(groups, parts)]
        whole = sums[0] if len(sums) == 1 else _join(sums, self._order)
        if whole.loss is not None:
            losses = self._reduction.by_key(whole.losses, whole.loss)
        else:
            losses = self._reduce(TaskSums(whole.losses, whole.weight), normalizer)
        # Last, so that a batch whose loss could not be computed is not in the running sums either.
        _track(whole, *metrics)
        return losses

    def _sum(
        self,
        group: TypeGroup,
        inputs: tuple[Any, ...],
        metrics: tuple[GlobalLoss, RankingQuality | None],
        *,
        is_direct: bool,
    ) -> Sums:
        """The sums of the tasks that share a loss type, or where that is all there is to do, their losses."""
        loss_type, takes_valid = getattr(self, group.attribute), group.takes_valid
        size = 1 if group.tasks is None else len(group.tasks)
        logits, labels, weights = inputs
        batch = align(logits, labels, weights, group.tasks, loss_type, group.ignore_index, takes_valid=takes_valid)
        metric, quality = metrics
        quality = quality if loss_type is LossType.BCE_WITH_LOGITS else None
        if is_closed_form(loss_type, batch):
            what = Pass(
                self._rule if is_direct else None,
                self.mean_over,
                self._reduction.over_rows,
                metric._drops_non_finite if len(self._groups) == 1 else None,
                None if quality is None else quality._drops_non_finite,
                quality is not None and quality.window_rows is not None,
            )
            task_weights = self._task_weights.like(batch.logits)
            return sum_bce(batch, size, what, group.pos_weights, task_weights, fused=self.fused)
        pos_weight = group.pos_weights.like(batch.logits)
        weight = sum_weights(batch, size, self.mean_over, self._reduction.over_rows)
        loss_sum, wide = sum_rows(loss_type, batch, pos_weight, size, takes_valid=takes_valid)
        known = wide if pos_weight is None else None
        four = None if wide is None or quality is None else quality._pack(sum_quality(batch, size, known))
        return Sums(loss_sum, None, weight, wide, four, None)

    def _reduce(self, local: TaskSums, normalizer: Tensor | float | None) -> dict[str, Tensor]:
        """The losses of this rank's sums, or of those of all ranks."""
        total, factor = local, 1.0
        if self.global_batch:
            total = sum_over_ranks_with_gradient(local, self.train_metric._names, self.process_group)
            if self.gradient_reduction == "sum":
                # Each rank has the whole gradient of the reduction's own parameters too.
                factor /= world_size(self.process_group)
        if normalizer is not None:
            total = TaskSums(total.loss_sum, self._check_normalizer(normalizer, local.loss_sum))
        dtype, task_weights = local.loss_sum.dtype, self._task_weights.like(local.loss_sum)
        return self._reduction.reduce(total, task_weights, dtype, is_final=False, gradient_factor=factor)

    def _record(self, proxy: Proxy, *inputs: Any) -> dict[str, Tensor]:
        """What stands for the losses in a graph of torch.fx that is being traced."""
        # What a subclass's own forward, or a hook, does is in the graph already, and must not be done twice.
        is_plain = type(self).forward.__module__ == __name__ and not has_forward_hooks(self)
        method = None if is_plain else "_losses"
        *tensors, normalizer = inputs
        result = record_call(proxy, self, method, *tensors, normalizer=normalizer)
        if self.tasks is None and method is None:
            return {"loss": result}
        return {key: result[key] for key in self._reduction.keys}

    def _check_normalizer(self, normalizer: Tensor | float, loss_sum: Tensor) -> Tensor | float:
        is_averaged = self.gradient_reduction == "mean" and not self.global_batch
        if is_averaged and not torch.compiler.is_compiling() and world_size(self.process_group) > 1:
            warn_local_normalizer()
        return self._reduction.check_normalizer(normalizer, loss_sum)

    def _metrics(self) -> tuple[GlobalLoss, RankingQuality | None]:
        """The metrics of this mode."""
        if self.training:
            return self.train_metric, self.train_quality if self.quality else None
        return self.eval_metric, self.eval_quality if self.quality else None

    @property
    def task_weights(self) -> tuple[float, ...] | None:
        """The factors of the tasks' losses in the global one; set, in any form that the constructor takes, at any time.

        It reaches forward and both metrics at once, whose compute() weighs all steps by it; a compiled forward is not
        compiled again, and a backward pass that is under way keeps the factors that its forward had.
        """
        return self._task_weights.numbers

    @task_weights.setter
    def task_weights(self, values: PerTask | None) -> None:
        self._task_weights.set(per_task_numbers("task_weights", values, self.tasks or ("loss",)))

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "task_weights" and name not in self._settings:
            # Past nn.Module, which would register a parameter or a module under the name.
            object.__setattr__(self, name, value)
            return
        is_setting = name in self._settings or name.startswith("loss_type_")
        modules = self.__dict__.get("_modules", {})
        # TorchRec's DistributedModelParallel puts each child of a module back in its place.
        if is_setting and "train_metric" in modules and modules.get(name, self) is not value:
            raise AttributeError(f"{name}: got a change of it, expected a new loss that is made with it")
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name not in ("train_quality", "eval_quality"):
                raise
        raise AttributeError(f"{name}: got a loss with quality=False, expected one that is made with quality=True")

    def _binary_group(self, argument: str, value: object) -> TypeGroup:
        """The tasks with BCE_WITH_LOGITS, without which an argument makes no sense."""
        groups = [group for group in self._groups if getattr(self, group.attribute) is LossType.BCE_WITH_LOGITS]
        if not groups:
            types = list_some(self.loss_type) if isinstance(self.loss_type, dict) else self.loss_type
            raise ValueError(f"{argument}: got {value} with {types}, expected it with BCE_WITH_LOGITS only")
        return groups[0]

    def _own_quality(self, quality: bool | RankingQuality) -> RankingQuality:
        """A metric for the quality of this loss's logits, as the argument says."""
        if not isinstance(quality, (bool, RankingQuality)):
            raise TypeError(f"quality: got {type(quality).__name__}, expected a bool or a RankingQuality")
        group = self._binary_group("quality", quality)
        if isinstance(quality, bool):
            return RankingQuality(group.tasks, ignore_index=group.ignore_index, process_group=self.process_group)
        found, expected = (
            f"tasks={each.tasks and list_some(each.tasks)}, ignore_index={each.ignore_index}"
            for each in (quality, group)
        )
        if quality.tasks != group.tasks or label_name(quality.ignore_index) != label_name(group.ignore_index):
            raise ValueError(
                f"quality: got one with {found}, expected {expected}, as the loss's tasks with BCE_WITH_LOGITS have"
            )
        if quality.process_group not in (None, self.process_group):
            raise ValueError("quality: got one with another process_group, expected that of the loss, or none")
        own = copy.deepcopy(quality)
        own.process_group = self.process_group
        own.reset()
        return own

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _TaskLosses:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for constants in (self._order, self._task_weights, *(group.pos_weights for group in self._groups)):
            constants.place(fn(torch.empty(0, device=self.train_metric.device)).device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return group_to_state(super().__getstate__())  # type: ignore[no-untyped-call]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(group_from_state(state))  # type: ignore[no-untyped-call]


def _join(sums: Sequence[Sums], order: TaskConstants) -> Sums:
    """The sums of several groups of tasks as those of all."""
    loss_sum, weight = join_sums([TaskSums(each.losses, each.weight) for each in sums], order)
    updates = [each.update for each in sums if each.update is not None]
    update = join_tasks(updates, order) if len(updates) == len(sums) else None
    qualities = [each.quality for each in sums if each.quality is not None]  # no next(), which torch 2.6 can't compile
    return Sums(loss_sum, None, weight, update, qualities[0] if qualities else None, None)


def _track(sums: Sums, metric: GlobalLoss, quality: RankingQuality | None) -> None:
    """Add a batch to the metrics of its mode; to none of them where one refuses it."""
    if (update := sums.update) is None:
        return
    metric._prepare_for(update)
    if update.ndim == 1:
        update = metric._pack(TaskSums(update, sums.weight))
    if quality is not None and sums.quality is not None:
        quality._prepare_for(update)
        quality._put(sums.quality)
    metric._put(update)


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

    _settings = _TaskLosses._settings | {"task_weights"}

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
        process_group: dist.ProcessGroup | None = None,
        quality: bool | RankingQuality = False,
        fused: bool = False,
    ) -> None:
        check_choice("reduction", reduction, get_args(RowReduction))
        super().__init__(
            loss_type,
            None,
            Reduction.of(None, reduction, "mean"),
            pos_weights=pos_weight,
            task_weights=None,
            mean_over=mean_over,
            ignore_index=ignore_index,
            global_batch=global_batch,
            gradient_reduction=gradient_reduction,
            process_group=process_group,
            quality=quality,
            fused=fused,
        )
        warn_unless_mean(global_batch, reduction=reduction)

    @torch.jit.unused
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
            RuntimeError: with ``fused``, where torch.compile fails, for want of a compiler above all.
        """
        return self._losses(logits, labels, weights, normalizer)["loss"]

    if TYPE_CHECKING:
        reduction: RowReduction
        pos_weight: tuple[float, ...] | None
        __call__ = forward  # nn.Module's own has no types


class MultiTaskLoss(_TaskLosses):
    """The losses of several tasks and the global loss that reduces them, with their running sums.

    With l the unreduced loss, w the weights and the sums over a task's valid rows, its loss is ``Σ w·l / N`` ("mean"),
    where N is the number of rows (``mean_over="rows"``) or ``Σ w`` ("weights"), or ``Σ w·l`` ("sum"); "loss" is their
    reduction over the tasks with data.

    Args:
        loss_type: a ``LossType``, its name, or a callable ``(logits, labels) -> loss`` that gives the unreduced loss in
            the labels' shape ``(rows, tasks)``, or in that without their last dimension where it is one of classes.
            Also a mapping task -> one of these; tasks with the same one are computed in one call. A module is trained
            with the loss, as its submodule.
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
            DDP's average the gradient of one process. One collective in forward, in evaluation too, so every rank
            has to call it equally often: a rank that has run out of rows with an empty batch.
        gradient_reduction: what becomes of the ranks' gradients, their "mean" (DDP, FSDP) or their "sum"; with
            ``global_batch`` it is the gradient of one process. With "sum" so is that by inputs, which stays a rank's.
        process_group: the ranks to sum over; None: all.
        quality: True, or a ``RankingQuality`` to be copied, for running sums of the quality of the predictions, without
            the pos_weights, from the logits at hand; of the tasks with BCE_WITH_LOGITS, which a given one has to have.
        fused: have torch.compile make one function of the pass over the rows, of the tasks with BCE_WITH_LOGITS: faster
            where batches are large. It needs a C++ compiler for tensors on a CPU, and Triton for those on a GPU.

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
        process_group: dist.ProcessGroup | None = None,
        quality: bool | RankingQuality = False,
        fused: bool = False,
    ) -> None:
        tasks = check_tasks(tasks)
        check_choice("task_loss_reduction", task_loss_reduction, get_args(RowReduction))
        check_global_reduction(global_reduction)
        super().__init__(
            loss_type,
            tasks,
            Reduction.of(tasks, task_loss_reduction, global_reduction),
            pos_weights=pos_weights,
            task_weights=per_task_numbers("task_weights", task_weights, tasks),
            mean_over=mean_over,
            ignore_index=ignore_index,
            global_batch=global_batch,
            gradient_reduction=gradient_reduction,
            process_group=process_group,
            quality=quality,
            fused=fused,
        )
        warn_unless_mean(global_batch, task_loss_reduction=task_loss_reduction, global_reduction=global_reduction)

    @torch.jit.unused
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
        logits map to ``(rows, classes)``, and the numbers of classes may differ. Where all three are mappings, so may
        the numbers of rows; a task without any has tensors of 0 rows.

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
            RuntimeError: with ``fused``, where torch.compile fails, for want of a compiler above all.
        """
        return self._losses(logits, labels, weights, normalizer)

    if TYPE_CHECKING:
        tasks: tuple[str, ...]
        task_loss_reduction: RowReduction
        pos_weights: tuple[float, ...] | None
        __call__ = forward
