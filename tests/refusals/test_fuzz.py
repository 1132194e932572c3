"""Batches of all kinds, right and wrong: each gives what the oracle gives, or an error that names an argument."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.support import reference
from tests.support.batches import TOO_MANY, Column, Kind, batch_of, columns_of, faulty, kinds, numbers_of
from tests.support.cases import Settings, norm, settings_of_all_kinds
from tests.support.refusals import expect_error_that_names, snapshot
from tests.support.tiers import dozens
from twloss import Loss, MultiTaskLoss

RTOL = {torch.float32: 1e-6, torch.float64: 1e-13}


def quietly(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Without the warnings of reductions and of sums that are not finite, which are chosen on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return call(*args, **kwargs)


def built(case: Settings, classes: int | None, *, one: bool) -> Loss | MultiTaskLoss:
    """The loss of the settings, of one task or of several."""
    loss_type = "cross_entropy" if classes else "bce_with_logits"
    options = {"mean_over": case.mean_over, "ignore_index": case.ignore_index}
    if one:
        pos_weight = None if case.pos_weights is None else case.pos_weights[0]
        loss: Loss | MultiTaskLoss = quietly(
            Loss, loss_type, case.task_loss_reduction, pos_weight=pos_weight, **options
        )
        return loss
    reduction = norm if case.global_reduction == "norm" else case.global_reduction
    rules = (case.task_loss_reduction, reduction, case.pos_weights)
    tasks: MultiTaskLoss = quietly(
        MultiTaskLoss, loss_type, case.names(), *rules, task_weights=case.task_weights, **options
    )
    return tasks


def expect_close(actual: dict[str, Tensor], expected: dict[str, float], scales: dict[str, float], rtol: float) -> None:
    """Each value is within ``rtol`` of the largest magnitude that it is computed from."""
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        tolerance = rtol * (scales[key] + abs(value)) if math.isfinite(value) else 0.0
        assert actual[key].item() == pytest.approx(value, rel=0, abs=tolerance, nan_ok=True), key


def oracle(columns: dict[str, Column], rule: reference.Rule) -> tuple[dict[str, float], dict[str, float]]:
    """The losses and the magnitudes behind them; where a task's sums are not finite, those of no rows."""
    finite = {task: column if column.is_finite() else Column([], 0.0) for task, column in columns.items()}
    scales, factors = {}, rule.task_weights or [1.0] * len(columns)
    for task, column in finite.items():
        valid = [row.weight for row in column.rows if row.valid]
        divisor = rule.normalizer or (float(len(valid)) if rule.mean_over == "rows" else math.fsum(valid))
        scales[f"loss/{task}"] = column.magnitude / (divisor if rule.task_loss_reduction == "mean" and divisor else 1.0)
    scales["loss"] = math.fsum(f * s for f, s in zip(factors, scales.values()))
    return reference.losses({task: column.rows for task, column in finite.items()}, rule), scales


def expect_right(loss: Loss | MultiTaskLoss, batch: dict[str, Any], kind: Kind, case: Settings) -> None:
    """forward(), its gradient and the running sums are the oracle's."""
    before = snapshot(batch)
    output = loss(**batch)
    assert snapshot(batch) == before
    result: dict[str, Tensor] = {"loss": output} if isinstance(output, Tensor) else output
    columns = columns_of(batch, kind, case)
    rtol = RTOL[torch.float64 if kind.dtypes["logits"] == torch.float64 else torch.float32]
    assert {RTOL[value.dtype] for value in result.values()} == {rtol}
    computed = quietly(loss.train_metric.compute)
    expected, scales = oracle(columns, case.rule())
    expect_close(computed, {key: expected[key] for key in result}, scales, rtol)

    normalizer = batch["normalizer"]
    number = normalizer.view(-1)[0].item() if isinstance(normalizer, Tensor) else normalizer
    expected, scales = oracle(columns, replace(case.rule(), normalizer=number))
    if case.global_reduction == "norm" and math.isnan(expected["loss"]):
        expected["loss"] = 1.0
    # Where nothing was measured, forward gives 0, so that the loss stays a number to train on.
    expected = {key: 0.0 if math.isnan(expected[key]) else expected[key] for key in result}
    spoilt = [f"loss/{task}" for task, column in columns.items() if not column.is_finite()]
    if spoilt:
        if case.global_reduction in ("mean", "sum", "norm"):
            assert not result["loss"].isfinite()
        for key in {"loss", *spoilt} & result.keys():
            assert key == "loss" or not result[key].isfinite()
            del result[key], expected[key]
    elif kind.requires_grad:
        expect_clean_gradient(output if isinstance(output, Tensor) else output["loss"], batch["logits"], columns, kind)
    expect_close(result, expected, scales, rtol)


def expect_clean_gradient(
    loss: Tensor, logits: Tensor | Mapping[str, Tensor], columns: dict[str, Column], kind: Kind
) -> None:
    """The gradient is finite, and exactly 0 where a row is left out."""
    inputs = logits if isinstance(logits, Tensor) else list(logits.values())
    grads = torch.autograd.grad(loss, inputs)
    values = grads[0] if isinstance(logits, Tensor) else dict(zip(logits, grads))
    for t, (task, column) in enumerate(columns.items()):
        for row, grad in zip(column.rows, numbers_of(values, t, task, len(columns), kind.classes)):
            numbers = grad if kind.classes else [grad]
            assert all(map(math.isfinite, numbers))
            assert any(numbers) <= (row.valid and row.weight != 0)


def normalizers(tasks: int) -> st.SearchStrategy[Any]:
    """None, or one number, as a number or in a tensor."""
    number = torch.tensor(3.5, dtype=torch.float64)
    return st.sampled_from([None, None, 3.5, 3, number, number.expand(tasks)])


WRONG_NORMALIZERS = ("3", True, 3j, [3.5], torch.ones(TOO_MANY), torch.ones(()) + 0j, torch.ones((), device="meta"))


def fuzz(data: st.DataObject, case: Settings, *, one: bool) -> None:
    """A batch without a fault, then the same with each of the faults, through one loss."""
    kind = data.draw(kinds(None if one else case.tasks))
    if kind.classes:
        # No class index is NaN.
        missing = None if case.ignore_index is None else -1.0
        case = replace(case, pos_weights=None, ignore_index=missing)
    loss = built(case, kind.classes, one=one)
    sums_up = case.task_loss_reduction == "mean" and case.global_reduction in ("mean", "sum")
    batch = {**batch_of(kind, case), "normalizer": data.draw(normalizers(case.tasks)) if sums_up else None}
    expect_right(loss, batch, kind, case)
    for wrong in faulty(batch, kind, case):
        expect_error_that_names("logits|labels|weights", loss, loss, wrong)
    for normalizer in WRONG_NORMALIZERS if sums_up else (3.5, torch.ones(())):
        expect_error_that_names("normalizer", loss, loss, {**batch, "normalizer": normalizer})


@given(data=st.data(), case=settings_of_all_kinds())
@dozens(8)
def test_multi_task_loss(data: st.DataObject, case: Settings) -> None:
    fuzz(data, case, one=False)


@given(data=st.data(), case=settings_of_all_kinds())
@dozens(4)
def test_loss(data: st.DataObject, case: Settings) -> None:
    fuzz(data, replace(case, tasks=1, global_reduction="mean", task_weights=None), one=True)


@pytest.mark.parametrize("name", ["labels", "weights"])
@pytest.mark.parametrize(
    "dtypes", [(torch.int64, torch.float16), (torch.int64, torch.uint16), (torch.uint8, torch.int8)]
)
def test_a_mapping_may_mix_dtypes_and_rounds_none_of_its_values(
    name: str, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    """What torch.stack promotes to does not hold them: 100,000 is inf in float16."""
    loss = MultiTaskLoss(torch.sub, ["task0", "task1"])
    columns = [torch.tensor([100_001, 7]).to(dtypes[0]), torch.tensor([1, 2]).to(dtypes[1])]
    batch: dict[str, Any] = {"logits": torch.ones(2, 2, dtype=torch.float64), "labels": torch.zeros(2, 2)}
    mixed = loss(**{**batch, name: dict(zip(["task0", "task1"], columns))})
    exact = loss(**{**batch, name: torch.stack([column.double() for column in columns], dim=1)})
    assert mixed == exact


def test_a_callable_that_gives_half_precision_is_summed_in_float32() -> None:
    """1024 rows of 100 are inf in float16, whose largest number is 65504."""
    loss = Loss(lambda logits, labels: (logits - labels).half())
    assert loss(torch.full((1024,), 100.0), torch.zeros(1024)).item() == 100.0
