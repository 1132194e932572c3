"""Callables that give what they should not, and normalizers of no use: refused, and the batch is not counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.cases import norm
from tests.support.refusals import EITHER, WrongError, expect_refusal, expect_refused_batch, named, sums_of
from twloss import GlobalLoss, MultiTaskLoss

TASKS = ["like", "reply"]
TWO, THREE, LABELS = torch.ones(2), torch.ones(3), torch.ones(3, 2)
INDICES = torch.zeros(3, 2, dtype=torch.int64)


def gives(result: object) -> Callable[..., Any]:
    """A callable that gives the same whatever it gets."""
    return lambda *_: result


WRONG_GLOBAL_LOSSES: list[tuple[Any, WrongError, str]] = [
    (None, TypeError, "NoneType"),
    (0.5, TypeError, "float"),
    ([torch.ones(())], TypeError, "list"),
    (np.float64(0.5), TypeError, "float64"),
    (TWO, ValueError, "shape (2,)"),
    (torch.ones(1), ValueError, "shape (1,)"),
    (torch.tensor(1), EITHER, ""),
    (torch.tensor(True), EITHER, ""),
    (torch.tensor(1j), EITHER, ""),
    (torch.ones((), device="meta"), EITHER, ""),
]
"""What a callable gives as global loss, error, what came."""

# what the loss is made of, what is wrong about the batch, error, how the message starts, what was expected.
NO_SUM = "no other loss is the sum of those of its parts"
SETTINGS: list[tuple[dict[str, Any], dict[str, Any], WrongError, str, str]] = [
    *[
        (settings, {"normalizer": normalizer}, ValueError, "normalizer: got one with", NO_SUM)
        for normalizer in (3.0, torch.tensor(3.0))
        for settings in (
            {"task_loss_reduction": "sum"},
            {"global_reduction": "min"},
            {"global_reduction": "max"},
            {"global_reduction": "median"},
            {"global_reduction": norm},
        )
    ],
    *[
        ({"loss_type": gives(wrong)}, {"weights": weights}, error, f"loss_type: the callable gave {came}", "expected")
        for weights in (None, LABELS)
        for wrong, error, came in [
            (None, TypeError, "NoneType"),
            (0.5, TypeError, "float"),
            ((LABELS, LABELS), TypeError, "tuple"),
            (LABELS.numpy(), TypeError, "ndarray"),
            (torch.ones(()), ValueError, "a loss of shape ()"),
            (THREE, ValueError, "a loss of shape (3,)"),
            (LABELS.T, ValueError, "a loss of shape (2, 3)"),
            (LABELS.unsqueeze(2), ValueError, "a loss of shape (3, 2, 1)"),
            (INDICES, EITHER, ""),
            (LABELS > 0, EITHER, ""),
            (LABELS + 0j, EITHER, ""),
            (LABELS.to("meta"), EITHER, ""),
            (LABELS.to_sparse(), EITHER, ""),
        ]
    ],
    *[
        ({"global_reduction": gives(wrong)}, {}, error, f"global_reduction: the callable gave {came}", "a 0-dim Tensor")
        for wrong, error, came in WRONG_GLOBAL_LOSSES
    ],
]


@pytest.mark.parametrize(("settings", "wrong", "error", "starts", "expected"), named(SETTINGS))
def test_a_batch_that_does_not_suit_the_loss(
    settings: dict[str, Any], wrong: dict[str, Any], error: WrongError, starts: str, expected: str
) -> None:
    loss = MultiTaskLoss(**{"loss_type": "bce_with_logits", "tasks": TASKS, "global_batch": True, **settings})
    loss.train_metric.update(TWO, 1)
    expect_refused_batch(loss, {"logits": LABELS, "labels": LABELS}, wrong, error, starts, expected)


@pytest.mark.parametrize(("wrong", "error", "came"), WRONG_GLOBAL_LOSSES)
def test_a_wrong_global_loss_of_a_callable(wrong: object, error: WrongError, came: str) -> None:
    metric = GlobalLoss(TASKS, global_reduction=gives(wrong))
    metric.update(TWO, 1)
    before = sums_of(metric)
    for call in (metric.compute, lambda: metric(TWO, 1)):
        expect_refusal(call, error, f"global_reduction: the callable gave {came}", "a 0-dim Tensor", wrong)
        assert sums_of(metric) == before
