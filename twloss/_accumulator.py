"""The number format of a running sum: float64, or where a device has none, a pair of float32; and how it is added to.

``(…)`` values come in at each update. The state is ``(2, 1 + window, …)``: first what was added here, their sum and a
ring buffer of the latest of them, none where the window is 0; then, in the same order, what a checkpoint brought and is
carried beside it. It is changed in place and without waiting for the device. A pair (hi, lo), stacked as
``(2, 2, 1 + window, …)``, is an unevaluated sum hi + lo with ``|lo| <= ulp(hi) / 2`` that holds at least 48 bits; what
the rounding of an addition loses is computed exactly and kept in lo (two-sum; Knuth, The Art of Computer Programming,
volume 2, 4.2.2; Dekker 1971, "A floating-point technique for extending the available precision").
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.module_tracker import ModuleTracker

from twloss._torch import plain_tensors

DEVICES_WITHOUT_FLOAT64 = {"mps"}
"""Device types on which a sum is a pair; a test may add another."""

_TRACKER = ModuleTracker()


def sum_dtype(device: torch.device) -> torch.dtype:
    """The widest floating dtype of a device."""
    return torch.float32 if device.type in DEVICES_WITHOUT_FLOAT64 else torch.float64


def sum_wide(values: Tensor, tasks: int) -> Tensor:
    """The sum over rows ``(tasks,)`` of ``(rows, tasks)``, in the widest dtype; several rows may be seen as one."""
    if values.ndim != 2:
        values = values.reshape(-1, tasks)
    total = values.sum(0, dtype=sum_dtype(values.device))
    return total if total.numel() == tasks else total.view(-1, tasks).sum(0)


def pack_update(sums: Sequence[Tensor | float], *, drops_non_finite: bool) -> Tensor:
    """A batch's sums ``(tasks,)``, detached, in the widest dtype; below them 1 where they are finite, and 1."""
    like = sums[0]
    assert isinstance(like, Tensor)
    one = torch.ones_like(like, dtype=sum_dtype(like.device))
    rows = [each.detach().to(one) if isinstance(each, Tensor) else torch.full_like(one, each) for each in sums]
    packed = torch.stack((*rows, one, one))
    if drops_non_finite:
        # What is not finite less itself is NaN, which any() takes for true.
        packed[:-1].masked_fill_((packed - packed).any(0), 0.0)
    return packed


def zero_state(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """The state of a sum of nothing, of the shape ``(2, 1 + window, …)``."""
    dtype = sum_dtype(device)
    # An inference tensor could not be updated in place by the training that follows.
    with plain_tensors():
        return torch.zeros(shape if dtype == torch.float64 else (2, *shape), dtype=dtype, device=device)


def value_of(state: Tensor) -> Tensor:
    """The sums in float64, ``(2, 1 + window, …)``; of a pair on the CPU, since its device has none."""
    return state.to("cpu", torch.float64).sum(0) if state.dtype == torch.float32 else state


def state_on(device: torch.device, value: Tensor) -> Tensor:
    """A new state of a device that has this value; of 0 from or to the meta device, where nothing can be copied."""
    with plain_tensors():
        state = zero_state(tuple(value.shape), device)
        if not (value.is_meta or state.is_meta):
            state.copy_(torch.stack(_halves(value)) if state.dtype == torch.float32 else value)
        return state


def add_once(state: Tensor, values: Tensor) -> None:
    """Add values ``(…)``, unless this call recomputes a checkpointed forward, whose rows are in the state already.

    Where there is a window, ``state[0, 0, -1, 0]`` counts the additions, so that ``values[-1]`` are ones. It is an
    operator too, ``torch.ops.twloss.add_once``, so that a compiled graph asks when it runs: a recomputation runs inside
    of a backward pass.
    """
    if _TRACKER.is_bw:
        return
    is_pair = state.dtype == torch.float32
    if state.shape[1 + is_pair] > 1:
        _overwrite_oldest(state if is_pair else state.unsqueeze(0), values)
    if is_pair:
        _add_to_pair(state[:, 0, 0], values)
    else:
        state[0, 0].add_(values)


def as_added(values: Tensor) -> Tensor:
    """What was added ``(…)``, with nothing carried beside it: ``(2, …)``."""
    return torch.stack((values, torch.zeros_like(values)))


def in_order(value: Tensor) -> Tensor:
    """Both ring buffers of ``(2, 1 + window, …)`` from old to new, wherever the next update goes."""
    return _turn(value, -int(value[0, 0, -1, 0]))


def as_ring(ordered: Tensor) -> Tensor:
    """The value that is ``in_order`` so."""
    return _turn(ordered, int(ordered[0, 0, -1, 0]))


def _turn(value: Tensor, places: int) -> Tensor:
    return torch.cat((value[:, :1], value[:, 1:].roll(places, 1)), 1)


def _overwrite_oldest(parts: Tensor, values: Tensor) -> None:
    """Put values in the place of the oldest in the ring buffers of ``(1 or 2, 2, 1 + window, …)``."""
    added, carried = parts[:, 0, 1:], parts[:, 1, 1:]
    size = added.shape[1]
    # Each part of a pair by itself: float32 may not hold the whole counter.
    oldest = parts[:, 0, 0, -1, 0].remainder(size).sum(0, keepdim=True).remainder(size).long()
    addend = torch.stack(_halves(values)) if len(parts) > 1 else values.unsqueeze(0)
    added.index_copy_(1, oldest, addend.unsqueeze(1))
    carried.index_fill_(1, oldest, 0.0)


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


# Not torch.library.custom_op: its checks at run time cost a compiled step 60 µs. Once: a reload finds it defined.
if "_LIBRARY" not in globals():
    _LIBRARY = torch.library.Library("twloss", "DEF")
    _LIBRARY.define("add_once(Tensor(a!) state, Tensor values) -> ()")
    _LIBRARY.impl("add_once", add_once, "CompositeExplicitAutograd")
