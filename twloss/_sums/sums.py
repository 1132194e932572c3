"""The currency: sums of each task, which add up over batches, steps and ranks."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TaskSums(NamedTuple):
    """The sums of each task's loss. Division comes last."""

    loss_sum: Tensor
    """``(tasks,)``: Σ w·l over the valid rows."""
    weight: Tensor | float
    """``(tasks,)``: the number of valid rows, or Σ w; a plain number where all tasks share it."""


class BatchSums(NamedTuple):
    """The results of one pass over a batch, for the tasks of one loss."""

    losses: Tensor
    """``(tasks,)``: Σ w·l, or where the pass reduces them the tasks' losses; with their gradient."""
    loss: Tensor | None
    """The global loss, 0-dim; None: the pass did not reduce."""
    weight: Tensor | float
    """``(tasks,)``, or a number that all tasks share: what a mean divides by."""
    tracked: Tensor | None
    """For the running sums: packed; or Σ w·l ``(tasks,)``, and with segments the weight too, ``(2, 1 + cells, tasks)``;
    None where a transform runs the forward."""
    quality: Tensor | None
    """For the running sums of the quality of predictions, packed."""
    faults: Tensor | None
    """``(2, tasks)``: the rows with an invalid label, and those of negative weight; None: not counted, or packed."""
