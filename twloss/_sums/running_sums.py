"""Running sums: a value with an algebra, and the format in which a metric's state holds it.

A batch's sums ``(tasks,)`` are packed with counters below them, ``(rows, tasks)``, and added to a state in place,
without waiting for the device. The state is read as ``RunningSums``, which are merged, sent to other ranks and split
into the parts of a result. No other file indexes into either.

A sum is float64, or on a device without it a pair of float32 (hi, lo): an unevaluated sum hi + lo with
``|lo| <= ulp(hi) / 2`` that holds at least 48 bits. What the rounding of an addition loses is computed exactly and kept
in lo (two-sum; Knuth, The Art of Computer Programming, volume 2, 4.2.2; Dekker 1971, "A floating-point technique for
extending the available precision").
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.module_tracker import ModuleTracker

from twloss._precision import SUM_DTYPES, sum_dtype
from twloss._torch import define_operator, plain_tensors, split_last

# A window of rows ends, on the old side, within a thousandth of itself or one update, whichever is more.
_MOST_PLACES = 1000
_FAULTS = 2  # rows: invalid labels, negative weights
_MARKS = 3  # rows that tell whether all ranks carry the same sums
# So that no update is lost, nor seen by half, where another thread updates, computes or calls the metric. One for all:
# it is held for microseconds, and a metric with a lock of its own could not be copied.
# Held again where a signal's handler interrupts, and by the thread that forks, so that no child has it held for ever.
LOCK = threading.RLock()
if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(before=LOCK.acquire, after_in_parent=LOCK.release, after_in_child=LOCK.release)
CARRIED_ELSEWHERE = (
    "got sums of a checkpoint that the first rank of the process group does not have, expected one file, loaded on all "
    "ranks or on the first"
)
_TRACKER = ModuleTracker()
# Addresses of states that a CUDA graph adds to. No flag of a metric, since compiled code, which knows none, is captured
# too.
_CAPTURED: set[int] = set()


class RunningSums:
    """The running sums of one rank: those of its own updates, and those that it carries from a checkpoint.

    A checkpoint's sums of all ranks are carried by all of them, or by the first rank alone, and count once.

    Args:
        parts: ``(2, 1 + places, rows, tasks)``, own and carried: the sums of all updates, then those in the places of a
            window, old to new, or those of the window as one.
    """

    def __init__(self, parts: Tensor) -> None:
        self.parts = parts

    @classmethod
    def own(cls, sums: Tensor) -> RunningSums:
        """Sums ``(1 + places, rows, tasks)``, with nothing carried beside them."""
        return cls(torch.stack((sums, torch.zeros_like(sums))))

    @classmethod
    def carried(cls, sums: Tensor) -> RunningSums:
        """Sums ``(1 + places, rows, tasks)`` of a checkpoint, with nothing added since."""
        return cls(torch.stack((torch.zeros_like(sums), sums)))

    def __add__(self, other: RunningSums) -> RunningSums:
        return RunningSums(self.parts + other.parts.to(self.parts.device))

    def __sub__(self, other: RunningSums) -> RunningSums:
        return RunningSums(self.parts - other.parts.to(self.parts.device))

    def without_window(self) -> RunningSums:
        """A copy with an empty window, so that subtracting it leaves a window of the last updates."""
        parts = self.parts.clone()
        parts[:, 1:] = 0.0
        return RunningSums(parts)

    def of_rank(self, rank: int) -> Tensor:
        """The part of the sums of all ranks that this rank adds, ``(1 + places, rows, tasks)``."""
        return self.parts.sum(0) if rank == 0 else self.parts[0]

    def rows_of_rank(self, rank: int) -> Tensor:
        """The rows that this rank sends, ``((1 + places)·rows + marks, tasks)``; see ``SumsFormat.receive``."""
        return torch.cat((self.of_rank(rank).flatten(0, 1), marks_of_rank([self], rank)))

    def to(self, device: torch.device) -> RunningSums:
        """The same sums on a device, without waiting for it."""
        return RunningSums(self.parts.to(device, non_blocking=True))


def marks_of_rank(values: Sequence[RunningSums], rank: int) -> Tensor:
    """The marks that a rank sends beside these sums, ``(marks, columns)`` of all of them; see ``are_counted``."""
    # What is carried of the window is not marked: it leaves the window as this rank goes on.
    mark = torch.cat([value.parts[1, 0].nan_to_num(0.0, 0.0, 0.0).abs().sum(0) for value in values])
    nothing = torch.zeros_like(mark)
    return torch.stack((mark, nothing, nothing) if rank == 0 else (nothing, mark, (mark != 0).to(mark)))


def are_counted(marks: Tensor) -> Tensor:
    """Whether the first rank carries all that others do, by the total of their marks; 0-dim bool."""
    first, rest, carriers = marks
    expected = carriers * first
    # But for the rounding of as many additions.
    is_equal: Tensor = (rest - expected).abs() <= torch.finfo(marks.dtype).eps * carriers * expected
    return is_equal.all()


class SumsFormat:
    """The layout of a metric's state: ``(2, 1 + places, rows, tasks)``, or two of these for pairs of float32.

    First what was added here, the sums of all updates and a ring buffer of the last ones; then, in the same order, what
    is carried from a checkpoint. Updates that fall into one place of the ring buffer are summed there. The rows are the
    sums, the number of finite updates, where faults are counted those of labels and of weights, for a window of rows
    the number of rows, and the number of all updates.

    Args:
        sums: how many sums a task has.
        tasks: how many tasks there are.
        window: how many of the last updates are kept; None: none.
        window_rows: how many of the last rows of all ranks are kept; None: none.
        counts_faults: whether invalid labels and negative weights are counted.
    """

    def __init__(
        self,
        sums: int,
        tasks: int,
        window: int | None = None,
        window_rows: int | None = None,
        *,
        counts_faults: bool = False,
    ) -> None:
        self.sums = sums
        self.faults = _FAULTS if counts_faults else 0
        self.places = window or min(window_rows or 0, _MOST_PLACES)
        rows = sums + 2 + (window_rows is not None)
        self.shape = (1 + self.places, rows + self.faults, tasks)
        self.saved_shape = (1 + self.places, rows, tasks)
        self.window_rows = window_rows

    @property
    def numbers_of_column(self) -> int:
        """How many numbers a state has for each column."""
        places, rows, _ = self.shape
        return 2 * places * rows

    def zeros(self, device: torch.device) -> Tensor:
        """The state of no update."""
        return _state_of(torch.empty((2, *self.shape), device="meta"), device)

    def pack(self, sums: Sequence[Tensor | float], *, drops_non_finite: bool) -> Tensor:
        """``pack_update`` of a batch's sums, and what may follow.

        That is the batch's number of rows, which a window of rows needs, and where they are counted the faults
        ``(2, tasks)``.
        """
        own, faults = split_last(sums) if self.faults and len(sums) > self.sums else (sums, None)
        own, rows = (own, None) if len(own) <= self.sums else split_last(own)
        is_complete = (rows is not None or self.window_rows is None) and (faults is not None or not self.faults)
        if len(own) != self.sums or isinstance(rows, Tensor) or not is_complete:
            rows_too = "" if self.window_rows is None else ", and the number of rows below them"
            faults_too = ", and last the faults (2, tasks)" if self.faults else ""
            raise ValueError(f"_sum_batch: got {len(sums)} sums, expected {self.sums}{rows_too}{faults_too}")
        rows = rows if self.window_rows else None
        return pack_update(own, drops_non_finite=drops_non_finite, rows=rows, faults=faults)

    def add(self, state: Tensor, packed: Tensor, ranks: int = 1) -> None:
        """Add a packed batch ``(rows, tasks)`` in place; see ``add_once``.

        Args:
            state: of this format.
            packed: the result of ``pack``.
            ranks: how many ranks have as many rows, for a window of rows.
        """
        advance = self._advance(ranks) if self.places else (0, 1, 1, -1)
        if torch.compiler.is_compiling():
            _ADD_ONCE(state, packed, *advance)
        else:
            add_once(state, packed, *advance)

    def read(self, state: Tensor, ranks: int = 1) -> RunningSums:
        """The sums that a state has, in tensors of their own.

        Raises:
            ValueError: for a state of another shape.
        """
        parts = _value_of(state)
        if parts.shape != (2, *self.shape):
            expected = f"{(2, *self.shape)}, as with the same validate_args"
            raise ValueError(f"totals: got shape {tuple(parts.shape)}, expected {expected}")
        return RunningSums(self._turn(parts, ranks, 1))

    def read_horizons(self, state: Tensor) -> RunningSums:
        """The sums that a state has, those of its window as one: ``(2, 1 or 2, rows, tasks)``."""
        parts = state if state.dtype == torch.float64 else _value_of(state)
        if not self.places:
            return RunningSums(parts.clone())
        return RunningSums(torch.cat((parts[:, :1], parts[:, 1:].sum(1, keepdim=True)), 1))

    def append(self, earlier: RunningSums, later: RunningSums, ranks: int = 1) -> RunningSums:
        """The sums of updates and of later ones, which push the earlier ones out of a window."""
        if not self.places:
            return earlier + later
        parts, begun = earlier.parts, min(self.places, int(self._places_begun(later.parts, ranks)))
        gone = torch.zeros_like(parts[:, 1 : 1 + begun])
        return RunningSums(torch.cat((parts[:, :1], parts[:, 1 + begun :], gone), 1)) + later

    def write(self, value: RunningSums, device: torch.device, ranks: int = 1) -> Tensor:
        """A new state of a device that has these sums."""
        return _state_of(self._turn(value.parts, ranks, -1), device)

    def move(self, state: Tensor, device: torch.device) -> Tensor:
        """A new state of another device that has the same sums; those of none from or to the meta device."""
        return _state_of(_value_of(state), device)

    def update_count(self, state: Tensor) -> int:
        """The number of updates that a state has seen, own and carried."""
        return int(_value_of(state)[:, 0, -1, 0].sum())

    def receive(self, rows: Tensor) -> Tensor:
        """The sums of all ranks ``(1 + places, rows, tasks)``, of the total of what they sent.

        Raises:
            RuntimeError: if a rank carries what the first does not, and so what would not be counted.
        """
        if not are_counted(rows[-_MARKS:]):
            raise RuntimeError(CARRIED_ELSEWHERE)
        return rows[:-_MARKS].view(-1, *self.shape[1:])

    def split(self, total: Tensor) -> tuple[Tensor, Tensor]:
        """The parts of a total ``(horizons, rows, tasks)`` that results are made of.

        Returns:
            The sums ``(horizons, sums, tasks)``, and counts ``(faults + 1 + horizons, tasks)``: the faults, where they
            are counted, the finite updates, and the updates of each horizon.
        """
        faults = total[0, self.sums + 1 :][: self.faults]
        return total[:, : self.sums], torch.cat((faults, total[:1, self.sums], total[:, -1]))

    def to_saved(self, sums: Tensor) -> Tensor:
        """Sums ``(1 + places, rows, tasks)`` without the faults, which a checkpoint does not have."""
        before, after = self.sums + 1, self.sums + 1 + self.faults
        return torch.cat((sums[:, :before], sums[:, after:]), 1) if self.faults else sums

    def from_saved(self, sums: Tensor) -> Tensor:
        """Sums of a checkpoint, with faults of 0."""
        before = self.sums + 1
        none = torch.zeros_like(sums[:, : self.faults])
        return torch.cat((sums[:, :before], none, sums[:, before:]), 1) if self.faults else sums

    def has_counts(self, sums: Tensor) -> bool:
        """Whether the counters of saved sums ``(1 + places, rows, tasks)`` can be counts."""
        counts = sums[:, self.sums :]
        return bool((counts.isfinite() & (counts >= 0) & (counts == counts.round())).all())

    def _advance(self, ranks: int) -> tuple[int, int, int, int]:
        """The ring buffer's advance: its places; so many are begun in so many counted; the row that counts."""
        if self.window_rows is None:
            return self.places, 1, 1, -1
        return self.places, self.places * ranks, self.window_rows, -2

    def _places_begun(self, parts: Tensor, ranks: int) -> Tensor:
        """The number of places that own updates have begun, 0-dim int64."""
        _, every, per, counter = self._advance(ranks)
        return _begun(parts[0, 0, counter, 0].long(), every, per)

    def _turn(self, parts: Tensor, ranks: int, direction: int) -> Tensor:
        """A copy with the ring buffers turned from the order of the places to that of age (1), or back (-1)."""
        if not self.places:
            return parts.clone()
        begun = self._places_begun(parts, ranks)
        # Not roll, which would wait for the device to know how far.
        order = (torch.arange(self.places, device=parts.device) + direction * begun).remainder(self.places)
        return torch.cat((parts[:, :1], parts[:, 1:].index_select(1, order)), 1)


def pack_update(
    sums: Sequence[Tensor | float],
    *,
    drops_non_finite: bool,
    rows: float | None = None,
    faults: Tensor | None = None,
) -> Tensor:
    """A batch's sums, detached and in the widest dtype, with the counters below them.

    Args:
        sums: ``(tasks,)`` each, or ``(1 + cells, tasks)``; after the first one also numbers that all tasks share.
        drops_non_finite: whether a task's sums count as 0, those of all cells, where one of them is not finite.
        rows: the batch's number of rows, for a window of rows.
        faults: ``(2, tasks)``, counted whether the sums are finite or not.

    Returns:
        ``(rows, tasks)``, with cells ``(rows, (1 + cells)·tasks)``: the sums, 1 where they are finite, the faults and
        the number of rows if they are there, and 1.
    """
    like = sums[0]
    assert isinstance(like, Tensor)
    one = torch.ones_like(like, dtype=SUM_DTYPES.get(like.device.type, torch.float64))
    wide = []
    for each in sums:
        # Not full_like(): the compiler would make a constant of a float.
        wide.append(each.detach().to(one) if isinstance(each, Tensor) else one * each)
    counters = (one,) if rows is None else (torch.full_like(one, rows), one)
    if faults is not None:
        counters = (*(each.expand_as(one) for each in faults.to(one)), *counters)
    packed = torch.stack((*wide, one, *counters))
    if drops_non_finite:
        finite = packed[: len(wide) + 1]  # what counts for the ring buffer stays
        for given, each in zip(sums, wide):
            if isinstance(given, int):  # a number of rows is finite
                continue
            # Multiplied first: the sum of finite cells may overflow.
            each = each if each.ndim == 1 else (each * 0.0).sum(0)  # noqa: PLW2901
            # NaN where it is not finite. torch's MPS backend takes an alpha of 0 for nothing to add.
            if each.is_mps:
                finite.add_(each * 0.0)
            else:
                finite.add_(each, alpha=0.0)
        finite.nan_to_num_(0.0, 0.0, 0.0)
    return packed.flatten(1)


def add_once(  # noqa: PLR0917 (an operator)
    state: Tensor, packed: Tensor, places: int = 0, every: int = 1, per: int = 1, counter: int = -1
) -> None:
    """Add a packed batch, unless this call recomputes a checkpointed forward, whose rows are in the state already.

    It is an operator too, ``torch.ops.twloss.add_once``, so that a compiled graph asks when it runs: a recomputation
    runs inside of a backward pass.

    Args:
        state: as ``SumsFormat`` says; changed in place.
        packed: ``(rows, tasks)``.
        places: of the ring buffer.
        every: so many places are begun ...
        per: ... in so many counted; as two integers, so that no place is off by a rounding.
        counter: the row of the batch that counts, the same for all tasks: updates, or their rows.
    """
    if _TRACKER.is_bw:
        return
    if state.is_cuda and torch.cuda.is_current_stream_capturing():
        _note_capture(state)
    is_pair = state.dtype == torch.float32
    with LOCK:  # here, where compiled code adds too
        if places:
            _add_to_ring(state if is_pair else state.unsqueeze(0), packed, every, per, counter)
        if is_pair:
            _add_to_pair(state[:, 0, 0], packed)
        else:
            own = state[0]
            (own[0] if places else own).add_(packed)


def is_captured(state: Tensor) -> bool:
    """Whether a CUDA graph adds to a state's memory when it is replayed, or one is being captured."""
    return state.is_cuda and (state.data_ptr() in _CAPTURED or torch.cuda.is_current_stream_capturing())


def _note_capture(state: Tensor) -> None:
    """Note a state's address for as long as its memory is its own."""
    address = state.data_ptr()
    if address not in _CAPTURED:
        _CAPTURED.add(address)
        weakref.finalize(state.untyped_storage(), _CAPTURED.discard, address)


def _value_of(state: Tensor) -> Tensor:
    """The sums in float64; of a pair on the CPU, since its device has none."""
    return state.to("cpu", torch.float64).sum(0) if state.dtype == torch.float32 else state


def _state_of(parts: Tensor, device: torch.device) -> Tensor:
    """A new state of a device; of 0 from or to the meta device, where nothing can be copied."""
    dtype = sum_dtype(device)
    # An inference tensor could not be updated in place by the training that follows.
    with plain_tensors():
        state = torch.zeros(parts.shape if dtype == torch.float64 else (2, *parts.shape), dtype=dtype, device=device)
        if not (parts.is_meta or state.is_meta):
            state.copy_(torch.stack(_halves(parts)) if dtype == torch.float32 else parts)
        return state


def _begun(counted: Tensor, every: int, per: int) -> Tensor:
    """The number of places that are begun once so much is counted, the last one perhaps just now; int64."""
    return (counted * every + (per - 1)) // per


def _add_to_ring(halves: Tensor, packed: Tensor, every: int, per: int, counter: int) -> None:
    """Add to the newest place of the ring buffers of ``(1 or 2, 2, 1 + places, …)``, which may be a new one.

    A place that is begun is emptied first, and so are those that are passed by. How many depends on what is counted, so
    each place is asked: the device need not be waited for.
    """
    # Each half of a pair by itself: float32 may not hold the whole counter.
    counted = halves[:, 0, 0, counter, 0].long().sum(0, keepdim=True)
    begin, end = _begun(counted, every, per), _begun(counted + packed[counter, 0].long(), every, per)
    latest = halves[:, :, 1:]
    places = latest.shape[2]
    is_begun = (torch.arange(places, device=latest.device) - begin).remainder(places) < end - begin
    latest.masked_fill_(is_begun.view(-1, 1, 1), 0.0)
    newest = (end - 1).remainder(places)
    place = latest[:, 0].index_select(1, newest).squeeze(1)
    if len(halves) > 1:
        _add_to_pair(place, packed)
    else:
        place += packed
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


# Once: a reload finds it defined.
if "_LIBRARY" not in globals():
    _SCHEMA = "add_once(Tensor(a!) state, Tensor packed, int places, int every, int per, int counter) -> ()"
    _LIBRARY, _ADD_ONCE = define_operator(_SCHEMA, add_once)
