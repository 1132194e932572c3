"""The work that is measured: one batch of a size, and twloss's own step on it.

A step is forward, backward and tracking. It ends with the gradient dropped, as ``optimizer.zero_grad()`` does, so that
each backward hands its gradient over and none has to add to the last one. Labels are float32 as torch's binary cross-
entropy demands them, so that no rival pays for a cast.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.paired import FULL, QUICK, Effort, Step
from twloss import MultiTaskLoss

__all__ = [
    "FUSED",
    "OURS",
    "Setting",
    "Workload",
    "kind_of",
    "make_loss",
    "make_workload",
    "step_of",
    "tracked_forward",
    "tracked_step",
]

OURS, FUSED = "twloss", "twloss, fused"


@dataclass(frozen=True)
class Setting:
    """What the command line asks of every benchmark."""

    device: torch.device
    quick: bool

    @property
    def effort(self) -> Effort:
        """How long to measure one case."""
        return QUICK if self.quick else FULL


@dataclass(frozen=True)
class Workload:
    """One batch, ``(rows, tasks)`` each; weights and pos_weights None for the plainest loss."""

    logits: Tensor
    labels: Tensor
    weights: Tensor | None
    pos_weights: Tensor | None

    @property
    def size(self) -> str:
        """The size, as a table shows it."""
        rows, tasks = self.logits.shape
        return f"{rows:,} × {tasks}"

    @property
    def tasks(self) -> list[str]:
        """The tasks' names."""
        return [f"task{t}" for t in range(self.logits.shape[1])]


def make_workload(rows: int, tasks: int, device: torch.device, *, weighted: bool = True) -> Workload:
    """A batch of random logits, labels of which a fifth are 1, and, if weighted, weights and pos_weights."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, tasks, generator=generator).to(device).requires_grad_()
    labels = (torch.rand(rows, tasks, generator=generator) < 0.2).float().to(device)
    if not weighted:
        return Workload(logits, labels, None, None)
    weights = torch.rand(rows, tasks, generator=generator).to(device)
    return Workload(logits, labels, weights, torch.linspace(1.0, 5.0, tasks, device=device))


def kind_of(*, weighted: bool) -> str:
    """The kind of a workload, as a table shows it."""
    return "weights, pos_weights" if weighted else "no weights"


def make_loss(work: Workload, **options: bool) -> MultiTaskLoss:
    """The module of twloss for a workload, with every guarantee on."""
    loss = MultiTaskLoss("bce_with_logits", work.tasks, pos_weights=work.pos_weights, **options)  # type: ignore[arg-type]
    return loss.to(work.logits.device)


def tracked_step(work: Workload, *, fused: bool = False) -> Step:
    """Forward, backward, tracking."""
    return step_of(make_loss(work, fused=fused), work)


def step_of(loss: Callable[..., dict[str, Tensor]], work: Workload) -> Step:
    """Forward, backward, tracking of a given module of twloss, compiled or not."""

    def step() -> None:
        loss(work.logits, work.labels, work.weights)["loss"].backward()
        work.logits.grad = None

    return step


def tracked_forward(work: Workload, *, fused: bool = False) -> Step:
    """Forward and tracking, as in an evaluation."""
    loss = make_loss(work, fused=fused).eval()

    @torch.no_grad()
    def step() -> None:
        loss(work.logits, work.labels, work.weights)

    return step
