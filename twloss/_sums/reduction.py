"""From sums to losses: the only place that divides a task's loss by its weight, and that knows the keys of a result.

``TaskSums`` ``(tasks,)`` come in; ``{"loss/<task>": …, "loss": …}`` goes out. The forward pass and ``compute()`` both
reduce here, so they cannot drift.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from twloss._arguments import RowReduction, TaskReduction, check_dense, check_number
from twloss._precision import sum_dtype
from twloss._sums.ranks import scale_gradient
from twloss._sums.sums import TaskSums
from twloss._torch import copy_to_call, takes_keyword, unwrapped, weigh


class TakesPresent(Protocol):
    """A reduction over tasks that wants to know which have data."""

    def __call__(self, losses: Tensor, /, *, present: Tensor) -> Tensor:
        """The global loss, 0-dim."""


GlobalReduction = TaskReduction | Callable[[Tensor], Tensor] | TakesPresent


@dataclass(frozen=True)
class Reduction:
    """Sums -> the tasks' losses -> the global loss."""

    keys: tuple[str, ...]
    """The keys of the result, in order, without those of cells. A single task has only "loss"."""
    over_rows: RowReduction
    """The loss of a task: "mean" is ``loss_sum / weight``, "sum" is ``loss_sum``."""
    over_tasks: GlobalReduction
    """The global loss, over the tasks with data: "mean", "sum", "min", "max", "median" (the lower one of an even count;
    ties share the gradient), or a callable from ``(tasks,)`` to 0-dim, which gets 0 for a task without data."""
    takes_present: bool
    """Whether the callable also wants to know which tasks have data."""

    @classmethod
    def of(cls, tasks: tuple[str, ...] | None, over_rows: RowReduction, over_tasks: GlobalReduction) -> Reduction:
        """The reduction of these tasks; None: of one, whose only key is "loss"."""
        keys = (*(f"loss/{task}" for task in tasks or ()), "loss")
        return cls(keys, over_rows, over_tasks, callable(over_tasks) and takes_keyword(over_tasks, "present"))

    def without_keys(self) -> Reduction:
        """A copy without keys, so that passes that differ only in names share compiled code."""
        return replace(self, keys=())

    def of_now(self, *, is_async: bool) -> Reduction:
        """A copy in which a module is as it is now, and is left as it is.

        Args:
            is_async: whether it is called later, when the module may have changed: its parameters, and its attributes.

        Raises:
            TypeError: with ``is_async``, for a module that can't be copied.
        """
        if not isinstance(self.over_tasks, nn.Module):
            return self
        return replace(self, over_tasks=_ModuleOfNow(self.over_tasks, is_async=is_async))

    def check_normalizer(self, normalizer: Tensor | float, loss_sum: Tensor) -> Tensor | float:
        """Check a normalizer and return it as the divisor of the means, in place of the weights."""
        if self.over_rows != "mean" or not self.adds_up:
            rule = f"reduction={self.over_rows!r}"
            if len(self.keys) > 1:
                rule = f"task_loss_{rule} and global_reduction={self.over_tasks!r}"
            raise ValueError(
                f"normalizer: got one with {rule}, expected 'mean' over rows, and 'mean' or 'sum' over tasks: no other "
                "loss is the sum of those of its parts"
            )
        if not isinstance(normalizer, Tensor):
            return check_number("normalizer", normalizer)
        check_dense("normalizer", normalizer)
        if normalizer.shape not in ((), loss_sum.shape):
            raise ValueError(f"normalizer: got shape {tuple(normalizer.shape)}, expected () or {tuple(loss_sum.shape)}")
        if normalizer.device != loss_sum.device:
            raise ValueError(f"normalizer: got a tensor on {normalizer.device}, expected {loss_sum.device}")
        return normalizer.detach().to(sum_dtype(loss_sum.device)).expand(loss_sum.shape)

    def reduce(
        self,
        sums: TaskSums,
        task_weights: Tensor | None,
        dtype: torch.dtype,
        *,
        is_final: bool,
        gradient_factor: float = 1.0,
    ) -> dict[str, Tensor]:
        """The losses of sums by their keys, as those of ``values``."""
        losses, loss = self.values(sums, task_weights, dtype, is_final=is_final)
        if gradient_factor != 1:
            losses, loss = scale_gradient(losses, gradient_factor), scale_gradient(loss, gradient_factor)
        return self.by_key(losses, loss)

    def by_key(self, losses: Tensor, loss: Tensor) -> dict[str, Tensor]:
        """The tasks' losses ``(tasks,)`` and the global one by their keys; of one task the global one alone."""
        if len(self.keys) == 1:
            return {self.keys[0]: loss}
        return dict(zip(self.keys, (*losses.unbind(0), loss)))

    def values(
        self, sums: TaskSums, task_weights: Tensor | None, dtype: torch.dtype, *, is_final: bool
    ) -> tuple[Tensor, Tensor]:
        """The losses of sums.

        Args:
            sums: ``(tasks,)``, or for compute() ``(1 + cells, tasks)``, of which each row is reduced by itself.
            task_weights: ``(tasks,)`` factors of the losses inside the reduction over tasks; None: 1.
            dtype: of the result.
            is_final: False for a batch's, to train on: without data a loss is 0 with a gradient of 0, and its head
                stays in the graph. True for what compute() gives: NaN, as nothing was measured.

        Returns:
            The tasks' losses, in the shape of the sums, and the global one, 0-dim, or ``(1 + cells,)``.
        """
        losses, weight = sums
        if not (isinstance(weight, Tensor) or weight):
            weight = torch.zeros_like(losses)
        present = None
        if isinstance(weight, Tensor):
            present = weight != 0
            losses, weight = losses.where(present, 0.0), weight.to(losses.dtype).where(present, 1.0)
        losses = (losses if self.over_rows == "sum" else losses / weight).to(dtype)
        is_one = len(self.keys) == 1
        loss = losses.squeeze(-1) if is_one else self._over_tasks(losses, present, task_weights).to(losses)
        if is_final and present is not None:
            losses, loss = losses.where(present, math.nan), loss.where(present.any(-1), math.nan)
        return losses, loss

    @property
    def adds_up(self) -> bool:
        """True if losses are linear in the tasks' sums; ``gradient`` requires it."""
        return self.over_tasks in ("mean", "sum")

    def gradient(
        self,
        weight: Tensor | float,
        task_weights: Tensor | None,
        grad_losses: Tensor | None,
        grad_loss: Tensor | None,
        tasks: int,
    ) -> Tensor:
        """The gradient by the sums of what ``adds_up``, ``(tasks,)``, or 0-dim where it is the same for all.

        Args:
            weight: of the ``TaskSums``.
            task_weights: as for ``values``.
            grad_losses: the gradient by the tasks' losses ``(tasks,)``; None: 0.
            grad_loss: that by the global one, 0-dim; None: 0.
            tasks: the number of tasks.
        """
        present, divisor = None, weight
        if isinstance(weight, Tensor):
            present = weight != 0
            divisor = weight.where(present, 1.0)
        if self.over_rows == "sum":
            divisor = 1.0
        count: Tensor | float = 1.0
        if self.over_tasks == "mean":
            count = tasks if present is None else present.sum().clamp(min=1)
        if grad_loss is None:
            assert grad_losses is not None
            grad = grad_losses / divisor
        else:
            if task_weights is not None:
                grad_loss = weigh(grad_loss.expand_as(task_weights), task_weights)
            grad = grad_loss / (count * divisor)
            grad = grad if grad_losses is None else grad + grad_losses / divisor
        return grad if present is None else grad.where(present, 0.0)

    def _over_tasks(self, losses: Tensor, present: Tensor | None, task_weights: Tensor | None) -> Tensor:
        """The global loss of the tasks with data; 0 where there is none. ``present`` None: all."""
        if task_weights is not None:
            losses = weigh(losses, task_weights)
        if callable(self.over_tasks):
            if losses.ndim > 1:
                assert present is not None  # compute() has a tensor of weights
                return torch.stack([self._call(self.over_tasks, *each) for each in zip(losses, present)])
            return self._call(self.over_tasks, losses, present)
        if self.over_tasks == "sum":
            return losses.sum(-1)
        if self.over_tasks == "mean":
            return losses.mean(-1) if present is None else losses.sum(-1) / present.sum(-1).clamp(min=1)
        if present is not None:
            losses = _with_neutral_absents(losses, present, self.over_tasks)
        if self.over_tasks == "median":
            # median() shares the gradient between ties; median(-1) does not.
            loss = losses.median() if losses.ndim == 1 else losses.median(-1).values
        else:
            loss = losses.amin(-1) if self.over_tasks == "min" else losses.amax(-1)
        return loss if present is None else loss.where(present.any(-1), 0.0)

    def _call(self, over_tasks: Callable[..., Tensor], losses: Tensor, present: Tensor | None) -> Tensor:
        # A copy: what it does in place must not reach the tasks' own entries.
        losses, options = losses.clone(), {}
        if self.takes_present:
            options["present"] = torch.ones_like(losses, dtype=torch.bool) if present is None else present
        return _call_reduction(over_tasks, losses, options)


def _with_neutral_absents(losses: Tensor, present: Tensor, reduction: str) -> Tensor:
    """Replace absent tasks' losses by values that the reduction ignores."""
    if reduction != "median":
        return losses.masked_fill(~present, {"min": math.inf, "max": -math.inf}[reduction])
    # With k of the absent at -inf and the others at +inf, the lower median of all is that of the present. Unlike
    # nanmedian, this keeps a loss of NaN visible.
    absent = ~present
    k = (present.shape[-1] - 1) // 2 - (present.sum(-1, keepdim=True) - 1).clamp(min=0) // 2
    low = absent.cumsum(-1) <= k
    return losses.masked_fill(absent & low, -math.inf).masked_fill(absent & ~low, math.inf)


def _call_reduction(reduction: Callable[..., Tensor], losses: Tensor, options: dict[str, Tensor]) -> Tensor:
    """Call a reduction and check its result."""
    loss = reduction(losses, **options)
    check_dense("global_reduction", loss, verb="the callable gave", tensor="a 0-dim Tensor", kind="floating")
    if loss.ndim != 0 or loss.device != losses.device:
        raise ValueError(
            f"global_reduction: the callable gave shape {tuple(loss.shape)} on {loss.device}, "
            f"expected a 0-dim Tensor on {losses.device}"
        )
    return loss


class _ModuleOfNow:
    """A module with copies of its parameters and buffers; to be called later, it is a copy itself."""

    def __init__(self, module: nn.Module, *, is_async: bool) -> None:
        self.module = unwrapped(module)
        named = (*self.module.named_parameters(), *self.module.named_buffers())
        # Outside of its wrapped model's forward, FSDP2 leaves a rank no more than its shards of them.
        whole = {name: each.full_tensor() if hasattr(each, "full_tensor") else each for name, each in named}
        self.tensors = {name: each.detach().clone() for name, each in whole.items()}
        # One that is scripted takes no other tensors.
        self.is_copy = is_async or isinstance(self.module, torch.jit.ScriptModule)
        if self.is_copy:
            values = {id(each): self.tensors[name] for name, each in named}
            self.module = copy_to_call(self.module, values, "global_reduction")

    def __call__(self, losses: Tensor, **options: Tensor) -> Any:
        """Apply the module in its parameters' dtype (at least float32) and on their device."""
        like = next((self.tensors[name] for name, _ in self.module.named_parameters()), losses)
        losses, device = losses.to(like.device, torch.promote_types(like.dtype, torch.float32)), losses.device
        options = {name: value.to(like.device) for name, value in options.items()}
        if self.is_copy:
            loss = self.module(losses, **options)
        else:
            loss = functional_call(self.module, self.tensors, (losses,), options)
        return loss.to(device) if isinstance(loss, Tensor) else loss
