"""Sums of all kinds, right and wrong, for a metric or a loss: the oracle's results, or an error naming an argument."""

from __future__ import annotations

import itertools
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
from twloss import GlobalLoss, Loss, MultiTaskLoss


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


def wrong_mappings(batch: dict[str, Any], names: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Mappings of the sums with each fault, one at a time, and the name of the wrong one."""
    sums = dict(zip(names, batch["loss_sum"]))
    weights = dict.fromkeys(names, 2.0)
    for name, good in (("loss_sum", sums), ("weight", weights)):
        wrongs = None, "1", 1j, True, torch.ones(1), torch.ones(()) + 0j, math.nan, torch.ones((), device="meta")
        for wrong in (*wrongs, 1.0) if name == "loss_sum" and len(names) > 1 else wrongs[:-1]:
            yield name, {"loss_sum": sums, "weight": weights, name: {**good, names[-1]: wrong}}
        for names_too in ({}, {**good, "x": torch.ones(())}, dict(list(good.items())[1:])):
            yield name, {"loss_sum": sums, "weight": weights, name: names_too}


def by_task(batch: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """The sums as mappings."""
    weight = batch["weight"]
    is_vector = isinstance(weight, Tensor) and weight.ndim == 1
    weights = dict(zip(names, weight)) if is_vector else dict.fromkeys(reversed(names), weight)
    return {"loss_sum": dict(zip(names, batch["loss_sum"])), "weight": weights}


def columns_of(parts: list[list[tuple[float, float] | None]], names: list[str]) -> dict[str, list[reference.Row]]:
    """The oracle's rows of several batches: one row of weight n and loss s/n has the sums s and n."""
    columns = {}
    for t, task in enumerate(names):
        kept = [part[t] or (0.0, 0.0) for part in parts]
        loss_sum, weight = math.fsum(s for s, _ in kept), math.fsum(w for _, w in kept)
        columns[task] = [reference.Row(loss_sum / weight, weight=weight)] if weight else []
    return columns


@given(data=st.data(), case=settings_of_all_kinds())
@dozens(4)
def test_sums_given_to_a_loss(data: st.DataObject, case: Settings) -> None:
    one = data.draw(st.booleans())
    if one:
        case = replace(case, tasks=1, global_reduction="mean", task_weights=None)
    case = replace(case, mean_over="weights", form="sums")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        loss: Loss | MultiTaskLoss = Loss("given", case.task_loss_reduction) if one else case.loss()
    names, parts = case.names(), []
    for batch in data.draw(st.lists(updates(() if one else (case.tasks,)), min_size=1, max_size=3)):
        calls = [batch] if one else [batch, by_task(batch, names)]
        for call in calls:
            losses: Any = loss.from_sums(**call)
            losses = {"loss": losses} if one else losses
            parts.append(finite_parts(batch, case.tasks))
            if None not in parts[-1]:
                exact = reference.losses(columns_of(parts[-1:], names), case.rule())
                exact = {key: 0.0 if math.isnan(exact[key]) else exact[key] for key in losses}
                if case.global_reduction == "norm" and not any(exact.values()):
                    exact["loss"] = 1.0
                assert {key: value.item() for key, value in losses.items()} == pytest.approx(exact, rel=1e-5)
        for name, wrong in faulty(batch) if one else itertools.chain(faulty(batch), wrong_mappings(batch, names)):
            expect_error_that_names(name, loss.from_sums, loss, wrong)
    assert loss.train_metric.update_count == len(parts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        result = {key: value.item() for key, value in loss.train_metric.compute().items()}
    expected = reference.losses(columns_of(parts, names), case.rule())
    assert result == pytest.approx({key: expected[key] for key in result}, rel=1e-13, nan_ok=True)


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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        result = {key: value.item() for key, value in metric.compute().items()}
    expected = reference.losses(columns_of(parts, case.names()), case.rule())
    assert result == pytest.approx({key: expected[key] for key in result}, rel=1e-13, nan_ok=True)
