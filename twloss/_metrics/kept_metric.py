"""A torchmetrics ``Metric`` of one state that nothing in a model's life damages: casts, copies, threads, checkpoints.

Packed sums ``(rows, tasks)`` come in at each update and are added in place; what is read are ``RunningSums``. The state
is no registered buffer: DistributedDataParallel overwrites every rank's buffers with those of rank 0 at each forward.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors
from torchmetrics.utilities.exceptions import TorchMetricsUserError

from twloss._arguments import check_process_group
from twloss._metrics.checkpoint import ALL_RANKS, SavedSums, check_same, decode, encode, sums_from_bytes, sums_to_bytes
from twloss._sums.pending import PendingResult
from twloss._sums.ranks import ColumnNames, group_from_state, group_to_state, place_in, start_sum_over_ranks
from twloss._sums.running_sums import LOCK, RunningSums, SumsFormat, is_captured
from twloss._torch import hidden_from_jit, is_valueless, plain_tensors


@hidden_from_jit
class KeptMetric(Metric):
    """The base of ``TaskMetric``: its state, and what torchmetrics and a model's life ask of it.

    Args:
        names: the columns' names, which all ranks share.
        layout: of the state.
        description: what the sums are of, in JSON's types; those of something else are neither loaded nor merged.
        settings: what else tells it from a metric with the same sums, in JSON's types; it may change.
        options: ``Metric``'s own.
    """

    full_state_update = False
    is_differentiable = False

    totals: Tensor
    """The state."""
    sums_of: Tensor
    """A second state, which says what the sums are of."""
    _drops_non_finite: bool
    """True where a task's sums that are not finite are left out."""
    _era: object
    """Another one after each start of the sums, which makes every earlier snapshot of them void."""
    _clears = 0  # how often the sums were started anew for good, and not by ``_take``

    def __init__(
        self,
        names: Sequence[str],
        layout: SumsFormat,
        description: Mapping[str, Any],
        settings: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> None:
        group = check_process_group(options.get("process_group"))
        if options.get("compute_with_cache"):
            raise ValueError(
                "compute_with_cache: got True, expected False: ranks with a cached value skip the collective"
            )
        super().__init__(**{"compute_with_cache": False, **options, "process_group": group})
        self._device = torch.empty(0).device  # torchmetrics 1.0.3 says "cpu" whatever it is
        self._settings = dict(settings)
        self._start_era()
        self._lay_out(names, layout, description)

    def _lay_out(self, names: Sequence[str], layout: SumsFormat, description: Mapping[str, Any]) -> None:
        """Create the states, all 0."""
        self._names = ColumnNames(names)
        self._format = layout
        self._description = {**description, "shape": list(layout.saved_shape)}
        self._describe_state()  # the first state, the only one that torchmetrics 1.0.3 compares
        with plain_tensors():
            super().add_state("totals", layout.zeros(self.device), dist_reduce_fx="sum")

    def add_state(self, name: str, *_: Any, **__: Any) -> None:
        """Refuse further states, which would be in no sync, merge or checkpoint.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            f"add_state: got {name!r}, expected one more sum from _sum_batch(), with sums= one higher: a state of "
            "its own would be in no sync, merge or checkpoint"
        )

    def _describe_state(self) -> None:
        """Say in ``sums_of`` what the sums are of, for merge_state(), and with which settings.

        A MetricCollection takes metrics whose states are equal for metrics that always will be, and updates one of them
        for all.
        """
        with plain_tensors():
            super().add_state("sums_of", encode({**self._description, "settings": self._settings}), dist_reduce_fx=None)

    # One batch.

    def _prepare_for(self, like: Tensor) -> None:
        """Move the running sums to the device of a batch's sums. Raises between sync() and unsync()."""
        if self._is_synced:
            self._refuse_between_syncs("update")
        if self.totals.device != like.device and not is_valueless(like, self.totals):
            # FSDP moves no module without parameters; the first update then brings the sums to the inputs' device.
            self._move(like.device)

    def _add_packed(self, packed: Tensor, *, in_place: bool = True) -> None:
        """Add a batch's packed sums ``(rows, tasks)``, outside of any transform."""
        # Of one type as a rule; the types are compared first, as is_valueless() would be one more call in each step.
        if packed.is_meta or (type(packed) is not type(self.totals) and is_valueless(packed, self.totals)):
            return
        ranks = 1 if self._format.window_rows is None else self._ranks
        if torch.compiler.is_compiling():
            # With no attribute written: torch.compile would guard on the attribute and recompile at each step.
            self._format.add(self.totals, packed, ranks)
            return
        with LOCK:
            if not (in_place or is_captured(self.totals)):
                # The metrics of a collection's compute group have one state, and forward is called on each.
                with plain_tensors():
                    self.totals = self.totals.clone()
            self._format.add(self.totals, packed, ranks)

    @property
    def _ranks(self) -> int:
        """The number of ranks that share a window of rows."""
        return max(1, place_in(self.process_group)[1])

    def _refuse_between_syncs(self, action: str) -> None:
        """Raise between sync() and unsync(), where the sums are not this rank's own, and unsync() drops what is new."""
        if self._is_synced:
            name = type(self).__name__
            raise TorchMetricsUserError(
                f"{name}: {action} between sync() and unsync(), where the sums are of all ranks"
            )

    # Reading, and starting anew.

    def _read(self) -> RunningSums:
        with LOCK:
            return self._format.read(self.totals, self._ranks)

    def _take_snapshot(self) -> RunningSums:
        """The sums of now, for ``_start_since``."""
        self._refuse_between_syncs("reset() of a view")
        with LOCK:
            return self._format.read_horizons(self.totals).without_window()

    def _start_since(
        self, snapshot: RunningSums | None, is_over_ranks: bool, *, is_async: bool
    ) -> PendingResult[dict[str, Tensor]]:
        """Start the result of the rows after a snapshot, on each rank its own; None: after reset()."""
        raise NotImplementedError

    @property
    def update_count(self) -> int:
        """The number of updates since reset(), on this rank and in a checkpoint that it has loaded."""
        return 0 if self.totals.is_meta else self._format.update_count(self.totals)

    @property
    def update_called(self) -> bool:
        """Whether update_count is more than 0."""
        return self.update_count > 0

    def reset(self) -> None:
        """Set the sums to 0."""
        with LOCK, plain_tensors():
            totals = self.totals
            super().reset()
            if is_captured(totals):
                self.totals = totals.zero_()
            self._start_era()

    def _start_era(self) -> None:
        """Make every earlier snapshot, and all that ``_take`` has taken, void."""
        self._era, self._clears = object(), self._clears + 1

    def _take(self) -> tuple[Tensor, object, int]:
        """Start the sums anew, and return the state that they had, and its era, for ``_give_back``."""
        with LOCK, plain_tensors():
            taken = self.totals.clone(), self._era, self._clears
            # In place: a compiled step of another thread may have looked the tensor up before, and add to it after.
            self.totals.zero_()
            self._era = object()
        return taken

    def _give_back(self, taken: tuple[Tensor, object, int]) -> None:
        """Undo ``_take``: what was added since comes after what was taken, unless a reset or a load came between."""
        totals, era, clears = taken
        with LOCK:
            if clears != self._clears or self.totals.is_meta:
                return
            together = self._format.read(totals, self._ranks)
            together = self._format.append(together, self._read(), self._ranks)
            self.totals.copy_(self._format.write(together, self.totals.device, self._ranks))
            self._era = era

    def _put(self, totals: Tensor) -> None:
        """Replace the sums; in place where a captured CUDA graph adds to them."""
        if is_captured(self.totals) and totals.device == self.totals.device:
            self.totals.copy_(totals)
        else:
            self.totals = totals

    # torchmetrics' wrappers would count updates, cache results and swap states.

    def _wrap_update(self, update: Callable[..., None]) -> Callable[..., None]:
        return update

    def _wrap_compute(self, compute: Callable[[], dict[str, Tensor]]) -> Callable[[], dict[str, Tensor]]:
        return compute

    # Ranks.

    def _start_sum(
        self,
        value: RunningSums,
        call: str,
        gather: Callable[..., Any] | None,
        process_group: Any = None,
        *,
        is_async: bool = False,
    ) -> PendingResult[Tensor]:
        """Start one collective for the sums of all ranks ``(horizons, rows, tasks)``, or call a ``dist_sync_fn``.

        If the collective fails, the error names the ``call``, which every rank has to make.
        """
        group = process_group or self.process_group
        rows = value.rows_of_rank(place_in(group)[0])
        if gather is gather_all_tensors:
            gather = None  # torchmetrics' own would take three collectives
        total = start_sum_over_ranks(rows, self._names, group, call, gather=gather, is_async=is_async)
        return total.map(self._names.read_agreed).map(self._format.receive)

    def _sync_dist(self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any = None) -> None:
        group = check_process_group(process_group)
        total = self._start_sum(self._read(), f"{type(self).__name__}.sync()", dist_sync_fn, group).wait()
        self.totals = self._format.write(RunningSums.own(total), self.totals.device, self._ranks)

    @contextmanager
    def sync_context(self, *args: Any, should_unsync: bool = True, **kwargs: Any) -> Generator[None, None, None]:
        """Sync in a context; unlike ``Metric.sync_context``, it brings the local sums back after an exception too."""
        self.sync(*args, **kwargs)
        try:
            yield
        finally:
            self.unsync(should_unsync=self._is_synced and should_unsync)

    def _copy_state_dict(self) -> dict[str, Tensor | list[Any]]:
        # Sums that were copied inside inference_mode could not be updated in place by the training that follows.
        with plain_tensors():
            return super()._copy_state_dict()

    # Merges.

    @property
    def metric_state(self) -> dict[str, Any]:
        """The states, by name: what this rank adds to the sums of all, so that all ranks' can be merged."""
        totals = self.totals
        if not totals.is_meta:
            own = RunningSums.own(self._read().of_rank(place_in(self.process_group)[0]))
            totals = self._format.write(own, totals.device, self._ranks)
        return {"sums_of": self.sums_of, "totals": totals}

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the sums of another metric, or its ``metric_state``, to these.

        Raises:
            RuntimeError: with ``dist_sync_on_step=True``, whose sums are of all ranks at each step.
            TorchMetricsUserError: between sync() and unsync() of either.
            ValueError: for sums of something else.
        """
        # As torchmetrics 1.9 does; 1.0.3 has no such method.
        self._refuse_between_syncs("merge_state")
        if self.dist_sync_on_step:
            raise RuntimeError("merge_state: got a metric with dist_sync_on_step=True, expected one without")
        if isinstance(incoming_state, type(self)):
            incoming_state._refuse_between_syncs("merge_state")
            incoming_state = incoming_state.metric_state
        if not isinstance(incoming_state, dict):
            found, name = type(incoming_state).__name__, type(self).__name__
            raise ValueError(f"incoming_state: got {found}, expected a {name} or its metric_state")
        with LOCK:
            self._reduce_states(incoming_state)

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        for name in ("sums_of", "totals"):
            state = incoming_state.get(name)
            if not isinstance(state, Tensor) or state.is_meta or state.is_complex():
                found = f"{state.dtype} on {state.device}" if isinstance(state, Tensor) else type(state).__name__
                raise ValueError(f"incoming_state: got {found} as {name}, expected the metric_state of such a metric")
        try:
            description = decode(incoming_state["sums_of"])
            description.pop("settings", None)
            check_same(description, self._description)
            value = self._format.read(incoming_state["totals"], self._ranks)
            self._check_finite(value.parts)
        except ValueError as error:
            raise ValueError(f"incoming_state: {error}") from None
        merged = self._read() + value
        self._put(self._format.write(merged, self.totals.device, self._ranks))

    def _check_finite(self, sums: Tensor) -> None:
        """Raise for sums, made elsewhere, that this metric's own updates can't make."""
        if self._drops_non_finite and not sums.isfinite().all():
            raise ValueError(
                "got sums that are not finite, expected finite ones: those of nan_strategy='disable' alone may be"
            )

    # Devices: a cast of the model must not round the sums, nor the defaults that reset() restores.

    def _apply(self, fn: Callable[[Tensor], Tensor], *_: Any, **__: Any) -> KeptMetric:
        self._move(fn(torch.empty(0, device=self.totals.device)).device)
        return self

    def _move(self, device: torch.device) -> None:
        if device == self.totals.device:
            return
        if self.totals.is_meta or device.type == "meta":
            self._start_era()
        with LOCK, plain_tensors():
            self.totals = self._format.move(self.totals, device)
            self._defaults["totals"] = torch.zeros_like(self.totals)
        self._device = device
        self._names.hashes.place(device)
        self._forward_cache: Any = None

    # Checkpoints.

    def persistent(self, mode: bool = False) -> None:
        """Put the sums into the ``state_dict()`` as one entry, or leave them out; see ``global_sums()`` for ranks."""
        if mode:
            self.sums = SavedSums(self)
        elif hasattr(self, "sums"):
            del self.sums

    def _save_sums(self, *, of_all_ranks: bool) -> Tensor:
        """The entry of this rank's sums, or, by a collective, of those of all."""
        place = place_in(self.process_group)
        with LOCK:
            state = self._format.zeros(torch.device("cpu")) if self.totals.is_meta else self.totals
            value = self._format.read(state, self._ranks)
        if self._is_synced:
            sums, place = value.of_rank(0), ALL_RANKS
        elif of_all_ranks and place[0] >= 0 and self.distributed_available_fn():
            sums, place = self._start_sum(value, "global_sums()", self.dist_sync_fn).wait(), ALL_RANKS
        else:
            sums = value.of_rank(place[0])
        return sums_to_bytes(self._format.to_saved(sums), self._description, place)

    def _load_sums(self, entry: Any) -> None:
        """Take the sums of an entry in place of these: those of all ranks are carried, this rank's own are added."""
        if self._is_synced:
            raise ValueError("got sums between sync() and unsync(), which would drop what is loaded")
        sums, place = sums_from_bytes(entry, self._description)
        if not self._format.has_counts(sums):
            raise ValueError(
                f"got {len(entry)} bytes that are damaged, expected those of saved sums, which have counts"
            )
        self._check_finite(sums)
        here = place_in(self.process_group)
        if place not in (ALL_RANKS, here) and sums.any():
            raise ValueError(
                f"got the sums of rank {place[0]} of {place[1]} alone, expected those of rank {here[0]} of {here[1]}, "
                "or of all ranks, as saved within twloss.global_sums(); or leave this key out, to load the weights"
            )
        sums = self._format.from_saved(sums)
        value = RunningSums.carried(sums) if place == ALL_RANKS else RunningSums.own(sums)
        with LOCK:
            device = sums.device if self.totals.is_meta else self.totals.device
            self._put(self._format.write(value, device, self._ranks))
            self._start_era()

    def _load_from_state_dict(self, *args: Any) -> None:
        # Not Metric's, which would take a tensor of the name of a state for that state, without a look at it.
        super(Metric, self)._load_from_state_dict(*args)

    # Copies and pickles.

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise RuntimeError(
            f"nn.DataParallel: got a model with a {type(self).__name__}, whose sums would be without the rows of all "
            "devices but the first, expected DistributedDataParallel, or one device"
        )

    def __getstate__(self) -> dict[str, Any]:
        # Numbers, since multiprocessing would put a tensor into memory that all processes share; beside them an empty
        # tensor, which tells the device, whatever the pickle makes of it.
        state = group_to_state(super().__getstate__())
        state.pop("_compiled_call_impl", None)  # as nn.Module does, of which Metric does not ask it
        state.pop("_counterpart", None)  # that of a copy is the one that the copied loss has
        # The child that saves the sums is made anew: a shallow copy would share it.
        modules = {name: each for name, each in state["_modules"].items() if not isinstance(each, SavedSums)}
        with LOCK:
            numbers = None if self.totals.is_meta else self.totals.tolist()
            totals = self.totals.new_empty(0), numbers, self.totals.shape
        return {**state, "totals": totals, "_modules": modules, "sums": hasattr(self, "sums")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        like, numbers, shape = state["totals"]
        is_persistent = state.pop("sums")
        with plain_tensors():
            totals = like.new_empty(shape) if numbers is None else like.new_tensor(numbers)
        super().__setstate__(group_from_state({**state, "totals": totals}))
        self.persistent(is_persistent)
