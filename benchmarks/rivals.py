"""What people use today, each in its best idiomatic form, on the same tensors as twloss.

All do forward and backward of the mean over tasks of each task's weighted mean binary cross-entropy, and drop the
gradient. pos_weights are tensors made beforehand. What each one adds, and leaves out, stands at the function.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric

from benchmarks.paired import Step
from benchmarks.workload import Workload

with warnings.catch_warnings():
    # Both call parts of torch.jit that torch 2.13 deprecates.
    warnings.simplefilter("ignore", DeprecationWarning)
    from ignite.metrics import Loss as IgniteLoss
    from torcheval.metrics import Mean as TorchevalMean

__all__ = [
    "LOOP",
    "LOOP_FORWARD",
    "PLAIN",
    "STEPS",
    "copy_of_the_bytes",
    "exp_and_log1p",
    "loop",
    "loop_with_mean_metric_forward",
    "plain",
]

LOOP = "loop over tasks"
LOOP_FORWARD = "loop + MeanMetric.forward"
PLAIN = "plain BCE, no tracking"


def plain(work: Workload) -> Step:
    """One call over ``(rows, tasks)``, then the means of the tasks and their mean. Nothing is tracked."""

    def step() -> None:
        # The unreduced loss has no name here that would keep it during the backward pass.
        loss = F.binary_cross_entropy_with_logits(
            work.logits, work.labels, work.weights, pos_weight=work.pos_weights, reduction="none"
        ).mean(0)
        loss.mean().backward()
        work.logits.grad = None

    return step


def plain_global(work: Workload) -> Step:
    """One call that gives the global loss alone: less work than the others, no task's loss is known."""

    def step() -> None:
        F.binary_cross_entropy_with_logits(
            work.logits, work.labels, work.weights, pos_weight=work.pos_weights
        ).backward()
        work.logits.grad = None

    return step


def loop(work: Workload) -> Step:
    """One call a task on a column, as the-algorithm-ml does. Nothing is tracked."""
    return _loop(work, lambda _: None)


def loop_by_unbind(work: Workload) -> Step:
    """The loop with columns from one ``unbind``, whose backward is one kernel. Nothing is tracked."""
    pos_weights = _columns(work.pos_weights, work, dim=0)

    def step() -> None:
        columns = (work.logits.unbind(1), work.labels.unbind(1), _columns(work.weights, work, dim=1), pos_weights)
        torch.stack([_bce(*column) for column in zip(*columns)]).mean().backward()
        work.logits.grad = None

    return step


def loop_with_mean_metric_update(work: Workload) -> Step:
    """The loop, and a torchmetrics ``MeanMetric`` a task that is updated with the loss and the number of rows."""
    metrics, rows = _mean_metrics(work), len(work.logits)

    def track(losses: list[Tensor]) -> None:
        for metric, loss in zip(metrics, losses):
            metric.update(loss.detach(), rows)

    return _loop(work, track)


def loop_with_mean_metric_forward(work: Workload) -> Step:
    """The loop, and ``MeanMetric.forward``, which also returns the batch's value: what Lightning's log() calls."""
    metrics, rows = _mean_metrics(work), len(work.logits)

    def track(losses: list[Tensor]) -> None:
        for metric, loss in zip(metrics, losses):
            metric(loss.detach(), rows)

    return _loop(work, track)


def loop_with_torcheval_mean(work: Workload) -> Step:
    """The loop, and a torcheval ``Mean`` a task that is updated with the loss and the number of rows."""
    means, rows = [TorchevalMean(device=work.logits.device) for _ in work.tasks], len(work.logits)

    def track(losses: list[Tensor]) -> None:
        for mean, loss in zip(means, losses):
            mean.update(loss.detach(), weight=rows)

    return _loop(work, track)


def loop_with_ignite_loss(work: Workload) -> Step:
    """The loop, and an ignite ``Loss`` a task, which is given the loss at hand rather than made to compute it again."""
    metrics = [IgniteLoss(lambda loss, _: loss, device=work.logits.device) for _ in work.tasks]

    def track(losses: list[Tensor]) -> None:
        for metric, loss in zip(metrics, losses):
            metric.update((loss.detach(), work.labels))

    return _loop(work, track)


STEPS: dict[str, Callable[[Workload], Step]] = {
    PLAIN: plain,
    "plain BCE, global loss only": plain_global,
    LOOP: loop,
    "loop, columns by unbind": loop_by_unbind,
    "loop + MeanMetric.update": loop_with_mean_metric_update,
    LOOP_FORWARD: loop_with_mean_metric_forward,
    "loop + torcheval Mean": loop_with_torcheval_mean,
    "loop + ignite Loss": loop_with_ignite_loss,
}


def exp_and_log1p(work: Workload) -> Step:
    """One pass of ``exp`` and one of ``log1p`` over the logits: what binary cross-entropy can't do without."""
    logits = work.logits.detach()

    def step() -> Tensor:
        return torch.log1p(torch.exp(logits))

    return step


def copy_of_the_bytes(work: Workload) -> Step:
    """A copy that moves as many bytes, read and written, as logits, labels and weights have."""
    inputs = [values for values in (work.logits, work.labels, work.weights) if values is not None]
    moved = sum(values.numel() * values.element_size() for values in inputs)
    source = torch.ones(moved // 8, device=work.logits.device)
    target = torch.empty_like(source)

    def step() -> Tensor:
        return target.copy_(source)

    return step


def _loop(work: Workload, track: Callable[[list[Tensor]], None]) -> Step:
    pos_weights = _columns(work.pos_weights, work, dim=0)

    def step() -> None:
        losses = []
        for t, pos_weight in enumerate(pos_weights):
            weights = None if work.weights is None else work.weights[:, t]
            losses.append(_bce(work.logits[:, t], work.labels[:, t], weights, pos_weight))
        torch.stack(losses).mean().backward()
        track(losses)
        work.logits.grad = None

    return step


def _bce(logits: Tensor, labels: Tensor, weights: Tensor | None, pos_weight: Tensor | None) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, labels, weights, pos_weight=pos_weight)


def _columns(values: Tensor | None, work: Workload, *, dim: int) -> tuple[Tensor | None, ...]:
    """One entry a task."""
    return (None,) * len(work.tasks) if values is None else values.unbind(dim)


def _mean_metrics(work: Workload) -> list[MeanMetric]:
    return [MeanMetric().to(work.logits.device) for _ in work.tasks]
