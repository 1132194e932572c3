"""The dtype of a sum: float64, or float32 on a device that has no float64."""

from __future__ import annotations

import torch
from torch import Tensor

DEVICES_WITHOUT_FLOAT64 = {"mps"}
"""Device types on which a sum is a pair; a test may add another."""


def sum_dtype(device: torch.device) -> torch.dtype:
    """The widest floating dtype of a device."""
    return torch.float32 if device.type in DEVICES_WITHOUT_FLOAT64 else torch.float64


def sum_wide(values: Tensor, tasks: int) -> Tensor:
    """The sum over rows ``(tasks,)`` of ``(rows, tasks)``, in the widest dtype; several rows may be seen as one."""
    if values.ndim != 2:
        values = values.reshape(-1, tasks)
    total = values.sum(0, dtype=sum_dtype(values.device))
    return total if total.numel() == tasks else total.view(-1, tasks).sum(0)
