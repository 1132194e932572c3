"""The dtype of a sum: float64, or float32 on a device that has no float64."""

from __future__ import annotations

import torch

DEVICES_WITHOUT_FLOAT64 = {"mps"}
"""Device types on which a running sum is a pair of float32; a test may add another."""


def sum_dtype(device: torch.device) -> torch.dtype:
    """The widest floating dtype of a device."""
    return torch.float32 if device.type in DEVICES_WITHOUT_FLOAT64 else torch.float64
