"""The two laws, over random settings and splits, on one process and on real ranks, against the oracle.

1. compute() gives what one process would get from all rows in one batch.
2. With ``global_batch``, forward and DDP's averaged gradient are those of one process, at each step.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.parallel import DistributedDataParallel

from tests.support import reference
from tests.support.cases import Ranker, Rows, Settings, cases, columns, joined, parameter_gradients, split
from tests.support.rank_pool import RankPool

TOLERANCE = 1e-12
on_ranks = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def run_steps(rank: int, case: Settings, steps: list[list[Rows]], global_batch: bool) -> dict[str, Any]:
    """One rank's life: its part of every step, forward and backward, then compute()."""
    loss = case.loss(global_batch=global_batch)
    model: torch.nn.Module = Ranker(loss, case.tasks)
    if torch.distributed.is_initialized():
        model = DistributedDataParallel(model)
    values, gradients = [], []
    for parts in steps:
        model.zero_grad()
        losses = model(parts[rank])
        losses["loss"].backward()
        values.append({key: value.item() for key, value in losses.items()})
        gradients.append([parameter.grad.tolist() for parameter in model.parameters() if parameter.grad is not None])
    result = loss.train_metric.compute()
    return {"values": values, "gradients": gradients, "computed": {key: v.item() for key, v in result.items()}}


def expect_split_invariance(case: Settings, rows: Rows, results: list[dict[str, Any]]) -> None:
    """compute() is the oracle's of all rows, and the same on all ranks."""
    expected = reference.losses(columns(case, rows), case.rule())
    for result in results:
        assert result["computed"] == pytest.approx(expected, rel=TOLERANCE, abs=1e-300, nan_ok=True)
        assert list(result["computed"]) == list(expected)
        assert repr(result["computed"]) == repr(results[0]["computed"])


def expect_exact_gradients(case: Settings, steps: list[list[Rows]], results: list[dict[str, Any]]) -> None:
    """Each step's losses and gradients are the oracle's of the rows of all ranks."""
    for step, parts in enumerate(steps):
        rows = joined(parts)
        expected = reference.losses(columns(case, rows), case.rule())
        # Where nothing was measured, forward gives 0, so that the loss stays a number to train on; a callable gets 0s.
        expected = {key: 0.0 if math.isnan(value) else value for key, value in expected.items()}
        if case.global_reduction == "norm" and not any(expected.values()):
            expected["loss"] = 1.0
        matrix, bias = parameter_gradients(case, rows)
        scale = max([1e-300, *map(abs, bias), *(abs(g) for line in matrix for g in line)])
        for result in results:
            assert result["values"][step] == pytest.approx(expected, rel=TOLERANCE, abs=1e-300)
            our_matrix, our_bias = result["gradients"][step]
            assert our_bias == pytest.approx(bias, rel=0, abs=TOLERANCE * scale)
            for ours, theirs in zip(our_matrix, matrix):
                assert ours == pytest.approx(theirs, rel=0, abs=TOLERANCE * scale)


@given(cases(world_size=1))
@settings(max_examples=300)
def test_both_laws_on_one_process(case: tuple[Settings, Rows, list[list[int]]]) -> None:
    options, rows, sizes = case
    steps = split(rows, sizes)
    for global_batch in (False, True):
        results = [run_steps(0, options, steps, global_batch)]
        expect_split_invariance(options, rows, results)
        expect_exact_gradients(options, steps, results)


@on_ranks
@given(data=st.data())
@pytest.mark.parametrize("global_batch", [False, True])
def test_both_laws_on_ranks(ranks: RankPool, data: st.DataObject, global_batch: bool) -> None:
    options, rows, sizes = data.draw(cases(ranks.world_size))
    steps = split(rows, sizes)
    results = ranks.run(run_steps, options, steps, global_batch)
    expect_split_invariance(options, rows, results)
    if global_batch:
        expect_exact_gradients(options, steps, results)
