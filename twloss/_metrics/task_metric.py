"""Sums that live: a torchmetrics ``Metric`` of per-task sums, which nothing that a model goes through can damage.

A batch's sums ``(tasks,)`` come in at each update and are added, where they are finite; at compute() a copy is summed
over the ranks, by one collective, and the subclass makes the result of it. The state is no registered buffer:
DistributedDataParallel overwrites every rank's buffers with those of rank 0 at each forward.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors
from torchmetrics.utilities.exceptions import TorchMetricsUserError
from torchmetrics.utilities.prints import rank_zero_warn

from twloss._arguments import NanStrategy, check_choice, check_process_group, check_tasks, check_window, list_some
from twloss._metrics.checkpoint import ALL_RANKS, SavedSums, check_same, decode, encode, sums_from_bytes, sums_to_bytes
from twloss._metrics.scalar_view import ScalarView
from twloss._sums.pending import PendingResult
from twloss._sums.ranks import (
    ColumnNames,
    contribution,
    group_from_state,
    group_to_state,
    pack_running_sums,
    place_in,
    start_sum_over_ranks,
    unpack_running_sums,
)
from twloss._sums.running_sums import (
    Ring,
    add_once,
    as_added,
    as_ring,
    in_order,
    pack_update,
    state_on,
    value_of,
    zero_state,
)
from twloss._torch import is_transformed, plain_tensors

# So that no update is lost, nor seen by half, where another thread updates, computes or calls the metric. One for all:
# it is held for microseconds, and a metric with a lock of its own could not be copied.
# Held again where a signal's handler interrupts, and by the thread that forks, so that no child has it held for ever.
_LOCK = threading.RLock()
if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_LOCK.release)


# Of a window of rows: it ends, on the old side, within a thousandth of itself or one update, whichever is more.
_MOST_PLACES = 1000
_NO_RING = Ring(0)


class TaskMetric(Metric):
    """The base of metrics whose result is a function of sums over rows, of each task.

    A subclass brings four methods:

    - ``update(…)``, which calls ``self._add(self._sum_batch(…))``: the signature that users and collections see;
    - ``_sum_batch(…)``: the same arguments -> what they add, ``(tasks,)`` tensors, or after the first one
      also numbers that all tasks share; below them, for a window of rows, how many rows the batch has;
    - ``_keys()``: the keys of the result, in its order, and whether higher values are better (None: neither);
    - ``_results(sums)``: ``(sums, tasks)`` in float64, of all rows of all steps and ranks -> the values, in that order.

    All else is the same for all: sums in float64 that survive casts, copies, threads, checkpoints and NaN, a window,
    one collective a compute(), views of single keys and plots.

    The state ``totals`` is ``(2, 1 + places, sums + 2, tasks)``: the sums of all updates, then those of the last ones,
    in the places of a ring buffer; after those that were added here, those of a checkpoint, which are carried beside
    them. Below the subclass's sums stand the number of updates that were finite, for a window of rows that of the rows,
    and the number of all updates.

    Args:
        tasks: the tasks' names, or None for the one-task form, whose keys have no name in them.
        sums: how many sums a task has.
        window: how many of the last updates to give a result of as well, under keys with "window_" before them.
        window_rows: the same, for this many of the last rows of all ranks, as long as each has as many.
        nan_strategy: what becomes of a task's sums in an update in which they are not finite.
        of: what else the sums are of, in JSON's types; those of something else are neither loaded nor merged.
        settings: what else tells it from a metric with the same sums; a MetricCollection never takes them for one.
        options: ``Metric``'s own, such as ``process_group``. compute() is not cached (``compute_with_cache=False``): a
            rank with a cached value would leave the others waiting in the collective.

    Examples:
        >>> import torch
        >>> from twloss._metrics.task_metric import TaskMetric
        >>> class SquaredError(TaskMetric):
        ...     def __init__(self, tasks, **options):
        ...         super().__init__(tasks, sums=2, options=options)
        ...
        ...     def update(self, predictions, targets):
        ...         self._add(self._sum_batch(predictions, targets))
        ...
        ...     def _sum_batch(self, predictions, targets):
        ...         return (predictions - targets).square().sum(0), len(targets)
        ...
        ...     def _keys(self):
        ...         return {f"mse/{task}": False for task in self.tasks}
        ...
        ...     def _results(self, sums):
        ...         return (sums[0] / sums[1]).unbind()
        >>> metric = SquaredError(["price", "stars"])
        >>> metric.update(torch.tensor([[1.0, 4.0], [3.0, 5.0]]), torch.tensor([[1.0, 5.0], [1.0, 5.0]]))
        >>> metric.compute()
        {'mse/price': tensor(2., dtype=torch.float64), 'mse/stars': tensor(0.5000, dtype=torch.float64)}
    """

    full_state_update = False
    is_differentiable = False

    _restarts = 0  # of the sums, which make every earlier snapshot of them void

    if TYPE_CHECKING:  # In the class itself, torch.jit would read the annotation and not know the type.
        totals: Tensor
    # What torch.jit leaves alone, so that a model can be scripted that has a metric and does not call it.
    __jit_unused_properties__: ClassVar = [
        *Metric.__jit_unused_properties__,
        *("_ring", "metric_state", "nan_strategy", "update_count", "update_called"),
    ]

    def __init__(
        self,
        tasks: Sequence[str] | None,
        sums: int,
        *,
        window: int | None = None,
        window_rows: int | None = None,
        nan_strategy: NanStrategy = "warn",
        of: Mapping[str, Any] | None = None,
        settings: Sequence[str] = (),
        options: dict[str, Any],
    ) -> None:
        check_choice("nan_strategy", nan_strategy, get_args(NanStrategy))
        check_process_group(options.get("process_group"))
        check_window(window, window_rows)
        tasks = None if tasks is None else check_tasks(tasks)
        if options.setdefault("compute_with_cache", False):
            raise ValueError(
                "compute_with_cache: got True, expected False: ranks with a cached value skip the collective"
            )
        super().__init__(**options)
        self._device = torch.empty(0).device  # torchmetrics 1.0.3 says "cpu" whatever it is
        self.tasks = tasks
        self._nan_strategy = nan_strategy
        self.window = window
        self.window_rows = window_rows
        self._sums = sums
        places = window or min(window_rows or 0, _MOST_PLACES)
        # What stands before the keys: of all updates, and of those in the window.
        self._horizons = ("", "window_") if places else ("",)
        self._names = ColumnNames(tasks or ("loss",))
        windows = {"window": window, "window_rows": window_rows}
        self._description = {"tasks": None if tasks is None else list(tasks), **windows, **(of or {})}
        self._settings = tuple(settings)
        self._sign()
        with plain_tensors():
            rows = sums + 2 + (window_rows is not None)
            state = zero_state((2, 1 + places, rows, len(tasks or ("",))), self.device)
            self.add_state("totals", state, dist_reduce_fx="sum")

    def _sign(self) -> None:
        """Say in a state what the sums are of, for merge_state(), and with which settings.

        A MetricCollection takes metrics whose states are equal, the first one above all, for metrics that always will
        be, and updates one of them for all.
        """
        settings = [type(self).__qualname__, self._nan_strategy, *self._settings]
        with plain_tensors():
            self.add_state("sums_of", encode({**self._description, "settings": settings}), dist_reduce_fx=None)

    def _sum_batch(self, *args: Any, **kwargs: Any) -> Sequence[Tensor | float]:
        raise NotImplementedError

    def _keys(self) -> dict[str, bool | None]:
        raise NotImplementedError

    def _results(self, sums: Tensor) -> Sequence[Tensor]:
        raise NotImplementedError

    # A batch's sums, added.

    @torch.jit.unused
    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Add a batch, as update() does, and return the result of this batch alone."""
        sums = self._sum_batch(*args, **kwargs)
        batch = self._pack(sums)
        is_over_ranks = self.dist_sync_on_step and self.distributed_available_fn()
        shared = batch
        if is_over_ranks:
            shared = self._sum_over_ranks(as_added(batch.unsqueeze(0)), self.dist_sync_fn, None)[0]
        results = self._name_results(shared.expand(len(self._horizons), *shared.shape), self._results_of_now())
        if not is_transformed(*sums):
            self._put(batch, in_place=False)
            self._forward_cache: Any = results
        return results

    def _add(self, sums: Sequence[Tensor | float]) -> None:
        """Add a batch's sums, which need not be detached; what a transform runs is no batch."""
        if not is_transformed(*sums):
            self._put(self._pack(sums))

    def _put(self, batch: Tensor, *, in_place: bool = True) -> None:
        """Add a batch's packed sums, outside of any transform."""
        if batch.is_meta:
            return
        ring = self._ring if len(self._horizons) > 1 else _NO_RING
        if torch.compiler.is_compiling():
            # With no attribute written: torch.compile would guard on the attribute and recompile at each step.
            torch.ops.twloss.add_once(self.totals, batch, *ring)
            return
        with _LOCK:
            if not in_place:
                # The metrics of a collection's compute group have one state, and forward is called on each.
                with plain_tensors():
                    self.totals = self.totals.clone()
            add_once(self.totals, batch, *ring)

    @property
    def _ring(self) -> Ring:
        """How the latest updates are kept; with as many rows on each rank, the ranks that there are at an update."""
        if self.window_rows is None:
            return Ring(self.window or 0)
        places = min(self.window_rows, _MOST_PLACES)
        return Ring(places, places * max(1, place_in(self.process_group)[1]), self.window_rows, counter=-2)

    def _pack(self, sums: Sequence[Tensor | float]) -> Tensor:
        """``pack_update`` of a batch's sums, by this metric's rule."""
        like = sums[0]
        assert isinstance(like, Tensor)
        self._prepare_for(like)
        # Of a NamedTuple, torch 2.6 to 2.8 can't compile a slice.
        own, rows = (sums, None) if len(sums) == self._sums else (sums[:-1], sums[-1])
        assert not isinstance(rows, Tensor)
        return pack_update(own, drops_non_finite=self._drops_non_finite, rows=rows if self.window_rows else None)

    def _prepare_for(self, like: Tensor) -> None:
        """Be where a batch's sums are, or raise where they would be lost."""
        self._refuse_between_syncs("update")
        if self.totals.device != like.device and not like.is_meta:
            # FSDP moves no module without parameters; the first update then brings the sums to the inputs' device.
            self._move(like.device)

    @property
    def _drops_non_finite(self) -> bool:
        return self._nan_strategy != "disable"

    def _refuse_between_syncs(self, what: str) -> None:
        """Raise between sync() and unsync(), where the sums are not this rank's own, and unsync() drops what is new."""
        if self._is_synced:
            name = type(self).__name__
            raise TorchMetricsUserError(f"{name}: {what} between sync() and unsync(), where the sums are of all ranks")

    # Sums, as a result.

    def compute(self) -> dict[str, Tensor]:
        """The result from all rows since reset(), over all ranks; one collective, so every rank has to call it.

        Returns:
            0-dim detached float64 values; NaN where there was no data.

        Raises:
            RuntimeError: with ``nan_strategy="error"``, if an update was not finite.
        """
        return self._start_since(None, self.sync_on_compute, is_async=False).wait()

    def compute_async(self) -> PendingResult[dict[str, Tensor]]:
        """Start what compute() does, and return at once, without waiting for the device or for a slower rank.

        The result is that of this moment, whatever becomes of the metric before it is asked for: updates, reset(),
        other task_weights, a training step of a learned reduction's parameters. (Not what a callable that is no module
        reads elsewhere.)

        It is one collective, and as all of them has its place in an order that must be the same on every rank, those of
        DistributedDataParallel's backward included; else gloo may end the process. A later collective of the same
        process group that does wait waits for this one too.

        Returns:
            What will have the result: ``wait()`` gives it, and ``is_completed()`` says whether that would take a while.
            Warnings and errors come at ``wait()``. Without other ranks it is complete at once.
        """
        return self._start_since(None, self.sync_on_compute, is_async=True)

    def _start_since(
        self, snapshot: Tensor | None, is_over_ranks: bool, *, is_async: bool
    ) -> PendingResult[dict[str, Tensor]]:
        """Start what compute() does for the rows after a snapshot, on each rank its own; None: after reset()."""
        sums = self._copy_sums()
        if snapshot is not None:
            self._refuse_between_syncs("compute() of a view that was reset")
            sums -= snapshot.to(sums.device)
        if is_over_ranks and not self._is_synced and self.distributed_available_fn():
            work, receive = self._start_sum_over_ranks(sums, self.dist_sync_fn, None, is_async=is_async)
        else:
            own = contribution(sums, place_in(self.process_group)[0])
            work, receive = None, lambda: own
        results_of, nan_strategy = self._results_of_now(), self._nan_strategy

        def finish() -> dict[str, Tensor]:
            total = receive()
            if not total[:, -1].any():
                name = type(self).__name__
                rank_zero_warn(f"{name}.compute() was called before update() on any rank; without data, values are NaN")
            counted, offered = total[0, [self._sums, -1]].tolist()
            if counted != offered:
                self._report_non_finite(counted, offered, nan_strategy)
            return self._name_results(total, results_of)

        return PendingResult(work, finish)

    def _copy_sums(self) -> Tensor:
        """This rank's sums in float64, or between sync() and unsync() those of all, by horizon: ``(2, 1 or 2, …)``."""
        with _LOCK:
            value = value_of(self.totals)
            return torch.cat((value[:, :1], value[:, 1:].sum(1, keepdim=True)), 1)[:, : len(self._horizons)]

    def _take_snapshot(self) -> Tensor:
        """What ``_start_since`` takes; the window is of the last updates whatever came before them."""
        self._refuse_between_syncs("reset() of a view")
        sums = self._copy_sums()
        sums[:, 1:] = 0.0
        return sums

    def _results_of_now(self) -> Callable[[Tensor], Sequence[Tensor]]:
        """``_results`` as it is at this moment; with settings that can change, a subclass brings this in its place."""
        return self._results

    @torch.no_grad()
    def _name_results(self, sums: Tensor, results_of: Callable[[Tensor], Sequence[Tensor]]) -> dict[str, Tensor]:
        values = [value for each in sums for value in results_of(each[: self._sums])]
        return dict(zip(self.keys(), values))

    def _report_non_finite(self, counted: list[float], offered: list[float], nan_strategy: NanStrategy) -> None:
        if nan_strategy not in ("warn", "error"):
            return
        counts = {task: int(n - k) for task, n, k in zip(self.tasks or ("loss",), offered, counted) if n > k}
        found = f"sums that were not finite, left out of the running sums: {list_some(counts, 12)} updates"
        message = f"{type(self).__name__}: {found}"
        if nan_strategy == "error":
            raise RuntimeError(message)
        rank_zero_warn(message)

    def keys(self) -> list[str]:
        """The keys of the result, in its order."""
        keys = self._keys()
        return [horizon + key for horizon in self._horizons for key in keys]

    def scalar(self, key: str) -> ScalarView:
        """One key of the result as a ``Metric`` whose compute() is that value, for what wants a metric with one number.

        It shares the sums and costs none of its own. Its reset() starts the view anew and leaves these sums and the
        other views alone, so that Lightning, for one, may log and reset each as it likes.

        Args:
            key: a key of compute()'s result, such as "loss/like".

        Raises:
            ValueError: for an unknown key.
        """
        check_choice("key", key, self.keys())
        return ScalarView(self, key, self._keys()[key.removeprefix("window_")])

    @property
    def nan_strategy(self) -> NanStrategy:
        """What becomes of a task's sums in an update in which they are not finite; set at any time."""
        return self._nan_strategy

    @nan_strategy.setter
    def nan_strategy(self, value: NanStrategy) -> None:
        check_choice("nan_strategy", value, get_args(NanStrategy))
        self._refuse_between_syncs("a new nan_strategy")
        self._nan_strategy = value
        self._sign()

    @property
    def update_count(self) -> int:
        """The number of updates since reset(), on this rank and in a checkpoint that it has loaded."""
        return 0 if self.totals.is_meta else int(value_of(self.totals)[:, 0, -1, 0].sum())

    @property
    def update_called(self) -> bool:
        """Whether update_count is more than 0."""
        return self.update_count > 0

    def reset(self) -> None:
        """Set the sums to 0."""
        with _LOCK, plain_tensors():
            super().reset()
            self._restarts += 1

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot a result as a point for each key, or several as a line for each; the global loss black and bold.

        It is torchmetrics' plot, with a gap where there is no data.

        Args:
            val: what compute() or forward() gave, a list of such results, one a step, or those of
                ``MetricTracker.compute_all()``; None calls compute(), which every rank has to do.
            ax: the matplotlib axes to draw on; None makes a figure with room for all names.

        Returns:
            The figure and the axes.

        Raises:
            ModuleNotFoundError: without matplotlib, which the extra "visual" brings.
            TypeError: for a ``val`` that is no result.
            ValueError: for a ``val`` in which a key is missing.
        """
        return self._plot_keys(self.keys(), val, ax)

    def _plot_keys(self, keys: Sequence[str], val: Any, ax: Any) -> Any:
        """As plot(), of these keys alone."""
        val = self.compute() if val is None else val
        results = val if isinstance(val, (list, tuple)) and val else [val]
        for result in results:
            if not isinstance(result, Mapping):
                raise TypeError(f"val: got {type(result).__name__}, expected a result of compute() or a list of some")
            if missing := [key for key in keys if key not in result]:
                raise ValueError(
                    f"val: got the keys {list_some(list(result))}, expected {list_some(missing)} among them"
                )
        # (keys, steps), where and as matplotlib reads them.
        columns = [torch.stack([torch.as_tensor(each[key], device="cpu").double() for key in keys]) for each in results]
        values = torch.column_stack(columns)
        axes: Any = self._plot(dict(zip(keys, values)), ax)[1]
        steps = values.shape[1]
        size = min(10, 2 + 200 / steps)  # large markers of many steps would close the gaps
        for index, (key, line) in enumerate(zip(keys, axes.lines[-len(keys) :])):
            line.set(marker="osD^"[index // 10 % 4], markersize=size)  # there are 10 colors
            if key == "loss":
                line.set(color="black", linewidth=3, marker="o", markersize=1.4 * size, zorder=3)
        if steps > 16:
            axes.set_xticks(range(0, steps, -(-steps // 10)))
        figure = axes.get_figure()
        if ax is None:
            figure.set_layout_engine("constrained")
        has_room = figure.get_layout_engine() is not None  # beside the axes; torchmetrics' own may hide the lines
        legend = axes.legend(**({"loc": "upper left", "bbox_to_anchor": (1, 1)} if has_room else {}))
        if ax is None:
            width, height = legend.get_window_extent().size / figure.dpi
            figure.set_size_inches(figure.get_figwidth() + width, max(figure.get_figheight(), height + 0.5))
        return figure, axes

    # Over ranks, and merged.

    def _start_sum_over_ranks(
        self, sums: Tensor, gather: Callable[..., Any] | None, process_group: Any, *, is_async: bool
    ) -> tuple[dist.Work | None, Callable[[], Tensor]]:
        """Start one collective, or call the user's ``dist_sync_fn``.

        Args:
            sums: ``(2, …)``, those that were added and those that are carried.
            gather: the user's, or None or torchmetrics' own, which would take three collectives.
            process_group: None: that of the metric.
            is_async: whether to return at once.

        Returns:
            What to wait for, and what then gives the sums of all ranks ``(…)``, if those are of the same tasks.
        """
        group = process_group or self.process_group
        rank, ranks = place_in(group)
        packed = pack_running_sums(sums, self._names, rank)
        if gather is None or gather is gather_all_tensors:
            total, work = start_sum_over_ranks(packed, group, is_async=is_async)
        else:
            parts = gather(packed, group=group)
            total, work, ranks = torch.stack(parts).sum(0), None, len(parts)
        return work, lambda: unpack_running_sums(total, self._names, ranks).view(sums.shape[1:])

    def _sum_over_ranks(self, sums: Tensor, gather: Callable[..., Any] | None, process_group: Any) -> Tensor:
        """The sums of all ranks ``(…)``; as above."""
        return self._start_sum_over_ranks(sums, gather, process_group, is_async=False)[1]()

    def _sync_dist(self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any = None) -> None:
        total = self._sum_over_ranks(in_order(value_of(self.totals), self._ring), dist_sync_fn, process_group)
        self.totals = as_ring(as_added(total), self._ring)

    @contextmanager
    def sync_context(self, *args: Any, should_unsync: bool = True, **kwargs: Any) -> Generator[None, None, None]:
        """As ``Metric.sync_context``, but the local sums come back after an exception too."""
        self.sync(*args, **kwargs)
        try:
            yield
        finally:
            self.unsync(should_unsync=self._is_synced and should_unsync)

    def _copy_state_dict(self) -> dict[str, Tensor | list[Any]]:
        # Sums that were copied inside inference_mode could not be updated in place by the training that follows.
        with plain_tensors():
            return super()._copy_state_dict()

    @property
    def metric_state(self) -> dict[str, Any]:
        """The states, by name: what this rank adds to the sums of all, so that all ranks' can be merged."""
        totals = self.totals
        if not totals.is_meta:
            with _LOCK:
                own = contribution(in_order(value_of(totals), self._ring), place_in(self.process_group)[0])
            totals = state_on(totals.device, as_ring(as_added(own), self._ring))
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
        with _LOCK:
            self._reduce_states(incoming_state)

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        for name in ("sums_of", "totals"):
            value = incoming_state.get(name)
            if not isinstance(value, Tensor) or value.is_meta or value.is_complex():
                found = f"{value.dtype} on {value.device}" if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"incoming_state: got {found} as {name}, expected the metric_state of such a metric")
        try:
            check_same(decode(incoming_state["sums_of"]), self._description)
        except ValueError as error:
            raise ValueError(f"incoming_state: {error}") from None
        ours = value_of(self.totals)
        theirs = value_of(incoming_state["totals"]).to(ours.device)
        if theirs.shape != ours.shape:
            raise ValueError(f"totals: got shape {tuple(theirs.shape)}, expected {tuple(ours.shape)}")
        # Newest to newest: the place of the next update is that of the sum of both counters.
        ring = self._ring
        self.totals = state_on(self.totals.device, as_ring(in_order(ours, ring) + in_order(theirs, ring), ring))

    def _wrap_update(self, update: Callable[..., None]) -> Callable[..., None]:
        return update

    def _wrap_compute(self, compute: Callable[[], dict[str, Tensor]]) -> Callable[[], dict[str, Tensor]]:
        return compute

    # A cast of the model must not round the sums, nor the defaults that reset() restores.
    def _apply(self, fn: Callable[[Tensor], Tensor], *_: Any, **__: Any) -> TaskMetric:
        self._move(fn(torch.empty(0, device=self.totals.device)).device)
        return self

    def _move(self, device: torch.device) -> None:
        if device == self.totals.device:
            return
        if self.totals.is_meta or device.type == "meta":
            self._restarts += 1
        self.totals = state_on(device, value_of(self.totals))
        self._defaults["totals"] = torch.zeros_like(self.totals)
        self._device = device
        self._names.hashes.place(device)
        self._forward_cache = None

    # Copies and checkpoints.

    def persistent(self, mode: bool = False) -> None:
        """Whether the sums are in the ``state_dict()``, as one entry; see ``global_sums()`` for several ranks."""
        if mode:
            self.sums = SavedSums(self)
        elif hasattr(self, "sums"):
            del self.sums

    def _save_sums(self, *, of_all_ranks: bool) -> Tensor:
        """The entry of this rank's sums, or, by a collective, of those of all."""
        with _LOCK:
            value = torch.zeros_like(self.totals, device="cpu") if self.totals.is_meta else value_of(self.totals)
            sums = in_order(value, self._ring)
        place = place_in(self.process_group)
        if self._is_synced:
            own, place = sums[0], ALL_RANKS
        elif of_all_ranks and place[0] >= 0 and self.distributed_available_fn():
            own, place = self._sum_over_ranks(sums, self.dist_sync_fn, None), ALL_RANKS
        else:
            own = contribution(sums, place[0])
        return sums_to_bytes(own, self._description, place)

    def _load_sums(self, entry: Any) -> None:
        """Take the sums of an entry in place of these: those of all ranks are carried, this rank's own are added."""
        if self._is_synced:
            raise ValueError("got sums between sync() and unsync(), which would drop what is loaded")
        shape, is_finite = tuple(value_of(self.totals).shape[1:]), self._nan_strategy != "disable"
        sums, place = sums_from_bytes(entry, shape, shape[-2] - self._sums, self._description, is_finite=is_finite)
        here = place_in(self.process_group)
        if place not in (ALL_RANKS, here) and sums.any():
            raise ValueError(
                f"got the sums of rank {place[0]} of {place[1]} alone, expected those of rank {here[0]} of {here[1]}, "
                "or of all ranks, as saved within twloss.global_sums(); or leave this key out, to load the weights"
            )
        value = as_added(sums)
        if place == ALL_RANKS:
            value = value.flip(0)
        with _LOCK:
            device = sums.device if self.totals.is_meta else self.totals.device
            self.totals = state_on(device, as_ring(value, self._ring))
            self._restarts += 1

    def _load_from_state_dict(self, *args: Any) -> None:
        # Not Metric's, which would take a tensor of the name of a state for that state, without a look at it.
        super(Metric, self)._load_from_state_dict(*args)

    def __getstate__(self) -> dict[str, Any]:
        # Numbers, since multiprocessing would put a tensor into memory that all processes share; beside them an empty
        # tensor, which tells the device, whatever the pickle makes of it.
        state = group_to_state(super().__getstate__())
        state.pop("_compiled_call_impl", None)  # as nn.Module does, of which Metric does not ask it
        # The child that saves the sums is made anew: a shallow copy would share it.
        modules = {name: each for name, each in state["_modules"].items() if not isinstance(each, SavedSums)}
        with _LOCK:
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
