"""One batch through a loss of binary tasks, against the definition: losses, gradient, running sums and quality."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import by_hand, quality_batches, reference
from tests.support.cases import Settings
from tests.support.results import assert_close, numbers

__all__ = ["LOSS_TOLERANCE", "columns_of_batch", "expect_the_definition"]

LOSS_TOLERANCE = {torch.bfloat16: 1e-6, torch.float32: 1e-6, torch.float64: 1e-12}
"""Half precision is computed in float32."""


def expect_the_definition(
    case: Settings,
    rows: int,
    dtype: torch.dtype = torch.float32,
    *,
    weighted: bool = False,
    training: bool = True,
    **options: Any,
) -> None:
    """Random rows through a new loss with these settings and further arguments, in training or without gradients."""
    batch = quality_batches.random_rows(
        rows, tasks=case.tasks, soft=True, weighted=weighted, missing=case.ignore_index, dtype=dtype
    )
    loss = case.loss(**options).train(training)
    logits = batch.logits.requires_grad_(training)
    with torch.set_grad_enabled(training):
        result = loss(logits, *batch[1:])
    columns, tolerance = columns_of_batch(case, batch), LOSS_TOLERANCE[dtype]
    expected = reference.losses(columns, case.rule())
    metric = loss.train_metric if training else loss.eval_metric
    for found in (result, metric.compute()):
        assert numbers(found) == pytest.approx(expected, rel=tolerance)
    if training:
        gradient = torch.autograd.grad(result["loss"], logits)[0]
        expect_gradients(gradient, reference.gradients(columns, case.rule()), tolerance)
    if options.get("quality"):
        quality = loss.train_quality if training else loss.eval_quality
        seen, computed = quality_batches.expected([batch], case.names(), case.ignore_index), numbers(quality.compute())
        assert_close(quality_batches.recent(computed, window=False), seen, 10 * tolerance)
        if quality.window or quality.window_rows:
            assert_close(quality_batches.recent(computed, window=True), seen, 10 * tolerance)


def columns_of_batch(case: Settings, batch: quality_batches.Rows) -> by_hand.Columns:
    """The oracle's view of the batch."""
    weights = None if batch.weights is None else batch.weights.tolist()
    positive = case.pos_weights or [1.0] * case.tasks
    return by_hand.columns_of(
        batch.logits.tolist(), batch.labels.tolist(), weights, case.names(), case.ignore_index, positive
    )


def expect_gradients(gradient: Tensor, expected: dict[str, list[float]], tolerance: float) -> None:
    """To a fraction of the largest, or to the last digit of half precision; and exactly 0 where the oracle's is."""
    exact = torch.tensor(list(expected.values()), dtype=torch.float64).T
    bound = tolerance * exact.abs().max() + torch.finfo(gradient.dtype).eps * exact.abs()
    assert ((gradient - exact).abs() <= bound).all()
    assert (gradient[exact == 0] == 0).all()
