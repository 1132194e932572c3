"""The law of RankingQuality: compute() is the oracle's of all rows, however they were split over updates and ranks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.counts import CollectiveLog
from tests.support.quality_batches import Rows, expected, random_rows, recent
from tests.support.rank_pool import RankPool
from tests.support.results import assert_close, fed, numbers
from twloss import RankingQuality

on_ranks = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
Case = tuple[dict[str, Any], list[list[Rows]]]


@st.composite
def cases(draw: st.DrawFn, world_size: int) -> Case:
    """The arguments, and the batches of each rank, of uneven number and size; none is a rank without an update."""
    missing = draw(st.sampled_from((None, -1.0, math.nan)))
    tasks, window = draw(st.integers(1, 4)), draw(st.sampled_from((None, 1, 3)))
    options = {"tasks": [f"task{t}" for t in range(tasks)], "ignore_index": missing, "window": window}
    soft, weighted = draw(st.booleans()), draw(st.booleans())
    seeds = st.integers(0, 2**31)

    def batch() -> Rows:
        return random_rows(
            draw(st.integers(0, 7)), draw(seeds), tasks=tasks, soft=soft, weighted=weighted, missing=missing
        )

    return options, [[batch() for _ in range(draw(st.integers(0, 5)))] for _ in range(world_size)]


def life_of(rank: int, case: Case) -> dict[str, float]:
    """One rank's updates and compute()."""
    options, batches = case
    metric = fed(RankingQuality(**options), batches[rank])
    # The local sums come back, and a second compute() gives the same.
    assert metric.update_count == len(batches[rank])
    first, second = numbers(metric.compute()), numbers(metric.compute())
    assert repr(first) == repr(second)
    return first


def expect_the_oracles(case: Case, results: list[dict[str, float]]) -> None:
    """All ranks have the numbers of all rows, and of the last updates of each."""
    options, batches = case
    tasks, missing, window = options["tasks"], options["ignore_index"], options["window"]
    rows = [batch for rank in batches for batch in rank]
    for found in results:
        assert repr(found) == repr(results[0])
        assert_close(recent(found, window=False), expected(rows, tasks, missing))
        if window is not None:
            rows_of_window = [batch for rank in batches for batch in rank[-window:]]
            assert_close(recent(found, window=True), expected(rows_of_window, tasks, missing))


@given(cases(world_size=1).filter(lambda case: any(case[1])))
@settings(max_examples=200)
def test_any_split_into_updates(case: Case) -> None:
    expect_the_oracles(case, [life_of(0, case)])


@given(data=st.data())
@settings(max_examples=50)
def test_a_split_changes_nothing_but_the_last_digit(data: st.DataObject) -> None:
    """The same rows in one update, and cut anywhere."""
    whole = random_rows(40, data.draw(st.integers(0, 2**31)), weighted=True)
    cuts = sorted(data.draw(st.lists(st.integers(0, 40), max_size=8)))
    ends = list(zip([0, *cuts], [*cuts, 40]))
    parts = [Rows(*(part[a:b] for part in whole if part is not None)) for a, b in ends]
    one, many = (fed(RankingQuality(["a", "b", "c"]), batches).compute() for batches in ([whole], parts))
    assert_close(numbers(many), numbers(one), 1e-13)
    assert_close(numbers(many), expected([whole], ["a", "b", "c"]))


@pytest.mark.slow
@on_ranks
@given(data=st.data())
def test_any_split_over_ranks(ranks: RankPool, data: st.DataObject) -> None:
    case = data.draw(cases(ranks.world_size).filter(lambda case: any(case[1])))
    expect_the_oracles(case, ranks.run(life_of, case))


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 2])
def test_four_ranks_of_which_one_has_no_update_and_one_no_row(four_ranks: RankPool, window: int | None) -> None:
    batches = [
        [random_rows(n, 10 * rank + n, weighted=True) for n in sizes]
        for rank, sizes in enumerate([[5, 0, 9, 2], [], [0], [30]])
    ]
    case = {"tasks": ["a", "b", "c"], "ignore_index": None, "window": window}, batches
    expect_the_oracles(case, four_ranks.run(life_of, case))


def two_of_three_ranks(rank: int) -> dict[str, float] | None:
    """Ranks 0 and 2 are a group."""
    group = dist.new_group([0, 2])
    if rank == 1:
        return None
    batches = [random_rows(10, rank), random_rows(3, 5 + rank)]
    return numbers(fed(RankingQuality(["a", "b", "c"], window=1, process_group=group), batches).compute())


def test_a_process_group_of_some_ranks(three_ranks: RankPool) -> None:
    batches = [[random_rows(10, rank), random_rows(3, 5 + rank)] for rank in (0, 2)]
    case = {"tasks": ["a", "b", "c"], "ignore_index": None, "window": 1}, batches
    first, none, last = three_ranks.run(two_of_three_ranks)
    assert none is None
    expect_the_oracles(case, [first, last])


def collectives(rank: int, window: int | None) -> tuple[list[str], list[int], list[str]]:
    """Those of compute(), with their bytes, and those of an update()."""
    metric = RankingQuality(["a", "b", "c"], window=window)
    with CollectiveLog() as of_update:
        metric.update(*random_rows(5, rank))
    with CollectiveLog() as of_compute:
        metric.compute()
    return of_compute.names, of_compute.bytes, of_update.names


@pytest.mark.parametrize("window", [None, 1, 50])
def test_one_collective_a_compute_of_a_size_that_the_window_does_not_change(
    two_ranks: RankPool, window: int | None
) -> None:
    for names, sizes, of_update in two_ranks.run(collectives, window):
        assert len(names) == 1
        # Six float64 sums of three tasks, and as many of the whole window.
        assert sizes[0] <= 6 * 3 * 8 * (1 if window is None else 2)
        assert of_update == []


class Model(nn.Module):
    """A model with a quality metric as a submodule."""

    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.register_buffer("steps", torch.zeros(()))  # so that DDP broadcasts buffers, at every forward
        self.quality = RankingQuality(["a", "b", "c"], window=window)

    def forward(self, rows: Rows) -> torch.Tensor:
        """The sum of the logits, whose quality is noted."""
        self.quality.update(self.scale.detach() * rows.logits, rows.labels, rows.weights)
        return (self.scale * rows.logits).sum()


def train_with_ddp(rank: int, batches: list[list[Rows]], window: int | None) -> tuple[int, dict[str, float]]:
    model = Model(window)
    ddp = DistributedDataParallel(model)
    for batch in batches[rank]:
        ddp(batch).backward()
    return model.quality.update_count, numbers(model.quality.compute())


@pytest.mark.parametrize("window", [None, 2])
def test_ddp_does_not_overwrite_the_sums_of_a_submodule(two_ranks: RankPool, window: int | None) -> None:
    batches = [[random_rows(3 + 5 * rank, 10 * rank + step) for step in range(3)] for rank in range(2)]
    answers = two_ranks.run(train_with_ddp, batches, window)
    assert [count for count, _ in answers] == [3, 3]
    case = {"tasks": ["a", "b", "c"], "ignore_index": None, "window": window}, batches
    expect_the_oracles(case, [found for _, found in answers])


def fail_in_the_collective(rank: int) -> list[bool]:
    """A collective that fails, of a window and without, leaves the local sums."""
    answers = []
    for window in (None, 2):
        metric = fed(RankingQuality(["a", "b", "c"], window=window), [random_rows(5, rank), random_rows(2, 9)])
        before = metric.totals.clone()
        whole = dist.all_reduce

        def broken(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError("the network is down")

        dist.all_reduce = broken
        try:
            with pytest.raises(RuntimeError, match="the network is down"):
                metric.compute()
        finally:
            dist.all_reduce = whole
        answers.append(torch.equal(metric.totals, before))
        metric.update(*random_rows(4, rank))
        answers.append(metric.update_count == 3)
        metric.compute()
    return answers


def test_a_collective_that_fails_leaves_the_local_sums(two_ranks: RankPool) -> None:
    assert two_ranks.run(fail_in_the_collective) == [[True] * 4] * 2
