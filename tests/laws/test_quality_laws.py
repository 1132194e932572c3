"""The law of RankingQuality: compute() is the oracle's of all rows, however they were split over updates and ranks."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.quality_batches import Rows, expected, random_rows, recent
from tests.support.rank_pool import RankPool
from tests.support.results import assert_close, fed, numbers
from tests.support.tiers import dozens
from twloss import RankingQuality

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
@dozens(2)
def test_any_split_into_updates(case: Case) -> None:
    expect_the_oracles(case, [life_of(0, case)])


@given(data=st.data())
def test_a_split_changes_nothing_but_the_last_digit(data: st.DataObject) -> None:
    """The same rows in one update, and cut anywhere."""
    whole = random_rows(40, data.draw(st.integers(0, 2**31)), weighted=True)
    cuts = sorted(data.draw(st.lists(st.integers(0, 40), max_size=8)))
    ends = list(zip([0, *cuts], [*cuts, 40]))
    parts = [Rows(*(part[a:b] for part in whole if part is not None)) for a, b in ends]
    one, many = (fed(RankingQuality(["a", "b", "c"]), batches).compute() for batches in ([whole], parts))
    assert_close(numbers(many), numbers(one), 1e-13)
    assert_close(numbers(many), expected([whole], ["a", "b", "c"]))


@given(data=st.data())
def test_any_split_over_ranks(ranks: RankPool, data: st.DataObject) -> None:
    case = data.draw(cases(ranks.world_size).filter(lambda case: any(case[1])))
    expect_the_oracles(case, ranks.run(life_of, case))


@pytest.mark.parametrize("window", [None, 2])
def test_four_ranks_of_which_one_has_no_update_and_one_no_row(four_ranks: RankPool, window: int | None) -> None:
    batches = [
        [random_rows(n, 10 * rank + n, weighted=True) for n in sizes]
        for rank, sizes in enumerate([[5, 0, 9, 2], [], [0], [30]])
    ]
    case = {"tasks": ["a", "b", "c"], "ignore_index": None, "window": window}, batches
    expect_the_oracles(case, four_ranks.run(life_of, case))
