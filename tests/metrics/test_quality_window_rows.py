"""The window of rows: the quality of the updates whose last row is among the last N, in a state of a fixed shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support.quality_batches import TASKS, Rows, attached, expected, random_rows, recent
from tests.support.rank_pool import RankPool
from tests.support.results import assert_close, fed, numbers
from twloss import RankingQuality, _precision

PLACES = 1000


def windowed(rows: int, **options: Any) -> RankingQuality:
    return RankingQuality(TASKS, window_rows=rows, **options)


def uneven(steps: int, largest: int, seed: int = 0, **options: Any) -> list[Rows]:
    """Batches of no row up to so many."""
    return [random_rows((7 * step + 3 * seed) % (largest + 1), 100 * seed + step, **options) for step in range(steps)]


def in_window(batches: Sequence[Rows], share: int) -> list[Rows]:
    """Those whose last row is among the last ones, going back from the newest."""
    found, newer = [], 0
    for batch in reversed(batches):
        if newer < share:
            found.append(batch)
        newer += len(batch.labels)
    return found[::-1]


@pytest.mark.parametrize("rows", [1, 2, 7, 30, 1000])
@pytest.mark.parametrize("weighted", [False, True])
def test_after_every_step_it_has_the_updates_that_end_within_it(rows: int, weighted: bool) -> None:
    """An update larger than the window is in it whole, and alone."""
    batches = uneven(40, 10, weighted=weighted)
    metric = windowed(rows)
    shape, place = metric.totals.shape, metric.totals.data_ptr()
    for step in range(1, len(batches) + 1):
        metric.update(*batches[step - 1])
        found = numbers(metric.compute())
        assert_close(recent(found, window=True), expected(in_window(batches[:step], rows)))
        assert_close(recent(found, window=False), expected(batches[:step]))
        assert (metric.totals.shape, metric.totals.data_ptr()) == (shape, place)
    assert metric.update_count == len(batches)


@pytest.mark.parametrize("rows", [2_500, pytest.param(12_345, marks=pytest.mark.exhaustive)])
def test_where_updates_are_smaller_than_a_thousandth_it_ends_within_a_thousandth(rows: int) -> None:
    """By weight, which is the number of rows: the window, give or take a thousandth of it and one update."""
    assert windowed(rows).totals.shape[1] == 1 + PLACES
    metric, largest, seen = windowed(rows), 3, 0
    for batch in uneven(60, largest) * (rows // 40):
        metric.update(*batch)
        seen += len(batch.labels)
        if seen % 50 == 0 and len(batch.labels):
            weight = metric.compute()["window_weight/like"].item()
            assert min(seen, rows) - rows / PLACES - largest <= weight <= rows + largest
    assert seen > rows


@pytest.mark.parametrize("size", [12, 25])
def test_in_even_updates_it_is_the_last_rows_exactly(size: int) -> None:
    metric = windowed(5_000)
    for step in range(1, 1_000):
        metric.update(torch.zeros(size, 3), torch.ones(size, 3))
        if step % 97 == 0:
            expected = min(step, -(-5_000 // size)) * size
            assert metric.compute()["window_weight/like"].item() == expected


def test_in_updates_of_one_row_it_is_the_last_rows_exactly_as_soon_as_it_is_full() -> None:
    """The oldest of them lies in a place of two that is filled last."""
    metric = windowed(2_000)
    row = torch.zeros(1, 3), torch.ones(1, 3)
    for _ in range(2_000):
        metric.update(*row)
    assert metric.compute()["window_weight/like"].item() == 2_000
    metric.update(*row)
    assert metric.compute()["window_weight/like"].item() == 1_999


def test_what_was_left_out_as_not_finite_takes_its_rows_of_the_window() -> None:
    batches = [random_rows(5, seed) for seed in range(4)]
    batches[1].logits[0, :] = math.nan
    batches[2].logits[0, 0] = math.nan
    metric = fed(windowed(10, nan_strategy="ignore"), batches)
    found = numbers(metric.compute())
    assert [found[f"window_weight/{task}"] for task in TASKS] == [5, 10, 10]
    metric.update(*random_rows(5, 9))
    assert [metric.compute()[f"window_weight/{task}"].item() for task in TASKS] == [10, 10, 10]


def test_a_huge_or_infinite_update_leaves_no_trace_once_it_is_out() -> None:
    spoilt = random_rows(6, 2)
    spoilt.logits[0, 0] = math.nan
    heavy = random_rows(6, 3)._replace(weights=torch.full((6, 3), 1e30, dtype=torch.float64))
    later = [random_rows(6, seed) for seed in range(4, 8)]
    metric = fed(windowed(20, nan_strategy="disable"), [spoilt, heavy, *later])
    assert_close(recent(numbers(metric.compute()), window=True), expected(later))


def on_a_rank(rank: int, batches: list[list[Rows]], rows: int) -> dict[str, float]:
    return numbers(fed(windowed(rows), batches[rank]).compute())


@pytest.mark.parametrize("rows", [1, 20, 45])
def test_over_ranks_each_has_its_share(ranks: RankPool, rows: int) -> None:
    batches = [uneven(5 + rank, 9, seed=rank) for rank in range(ranks.world_size)]
    share = math.ceil(rows / ranks.world_size)
    oracle = expected(batch for rank in batches for batch in in_window(rank, share))
    for found in ranks.run(on_a_rank, batches, rows):
        assert_close(recent(found, window=True), oracle)


def in_a_group_of_its_own(rank: int, batches: list[list[Rows]], rows: int) -> dict[str, float]:
    groups = [dist.new_group([each]) for each in range(2)]
    return numbers(fed(windowed(rows, process_group=groups[rank]), batches[rank]).compute())


def test_only_the_ranks_of_its_group_share_it(two_ranks: RankPool) -> None:
    batches = [uneven(8, 9, seed=rank) for rank in range(2)]
    for rank, found in enumerate(two_ranks.run(in_a_group_of_its_own, batches, 20)):
        assert_close(recent(found, window=True), expected(in_window(batches[rank], 20)))


@pytest.mark.parametrize("rows", [7, 3_000])
def test_of_pairs_of_float32(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_precision.SUM_DTYPES, "cpu", torch.float32)
    batches = uneven(30, 5, dtype=torch.float32)
    metric = windowed(rows)
    assert metric.totals.dtype == torch.float32
    for step in range(1, len(batches) + 1):
        metric.update(*batches[step - 1])
        found = numbers(metric.compute())
        assert_close(recent(found, window=True), expected(in_window(batches[:step], rows)), 1e-5)


@pytest.mark.parametrize("way", ["eager", "fused", "compiled"])
def test_attached_to_a_loss_it_counts_the_rows(way: str, new_compiler: None) -> None:
    loss = attached(windowed(10), fused=way == "fused", pos_weights=[1.0, 2.0, 3.0])
    step = torch.compile(loss, backend="aot_eager", fullgraph=True) if way == "compiled" else loss
    batches = uneven(8, 6, weighted=True)
    for batch in batches:
        step(*batch)
    found = numbers(loss.train_quality.compute())
    assert_close(recent(found, window=True), expected(in_window(batches, 10)))
    assert_close(recent(found, window=False), expected(batches))


def test_the_two_windows_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="window_rows: got 5 beside window=3, expected one of the two"):
        RankingQuality(TASKS, window=3, window_rows=5)


def test_an_update_has_as_many_rows_as_its_largest_task() -> None:
    """Tasks of 10 rows and of 2, and one whose labels are missing in half of 10: the last two updates are 20 rows."""
    tasks = ["many", "few", "missing"]
    metric = RankingQuality(tasks, ignore_index=-1, window_rows=20)
    half = torch.tensor([1.0, -1.0] * 5)
    for _ in range(5):
        metric.update(
            {"many": torch.zeros(10), "few": torch.zeros(2), "missing": torch.zeros(10)},
            {"many": torch.ones(10), "few": torch.ones(2), "missing": half},
        )
    found = numbers(metric.compute())
    assert [found[f"window_weight/{task}"] for task in tasks] == [20.0, 4.0, 10.0]
    assert [found[f"weight/{task}"] for task in tasks] == [50.0, 10.0, 25.0]
