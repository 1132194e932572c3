"""The dtype of a sum: float64, or float32 on a device that has no float64."""

from __future__ import annotations

import torch

SUM_DTYPES = {"mps": torch.float32}
"""The dtype of sums by type of device, where it is not float64; running sums are then pairs. A test may add another."""


def sum_dtype(device: torch.device) -> torch.dtype:
    """The widest floating dtype of a device."""
    return SUM_DTYPES.get(device.type, torch.float64)
