"""Running sums in a checkpoint: one rank's, and beside them what they are of, so that no others are taken for them.

Float64 sums come in, two tensors go out, which ``torch.load(weights_only=True)`` reads; and back, after checks.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from twloss._ranks import world_size

SAVED_NAMES = ("totals", "sums_of")


def save_sums(
    totals: Tensor, description: dict[str, Any], process_group: dist.ProcessGroup | None
) -> dict[str, Tensor]:
    """A copy of the sums, and a JSON text ``(bytes,)`` uint8 of what they are of, this rank among it."""
    text = json.dumps({**description, **_place(process_group)})
    return {"totals": totals.detach().clone(), "sums_of": torch.tensor(list(text.encode()), dtype=torch.uint8)}


def load_sums(
    saved: dict[str, Any],
    shape: tuple[int, ...],
    description: dict[str, Any],
    process_group: dist.ProcessGroup | None,
) -> Tensor:
    """A copy of saved sums."""
    for name, value in saved.items():
        if not isinstance(value, Tensor) or value.is_meta:
            kind = "a meta tensor" if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"got {kind} as {name}, expected a Tensor with values")
    totals, text = saved["totals"], saved["sums_of"]
    if totals.dtype != torch.float64 or totals.shape != shape:
        raise ValueError(f"got {totals.dtype} of shape {tuple(totals.shape)}, expected torch.float64 of shape {shape}")
    try:
        found = json.loads(bytes(text.tolist()))
        place = {name: found.pop(name) for name in ("rank", "ranks")}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"got {text} as sums_of, expected what save_sums() writes") from error
    if found != description:
        raise ValueError(f"got sums of {found}, expected {description}")
    if place != _place(process_group) and totals.any():
        raise ValueError(
            f"got the sums of {place}, but here is {_place(process_group)}: save and load each rank's own, "
            "or reset() before saving"
        )
    copied: Tensor = totals.detach().clone()
    return copied


def _place(process_group: dist.ProcessGroup | None) -> dict[str, int]:
    ranks = world_size(process_group)
    return {"rank": dist.get_rank(process_group) if ranks > 1 else 0, "ranks": ranks}
