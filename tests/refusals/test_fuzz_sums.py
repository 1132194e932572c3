"""Sums of all kinds, right and wrong, fed by hand: the running sums are the oracle's, or an error names an argument."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.support import reference
from tests.support.batches import FLOATS, NOT_FINITE, SIGNED, TOO_MANY
from tests.support.cases import Settings, norm, settings_of_all_kinds
from tests.support.refusals import expect_error_that_names
from tests.support.tiers import dozens
from twloss import GlobalLoss


@st.composite
def updates(draw: st.DrawFn, shape: tuple[int, ...]) -> dict[str, Any]:
    """Sums of one batch."""

    def tensor(*shape: int) -> Tensor:
        dtype = draw(st.sampled_from((*FLOATS, *SIGNED)))
        values = torch.tensor(draw(st.lists(st.integers(0, 100), min_size=math.prod(shape), max_size=math.prod(shape))))
        values = values.view(shape).to(dtype)
        if dtype in FLOATS and values.ndim and draw(st.integers(0, 3)) == 3:
            values[draw(st.integers(0, len(values) - 1))] = draw(st.sampled_from(NOT_FINITE))
        return values

    loss_sum = tensor(*shape)
    if loss_sum.is_floating_point() and draw(st.booleans()):
        loss_sum.requires_grad_()
    weight = draw(st.sampled_from((0, 8, 2.5))) if draw(st.booleans()) else tensor(*draw(st.sampled_from(((), shape))))
    return {"loss_sum": loss_sum, "weight": weight}


def faulty(batch: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The sums with each fault, one at a time, and the name of the wrong one."""
    of_any = (None, [1.0], "1", 1j, True, torch.ones(TOO_MANY), torch.ones(1, 1), torch.ones(()) + 0j)
    for wrong in (*of_any, 1.0, batch["loss_sum"][None, None]):
        yield "loss_sum", {**batch, "loss_sum": wrong}
    for wrong in (*of_any, math.nan, math.inf, torch.ones_like(batch["loss_sum"], device="meta")):
        yield "weight", {**batch, "weight": wrong}


def finite_parts(batch: dict[str, Any], tasks: int) -> list[tuple[float, float] | None]:
    """What the oracle adds for each task; None for sums that are not finite."""
    sums = batch["loss_sum"].detach().double().reshape(-1).tolist()
    weights = torch.as_tensor(batch["weight"]).double().expand(tasks).tolist()
    return [(s, w) if math.isfinite(s) and math.isfinite(w) else None for s, w in zip(sums, weights)]


@given(data=st.data(), case=settings_of_all_kinds(), nan_strategy=st.sampled_from(("warn", "error", "ignore")))
@dozens(4)
def test_updates(data: st.DataObject, case: Settings, nan_strategy: Any) -> None:
    one = data.draw(st.booleans())
    if one:
        case = replace(case, tasks=1, global_reduction="mean", task_weights=None)
    case = replace(case, mean_over="weights")
    reduction = norm if case.global_reduction == "norm" else case.global_reduction
    options: dict[str, Any] = {"task_weights": case.task_weights, "nan_strategy": nan_strategy}
    metric = GlobalLoss(None if one else case.names(), case.task_loss_reduction, reduction, **options)
    parts = []
    for batch in data.draw(st.lists(updates(() if one else (case.tasks,)), min_size=1, max_size=4)):
        metric.update(**batch)
        parts.append(finite_parts(batch, case.tasks))
        for name, wrong in faulty(batch):
            expect_error_that_names(name, metric.update, metric, wrong)
    assert metric.update_count == len(parts)
    if nan_strategy == "error" and any(None in part for part in parts):
        with pytest.raises(RuntimeError, match="not finite"):
            metric.compute()
        return
    columns = {}
    for t, task in enumerate(case.names()):
        kept = [part[t] or (0.0, 0.0) for part in parts]
        loss_sum, weight = math.fsum(s for s, _ in kept), math.fsum(w for _, w in kept)
        # One row of weight n and loss s/n has the sums s and n.
        columns[task] = [reference.Row(loss_sum / weight, weight=weight)] if weight else []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        result = {key: value.item() for key, value in metric.compute().items()}
    expected = reference.losses(columns, case.rule())
    assert result == pytest.approx({key: expected[key] for key in result}, rel=1e-13, nan_ok=True)
