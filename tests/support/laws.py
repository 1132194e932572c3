"""A life of a model on a rank, and what the two laws say of the lives on all ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.support import reference
from tests.support.cases import Arguments

TOLERANCE = 1e-12

Columns = dict[str, list[reference.Row]]


def run_steps(rank: int, ranker: Any, steps: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """One rank's life: its part of every step, forward and backward, then compute(); gradients are those of heads."""
    # DDP as it comes: with find_unused_parameters=False, a head that a step does not reach is an error.
    model: nn.Module = DistributedDataParallel(ranker) if torch.distributed.is_initialized() else ranker
    values, gradients = [], []
    for parts in steps:
        model.zero_grad()
        losses = model(parts[rank])
        losses["loss"].backward()
        values.append({key: value.item() for key, value in losses.items()})
        gradients.append([each.grad.flatten().tolist() for each in ranker.heads.parameters() if each.grad is not None])
    computed = ranker.loss.train_metric.compute()
    return {"values": values, "gradients": gradients, "computed": {key: v.item() for key, v in computed.items()}}


def expect_split_invariance(case: Arguments, columns: Columns, results: Sequence[dict[str, Any]]) -> None:
    """compute() is the oracle's of all rows, in the tasks' order, and the same on all ranks."""
    expected = reference.losses(columns, case.rule())
    for result in results:
        assert result["computed"] == pytest.approx(expected, rel=TOLERANCE, abs=1e-300, nan_ok=True)
        assert list(result["computed"]) == list(expected)
        assert repr(result["computed"]) == repr(results[0]["computed"])


def expect_exact_gradients(
    case: Arguments, steps: Sequence[tuple[Columns, list[list[float]]]], results: Sequence[dict[str, Any]]
) -> None:
    """Each step's losses are the oracle's of the rows of all ranks, and the gradients the given ones."""
    rule = replace(case.rule(), cells=())  # which forward does not return
    for step, (columns, gradients) in enumerate(steps):
        expected = reference.losses(columns, rule)
        # Where nothing was measured, forward gives 0, so that the loss stays a number to train on; a callable gets 0s.
        expected = {key: 0.0 if math.isnan(value) else value for key, value in expected.items()}
        if case.global_reduction == "norm" and not any(expected.values()):
            expected["loss"] = 1.0
        scale = max([1e-300, *(abs(value) for each in gradients for value in each)])
        for result in results:
            assert result["values"][step] == pytest.approx(expected, rel=TOLERANCE, abs=1e-300)
            assert len(result["gradients"][step]) == len(gradients)
            for ours, theirs in zip(result["gradients"][step], gradients):
                assert ours == pytest.approx(theirs, rel=0, abs=TOLERANCE * scale)
