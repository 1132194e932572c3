"""One key of running sums as a ``Metric`` of its own, for what wants a metric with a single number.

A metric whose compute() gives a dict comes in; a metric that gives one of its values goes out. It holds no sums: it
reads those of the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric

from twloss._metrics.kept_metric import KeptMetric
from twloss._metrics.plot import plot_results
from twloss._sums.pending import PendingResult
from twloss._sums.running_sums import RunningSums
from twloss._torch import hidden_from_jit


@hidden_from_jit
class ScalarView(Metric):
    """One value of a metric's result, such as "loss/like", as a metric; see ``GlobalLoss.scalar()``.

    It shares the sums of its owner, which it does not register as a submodule: the model that has the owner does. What
    feeds the owner feeds the view, and ``update()`` feeds the owner, so update only one of a metric and its views.

    ``reset()`` starts this view anew and leaves the owner and its other views alone: compute() then gives the value of
    the rows that came after it, as the difference of two sums: its rounding is that of the longer one, and a NaN that
    ``nan_strategy="disable"`` let in stays in both. The owner's reset() starts all of its views anew.

    Args:
        owner: the metric to read.
        key: the key of its result.
        higher_is_better: whether higher values are better (None: neither); ``MetricTracker.best_metric()`` reads it.
    """

    # A view has no state that could be kept or merged: Running and merge_state() refuse it when they see this.
    full_state_update = True

    owner: KeptMetric

    def __init__(self, owner: KeptMetric, key: str, higher_is_better: bool | None = None) -> None:
        settings = {"dist_sync_on_step": owner.dist_sync_on_step, "sync_on_compute": owner.sync_on_compute}
        super().__init__(compute_with_cache=False, **settings)
        # In __dict__, where nn.Module does not look for submodules: its sums would be saved twice.
        known = {"higher_is_better": higher_is_better, "is_differentiable": owner.is_differentiable}
        self.__dict__.update(owner=owner, **known)
        self.key = key
        self._since: tuple[object, RunningSums | None] = (owner._era, None)

    def extra_repr(self) -> str:
        """The key, for repr()."""
        return repr(self.key)

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Update the owner, with its arguments."""
        self.owner.update(*args, **kwargs)

    def _filter_kwargs(self, **kwargs: Any) -> dict[str, Any]:
        return self.owner._filter_kwargs(**kwargs)

    @torch.jit.unused
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Update the owner, and return the value of this batch alone."""
        self._forward_cache: Any = self.owner(*args, **kwargs)[self.key]
        value: Tensor = self._forward_cache
        return value

    if TYPE_CHECKING:
        __call__ = forward  # nn.Module's own has no types

    def compute(self) -> Tensor:
        """The value of all rows since reset(), over all ranks; one collective, so every rank has to call it.

        Returns:
            0-dim detached float64.

        Raises:
            TorchMetricsUserError: after a reset() of the view, within the owner's sync() and unsync().
        """
        return self._start(is_async=False).wait()

    def compute_async(self) -> PendingResult[Tensor]:
        """Start what compute() does, and return at once; see ``GlobalLoss.compute_async()``."""
        return self._start(is_async=True)

    def _start(self, *, is_async: bool) -> PendingResult[Tensor]:
        era, snapshot = self._since
        # The owner's own reset() starts all of its views anew.
        is_valid = era is self.owner._era
        is_over_ranks = self.sync_on_compute and self.owner.sync_on_compute
        pending = self.owner._start_since(snapshot if is_valid else None, is_over_ranks, is_async=is_async)
        return pending.map(lambda results: results[self.key])

    def reset(self) -> None:
        """Start this view anew; the owner's sums, which other views read, stay."""
        super().reset()
        self._since = (self.owner._era, self.owner._take_snapshot())

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot a value as a point, or several as a line.

        Args:
            val: what compute() or forward() gave, or a list or ``(steps,)`` tensor of such values; all else as for
                ``GlobalLoss.plot``.
            ax: the matplotlib axes to draw on; None makes a figure.
        """
        val = self.compute() if val is None else val
        is_one = not isinstance(val, (list, tuple)) and getattr(val, "ndim", 0) == 0
        results = [{self.key: each} for each in ([val] if is_one else val)]
        return plot_results(self.owner, [self.key], results, ax)

    def _apply(self, *_: Any, **__: Any) -> ScalarView:
        # There is nothing to move or cast, and Metric's own would refuse nn.Module's ``recurse``.
        return self

    @property
    def device(self) -> torch.device:
        """The device of the owner's sums."""
        return self.owner.device

    @property
    def dtype(self) -> torch.dtype:
        """The owner's dtype."""
        return self.owner.dtype

    def set_dtype(self, dst_type: str | torch.dtype) -> ScalarView:
        """Set the owner's dtype; its sums stay float64."""
        self.owner.set_dtype(dst_type)
        return self

    @property
    def update_count(self) -> int:
        """The owner's number of updates."""
        return self.owner.update_count

    @property
    def update_called(self) -> bool:
        """True if the owner was updated."""
        return self.owner.update_called

    # Metric's wrappers count updates, cache results and warn where the view itself was not updated.

    def _wrap_update(self, update: Callable[..., None]) -> Callable[..., None]:
        return update

    def _wrap_compute(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return compute
