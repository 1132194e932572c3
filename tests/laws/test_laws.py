"""The two laws, over random settings and splits, on one process and on real ranks, against the oracle.

1. compute() gives what one process would get from all rows in one batch.
2. With ``global_batch``, forward and DDP's averaged gradient are those of one process, at each step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.cases import Rows, Settings, cases, columns, joined, parameter_gradients, random_rows, split
from tests.support.laws import Columns, expect_exact_gradients, expect_split_invariance, run_steps
from tests.support.rank_pool import RankPool
from tests.support.tiers import dozens


def run(rank: int, case: Settings, steps: list[list[Rows]], global_batch: bool) -> dict[str, Any]:
    """The life of a ``Ranker``."""
    return run_steps(rank, case.ranker(global_batch=global_batch), steps)


def by_step(case: Settings, steps: list[list[Rows]]) -> list[tuple[Columns, list[list[float]]]]:
    """The oracle's view of each step's rows of all ranks, and its gradients."""
    result = []
    for parts in steps:
        matrix, bias = parameter_gradients(case, joined(parts))
        result.append((columns(case, joined(parts)), [[value for line in matrix for value in line], bias]))
    return result


@given(cases(world_size=1))
@dozens(3)
def test_both_laws_on_one_process(case: tuple[Settings, Rows, list[list[int]]]) -> None:
    options, rows, sizes = case
    steps = split(rows, sizes)
    for global_batch in (False, True):
        results = [run(0, options, steps, global_batch)]
        expect_split_invariance(options, columns(options, rows), results)
        expect_exact_gradients(options, by_step(options, steps), results)


FUSED = [
    Settings(4, "mean", "sum", [0.5, 27.3, 4.0, 1.0], [1.0, 0.0, 2.5, 3.0], "weights", -1.0, fused=True),
    Settings(3, "mean", "norm", fused=True),
]
SIZES = [[16, 5], [1, 0], [32, 32]]
"""By step, by rank: an even number of rows, an odd one, one row and none."""


def expect_both_laws(
    options: Settings,
    sizes: list[list[int]],
    run_ranks: Callable[..., list[dict[str, Any]]],
    *,
    weighted: bool = True,
    global_batch: bool = True,
) -> None:
    """Of random rows, in parts of these sizes by step and rank."""
    rows = random_rows(options, sum(map(sum, sizes)), 0, weighted=weighted)
    steps = split(rows, sizes)
    results = run_ranks(options, steps, global_batch)
    expect_split_invariance(options, columns(options, rows), results)
    expect_exact_gradients(options, by_step(options, steps), results)


@pytest.mark.parametrize("options", FUSED, ids=str)
@pytest.mark.parametrize("is_alone", [True, False])
def test_both_laws_with_a_fused_pass(two_ranks: RankPool, options: Settings, is_alone: bool) -> None:
    weighted = options.mean_over == "weights"
    if is_alone:
        alone = [step[:1] for step in SIZES]
        expect_both_laws(options, alone, lambda *args: [run(0, *args)], weighted=weighted, global_batch=False)
    else:
        expect_both_laws(options, SIZES, partial(two_ranks.run, run), weighted=weighted)


@given(data=st.data())
@pytest.mark.parametrize("global_batch", [False, True])
def test_both_laws_on_ranks(ranks: RankPool, data: st.DataObject, global_batch: bool) -> None:
    options, rows, sizes = data.draw(cases(ranks.world_size))
    steps = split(rows, sizes)
    results = ranks.run(run, options, steps, global_batch)
    expect_split_invariance(options, columns(options, rows), results)
    if global_batch:
        expect_exact_gradients(options, by_step(options, steps), results)
