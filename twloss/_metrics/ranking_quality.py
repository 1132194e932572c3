"""The quality of a ranking model's predictions, beyond the loss: normalised entropy and calibration of each task.

Logits, labels and weights of a batch come in and become four sums a task; the quality of all rows of all steps and
ranks goes out. It takes one pass over the rows: everything that compute() gives is a ratio of these sums.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from twloss._arguments import (
    IgnoreIndex,
    NanStrategy,
    PerTask,
    SegmentNames,
    check_choice,
    check_ignore_index,
    check_tasks,
    label_name,
    list_some,
    per_task_numbers,
)
from twloss._constants import TaskConstants
from twloss._metrics.plot import plot_results
from twloss._metrics.task_metric import TaskMetric
from twloss._rows.batch import align
from twloss._rows.cell_sums import append_cells
from twloss._rows.mappings import TaskTensors
from twloss._rows.row_loss import BinaryCrossEntropy
from twloss._rows.row_pass import count_faults, sum_quality
from twloss._rows.segments import SegmentIds, Segments, refuse_ids
from twloss._torch import hidden_from_jit

QUANTITIES = {"ne": False, "rce": True, "calibration": None, "ctr": None, "logloss": False, "weight": None}
"""The quantities that compute() gives of each task, and whether higher is better."""


@hidden_from_jit
class RankingQuality(TaskMetric):
    """Normalised entropy, calibration and what they are made of, from logits, of all rows of all steps and ranks.

    With the sums over every row of every rank since reset(), x the logits, y the labels and w the weights (1 without):

    - ``weight`` = Σ w
    - ``logloss`` = Σ w·l / Σ w, where l is the binary cross-entropy of x and y, with no pos_weight
    - ``ctr`` = Σ w·y / Σ w, the base rate
    - ``ne`` = logloss / H(ctr), where H(p) = -p·ln p - (1-p)·ln(1-p): the normalised entropy (He et al. 2014,
      "Practical Lessons from Predicting Clicks on Ads at Facebook"). 1 is as good as predicting the base rate, lower is
      better
    - ``rce`` = 100·(1 - ne): the relative cross entropy, in percent
    - ``calibration`` = Σ w·σ(x) / Σ w·y: how many positives were predicted for each one observed

    The entropies are from logits, not from clipped probabilities, so that extreme ones count as what they are. A task
    with labels of one class only has an ne and rce of NaN, and without a positive one a calibration of infinity (NaN
    where none is predicted either); one without data has a weight of 0 and NaN for all else.

    Args:
        tasks: the tasks' names, or None for the one-task form, whose keys are "ne", "rce", ….
        ignore_index: the label that says "missing", NaN allowed; such rows are in no sum. Also a mapping task -> label;
            a task that is left out has none.
        window: also give the quality of the last ``window`` updates of each rank, under keys that begin "window_".
        window_rows: the same of the last rows, this many over all ranks, of each rank its share. It is exact to within
            one update or a thousandth of the window, whichever has more rows: an update counts as long as its last row
            does. All tasks have one window: where their numbers of rows differ, an update has as many as the task with
            the most, so that of one with fewer has fewer rows of it.
        segments: as for ``MultiTaskLoss``, for every quantity: "ne/like/country=DE". A metric that a loss is given as
            its ``quality`` takes the loss's if it has none.
        logit_shift: a number that is added to the logits first, or one a task: ln r where the model was trained on
            negatives that were kept at the rate r, and -ln f where it was trained with a pos_weight of f.
        validate_args: count the rows whose label is outside of [0, 1], and those of negative weight, on the device and
            without waiting for it; compute() warns with the counts by task. Of a loss's own, the loss has it.
        nan_strategy: as for ``GlobalLoss``.
        kwargs: ``Metric``'s own, such as ``process_group``, which may be a 1-D ``DeviceMesh``.

    Raises:
        TypeError: for an argument of a wrong type.
        ValueError: for an argument of a wrong value.

    Examples:
        >>> import torch
        >>> from twloss import RankingQuality
        >>> quality = RankingQuality(["like"])
        >>> quality.update(torch.tensor([[0.0, 0, 2, -2]]).T, torch.tensor([[1, 0, 1, 0]]).T)
        >>> {key: round(value.item(), 4) for key, value in quality.compute().items()}
        {'ne/like': 0.5916, 'rce/like': 40.8441, 'calibration/like': 1.0, 'ctr/like': 0.5,
         'logloss/like': 0.41, 'weight/like': 4.0}

        By country, of which -1 is none of these:

        >>> quality = RankingQuality(["like"], segments={"country": ["DE", "US"]})
        >>> ids = {"country": torch.tensor([0, 0, 1, -1])}
        >>> quality.update(torch.zeros(4, 1), torch.ones(4, 1), segments=ids)
        >>> quality.compute()["weight/like/country=DE"]
        tensor(2., dtype=torch.float64)
    """

    def __init__(
        self,
        tasks: Sequence[str] | None,
        *,
        ignore_index: IgnoreIndex = None,
        window: int | None = None,
        window_rows: int | None = None,
        segments: SegmentNames | None = None,
        logit_shift: PerTask | None = None,
        validate_args: bool = False,
        nan_strategy: NanStrategy = "warn",
        **kwargs: Any,
    ) -> None:
        tasks = None if tasks is None else check_tasks(tasks)
        ignore_index = check_ignore_index(ignore_index, tasks)
        columns = tasks or ("loss",)
        shift = per_task_numbers("logit_shift", logit_shift, columns)
        rule = {"ignore_index": label_name(ignore_index), "logit_shift": list(shift or [0.0] * len(columns))}
        checks: dict[str, Any] = {"validate_args": validate_args, "nan_strategy": nan_strategy}
        windows: dict[str, Any] = {"window": window, "window_rows": window_rows}
        super().__init__(tasks, 4, **windows, segments=segments, **checks, rule=rule, options=kwargs)
        self.ignore_index = ignore_index
        self._shift = TaskConstants(shift)

    @property
    def logit_shift(self) -> tuple[float, ...] | None:
        """The numbers that are added to the logits, one a task, or None."""
        return self._shift.numbers

    if TYPE_CHECKING:

        def __call__(
            self,
            logits: TaskTensors,
            labels: TaskTensors,
            weights: TaskTensors | None = None,
            *,
            segments: SegmentIds | None = None,
        ) -> dict[str, Tensor]:
            """Run ``forward``; nn.Module's own ``__call__`` has no types."""

    def update(
        self,
        logits: TaskTensors,
        labels: TaskTensors,
        weights: TaskTensors | None = None,
        *,
        segments: SegmentIds | None = None,
    ) -> None:
        """Add a batch's rows; nothing waits for the device, and nothing is added where an error is raised.

        Each of the three may also be a mapping task -> ``(rows,)`` or ``(rows, 1)``.

        Args:
            logits: ``(rows, tasks)``; any shape in the one-task form.
            labels: the logits' shape, in [0, 1], any dtype.
            weights: ``(rows, tasks)``, ``(rows, 1)`` or ``(rows,)``; None: 1. A row of weight 0 is in no sum.
            segments: a mapping dimension -> ids, for a metric with segments; as for ``MultiTaskLoss.forward``, and for
                the one-task form as for ``Loss.forward``.

        Raises:
            TypeError: for an input of a wrong type or dtype.
            ValueError: for names, shapes or devices that do not fit.
            TorchMetricsUserError: between sync() and unsync(), where the update would be lost.
        """
        self._add(self._sum_batch(logits, labels, weights, segments=segments))

    def plot(self, val: Any = None, ax: Any = None, quantity: str = "ne", *, key: str | None = None) -> Any:
        """Plot one quantity of a result as a point for each task, or of several as a line for each task.

        Args:
            val: this and the next as for ``GlobalLoss.plot``, and so what is returned and raised.
            ax: see there.
            quantity: the part of the keys before the task, such as "ne", "calibration" or "window_ne".
            key: a key, such as "ne/like", to be drawn with a line for each of its cells, in place of a quantity.

        Returns:
            The figure and the axes.

        Raises:
            ModuleNotFoundError: without matplotlib, which the extra "visual" brings.
            TypeError: for a ``val`` that is no result.
            ValueError: for an unknown quantity or key, or a ``val`` without it.
        """
        keys = self._keys_to_plot(key)
        if key is None:
            of_key = {each: name for each in keys for name, *_ in [each.split("/")]}
            check_choice("quantity", quantity, list(dict.fromkeys(of_key.values())))
            keys = [each for each in keys if of_key[each] == quantity]
        return plot_results(self, keys, val, ax)

    def _keys(self) -> dict[str, bool | None]:
        columns = self._columns([""] if self.tasks is None else [f"/{task}" for task in self.tasks])
        return {f"{quantity}{column}": better for quantity, better in QUANTITIES.items() for column in columns}

    def _sum_batch(
        self,
        logits: TaskTensors,
        labels: TaskTensors,
        weights: TaskTensors | None = None,
        *,
        segments: SegmentIds | None = None,
    ) -> Sequence[Tensor | float]:
        row_loss = BinaryCrossEntropy()
        batch = align(logits, labels, weights, self.tasks, row_loss, self.ignore_index)
        if self._segments is None:
            refuse_ids(segments)
        else:
            batch = self._segments.add_to(batch, segments, labels, self.tasks)
        logits, labels, weights, _, ids = batch
        rows, tasks = logits.shape
        sums, summed = sum_quality(logits, labels, weights, rows, tasks, self._shift.like(logits))
        faults: tuple[Tensor, ...] = ()
        if self.validate_args:
            log_loss, *_ = sums
            assert isinstance(log_loss, Tensor)
            faults = (count_faults(row_loss.invalid_labels(logits, labels), weights, log_loss),)
        if self._segments is not None and ids is not None:
            sums = append_cells(sums, summed, ids, self._segments.sizes)
        return *sums, rows, *faults

    def _move(self, device: torch.device) -> None:
        super()._move(device)
        self._shift.place(device)

    def _results(self, sums: Tensor) -> Sequence[Tensor]:
        loss_sum, weight, positives, predicted = sums
        logloss, ctr = loss_sum / weight, positives / weight
        # By the rarer class: the other's share may be rounded to 1, whose log is 0. The sums may be equal but for
        # rounding, which must not make a share negative.
        rare = torch.minimum(positives, weight - positives).clamp(min=0.0) / weight
        entropy = torch.special.entr(rare) - torch.special.xlog1py(1.0 - rare, -rare)
        ne = logloss / entropy.where(entropy > 0, torch.nan)
        values = (ne, 100.0 * (1.0 - ne), predicted / positives, ctr, logloss, weight)
        return torch.stack(values).flatten().unbind(0)


def is_wanted(quality: bool | RankingQuality) -> bool:
    """Whether a loss's argument asks for a metric of the quality of its predictions."""
    if not isinstance(quality, (bool, RankingQuality)):
        raise TypeError(f"quality: got {type(quality).__name__}, expected a bool or a RankingQuality")
    return quality is not False


def own_quality(
    quality: bool | RankingQuality,
    tasks: tuple[str, ...] | None,
    ignore_index: IgnoreIndex,
    process_group: dist.ProcessGroup | None,
    segments: Segments | None,
) -> RankingQuality:
    """A metric of a loss's own, of its binary tasks: a copy of the one that it was given, if any.

    Args:
        quality: the loss's argument.
        tasks: its binary tasks.
        ignore_index: of these.
        process_group: of the loss, and so the segments.
        segments: see there.
    """
    dimensions = None if segments is None else segments.dimensions
    if not isinstance(quality, RankingQuality):
        return RankingQuality(tasks, ignore_index=ignore_index, process_group=process_group, segments=dimensions)
    if quality.tasks != tasks or label_name(quality.ignore_index) != label_name(ignore_index):
        raise ValueError(
            f"quality: got one with tasks={quality.tasks and list_some(quality.tasks)}, "
            f"ignore_index={quality.ignore_index}, expected tasks={tasks and list_some(tasks)}, "
            f"ignore_index={ignore_index}, as the loss's tasks with BCE_WITH_LOGITS have"
        )
    if quality.validate_args:
        raise ValueError("quality: got one with validate_args=True, expected the loss to have it, for both")
    if quality.process_group not in (None, process_group):
        raise ValueError("quality: got one with another process_group, expected that of the loss, or none")
    own = copy.deepcopy(quality)
    if own.segments is None and dimensions is not None:
        own._segment_by(dimensions)
    elif own.segments != dimensions or list(own.segments or ()) != list(dimensions or ()):
        expected = "None" if dimensions is None else f"None or {dimensions}"
        raise ValueError(f"quality: got one with segments={own.segments}, expected {expected}, as the loss has")
    own.process_group = process_group
    own.reset()
    return own
