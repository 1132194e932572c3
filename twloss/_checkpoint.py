"""Running sums in a checkpoint: one rank's, and beside them what they are of, so that no others are taken for them.

Float64 sums come in, two tensors go out, which ``torch.load(weights_only=True)`` reads; and back, after checks.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from twloss._arguments import list_some
from twloss._ranks import world_size
from twloss._torch import plain_tensors, tensor_of

SAVED_NAMES = ("totals", "sums_of")


def encode(description: dict[str, Any]) -> Tensor:
    """What sums are of, as a JSON text ``(bytes,)`` uint8 on the CPU."""
    with plain_tensors():
        return tensor_of(list(json.dumps(description).encode()), torch.uint8, torch.device("cpu"))


def decode(text: Tensor) -> dict[str, Any]:
    """What ``encode`` was given, but for tuples, which are lists.

    Raises:
        ValueError: for any other tensor.
    """
    try:
        description = json.loads(bytes(text.tolist()))
    except (TypeError, ValueError) as error:
        raise ValueError(
            "got a sums_of that is no JSON text, expected what state_dict() or metric_state has"
        ) from error
    if not isinstance(description, dict):
        raise ValueError(f"got a sums_of with {type(description).__name__}, expected a JSON object")
    return description


def check_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise a ValueError that names the first difference in what is known of both, their tasks and window at least."""
    for name in ("tasks", "window", *(name for name in expected if name in found)):
        pair = [each.get(name, "unknown") for each in (found, expected)]
        if pair[0] != pair[1]:
            shown = [list_some(value, 12) if isinstance(value, (list, dict)) else repr(value) for value in pair]
            raise ValueError(f"got sums of {name}={shown[0]}, expected {name}={shown[1]}")


def save_sums(
    totals: Tensor, description: dict[str, Any], process_group: dist.ProcessGroup | None
) -> dict[str, Tensor]:
    """A copy of the sums, and what they are of, this rank among it."""
    return {"totals": totals.detach().clone(), "sums_of": encode({**description, **_place(process_group)})}


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
    found = decode(text)
    place = {name: found.pop(name, None) for name in ("rank", "ranks")}
    check_same(found, description)
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
