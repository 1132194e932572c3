"""Binary cross-entropy is one number, and its derivative another, whichever way the two are asked for."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import reference
from tests.support.pairwise import pairwise
from twloss import Loss, MultiTaskLoss, RankingQuality

ROWS = [
    (x, y)
    for x in (0.0, -0.0, 1e-3, -11.5, 11.5, 40.0, -40.0, 100.0, -100.0, math.inf, -math.inf)
    for y in (0.0, 1.0, 0.3)
]
NAN_ROWS = [(math.nan, 0.0), (math.nan, 1.0), (math.nan, 0.3), (0.5, math.nan), (math.inf, math.nan)]
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}

Found = tuple[dict[str, Tensor], "Tensor | None"]


def names(rows: list[tuple[float, float]]) -> list[str]:
    """A task for each row, so that each row's loss is a result."""
    return [f"{index}" for index in range(len(rows))]


def loss_of(
    rows: list[tuple[float, float]], pos_weight: float | None, path: object, *, quality: bool = False
) -> MultiTaskLoss:
    """A loss whose global one is a sum, and whose running sums take what is not finite."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        loss = MultiTaskLoss(
            "bce_with_logits", names(rows), "mean", "sum", pos_weight, quality=quality, fused=path is fused
        )
    for metric in [loss.train_metric, *([loss.train_quality] if quality else [])]:
        metric.nan_strategy = "disable"
    return loss


def tensors_of(rows: list[tuple[float, float]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One row of logits and one of labels."""
    logits, labels = torch.tensor(rows, dtype=dtype).T
    return logits.clone().unsqueeze(0), labels.clone().unsqueeze(0)


# The paths.


def in_closed_form(loss: MultiTaskLoss, logits: Tensor, labels: Tensor) -> Found:
    result = loss(logits.requires_grad_(), labels)
    result["loss"].backward()
    return result, logits.grad


def without_gradient(loss: MultiTaskLoss, logits: Tensor, labels: Tensor) -> Found:
    with torch.no_grad():
        return loss(logits, labels), None


def compiled(loss: MultiTaskLoss, logits: Tensor, labels: Tensor) -> Found:
    result = torch.compile(loss, fullgraph=True, backend="aot_eager")(logits.requires_grad_(), labels)
    result["loss"].backward()
    return result, logits.grad


def transformed(loss: MultiTaskLoss, logits: Tensor, labels: Tensor) -> Found:
    def call(logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        result = loss(logits, labels)
        return result["loss"], result

    grad, result = torch.func.grad(call, has_aux=True)(logits)
    return result, grad


def with_learned_labels(loss: MultiTaskLoss, logits: Tensor, labels: Tensor) -> Found:
    result = loss(logits.requires_grad_(), labels.requires_grad_())
    return result, torch.autograd.grad(result["loss"], logits)[0]


def with_learned_weights(loss: MultiTaskLoss, logits: Tensor, labels: Tensor) -> Found:
    result = loss(logits.requires_grad_(), labels, torch.ones_like(logits, requires_grad=True))
    return result, torch.autograd.grad(result["loss"], logits)[0]


def to_be_differentiated_again(loss: MultiTaskLoss, logits: Tensor, labels: Tensor) -> Found:
    result = loss(logits.requires_grad_(), labels)
    return result, torch.autograd.grad(result["loss"], logits, create_graph=True)[0]


def fused(loss: MultiTaskLoss, logits: Tensor, labels: Tensor) -> Found:
    """The mean of two rows that are the same, since one alone is not compiled."""
    result = loss(torch.cat([logits.requires_grad_()] * 2), torch.cat([labels] * 2))
    return result, torch.autograd.grad(result["loss"], logits)[0]


PATHS = [
    in_closed_form,
    without_gradient,
    compiled,
    transformed,
    with_learned_labels,
    with_learned_weights,
    to_be_differentiated_again,
    fused,
]
POS_WEIGHTS = [None, 1.0, 3.0]
on_each_path = pairwise(path=PATHS, pos_weight=POS_WEIGHTS, dtype=list(TOLERANCE))
on_each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)

pytestmark = pytest.mark.usefixtures("new_compiler")


@on_each_path
def test_the_loss_of_a_row_is_that_of_the_definition(
    path: Callable[..., Found], pos_weight: float | None, dtype: torch.dtype
) -> None:
    loss = loss_of(ROWS, pos_weight, path, quality=pos_weight is None)
    logits, labels = tensors_of(ROWS, dtype)
    rows = [*zip(logits[0].tolist(), labels[0].tolist())]
    result, _ = path(loss, logits, labels)
    oracle = {
        task: pytest.approx(
            reference.bce_with_logits(*row, pos_weight or 1.0), rel=TOLERANCE[dtype], abs=torch.finfo(dtype).tiny
        )
        for task, row in zip(names(ROWS), rows)
    }
    assert {task: result[f"loss/{task}"].item() for task in oracle} == oracle
    if path is transformed:
        assert loss.train_metric.update_count == 0
        return
    running = loss.train_metric.compute()
    assert {task: running[f"loss/{task}"].item() for task in oracle} == oracle
    if pos_weight is None:
        quality = loss.train_quality.compute()
        assert {task: quality[f"logloss/{task}"].item() for task in oracle} == oracle


@on_each_path
def test_the_derivative_by_a_logit_is_that_of_the_definition(
    path: Callable[..., Found], pos_weight: float | None, dtype: torch.dtype
) -> None:
    logits, labels = tensors_of(ROWS, dtype)
    rows = [*zip(logits[0].tolist(), labels[0].tolist())]
    _, grad = path(loss_of(ROWS, pos_weight, path), logits, labels)
    if path is without_gradient:
        assert grad is None
        return
    assert grad is not None
    for (logit, label), slope in zip(rows, grad[0].tolist()):
        expected = reference.bce_slope(logit, label, pos_weight or 1.0)
        # Where σ(x) - y is a short number, it is that number; elsewhere the last bit depends on the order.
        absolute = TOLERANCE[dtype] if logit else torch.finfo(dtype).eps * label * (1 - label)
        assert slope == pytest.approx(expected, rel=0, abs=absolute), (logit, label)


CONFIDENT = [
    (sign * x, y)
    for x in (4.0, 8.0, 12.0, 16.0, 17.0, 25.0, 39.0, 40.0)
    for sign in (1, -1)
    for y in (0.0, 1.0, 0.3, 0.999)
]


@on_each_path
def test_the_derivative_keeps_its_digits_however_confident_the_logit(
    path: Callable[..., Found], pos_weight: float | None, dtype: torch.dtype
) -> None:
    """σ(x) - y has none left at x = 17 in float32: a confident positive would learn nothing."""
    pos_weight = None if pos_weight is None else 9.1 * pos_weight
    logits, labels = tensors_of(CONFIDENT, dtype)
    rows = [*zip(logits[0].tolist(), labels[0].tolist())]
    _, grad = path(loss_of(CONFIDENT, pos_weight, path), logits, labels)
    for (logit, label), slope in zip(rows, () if grad is None else grad[0].tolist()):
        negative, positive = 1 / (1 + math.exp(-logit)), 1 / (1 + math.exp(logit))
        expected = math.fsum([(1 - label) * negative, -(pos_weight or 1.0) * label * positive])
        assert slope == pytest.approx(expected, rel=TOLERANCE[dtype]), (logit, label)


@pytest.mark.parametrize("pos_weight", POS_WEIGHTS)
@on_each_dtype
def test_the_second_derivative_at_every_logit_is_that_of_the_definition(
    pos_weight: float | None, dtype: torch.dtype
) -> None:
    logits, labels = tensors_of(ROWS, dtype)
    rows = [*zip(logits[0].tolist(), labels[0].tolist())]
    _, grad = to_be_differentiated_again(loss_of(ROWS, pos_weight, to_be_differentiated_again), logits, labels)
    assert grad is not None
    (second,) = torch.autograd.grad(grad.sum(), logits)
    for (logit, label), curvature in zip(rows, second[0].tolist()):
        factor = 1.0 - label + (pos_weight or 1.0) * label
        expected = factor * reference.sigmoid(logit) * reference.sigmoid(-logit)
        assert curvature == pytest.approx(expected, rel=0, abs=TOLERANCE[dtype]), (logit, label)


@on_each_path
def test_nan_stays_nan(path: Callable[..., Found], pos_weight: float | None, dtype: torch.dtype) -> None:
    loss = loss_of(NAN_ROWS, pos_weight, path, quality=True)
    result, _ = path(loss, *tensors_of(NAN_ROWS, dtype))
    assert all(found.isnan() for found in result.values())
    if path is transformed:
        return
    assert all(found.isnan() for found in loss.train_metric.compute().values())
    quality = loss.train_quality.compute()
    assert all(quality[f"logloss/{task}"].isnan() for task in names(NAN_ROWS))


@on_each_dtype
def test_a_quality_of_its_own_has_the_log_loss_of_the_definition(dtype: torch.dtype) -> None:
    logits, labels = tensors_of(ROWS, dtype)
    for weights in (None, torch.ones_like(logits)):
        quality = RankingQuality(names(ROWS), nan_strategy="disable")
        quality.update(logits, labels, weights)
        found = quality.compute()
        for task, logit, label in zip(names(ROWS), logits[0].tolist(), labels[0].tolist()):
            expected = reference.bce_with_logits(logit, label)
            logloss = found[f"logloss/{task}"].item()
            assert logloss == pytest.approx(expected, rel=TOLERANCE[dtype], abs=torch.finfo(dtype).tiny)


@pytest.mark.parametrize("options", [{}, {"pos_weight": 1.0}, {"quality": True}], ids=str)
def test_a_negative_at_a_logit_of_minus_infinity_costs_nothing_and_counts(options: dict[str, Any]) -> None:
    loss = Loss("bce_with_logits", **options)
    logits, labels = torch.tensor([-math.inf, 0.3], requires_grad=True), torch.tensor([0, 1])
    result = loss(logits, labels)
    expected = math.log1p(math.exp(-0.3)) / 2
    assert expected == pytest.approx(0.27718, abs=1e-5)
    assert result.item() == pytest.approx(expected, rel=1e-6)
    assert loss.train_metric.compute()["loss"].item() == pytest.approx(expected, rel=1e-6)
    assert torch.autograd.grad(result, logits)[0].tolist() == pytest.approx(
        [0.0, (reference.sigmoid(0.3) - 1) / 2], rel=1e-6
    )


def test_the_logits_of_probabilities_0_and_1_have_a_quality() -> None:
    probabilities, labels = [0.0, 0.9, 0.2, 1.0], [0, 1, 0, 1]
    quality = RankingQuality(None)
    quality.update(torch.tensor(probabilities).logit(), torch.tensor(labels))
    log_loss = -math.fsum(math.log(p if y else 1 - p) for p, y in zip(probabilities, labels)) / 4
    found = {key: result.item() for key, result in quality.compute().items()}
    assert found == {
        "ne": pytest.approx(log_loss / math.log(2), rel=1e-6),
        "rce": pytest.approx(100 * (1 - log_loss / math.log(2)), rel=1e-6),
        "calibration": pytest.approx(2.1 / 2, rel=1e-6),
        "ctr": 0.5,
        "logloss": pytest.approx(log_loss, rel=1e-6),
        "weight": 4.0,
    }
