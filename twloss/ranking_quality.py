"""How good a ranking model's predictions are, beyond the loss: normalised entropy and calibration of each task.

Logits, labels and weights of a batch come in and become four sums a task; the quality of all rows of all steps and
ranks goes out. It takes one pass over the rows: everything that compute() gives is a ratio of these sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from twloss.arguments import check_choice, check_ignore_index
from twloss.batch import Batch, align, weighted
from twloss.loss_type import log_loss
from twloss.per_task_metric import PerTaskMetric
from twloss.plots import plot_per_task
from twloss.summed_loss import sum_of_weights, wide_sum_of_rows
from twloss.task_columns import TaskTensors, align_tasks

__all__ = ["RankingQuality"]

QUANTITIES = {"ne": False, "rce": True, "calibration": None, "ctr": None, "logloss": False, "weight": None}
"""What compute() gives of each task, and whether higher is better."""


class RankingQuality(PerTaskMetric):
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
        ignore_index: the label that says "missing", NaN allowed; such rows are in no sum.
        window: also give the quality of the last ``window`` updates of each rank, under keys that begin "window_".
        nan_strategy: as for ``GlobalLoss``.
        kwargs: ``Metric``'s own, such as ``process_group``.

    Raises:
        TypeError: for an argument of a wrong type.
        ValueError: for an argument of a wrong value.

    Examples:
        >>> import torch
        >>> from twloss import RankingQuality
        >>> quality = RankingQuality(["like"])
        >>> quality.update(torch.tensor([[0.0], [0.0], [2.0], [-2.0]]), torch.tensor([[1], [0], [1], [0]]))
        >>> {key: round(value.item(), 4) for key, value in quality.compute().items()}
        {'ne/like': 0.5916, 'rce/like': 40.8441, 'calibration/like': 1.0, 'ctr/like': 0.5, 'logloss/like': 0.41,
         'weight/like': 4.0}
    """

    is_differentiable = False
    plot_lower_bound = 0.0

    def __init__(
        self,
        tasks: Sequence[str] | None,
        *,
        ignore_index: float | None = None,
        window: int | None = None,
        nan_strategy: str = "warn",
        **kwargs: Any,
    ) -> None:
        ignore_index = check_ignore_index(ignore_index)
        super().__init__(tasks, 4, nan_strategy=nan_strategy, window=window, **kwargs)
        self.ignore_index = ignore_index

    if TYPE_CHECKING:

        def __call__(
            self, logits: TaskTensors, labels: TaskTensors, weights: TaskTensors | None = None
        ) -> dict[str, Tensor]:
            """Run ``forward``; nn.Module's own ``__call__`` has no types."""

    def update(self, logits: TaskTensors, labels: TaskTensors, weights: TaskTensors | None = None) -> None:
        """Add a batch's rows; nothing waits for the device, and nothing is added where an error is raised.

        Each of the three may also be a mapping task -> ``(rows,)`` or ``(rows, 1)``.

        Args:
            logits: ``(rows, tasks)``; any shape in the one-task form.
            labels: the logits' shape, in [0, 1], any dtype.
            weights: ``(rows, tasks)``, ``(rows, 1)`` or ``(rows,)``; None: 1. A row of weight 0 is in no sum.

        Raises:
            TypeError: for an input of a wrong type or dtype.
            ValueError: for names, shapes or devices that do not fit.
            TorchMetricsUserError: between sync() and unsync(), where the update would be lost.
        """
        self._add(self._batch_sums(logits, labels, weights))

    def add(self, batch: Batch, logloss_sum: Tensor | None = None) -> None:
        """Add rows that are aligned already, with Σ w·l ``(tasks,)`` where it is known: what a loss at hand does."""
        self._add(self._sums(batch, logloss_sum))

    def plot(self, val: Any = None, ax: Any = None, quantity: str = "ne") -> Any:
        """Plot one quantity of a result as a bar for each task, or of a list of results as a line for each task.

        Args:
            val: what compute() or forward() gave, or a list of such results; None calls compute().
            ax: the matplotlib axes to draw on; None makes a figure.
            quantity: the part of the keys before the task, such as "ne", "calibration" or "window_ne".

        Returns:
            The figure and the axes.

        Raises:
            ModuleNotFoundError: without matplotlib.
            TypeError: for a ``val`` that is no result.
            ValueError: for an unknown quantity, or a ``val`` without it.
        """
        check_choice("quantity", quantity, list(dict.fromkeys(key.partition("/")[0] for key in self.keys())))
        return plot_per_task(
            self.compute() if val is None else val,
            ax,
            tasks=self.tasks or (),
            prefix=quantity,
            summary=quantity if self.tasks is None else None,
            ylabel=quantity,
            lower_bound=None if quantity.endswith("rce") else self.plot_lower_bound,
        )

    def better(self, key: str) -> bool | None:
        """Whether higher values of a key are better; None for calibration, whose best value is 1."""
        return QUANTITIES[key.removeprefix("window_").partition("/")[0]]

    def _keys(self) -> list[str]:
        if self.tasks is None:
            return list(QUANTITIES)
        return [f"{quantity}/{task}" for quantity in QUANTITIES for task in self.tasks]

    def _batch_sums(self, logits: TaskTensors, labels: TaskTensors, weights: TaskTensors | None = None) -> Tensor:
        rules: dict[str, Any] = {"has_classes": False, "ignore_index": self.ignore_index}
        if self.tasks is not None:
            return self._sums(align_tasks(logits, labels, weights, self.tasks, **rules))
        # The one-task form takes no mapping, and align() says so.
        return self._sums(align(logits, labels, weights, **rules))  # type: ignore[arg-type]

    @torch.no_grad()
    def _sums(self, batch: Batch, logloss_sum: Tensor | None = None) -> Tensor:
        """Σ w·l, Σ w, Σ w·y and Σ w·σ(x), counted."""
        tasks = 1 if self.tasks is None else len(self.tasks)
        # Forward-mode derivatives too end here; no_grad() does not stop them.
        batch = batch.each(Tensor.detach)
        logits, labels, weights, _ = batch
        if logloss_sum is None:
            logloss_sum = wide_sum_of_rows(weighted(log_loss(logits, labels), weights), tasks)
        return self._counted(
            logloss_sum,
            sum_of_weights(batch, tasks, "weights"),
            wide_sum_of_rows(weighted(labels, weights), tasks),
            wide_sum_of_rows(weighted(logits.sigmoid(), weights), tasks),
        )

    def _values(self, sums: Tensor) -> Sequence[Tensor]:
        loss_sum, weight, positives, predicted = sums[:4]
        logloss, ctr = loss_sum / weight, positives / weight
        # By the rarer class: the other's share may be rounded to 1, whose log is 0. The sums may be equal but for
        # rounding, which must not make a share negative.
        rare = torch.minimum(positives, weight - positives).clamp(min=0.0) / weight
        entropy = torch.special.entr(rare) - torch.special.xlog1py(1.0 - rare, -rare)
        ne = logloss / entropy.where(entropy > 0, torch.nan)
        values = (ne, 100.0 * (1.0 - ne), predicted / positives, ctr, logloss, weight)
        return torch.stack(values).flatten().unbind(0)
