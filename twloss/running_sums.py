"""The life cycle of running sums: a ``Metric`` around one packed state, which nothing a model goes through can damage.

A batch's detached sums come in at each step and are added to the state; the sums over ranks go out, at the cost of one
collective. What is summed, and what becomes of it, is the subclass's. The state is no registered buffer:
DistributedDataParallel overwrites every rank's buffers with those of rank 0 at each forward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors
from torchmetrics.utilities.exceptions import TorchMetricsUserError

from twloss.ranks import detached_sum_over_ranks, group_from_state, group_to_state
from twloss.saved_sums import SAVED_NAMES, load_sums, save_sums
from twloss.wide_sum import add_once, moved_sum, value_of_sum, zero_sum

__all__ = ["RunningSums"]


class RunningSums(Metric):
    """Sums since reset(), of this rank; of all ranks between sync() and unsync(), and so within compute().

    Args:
        shape: of what a batch adds.
        kwargs: ``Metric``'s own, such as ``process_group``. compute() is not cached (``compute_with_cache=False``): a
            rank with a cached value would leave the others waiting in the collective.

    Raises:
        ValueError: for an unknown argument, or ``compute_with_cache=True``.
    """

    full_state_update = False

    totals: Tensor
    """The state, see ``wide_sum.py``."""
    restarts: int = 0
    """How often the sums were set anew, which makes every earlier snapshot of them void."""

    def __init__(self, shape: tuple[int, ...], **kwargs: Any) -> None:
        if kwargs.setdefault("compute_with_cache", False):
            raise ValueError(
                "compute_with_cache: got True, expected False: ranks with a cached value skip the collective"
            )
        super().__init__(**kwargs)
        with torch.inference_mode(False):
            self.add_state("totals", zero_sum(shape, self.device), dist_reduce_fx="sum")

    def describe(self) -> dict[str, Any]:
        """What the sums are of, in JSON's types: sums of something else are neither loaded nor merged."""
        raise NotImplementedError

    @property
    def summed(self) -> Tensor:
        """The sums in float64, of the given shape: views of the state, or a copy where it is a pair."""
        return value_of_sum(self.totals)

    def reset(self) -> None:
        """Set the sums to 0."""
        with torch.inference_mode(False):
            super().reset()
        self.restarts += 1

    def snapshot(self) -> Tensor:
        """A copy of this rank's sums in float64, which compute_since() takes."""
        self.refuse_between_syncs("snapshot")
        return self.summed.clone()

    def compute_since(self, snapshot: Tensor | None) -> Any:
        """What compute() gives for the rows that came after a snapshot, on each rank its own; None: after reset()."""
        if snapshot is None:
            return self.compute()
        self.refuse_between_syncs("compute_since")
        totals = self.totals
        try:
            self.totals = moved_sum(self.summed - snapshot.to(self.summed.device), totals.device)
            return self.compute()
        finally:
            self.totals = totals

    def _add(self, batch: Tensor) -> None:
        """Add a batch's detached sums."""
        self.refuse_between_syncs("update")
        # The transforms of torch.func refuse to update a tensor from outside; meta tensors have no values to add.
        if batch.is_meta or torch._C._are_functorch_transforms_active():
            return
        if self.totals.device != batch.device:
            # FSDP moves no module without parameters; the first update then brings the sums to the inputs' device.
            self._move(batch.device)
        self._put(batch)

    def _put(self, batch: Tensor) -> None:
        # In place, with no attribute written: torch.compile would guard on the attribute and recompile at each step.
        add_once(self.totals, batch)

    def refuse_between_syncs(self, what: str) -> None:
        """Raise between sync() and unsync(), where the sums are not this rank's own, and unsync() drops what is new."""
        if self._is_synced:
            name = type(self).__name__
            raise TorchMetricsUserError(f"{name}: {what} between sync() and unsync(), where the sums are of all ranks")

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        incoming = value_of_sum(incoming_state["totals"]).to(self.summed.device)
        if incoming.shape != self.summed.shape:
            raise ValueError(f"totals: got shape {tuple(incoming.shape)}, expected {tuple(self.summed.shape)}")
        self.totals = moved_sum(self._merged(self.summed, incoming), self.totals.device)

    def _merged(self, sums: Tensor, incoming: Tensor) -> Tensor:
        """The sums of two metrics' rows."""
        return sums + incoming

    def _to_share(self, sums: Tensor) -> Tensor:
        """What of the sums goes over the ranks."""
        return sums

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the sums of another metric, or its ``metric_state``, to these.

        Raises:
            TorchMetricsUserError: between sync() and unsync() of either.
            ValueError: for sums of something else.
        """
        self.refuse_between_syncs("merge_state")
        if isinstance(incoming_state, RunningSums):
            incoming_state.refuse_between_syncs("merge_state")
            if incoming_state.describe() != self.describe():
                raise ValueError(f"incoming_state: got sums of {incoming_state.describe()}, expected {self.describe()}")
        super().merge_state(incoming_state)

    # Sync: one collective, where torchmetrics' own gather takes three.

    def _sync_dist(self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any = None) -> None:
        self.totals = self._to_share(self.summed)
        if dist_sync_fn is gather_all_tensors:
            self.totals = detached_sum_over_ranks(self.totals, process_group or self.process_group)
        else:
            super()._sync_dist(dist_sync_fn, process_group)

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """As ``Metric.sync``; where the collective fails, the local sums are as they were."""
        local = self.totals
        try:
            super().sync(*args, **kwargs)
        except BaseException:
            if not self._is_synced:
                self.totals, self._cache = local, None
            raise

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
        with torch.inference_mode(False):
            return super()._copy_state_dict()

    def _wrap_update(self, update: Callable[..., None]) -> Callable[..., None]:
        # Metric's wrapper counts updates in a Python attribute, at which torch.compile recompiles at each step. There
        # is no cached result to drop, and the sums are detached.
        return update

    def _wrap_compute(self, compute: Callable[[], dict[str, Tensor]]) -> Callable[[], dict[str, Tensor]]:
        # Metric's wrapper would warn on a rank without data, although other ranks have some, and refuse to compute
        # between sync() and unsync().
        @functools.wraps(compute)
        def synced_compute() -> dict[str, Tensor]:
            if self._is_synced:
                return compute()
            with self.sync_context(
                dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync, should_unsync=self._should_unsync
            ):
                return compute()

        return synced_compute

    # Placement: a cast of the model must not round the sums, nor the defaults that reset() restores.

    def _apply(self, fn: Callable[[Tensor], Tensor], *_: Any, **__: Any) -> RunningSums:
        # What else may come is nn.Module's ``recurse`` or Metric's ``exclude_state``, which have nothing to act on.
        self._move(fn(torch.empty(0, device=self.totals.device)).device)
        return self

    def _move(self, device: torch.device) -> None:
        if device == self.totals.device:
            return
        if self.totals.is_meta or device.type == "meta":
            self.restarts += 1
        self.totals = moved_sum(self.totals, device)
        self._defaults["totals"] = torch.zeros_like(self.totals)
        self._device = device
        self._forward_cache: Any = None

    # Copies and checkpoints.

    def __getstate__(self) -> dict[str, Any]:
        return group_to_state(super().__getstate__())

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(group_from_state(state))

    def state_dict(  # type: ignore[override]
        self, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """As ``Metric.state_dict``: with ``persistent(True)`` this rank's sums and what they are of, as tensors."""
        destination = super().state_dict(destination, prefix, keep_vars)
        if self._persistent["totals"]:
            local: Any = self.totals if self._cache is None else self._cache["totals"]
            saved = save_sums(value_of_sum(local), self.describe(), self.process_group)
            destination.update({prefix + name: value for name, value in saved.items()})
        return destination

    def _load_from_state_dict(  # noqa: PLR0917 (nn.Module's signature)
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # Popped, so that nn.Module does not call them unexpected.
        saved = {name: state_dict.pop(prefix + name) for name in SAVED_NAMES if prefix + name in state_dict}
        if saved or self._persistent["totals"]:
            missing = [prefix + name for name in SAVED_NAMES if name not in saved]
            missing_keys.extend(missing)
            if not missing:
                self._load(saved, prefix, error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _load(self, saved: dict[str, Any], prefix: str, error_msgs: list[str]) -> None:
        try:
            if self._is_synced:
                raise ValueError("between sync() and unsync(), which would drop what is loaded")
            value = load_sums(saved, tuple(self.summed.shape), self.describe(), self.process_group)
        except (TypeError, ValueError) as error:
            error_msgs.append(f"{prefix}totals: {error}")
        else:
            self.totals = moved_sum(value, value.device if self.totals.is_meta else self.totals.device)
            self.restarts += 1
