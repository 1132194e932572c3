"""What every metric goes through without harm to its sums: casts, moves, copies, merges, and syncs by hand."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torchmetrics.utilities.exceptions import TorchMetricsUserError

from tests.support.casts import CASTS
from tests.support.metrics import Batch, Kind, Summing, expect_result_of, of_every_kind
from tests.support.results import fed


@of_every_kind
def test_nothing_is_a_buffer_a_parameter_or_in_the_state_dict(kind: Kind) -> None:
    """DistributedDataParallel overwrites buffers."""
    metric = fed(kind.make(), kind.batches(3))
    model = nn.ModuleDict({"metric": metric})
    assert [*model.buffers(), *model.parameters(), *model.state_dict()] == []
    model.load_state_dict({})
    assert metric.update_count == 3


@of_every_kind
@pytest.mark.parametrize("within", [True, False])
@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_casts_leave_the_sums_alone(kind: Kind, cast: Callable[[nn.Module], object], within: bool) -> None:
    """To 12 digits, and by the metric's own methods, those of torchmetrics among them, as by those of its model."""
    metric, batches = kind.make(), kind.batches(4)
    model = nn.ModuleDict({"head": nn.Linear(2, 1), "metric": metric}) if within else metric
    for batch in batches:
        cast(model)
        metric.update(*batch)
    metric.set_dtype(torch.float16)
    expect_result_of(kind, metric, batches)
    metric.reset()
    assert metric.totals.dtype == torch.float64
    expect_result_of(kind, fed(metric, batches), batches)


@of_every_kind
def test_the_meta_device_ends_in_sums_of_nothing(kind: Kind) -> None:
    batches = kind.batches(3)
    with torch.device("meta"):
        metric = kind.make()
    assert (metric.device.type, metric.update_count) == ("meta", 0)
    metric.update(*(part.to("meta") for part in batches[0]))
    nn.ModuleDict({"metric": metric}).to_empty(device="cpu")
    assert not metric.totals.any()
    expect_result_of(kind, fed(metric, batches), batches)
    metric.to("meta")
    metric.to_empty(device="cpu")
    assert (metric.update_count, metric.totals.any().item()) == (0, False)
    metric.reset()
    expect_result_of(kind, fed(metric, batches[:1]), batches[:1])


@of_every_kind
def test_the_first_batch_brings_a_metric_from_the_meta_device(kind: Kind) -> None:
    with torch.device("meta"):
        metric = kind.make()
    expect_result_of(kind, fed(metric, kind.batches(3)), kind.batches(3))
    assert metric.device.type == "cpu"


def update(metric: Summing, batch: Batch) -> None:
    metric.update(*batch)


def forward(metric: Summing, batch: Batch) -> None:
    metric(*batch)


def update_and_compute(metric: Summing, batch: Batch) -> None:
    metric.update(*batch)
    metric.compute()


def update_and_sync(metric: Summing, batch: Batch) -> None:
    metric.distributed_available_fn = lambda: True
    metric.update(*batch)
    metric.sync()
    metric.unsync()


def merge(metric: Summing, batch: Batch) -> None:
    other = metric.clone()
    other.update(*batch)
    metric.merge_state(other)


@of_every_kind
@pytest.mark.parametrize("then_reset", [False, True])
@pytest.mark.parametrize("within", [update, forward, update_and_compute, update_and_sync, merge])
def test_inference_mode_does_not_spoil_the_updates_that_follow(
    kind: Kind, within: Callable[[Summing, Batch], None], then_reset: bool
) -> None:
    """Nothing comes between, such as compute(), which might put what is spoilt right again."""
    first, *later = kind.batches(5)
    with torch.inference_mode():
        metric = kind.make()
        metric.reset()
        within(metric, first)
        if then_reset:
            metric.reset()
    expect_result_of(kind, fed(metric, later), later if then_reset else [first, *later])


@of_every_kind
@pytest.mark.parametrize("within", [update, forward, update_and_compute, update_and_sync])
def test_inference_mode_between_updates_outside_of_it_spoils_none(
    kind: Kind, within: Callable[[Summing, Batch], None]
) -> None:
    """As an evaluation does whose metric goes on."""
    batches = kind.batches(6)
    metric = fed(kind.make(), batches[:2])
    with torch.inference_mode():
        within(metric, batches[2])
        within(metric, batches[3])
    expect_result_of(kind, fed(metric, batches[4:]), batches)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda metric: pickle.loads(pickle.dumps(metric)),
    "clone": lambda metric: metric.clone(),
    "deepcopy of a model": lambda metric: copy.deepcopy(nn.ModuleDict({"metric": metric}))["metric"],
}


@of_every_kind
@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies_are_independent(kind: Kind, duplicate: Callable[[Summing], Summing]) -> None:
    batches = kind.batches(6)
    metric = fed(kind.make(nan_strategy="error"), batches[:3])
    twin = duplicate(metric)
    fed(twin, batches[3:])
    expect_result_of(kind, twin, batches)
    expect_result_of(kind, metric, batches[:3])
    metric.reset()
    expect_result_of(kind, twin, batches)
    assert (twin.tasks, twin.nan_strategy, twin.keys()) == (metric.tasks, "error", metric.keys())


# Merged.


@of_every_kind
def test_merge_state_adds(kind: Kind) -> None:
    """Of a window, newest to newest, so that it is then of the last updates of both."""
    ours, theirs = kind.batches(4), kind.batches(3, seed=10)
    metric, other = fed(kind.make(), ours), fed(kind.make(), theirs)
    metric.merge_state(other)
    expect_result_of(kind, metric, ours, theirs, of=1)
    expect_result_of(kind, other, theirs)
    assert metric.update_count == 7
    empty = kind.make()
    empty.merge_state(metric.metric_state)
    expect_result_of(kind, empty, ours, theirs, of=1)
    metric.update(*kind.batch(20))
    expect_result_of(kind, empty, ours, theirs, of=1)


@of_every_kind
def test_sums_of_something_else_are_not_merged(kind: Kind) -> None:
    batches = kind.batches(3)
    metric = fed(kind.make(), batches)
    for name, stranger in kind.strangers().items():
        other = fed(stranger.make(), stranger.batches(2))
        with pytest.raises(ValueError, match=r"got .*expected|Expected .* but got"):
            metric.merge_state(other)
        with pytest.raises(ValueError, match=r"got .*expected|Expected .* but got"):
            metric.merge_state(other.metric_state)
        expect_result_of(kind, metric, batches)
        assert other.update_count == 2, name


# Between sync() and unsync(), the sums are those of all ranks, and unsync() drops what is new.


@of_every_kind
def test_an_update_between_sync_and_unsync_is_an_error_and_loses_nothing(kind: Kind) -> None:
    batches = kind.batches(3)
    metric = fed(kind.make(distributed_available_fn=lambda: True), batches[:2])
    metric.sync()
    for call in (metric.update, metric.forward):
        with pytest.raises(TorchMetricsUserError, match=f"{kind.of.__name__}: update between sync"):
            call(*batches[2])
    expect_result_of(kind, metric, batches[:2])
    metric.unsync()
    assert metric.update_count == 2
    expect_result_of(kind, fed(metric, batches[2:]), batches)


@of_every_kind
def test_a_merge_between_sync_and_unsync_is_an_error_whichever_is_synced(kind: Kind) -> None:
    batches = kind.batches(3)
    metric, other = fed(kind.make(distributed_available_fn=lambda: True), batches[:2]), fed(kind.make(), batches[2:])
    metric.sync()
    for into, what in ((metric, other), (other, metric)):
        with pytest.raises(TorchMetricsUserError, match=f"{kind.of.__name__}: merge_state between sync"):
            into.merge_state(what)
    metric.unsync()
    expect_result_of(kind, metric, batches[:2])
    expect_result_of(kind, other, batches[2:])


@of_every_kind
def test_a_second_sync_or_unsync_is_an_error(kind: Kind) -> None:
    metric = fed(kind.make(distributed_available_fn=lambda: True), kind.batches(2))
    with pytest.raises(TorchMetricsUserError, match="already been un-synced"):
        metric.unsync()
    metric.sync()
    with pytest.raises(TorchMetricsUserError, match="already been synced"):
        metric.sync()
    metric.unsync()
    expect_result_of(kind, metric, kind.batches(2))
