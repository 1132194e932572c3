"""Metrics whose result is a function of sums over rows, of each task: four methods make one.

A batch's sums ``(tasks,)`` come in at each update and are added, where they are finite; at compute() a copy is summed
over the ranks, by one collective, and the subclass makes the values ``()`` of its keys of it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from itertools import chain, islice
from typing import Any, get_args

import torch
from torch import Tensor
from torchmetrics.utilities.prints import rank_zero_warn

from twloss._arguments import (
    NanStrategy,
    SegmentNames,
    check_bool,
    check_choice,
    check_tasks,
    check_window,
    list_counts,
    list_some,
)
from twloss._metrics.checkpoint import ANY
from twloss._metrics.kept_metric import KeptMetric
from twloss._metrics.plot import plot_results
from twloss._metrics.scalar_view import ScalarView
from twloss._rows.segments import SegmentIds, Segments, sum_by_cell
from twloss._sums.pending import PendingResult
from twloss._sums.ranks import place_in
from twloss._sums.running_sums import LOCK, RunningSums, SumsFormat
from twloss._torch import hidden_from_jit, is_transformed, refuse_trace


@hidden_from_jit
class TaskMetric(KeptMetric):
    """The base for metrics of your own whose result is a function of sums over rows, of each task.

    A subclass brings four methods:

    - ``update(…)``, which calls ``self._add(self._sum_batch(…))``: the signature that users and collections see
    - ``_sum_batch(…)``: the same arguments -> the batch's sums, a sequence of ``sums`` tensors ``(tasks,)``; after the
      first one also numbers that all tasks share. How many rows the batch has may follow, as ``window_rows`` needs
    - ``_keys()``: the keys of the result, in its order, and whether higher values are better (None: neither). It is
      called once
    - ``_results(sums)``: ``(sums, tasks)`` in float64, of all rows of all steps and ranks -> the values, 0-dim, in the
      order of the keys

    With ``segments`` there is a column for each cell and task too. ``_sum_batch`` then returns sums of the shape
    ``(1 + cells, tasks)``, which ``_sum_rows`` makes of rows and ids; ``_results`` is given as many columns, ``(sums,
    (1 + cells)·tasks)``; and ``_columns`` appends the names of the cells to those of the totals, for the keys. Without
    segments both serve as well, and add nothing.

    All else is the same for all: sums in float64 that survive casts, copies, threads, checkpoints and NaN, a window,
    one collective a compute(), views of single keys and plots. There is one state: ``add_state()`` raises, as a state
    of a subclass's own would be in no merge or checkpoint.

    Args:
        tasks: the tasks' names, or None for the one-task form, whose keys have no name in them.
        sums: how many sums a task has.
        window: also give the result of the last ``window`` updates of each rank, under keys that begin "window_".
        window_rows: the same of the last rows, this many over all ranks, of each rank its share; one number of rows for
            all tasks.
        segments: as for ``MultiTaskLoss``; for metrics whose update() takes ids.
        validate_args: whether the last thing that ``_sum_batch`` returns is ``(2, tasks)``: the rows with an invalid
            label, and those of negative weight, of which ``compute()`` warns.
        nan_strategy: what becomes of a task's sums in an update in which they are not finite; as for ``GlobalLoss``.
        rule: what else the sums are of, in JSON's types; sums by another rule, of other tasks or windows, or of another
            class are neither loaded nor merged.
        settings: what else makes its results, in JSON's types: a ``MetricCollection`` takes metrics with equal sums and
            equal settings for one.
        options: ``Metric``'s own, such as ``process_group``, which may be a 1-D ``DeviceMesh``; ``compute_with_cache``
            can't be True, as a rank with a cached value would leave the others waiting in the collective.

    Raises:
        TypeError: for an argument of a wrong type.
        ValueError: for an argument of a wrong value.

    Examples:
        >>> import torch
        >>> from twloss import TaskMetric
        >>> class SquaredError(TaskMetric):
        ...     def __init__(self, tasks, **options):
        ...         super().__init__(tasks, sums=2, **options)
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
        >>> predictions = torch.tensor([[1.0, 4.0], [3.0, 5.0]])
        >>> metric.update(predictions, torch.tensor([[1.0, 5.0], [1.0, 5.0]]))
        >>> metric.compute()
        {'mse/price': tensor(2., dtype=torch.float64),
         'mse/stars': tensor(0.5000, dtype=torch.float64)}
    """

    _counterpart: tuple[str, str, str, weakref.ref[TaskMetric]] | None = None

    def __init__(
        self,
        tasks: Sequence[str] | None,
        sums: int,
        *,
        window: int | None = None,
        window_rows: int | None = None,
        segments: SegmentNames | None = None,
        validate_args: bool = False,
        nan_strategy: NanStrategy = "warn",
        rule: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        check_choice("nan_strategy", nan_strategy, get_args(NanStrategy))
        check_window(window, window_rows)
        check_bool("validate_args", validate_args)
        tasks = None if tasks is None else check_tasks(tasks)
        names = tasks or ("loss",)
        # No module's name: a script's is "__main__", and its file's where it is imported.
        known = {"class": type(self).__qualname__, "tasks": tasks, "window": window, "window_rows": window_rows}
        if taken := [name for name in rule or {} if name in {*known, "segments", "shape", "settings", ANY}]:
            raise ValueError(f"rule: got {list_some(taken)}, expected other names: these are known of all sums")
        super().__init__(
            names,
            SumsFormat(sums, len(names), window, window_rows, counts_faults=validate_args),
            description={**known, **(rule or {})},
            settings={"nan_strategy": nan_strategy, "validate_args": validate_args, **(settings or {})},
            options=options or {},
        )
        self.tasks = tasks
        self.window = window
        self.window_rows = window_rows
        self.validate_args = validate_args
        self._nan_strategy = nan_strategy
        self._drops_non_finite = nan_strategy != "disable"
        # The prefixes of the keys: of all updates, and of those in the window.
        self._horizons = ("", "window_") if window or window_rows else ("",)
        self._segments: Segments | None = None
        self._segment_by(segments)

    def _segment_by(self, segments: SegmentNames | None) -> None:
        """Add columns for the cells of segments, and start anew."""
        self._segments = Segments.of(segments, self.tasks, self._format.numbers_of_column)
        if self._segments is None:
            return
        names = self._segments.columns(self.tasks or ("loss",))
        windows = self.window, self.window_rows
        layout = SumsFormat(self._format.sums, len(names), *windows, counts_faults=self.validate_args)
        self._lay_out(names, layout, {**self._description, **self._segments.describe()})
        self.__dict__.pop("_all_keys", None)  # of a copy, whose keys were those without cells

    @property
    def segments(self) -> dict[str, tuple[str, ...] | int] | None:
        """The names of each dimension's ids, or their number; None: no segments."""
        return None if self._segments is None else dict(self._segments.dimensions)

    def _pair_with(self, name: str, mode: str, other_name: str, other: TaskMetric) -> None:
        """Know a loss's metric of the other mode, so that a compute() without data can name it; copies forget it."""
        self._counterpart = name, mode, other_name, weakref.ref(other)

    # What a subclass brings, besides update().

    def _sum_batch(self, *args: Any, **kwargs: Any) -> Sequence[Tensor | float]:
        raise NotImplementedError

    def _keys(self) -> dict[str, bool | None]:
        raise NotImplementedError

    def _results(self, sums: Tensor) -> Sequence[Tensor]:
        raise NotImplementedError

    def _results_of_now(self, *, is_async: bool) -> Callable[[Tensor], Sequence[Tensor]]:  # noqa: ARG002 (a subclass's)
        """``_results`` as it is at this moment; a subclass whose settings can change brings this in its place.

        Args:
            is_async: whether they may have changed by the time that it is called.
        """
        return self._checked_results

    def _checked_results(self, sums: Tensor) -> Sequence[Tensor]:
        values, expected = self._results(sums), len(self._all_keys) // len(self._horizons)
        if len(values) != expected:
            raise ValueError(f"_results: got {len(values)} values, expected {expected}, one for each of _keys()")
        return values

    # From a batch to the running sums.

    def _columns(self, names: Sequence[str]) -> tuple[str, ...]:
        """The names of the tasks' totals, followed by those of the cells: ``name/country=DE``; for ``_keys``."""
        return tuple(names) if self._segments is None else self._segments.columns(tuple(names))

    def _sum_rows(self, rows: Sequence[Tensor], segments: SegmentIds | None = None) -> Sequence[Tensor | float]:
        """The sums over rows ``(rows, tasks)``, each ``(tasks,)``, or with segments ``(1 + cells, tasks)``.

        Args:
            rows: the values to sum, ``(rows, tasks)`` each, detached here; a count of rows is a sum of ones.
            segments: the ids, as for ``MultiTaskLoss.forward``; None for a metric without segments.
        """
        return sum_by_cell(rows, self._segments, segments, self.tasks)

    @torch.jit.unused
    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Add a batch, as update() does, and return the result of this batch alone."""
        sums = self._sum_batch(*args, **kwargs)
        packed = self._pack(sums)
        total = packed.unsqueeze(0)
        if self.dist_sync_on_step and self.distributed_available_fn():
            call = f"{type(self).__name__}.forward() with dist_sync_on_step=True"
            total = self._start_sum(RunningSums.own(total), call, self.dist_sync_fn).wait()
        of_batch, _ = self._format.split(total)
        results_of = self._results_of_now(is_async=False)
        with torch.no_grad():
            of_horizons = of_batch.expand(len(self._horizons), -1, -1)
            results = dict(zip(self._all_keys, [value for each in of_horizons for value in results_of(each)]))
        if not is_transformed(*sums):
            self._add_packed(packed, in_place=False)
            self._forward_cache: Any = results
        return results

    def _add(self, sums: Sequence[Tensor | float]) -> None:
        """Add a batch's sums, which need not be detached. Within a transform of torch.func nothing is added."""
        if not is_transformed(*sums):
            self._add_packed(self._pack(sums))

    def _pack(self, sums: Sequence[Tensor | float]) -> Tensor:
        """A batch's sums ``(tasks,)`` with their counters, ``(rows, tasks)``, where the running sums are."""
        refuse_trace(self)
        self._prepare_for(self._check_shapes(sums))
        return self._format.pack(sums, drops_non_finite=self._drops_non_finite)

    def _check_shapes(self, sums: Sequence[Tensor | float]) -> Tensor:
        """The first of a batch's sums; raise unless each has one number a task, or with segments one a cell and task.

        After the first one, without segments, also a number that all tasks share.
        """
        columns, segments = len(self.tasks or ("loss",)), self._segments
        expected = (columns,) if segments is None else (1 + segments.cells, columns)
        first, *others = islice(sums, self._format.sums)
        for each in (first, *others):
            if isinstance(each, Tensor):
                found = None if each.shape == expected else f"shape {tuple(each.shape)}"
            else:
                found = type(each).__name__ if each is first or segments is not None else None
            if found is not None:
                meaning = "(tasks,)" if segments is None else "(1 + cells, tasks), as of _sum_rows()"
                raise ValueError(f"_sum_batch: got {found}, expected {expected}, {meaning}")
        assert isinstance(first, Tensor)
        return first

    @property
    def nan_strategy(self) -> NanStrategy:
        """The treatment of a task's sums in an update in which they are not finite; set at any time."""
        return self._nan_strategy

    @nan_strategy.setter
    def nan_strategy(self, value: NanStrategy) -> None:
        check_choice("nan_strategy", value, get_args(NanStrategy))
        self._refuse_between_syncs("a new nan_strategy")
        self._nan_strategy = value
        self._drops_non_finite = value != "disable"
        self._settings = {**self._settings, "nan_strategy": value}
        self._describe_state()

    # From the running sums to a result.

    def compute(self) -> dict[str, Tensor]:
        """The result from all rows since reset(), over all ranks; one collective, so every rank has to call it.

        Returns:
            0-dim detached float64 values; NaN where there was no data.

        Raises:
            RuntimeError: with ``nan_strategy="error"``, if an update was not finite; from the backend's, if a rank does
                not call it before the process group's timeout, or is gone.
        """
        return self._start_since(None, self.sync_on_compute, is_async=False).wait()

    def compute_async(self) -> PendingResult[dict[str, Tensor]]:
        """Start what compute() does, and return at once, without waiting for the device or for a slower rank.

        The result is that of this moment, whatever becomes of the metric before it is asked for: updates, reset(),
        other task_weights, a training step of a learned reduction, its mode and other attributes. A reduction that is a
        module is copied for it, which is refused with an error where ``copy.deepcopy()`` can't. (Not of this moment is
        what a function reads elsewhere: one that is the reduction, or that a module holds, such as a compiled method.)

        It is one collective, and as all of them has its place in an order that must be the same on every rank, those of
        DistributedDataParallel's backward included; else gloo may end the process. A later collective of the same
        process group that does wait waits for this one too.

        Returns:
            The pending result: ``wait()`` gives it, and ``is_completed()`` says whether that would take a while.
            Warnings and errors of the sums come at ``wait()``. Without other ranks it is complete at once.

        Raises:
            TypeError: for a reduction that is a module and can't be copied.
        """
        return self._start_since(None, self.sync_on_compute, is_async=True)

    def _start_since(
        self, snapshot: RunningSums | None, is_over_ranks: bool, *, is_async: bool
    ) -> PendingResult[dict[str, Tensor]]:
        # First, since it may be refused, or be a collective that waits.
        finish = partial(self._finish, self._results_of_now(is_async=is_async), self._nan_strategy)
        rank, _ = place_in(self.process_group)
        with LOCK:
            value = self._format.read_horizons(self.totals)
        if snapshot is not None:
            self._refuse_between_syncs("compute() of a view that was reset")
            value -= snapshot
        if is_over_ranks and not self._is_synced and self.distributed_available_fn():
            call = f"{type(self).__name__}.{'compute_async' if is_async else 'compute'}()"
            pending = self._start_sum(value, call, self.dist_sync_fn, is_async=is_async)
            return pending.map(self._format.split).map(finish)
        return PendingResult(None, partial(finish, self._format.split(value.of_rank(rank))))

    def _finish(
        self,
        results_of: Callable[[Tensor], Sequence[Tensor]],
        nan_strategy: NanStrategy,
        total: tuple[Tensor, Tensor],
    ) -> dict[str, Tensor]:
        """The result of the total of all ranks, as ``SumsFormat.split`` gives it."""
        sums, counts = total
        self._report(counts.cpu(), nan_strategy)
        with torch.no_grad():
            return dict(zip(self._all_keys, chain.from_iterable(map(results_of, sums))))

    def _report(self, counts: Tensor, nan_strategy: NanStrategy) -> None:
        """Warn of, or raise for, what the counts of ``SumsFormat.split`` tell, on the CPU."""
        # The updates of each horizon come last, and before them the finite ones.
        head, tail = counts.split((len(counts) - len(self._horizons), len(self._horizons)))
        (*faults, finite), (updates, *of_window) = head.tolist(), tail.tolist()
        if not any(map(any, (updates, *of_window))):
            found = "was called before update() on any rank; without data, values are NaN"
            rank_zero_warn(f"{type(self).__name__}.compute() {found}{self._question_of_mode()}")
        if finite != updates and nan_strategy in ("warn", "error"):
            self._report_non_finite(finite, updates, is_error=nan_strategy == "error")
        if faults:
            self._report_faults(*faults)

    def _question_of_mode(self) -> str:
        """What to ask where one of a loss's two metrics has no data: whether the loss was ever in its mode."""
        if self._counterpart is None:
            return ""
        name, mode, other_name, reference = self._counterpart
        other = reference()
        updates = 0 if other is None else other.update_count
        counted = f", and {other_name} has {updates} updates on this rank" if updates else ""
        return f". It is the {name} of a loss{counted}: was the model put into {mode}?"

    def _report_non_finite(self, finite: list[float], updates: list[float], *, is_error: bool) -> None:
        counts = {task: int(n - k) for task, n, k in zip(self.tasks or ("loss",), updates, finite) if n > k}
        message = f"{type(self).__name__}: skipped updates that were not finite: {list_counts(counts)}"
        if is_error:
            raise RuntimeError(message)
        rank_zero_warn(message)

    def _report_faults(self, labels: Sequence[float], weights: Sequence[float]) -> None:
        """Warn of invalid labels, and of negative weights."""
        found = []
        for name, counts in (
            ("invalid labels (outside of [0, 1], or no class)", labels),
            ("negative weights", weights),
        ):
            if any(counts):
                by_task = {task: int(n) for task, n in zip(self.tasks or ("loss",), counts) if n}
                found.append(f"{name}: {list_counts(by_task)}")
        if found:
            rank_zero_warn(f"{type(self).__name__}: got {'; '.join(found)}")

    # The result's keys, and single ones.

    @cached_property
    def _all_keys(self) -> dict[str, bool | None]:
        keys = self._keys()
        return {horizon + key: better for horizon in self._horizons for key, better in keys.items()}

    def keys(self) -> list[str]:
        """The keys of the result, in its order."""
        return list(self._all_keys)

    def scalar(self, key: str) -> ScalarView:
        """One key of the result as a ``Metric`` whose compute() is that value, for what wants a metric with one number.

        It shares the sums and costs none of its own. Its reset() starts the view anew and leaves these sums and the
        other views alone, so that Lightning, for one, may log and reset each as it likes.

        Args:
            key: a key of compute()'s result, such as "loss/like".

        Raises:
            ValueError: for an unknown key.
        """
        check_choice("key", key, self._all_keys)
        return ScalarView(self, key, self._all_keys[key])

    def plot(self, val: Any = None, ax: Any = None, *, key: str | None = None) -> Any:
        """Plot a result as a point for each key, or several as a line for each; the global loss black and bold.

        It is torchmetrics' plot, with a gap where there is no data.

        Args:
            val: what compute() or forward() gave, a list of such results, one a step, or those of
                ``MetricTracker.compute_all()``; None calls compute(), which every rank has to do.
            ax: the matplotlib axes to draw on; None makes a figure with room for all names.
            key: a key of the result, to be drawn alone, with a line for each of its cells; None: all but cells.

        Returns:
            The figure and the axes.

        Raises:
            ModuleNotFoundError: without matplotlib, which the extra "visual" brings.
            TypeError: for a ``val`` that is no result.
            ValueError: for a ``val`` in which a key is missing, or an unknown ``key``.
        """
        return plot_results(self, self._keys_to_plot(key), val, ax)

    def _keys_to_plot(self, key: str | None) -> list[str]:
        """A key and those of its cells; None: all but those of cells."""
        if key is not None:
            check_choice("key", key, self._all_keys)
            return [each for each in self._columns([key]) if each in self._all_keys]
        of_cells: set[str] = set()
        for name in self._all_keys:
            if name not in of_cells:  # a total comes before its cells
                _, *cells = self._columns([name])
                of_cells.update(cells)
        return [each for each in self._all_keys if each not in of_cells]
