"""What a RankingQuality goes through: casts, moves, copies, checkpoints, merges, syncs and views of single keys."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torchmetrics.utilities.exceptions import TorchMetricsUserError

from tests.support.quality_batches import TASKS, expected, random_rows, recent
from tests.support.rank_pool import RankPool
from tests.support.results import assert_close, fed, numbers
from twloss import GlobalLoss, RankingQuality

BATCHES = [random_rows(5 + step, step, weighted=True) for step in range(6)]
WINDOWS = pytest.mark.parametrize("window", [None, 2])


def persistent(**options: Any) -> RankingQuality:
    metric = RankingQuality(**{"tasks": TASKS, **options})
    metric.persistent(True)
    return metric


def assert_seen(metric: RankingQuality, count: int) -> None:
    """All numbers are those of the first so many batches."""
    assert metric.update_count == count
    found = numbers(metric.compute())
    assert_close(recent(found, window=False), expected(BATCHES[:count]))
    if metric.window is not None:
        assert_close(recent(found, window=True), expected(BATCHES[max(0, count - metric.window) : count]))


def test_nothing_is_a_registered_buffer_or_in_the_state_dict() -> None:
    metric = fed(RankingQuality(TASKS, window=2), BATCHES)
    assert [*metric.buffers(), *metric.parameters(), *metric.state_dict()] == []


CASTS: dict[str, Callable[[nn.Module], object]] = {
    "half": nn.Module.half,
    "bfloat16": nn.Module.bfloat16,
    "float": nn.Module.float,
    "double": nn.Module.double,
    "to dtype": lambda m: m.to(torch.bfloat16),
    "to tensor": lambda m: m.to(torch.zeros(1, dtype=torch.float16)),
    "type": lambda m: m.type(torch.float16),
    "_apply": lambda m: m._apply(lambda t: t.to(torch.float16)),
}


@WINDOWS
@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_casts_of_a_model_leave_the_sums_alone(cast: Callable[[nn.Module], object], window: int | None) -> None:
    metric = RankingQuality(TASKS, window=window)
    model = nn.ModuleDict({"head": nn.Linear(2, 1), "quality": metric})
    for step in range(3):
        cast(model)
        metric.update(*BATCHES[step])
    assert_seen(metric, 3)
    metric.reset()
    assert metric.totals.dtype == torch.float64
    assert_seen(fed(metric, BATCHES[:4]), 4)


@WINDOWS
def test_the_meta_device_ends_in_zeros(window: int | None) -> None:
    with torch.device("meta"):
        metric = RankingQuality(TASKS, window=window)
    assert metric.update_count == 0
    metric.update(*(part.to("meta") for part in BATCHES[0] if part is not None))
    nn.ModuleDict({"quality": metric}).to_empty(device="cpu")
    assert not metric.totals.any()
    assert_seen(fed(metric, BATCHES[:3]), 3)
    metric.to("meta")
    metric.to_empty(device="cpu")
    assert not metric.totals.any()
    metric.reset()
    assert_seen(fed(metric, BATCHES[:1]), 1)


def test_the_first_batch_brings_a_metric_from_the_meta_device() -> None:
    with torch.device("meta"):
        metric = RankingQuality(TASKS, window=2)
    assert_seen(fed(metric, BATCHES), len(BATCHES))


@WINDOWS
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), RankingQuality.clone])
def test_copies_are_independent(duplicate: Callable[[RankingQuality], RankingQuality], window: int | None) -> None:
    metric = fed(RankingQuality(TASKS, window=window), BATCHES[:3])
    twin = duplicate(metric)
    fed(twin, BATCHES[3:])
    assert_seen(twin, len(BATCHES))
    assert_seen(metric, 3)
    assert (twin.tasks, twin.window, twin.ignore_index) == (metric.tasks, metric.window, metric.ignore_index)


@WINDOWS
def test_inference_mode_does_not_spoil_the_updates_that_follow(window: int | None) -> None:
    with torch.inference_mode():
        metric = fed(RankingQuality(TASKS, window=window), BATCHES[:2])
        assert_seen(metric, 2)
        metric.reset()
        fed(metric, BATCHES[:1])
    assert_seen(fed(metric, BATCHES[1:]), len(BATCHES))


# Checkpoints.


@WINDOWS
def test_a_resumed_run_is_bit_equal_to_one_that_never_stopped(window: int | None) -> None:
    steady, stopped = fed(persistent(window=window), BATCHES), fed(persistent(window=window), BATCHES[:3])
    file = io.BytesIO()
    torch.save(stopped.state_dict(), file)
    file.seek(0)
    resumed = fed(persistent(window=window), BATCHES[4:])
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert_seen(resumed, 3)
    fed(resumed, BATCHES[3:])
    assert torch.equal(resumed.totals, steady.totals)
    assert_seen(stopped, 3)


def other_states() -> dict[str, dict[str, Any]]:
    rows = random_rows(4, tasks=2)
    loss = GlobalLoss(TASKS)
    loss.persistent(True)
    loss.update(torch.ones(3), 1)
    return {
        "a loss's": loss.state_dict(),
        "without a window": fed(persistent(), BATCHES[:1]).state_dict(),
        "another window": fed(persistent(window=3), BATCHES[:1]).state_dict(),
        "other tasks": fed(persistent(tasks=["x", "y", "z"], window=2), BATCHES[:1]).state_dict(),
        "fewer tasks": fed(persistent(tasks=TASKS[:2], window=2), [rows]).state_dict(),
        "other order": fed(persistent(tasks=TASKS[::-1], window=2), BATCHES[:1]).state_dict(),
        "one task": fed(persistent(tasks=None, window=2), [random_rows(4, tasks=1)]).state_dict(),
        "nothing": {},
    }


@pytest.mark.parametrize("which", other_states())
def test_sums_of_something_else_are_not_loaded(which: str) -> None:
    metric = fed(persistent(window=2), BATCHES[:3])
    with pytest.raises(RuntimeError, match="totals"):
        metric.load_state_dict(other_states()[which])
    assert_seen(metric, 3)


def test_sums_of_a_quality_are_not_loaded_into_a_loss() -> None:
    loss = GlobalLoss(TASKS)
    loss.persistent(True)
    with pytest.raises(RuntimeError, match="totals"):
        loss.load_state_dict(fed(persistent(), BATCHES[:1]).state_dict())
    assert not loss.update_called


def saved_and_resumed(rank: int, window: int | None) -> tuple[bool, bool, str]:
    """Whether a state dict of this rank resumes, also one that was taken while synced; and what another's raises."""
    metric = fed(persistent(window=window), BATCHES[rank : rank + 2])
    state = metric.state_dict()
    metric.sync()
    while_synced = metric.state_dict()
    metric.unsync()
    twin = persistent(window=window)
    twin.load_state_dict(while_synced)
    state["sums_of"] = torch.tensor(
        list(bytes(state["sums_of"].tolist()).replace(b'"rank": %d' % rank, b'"rank": %d' % (1 - rank))),
        dtype=torch.uint8,
    )
    try:
        persistent(window=window).load_state_dict(state)
        message = ""
    except RuntimeError as error:
        message = str(error)
    return torch.equal(twin.totals, metric.totals), torch.equal(metric.totals, while_synced["totals"]), message


@WINDOWS
def test_each_rank_resumes_its_own_sums_and_no_others(two_ranks: RankPool, window: int | None) -> None:
    for same, saved, message in two_ranks.run(saved_and_resumed, window):
        assert (same, saved) == (True, True)
        assert "each rank's own" in message


# Merged, synced.


def test_merge_state_adds() -> None:
    metric = fed(RankingQuality(TASKS), BATCHES[:2])
    metric.merge_state(fed(RankingQuality(TASKS), BATCHES[2:4]))
    assert_seen(metric, 4)
    metric.merge_state(fed(RankingQuality(TASKS), BATCHES[4:]).metric_state)
    assert_seen(metric, 6)


def test_other_sums_are_not_merged() -> None:
    metric = fed(RankingQuality(TASKS), BATCHES[:3])
    loss = GlobalLoss(TASKS)
    loss.update(torch.ones(3), 1)
    others: list[RankingQuality | GlobalLoss] = [
        RankingQuality(["x", "y", "z"]),
        RankingQuality(TASKS[::-1]),
        RankingQuality(TASKS[:1]),
        loss,
    ]
    for other in others:
        with pytest.raises(ValueError, match=r"got .*expected|Expected .* but got"):
            metric.merge_state(other)
        assert_seen(metric, 3)
    with pytest.raises(ValueError, match="totals: got shape"):
        metric.merge_state(loss.metric_state)
    assert_seen(metric, 3)


@WINDOWS
def test_an_update_between_sync_and_unsync_is_an_error_and_loses_nothing(window: int | None) -> None:
    metric = fed(RankingQuality(TASKS, window=window, distributed_available_fn=lambda: True), BATCHES[:2])
    metric.sync()
    for call in (metric.update, metric.forward):
        with pytest.raises(TorchMetricsUserError, match="RankingQuality: update between sync"):
            call(*BATCHES[2])
    other = fed(RankingQuality(TASKS, window=window), [BATCHES[2]])
    for into, other_sums in ((metric, other), (other, metric)):
        with pytest.raises(TorchMetricsUserError, match="RankingQuality: merge_state between sync"):
            into.merge_state(other_sums)
    assert other.update_count == 1
    # compute() reads the synced sums.
    found = numbers(metric.compute())
    assert_close(recent(found, window=False), expected(BATCHES[:2]))
    metric.unsync()
    assert_seen(metric, 2)


def synced_values(rank: int, window: int | None) -> list[dict[str, float]]:
    metric = fed(RankingQuality(TASKS, window=window, dist_sync_on_step=True), BATCHES[rank : rank + 1])
    metric.sync()
    inside = numbers(metric.compute())
    metric.unsync()
    with metric.sync_context():
        within = numbers(metric.compute())
    # With dist_sync_on_step, forward gives the batch of all ranks.
    return [inside, within, numbers(metric(*BATCHES[2 + rank])), numbers(metric.compute())]


@WINDOWS
def test_what_is_synced_by_hand_is_of_all_ranks(two_ranks: RankPool, window: int | None) -> None:
    for results in two_ranks.run(synced_values, window):
        for found, batches in zip(results, (BATCHES[:2], BATCHES[:2], BATCHES[2:4], BATCHES[:4])):
            assert_close(recent(found, window=False), expected(batches))


def test_forward_returns_the_batch_and_keeps_the_sums() -> None:
    metric = RankingQuality(TASKS)
    for batch in BATCHES:
        assert_close(numbers(metric(*batch)), expected([batch]))
    assert_seen(metric, len(BATCHES))
