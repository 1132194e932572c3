"""The window: the quality of the last N updates, as a fresh metric would have it that saw nothing else."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.counts import CollectiveLog
from tests.support.quality_batches import TASKS, Rows, expected, random_rows, recent
from tests.support.rank_pool import RankPool
from tests.support.results import assert_close, fed, numbers
from twloss import RankingQuality, _precision

# A sum of N float64 numbers in another order differs by at most N roundings of 1.1e-16 each.
REORDERED = 1e-14


def windowed(window: int = 3, **options: Any) -> RankingQuality:
    return RankingQuality(TASKS, window=window, **options)


def run(steps: int, **options: Any) -> list[Rows]:
    """Batches of uneven size, some without a row."""
    return [random_rows((7 * step) % 5, step, **options) for step in range(steps)]


def test_keys_are_those_of_all_updates_and_then_those_of_the_window() -> None:
    plain = RankingQuality(TASKS).keys()
    result = fed(windowed(), run(4)).compute()
    assert list(result) == windowed().keys() == [*plain, *(f"window_{key}" for key in plain)]
    assert all(v.shape == () and v.dtype == torch.float64 and not v.requires_grad for v in result.values())
    assert list(fed(RankingQuality(None, window=1), [random_rows(3, tasks=1)]).compute())[-1] == "window_weight"


@pytest.mark.parametrize("window", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("weighted", [False, True])
def test_after_every_step_it_is_the_oracle_and_a_fresh_metric_of_the_last_updates(window: int, weighted: bool) -> None:
    """Over 24 steps a window of 7 wraps around three times, one of 50 is never full."""
    batches = run(24, weighted=weighted)
    metric = windowed(window)
    for step in range(1, len(batches) + 1):
        metric.update(*batches[step - 1])
        seen, last = batches[:step], batches[max(0, step - window) : step]
        found = numbers(metric.compute())
        assert_close(recent(found, window=True), expected(last))
        assert_close(recent(found, window=True), numbers(fed(RankingQuality(TASKS), last).compute()), REORDERED)
        # The numbers of all updates are those of a metric without a window, to the last bit.
        assert repr(recent(found, window=False)) == repr(numbers(fed(RankingQuality(TASKS), seen).compute()))
    assert metric.update_count == len(batches)


def test_each_slot_is_the_sums_of_its_update_to_the_last_bit() -> None:
    batches = run(11, weighted=True)
    metric = fed(windowed(4), batches)
    alone = [fed(RankingQuality(TASKS), [batch]).totals[0].flatten().tolist() for batch in batches]
    assert sorted(slot.flatten().tolist() for slot in metric.totals[0, 1:]) == sorted(alone[-4:])


def test_the_state_has_a_fixed_shape() -> None:
    metric = windowed(5)
    shape, place = metric.totals.shape, metric.totals.data_ptr()
    for batch in run(13):
        metric.update(*batch)
        assert (metric.totals.shape, metric.totals.data_ptr()) == (shape, place)


def test_updates_without_rows_move_the_window_on() -> None:
    metric = fed(windowed(2), [random_rows(9), *[random_rows(0)] * 2])
    found = numbers(metric.compute())
    assert found["window_weight/like"] == 0
    assert math.isnan(found["window_ne/like"])
    assert found["weight/like"] == 9


# Exact eviction.


def heavy(rows: Rows) -> Rows:
    """Rows whose weights leave no digit for others."""
    return rows._replace(weights=torch.full_like(rows.labels, 1e30))


def test_a_huge_batch_leaves_no_trace_once_it_is_out() -> None:
    batches = [random_rows(6, 1), heavy(random_rows(6, 2)), *(random_rows(6, seed) for seed in range(3, 6))]
    metric = fed(windowed(3), batches[:4])
    assert metric.compute()["window_weight/like"].item() > 1e30
    metric.update(*batches[4])
    found = recent(numbers(metric.compute()), window=True)
    assert_close(found, expected(batches[-3:]))
    assert found["weight/like"] == 18


def test_a_nan_batch_that_is_let_in_leaves_no_trace_once_it_is_out() -> None:
    spoilt = random_rows(6, 2)
    spoilt.logits[0, 0] = math.nan
    batches = [random_rows(6, 1), spoilt, *(random_rows(6, seed) for seed in range(3, 6))]
    metric = fed(windowed(3, nan_strategy="disable"), batches[:4])
    assert metric.compute()["window_ne/like"].isnan()
    metric.update(*batches[4])
    found = numbers(metric.compute())
    assert_close(recent(found, window=True), expected(batches[-3:]))
    assert math.isnan(found["ne/like"])


@pytest.mark.parametrize("trouble", [1e30, math.nan])
def test_adding_the_new_and_subtracting_the_old_leaves_a_trace(trouble: float) -> None:
    """The naive version: one running sum of the window."""
    addends = [torch.tensor(x, dtype=torch.float64) for x in (6.0, trouble, 6.0, 6.0, 6.0)]
    total, queue = torch.zeros((), dtype=torch.float64), deque[Tensor]()
    for addend in addends:
        total += addend
        queue.append(addend)
        if len(queue) > 3:
            total -= queue.popleft()
    assert total.item() != 18.0


def test_a_batch_that_is_left_out_takes_a_place_in_the_window_and_is_reported_for_good() -> None:
    spoilt = random_rows(6, 2)
    spoilt.logits[0, 1] = math.nan
    metric = fed(windowed(2), [random_rows(6, 1), spoilt])
    with pytest.warns(UserWarning, match="not finite: reply: 1$"):
        found = numbers(metric.compute())
    assert (found["window_weight/like"], found["window_weight/reply"], found["weight/reply"]) == (12, 6, 6)
    fed(metric, run(5))
    with pytest.warns(UserWarning, match="not finite: reply: 1$"):
        metric.compute()


# Over ranks, merged, and in pairs of float32.


def on_a_rank(rank: int, batches: list[list[Rows]], window: int) -> list[dict[str, float]]:
    """compute() after each of the updates that both ranks have; then more updates on rank 0 alone."""
    metric, results = windowed(window), []
    for batch in batches[rank][:4]:
        metric.update(*batch)
        results.append(numbers(metric.compute()))
    fed(metric, batches[rank][4:])
    return [*results, numbers(metric.compute())]


@pytest.mark.parametrize("window", [1, 3, 20])
def test_over_ranks_it_is_the_last_updates_of_each(two_ranks: RankPool, window: int) -> None:
    batches = [[random_rows(3 + step, 100 * rank + step) for step in range(n)] for rank, n in enumerate([9, 4])]
    for results in two_ranks.run(on_a_rank, batches, window):
        for step, found in enumerate(results, start=1):
            seen = [rank[: step if step <= 4 else None] for rank in batches]
            assert_close(recent(found, window=True), expected(b for rank in seen for b in rank[-window:]))
            assert_close(recent(found, window=False), expected(b for rank in seen for b in rank))


def bytes_of_compute(rank: int, window: int | None) -> list[int]:
    metric = fed(RankingQuality(TASKS, window=window), [random_rows(5, rank)])
    log = CollectiveLog()
    with log:
        metric.compute()
    return log.bytes


def test_the_window_travels_as_one_sum_whatever_its_size(two_ranks: RankPool) -> None:
    sizes = [two_ranks.run(bytes_of_compute, window) for window in (None, 1, 50)]
    plain, short, long = (size for by_rank in sizes for (size,) in [by_rank[0]])
    checks = 4 * 8 * len(TASKS)  # the rows that tell whether the ranks mean the same, once
    assert short == long == 2 * (plain - checks) + checks


@pytest.mark.parametrize(("ours", "theirs"), [(0, 4), (2, 0), (2, 1), (2, 5), (7, 3), (6, 8)])
def test_merged_windows_are_aligned_newest_with_newest(ours: int, theirs: int) -> None:
    """So that with each further update what is oldest in both goes."""
    mine, others, later = run(ours), run(theirs + 20)[20:], run(45)[40:]
    metric = fed(windowed(3), mine)
    metric.merge_state(fed(windowed(3), others))
    for step in range(len(later) + 1):
        if ours + theirs + step:
            found = numbers(fed(metric, later[step - 1 : step] if step else []).compute())
            left = max(0, 3 - step)
            # Of both, in step; [-0:] would be all of them.
            last = (mine[-left:] + others[-left:] if left else []) + later[max(0, step - 3) : step]
            assert_close(recent(found, window=True), expected(last))
            assert_close(recent(found, window=False), expected([*mine, *others, *later[:step]]))


def test_a_window_of_pairs_of_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device without float64; the rows' own sums are then of float32."""
    monkeypatch.setitem(_precision.SUM_DTYPES, "cpu", torch.float32)
    batches = [random_rows(6, seed, weighted=True, dtype=torch.float32) for seed in range(12)]
    metric = windowed(5)
    assert metric.totals.dtype == torch.float32
    for step in range(1, len(batches) + 1):
        metric.update(*batches[step - 1])
        found = numbers(metric.compute())
        assert_close(recent(found, window=True), expected(batches[max(0, step - 5) : step]), 1e-5)
        assert_close(recent(found, window=False), expected(batches[:step]), 1e-5)
    other = windowed(5)
    other.merge_state(metric)
    assert_close(recent(numbers(other.compute()), window=True), expected(batches[-5:]), 1e-5)
    assert_close(recent(numbers(other.compute()), window=False), expected(batches), 1e-5)


def windowed_after(updates: int, window: int) -> RankingQuality:
    """After so many updates without a row: sums of 2, 4, 8, … updates, merged."""
    metric, power = windowed(window), fed(windowed(window), [random_rows(0, dtype=torch.float32)])
    for digit in reversed(f"{updates:b}"):
        if digit == "1":
            metric.merge_state(power)
        power.merge_state(power.clone())
    return metric


@pytest.mark.parametrize("updates", [2**24 - 2, 2**24 + 1, 2**31 + 3, 2**40 + 7])
@pytest.mark.parametrize("window", [1, 3, 7])
@pytest.mark.parametrize("pairs", [False, True])
def test_after_millions_of_updates_the_oldest_place_is_still_the_next(
    updates: int, window: int, pairs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A float32 counter stops at 2^24; that of a pair goes on, in its two parts."""
    monkeypatch.setitem(_precision.SUM_DTYPES, "cpu", torch.float32 if pairs else torch.float64)
    batches = [random_rows(6, seed, dtype=torch.float32) for seed in range(9)]
    metric = windowed_after(updates, window)
    assert metric.update_count == updates
    for step in range(1, len(batches) + 1):
        metric.update(*batches[step - 1])
        assert metric.update_count == updates + step
        found = recent(numbers(metric.compute()), window=True)
        assert_close(found, expected(batches[max(0, step - window) : step]), 1e-5)
