"""The currency: what is known of each task's loss."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TaskSums(NamedTuple):
    """What is known of each task's loss: sums, which add up over batches, steps and ranks. Division comes last."""

    loss_sum: Tensor
    """``(tasks,)``: Σ w·l over the valid rows."""
    weight: Tensor | float
    """``(tasks,)``: the number of valid rows, or Σ w; a plain number where all tasks share it."""
