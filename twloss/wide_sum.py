"""How one running sum is held: in float64, or where a device has none, as a pair of float32.

``(…)`` values come in, a state that holds their sum to at least 48 bits goes out, in place and without waiting for the
device. The pair (hi, lo), stacked as ``(2, …)``, is an unevaluated sum hi + lo with ``|lo| <= ulp(hi) / 2``; what the
rounding of an addition loses is computed exactly and kept in lo (two-sum; Knuth, The Art of Computer Programming,
volume 2, 4.2.2; Dekker 1971, "A floating-point technique for extending the available precision").
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["add_and_keep_once", "add_once", "moved_sum", "sum_dtype", "value_of_sum", "zero_sum"]

DEVICES_WITHOUT_FLOAT64 = {"mps"}
"""Device types on which a sum is a pair; a test may add another."""


def sum_dtype(device: torch.device) -> torch.dtype:
    """The widest floating dtype of a device."""
    return torch.float32 if device.type in DEVICES_WITHOUT_FLOAT64 else torch.float64


def zero_sum(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """A sum of nothing; ``shape`` is that of the values."""
    dtype = sum_dtype(device)
    # An inference tensor could not be updated in place by the training that follows.
    with torch.inference_mode(False):
        return torch.zeros(shape if dtype == torch.float64 else (2, *shape), dtype=dtype, device=device)


def _is_pair(state: Tensor) -> bool:
    """Whether a state is a pair of float32."""
    return state.dtype == torch.float32


def value_of_sum(state: Tensor) -> Tensor:
    """The sum in float64; of a pair on the CPU, since its device has none."""
    if not _is_pair(state):
        return state
    return state.to("cpu", torch.float64).sum(0)


def moved_sum(state: Tensor, device: torch.device) -> Tensor:
    """The sum as a state of another device; 0 from or to the meta device, where nothing can be copied."""
    with torch.inference_mode(False):
        value = value_of_sum(state)
        moved = zero_sum(tuple(value.shape), device)
        if not (state.is_meta or device.type == "meta"):
            moved.copy_(torch.stack(_halves(value)) if _is_pair(moved) else value)
        return moved


def add_once(state: Tensor, values: Tensor) -> None:
    """Add values to a sum in place, unless this call recomputes a checkpointed forward, whose rows are in it already.

    An operator of its own, so that a compiled graph asks when it runs: a recomputation runs inside of a backward pass.
    """
    (torch.ops.twloss.add_once if torch.compiler.is_compiling() else _add_once)(state, values)


def add_and_keep_once(state: Tensor, values: Tensor) -> None:
    """As add_once(), for a sum and its latest addends: add to ``state[0]``, and write over the oldest of ``state[1:]``.

    Args:
        state: a sum of shape ``(1 + latest, …)``, whose ``state[0, -1]`` counts the additions.
        values: ``(…)``, with ones as ``values[-1]``.
    """
    (torch.ops.twloss.add_and_keep_once if torch.compiler.is_compiling() else _add_and_keep_once)(state, values)


def _add_and_keep_once(state: Tensor, values: Tensor) -> None:
    if _is_recomputation():
        return
    parts = state if _is_pair(state) else state.unsqueeze(0)
    latest = parts[:, 1:]
    size = latest.shape[1]
    # Each part of a pair by itself: float32 may not hold the whole counter.
    oldest = parts[:, 0, -1, 0].remainder(size).sum(0, keepdim=True).remainder(size)
    addend = torch.stack(_halves(values)) if _is_pair(state) else values.unsqueeze(0)
    latest.index_copy_(1, oldest.long(), addend.unsqueeze(1))
    _add_once(state.select(-3, 0), values)


def _add_once(state: Tensor, values: Tensor) -> None:
    if _is_recomputation():
        return
    if _is_pair(state):
        _add_to_pair(state, values)
    else:
        state.add_(values)


def _is_recomputation() -> bool:
    """Whether this runs inside of a backward pass, where a checkpointed forward is run again."""
    # Private, but what torch's own checkpoint and FSDP2 ask; there is no public way to know.
    return torch._C._current_graph_task_id() != -1


def _add_to_pair(state: Tensor, values: Tensor) -> None:
    for part in _halves(values) if values.dtype == torch.float64 else (values,):
        hi, lo = state
        total = hi + part
        virtual = total - hi
        # Of an infinite sum nothing is lost, but inf - inf would make it NaN.
        lo = lo + _finite((hi - (total - virtual)) + (part - virtual))
        hi = total + lo
        state.copy_(torch.stack((hi, _finite(lo - (hi - total)))))


def _halves(value: Tensor) -> tuple[Tensor, Tensor]:
    """A float64 value as float32 hi and lo, 48 of its 53 bits."""
    hi = value.to(torch.float32)
    return hi, _finite(value - hi).to(torch.float32)


def _finite(values: Tensor) -> Tensor:
    return values.nan_to_num(0.0, 0.0, 0.0)


_LIBRARY = torch.library.Library("twloss", "DEF")
_LIBRARY.define("add_once(Tensor(a!) state, Tensor values) -> ()")
_LIBRARY.impl("add_once", _add_once, "CompositeExplicitAutograd")
_LIBRARY.define("add_and_keep_once(Tensor(a!) state, Tensor values) -> ()")
_LIBRARY.impl("add_and_keep_once", _add_and_keep_once, "CompositeExplicitAutograd")
