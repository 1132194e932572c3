"""The number format of a running sum: float64, or where a device has none, a pair of float32; and how it is added to.

``(…)`` values come in at each update. The state is ``(2, 1 + places, …)``: first what was added here, their sum and a
ring buffer of the latest of them, none where it has 0 places; then, in the same order, what a checkpoint brought and is
carried beside it. It is changed in place and without waiting for the device. A pair (hi, lo), stacked as
``(2, 2, 1 + places, …)``, is an unevaluated sum hi + lo with ``|lo| <= ulp(hi) / 2`` that holds at least 48 bits; what
the rounding of an addition loses is computed exactly and kept in lo (two-sum; Knuth, The Art of Computer Programming,
volume 2, 4.2.2; Dekker 1971, "A floating-point technique for extending the available precision").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.module_tracker import ModuleTracker

from twloss._precision import sum_dtype
from twloss._torch import plain_tensors

_TRACKER = ModuleTracker()


class Ring(NamedTuple):
    """How the ring buffer goes on; what is added while it is in one place is added up there."""

    places: int
    every: int = 1
    """So many places are begun …"""
    per: int = 1
    """… in so many of what is counted; as two integers, so that no place is off by a rounding."""
    counter: int = -1
    """The row of the values that counts, the same for all tasks: updates, or their rows."""

    def begun(self, counted: Tensor) -> Tensor:
        """How many places have been begun after so much, the last one perhaps just now; int64."""
        return (counted * self.every + (self.per - 1)) // self.per


def pack_update(sums: Sequence[Tensor | float], *, drops_non_finite: bool, rows: float | None = None) -> Tensor:
    """A batch's sums ``(tasks,)``, detached, in the widest dtype; below them 1 where they are finite, rows, and 1."""
    like = sums[0]
    assert isinstance(like, Tensor)
    one = torch.ones_like(like, dtype=sum_dtype(like.device))
    wide = [each.detach().to(one) if isinstance(each, Tensor) else torch.full_like(one, each) for each in sums]
    packed = torch.stack((*wide, one, *(() if rows is None else (torch.full_like(one, rows),)), one))
    if drops_non_finite:
        # What is not finite less itself is NaN, which any() takes for true. What counts for the ring buffer stays.
        packed[: len(wide) + 1].masked_fill_((packed - packed).any(0), 0.0)
    return packed


def zero_state(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """The state of a sum of nothing, of the shape ``(2, 1 + places, …)``."""
    dtype = sum_dtype(device)
    # An inference tensor could not be updated in place by the training that follows.
    with plain_tensors():
        return torch.zeros(shape if dtype == torch.float64 else (2, *shape), dtype=dtype, device=device)


def value_of(state: Tensor) -> Tensor:
    """The sums in float64, ``(2, 1 + places, …)``; of a pair on the CPU, since its device has none."""
    return state.to("cpu", torch.float64).sum(0) if state.dtype == torch.float32 else state


def state_on(device: torch.device, value: Tensor) -> Tensor:
    """A new state of a device that has this value; of 0 from or to the meta device, where nothing can be copied."""
    with plain_tensors():
        state = zero_state(tuple(value.shape), device)
        if not (value.is_meta or state.is_meta):
            state.copy_(torch.stack(_halves(value)) if state.dtype == torch.float32 else value)
        return state


def add_once(  # noqa: PLR0917 (an operator)
    state: Tensor, values: Tensor, places: int = 0, every: int = 1, per: int = 1, counter: int = -1
) -> None:
    """Add values ``(…)``, unless this call recomputes a checkpointed forward, whose rows are in the state already.

    It is an operator too, ``torch.ops.twloss.add_once``, so that a compiled graph asks when it runs: a recomputation
    runs inside of a backward pass. So a ``Ring`` is given as its numbers.
    """
    if _TRACKER.is_bw:
        return
    is_pair = state.dtype == torch.float32
    if places:
        _add_to_ring(state if is_pair else state.unsqueeze(0), values, Ring(places, every, per, counter))
    if is_pair:
        _add_to_pair(state[:, 0, 0], values)
    else:
        state[0, 0].add_(values)


def as_added(values: Tensor) -> Tensor:
    """What was added ``(…)``, with nothing carried beside it: ``(2, …)``."""
    return torch.stack((values, torch.zeros_like(values)))


def in_order(value: Tensor, ring: Ring) -> Tensor:
    """Both ring buffers of ``(2, 1 + places, …)`` from old to new, wherever the next update goes."""
    return _turn(value, ring, -1)


def as_ring(ordered: Tensor, ring: Ring) -> Tensor:
    """The value that is ``in_order`` so."""
    return _turn(ordered, ring, 1)


def _turn(value: Tensor, ring: Ring, direction: int) -> Tensor:
    begun = int(ring.begun(value[0, 0, ring.counter, 0].long()))
    return torch.cat((value[:, :1], value[:, 1:].roll(direction * begun, 1)), 1)


def _add_to_ring(parts: Tensor, values: Tensor, ring: Ring) -> None:
    """Add values to the newest place of the ring buffers of ``(1 or 2, 2, 1 + places, …)``, which may be a new one.

    A place that is begun is emptied first, and so are those that are passed by. How many depends on what is counted, so
    each place is asked: the device need not be waited for.
    """
    # Each part of a pair by itself: float32 may not hold the whole counter.
    counted = parts[:, 0, 0, ring.counter, 0].long().sum(0, keepdim=True)
    begin, end = ring.begun(counted), ring.begun(counted + values[ring.counter, 0].long())
    latest = parts[:, :, 1:]
    is_begun = (torch.arange(ring.places, device=latest.device) - begin).remainder(ring.places) < end - begin
    latest.masked_fill_(is_begun.view(-1, 1, 1), 0.0)
    newest = (end - 1).remainder(ring.places)
    place = latest[:, 0].index_select(1, newest).squeeze(1)
    if len(parts) > 1:
        _add_to_pair(place, values)
    else:
        place += values
    latest[:, 0].index_copy_(1, newest, place.unsqueeze(1))


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
    _LIBRARY.define("add_once(Tensor(a!) state, Tensor values, int places, int every, int per, int counter) -> ()")
    _LIBRARY.impl("add_once", add_once, "CompositeExplicitAutograd")
