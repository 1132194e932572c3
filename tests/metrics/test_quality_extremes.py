"""Where prior versions give a wrong number or none: extreme logits, rows that are left out, one class, no data, NaN."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.metrics import log_loss  # type: ignore[import-untyped]
from torch import Tensor

from tests.support import quality_reference
from tests.support.quality_batches import TASKS, Rows, expected, one_task, random_rows
from tests.support.results import assert_close, fed, numbers
from twloss import RankingQuality

# Extreme logits.


@pytest.mark.parametrize("size", [50.0, 1e4, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_confident_wrong_prediction_costs_its_logit(size: float, dtype: torch.dtype) -> None:
    logits = torch.tensor([size, -size, size, -size], dtype=dtype)
    metric = RankingQuality(None)
    metric.update(logits, torch.tensor([1, 0, 0, 1]))
    found = numbers(metric.compute())
    size = logits[0].item()
    assert found["logloss"] == size / 2
    assert found["ne"] == pytest.approx(size / 2 / math.log(2), rel=1e-14)
    assert found["calibration"] == pytest.approx(1.0, rel=1e-15)


def test_clipped_probabilities_give_another_number() -> None:
    """The naive versions: the largest log loss there is of a probability that is clipped at 2^-52 is 36."""
    logits, labels = torch.tensor([-1e4, 1e4, -2.0], dtype=torch.float64), torch.tensor([1, 0, 0])
    true = (2e4 + math.log1p(math.exp(-2.0))) / 3
    assert one_task(logits, labels)["logloss"] == pytest.approx(true, rel=1e-14)
    probabilities = logits.sigmoid()
    clipped = probabilities.clamp(2**-52, 1 - 2**-52)
    naive = torch.nn.functional.binary_cross_entropy(clipped, labels.double()).item()
    for value in (naive, log_loss(labels.numpy(), probabilities.numpy())):
        assert math.isfinite(value)
        assert value < 0.01 * true


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_of_weight_0_adds_exactly_0(bad: float, place: int, dtype: torch.dtype) -> None:
    batch = random_rows(30, 5, weighted=True, dtype=dtype)
    assert batch.weights is not None
    clean = fed(RankingQuality(TASKS), [batch])
    spoilt = [part.masked_fill(batch.weights == 0, bad) if n == place else part for n, part in enumerate(batch[:2])]
    metric = fed(RankingQuality(TASKS, nan_strategy="error"), [Rows(spoilt[0], spoilt[1], batch.weights)])
    assert torch.equal(metric.totals, clean.totals)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("missing", [-1.0, math.nan])
def test_a_missing_label_leaves_out_its_logit_and_weight(bad: float, missing: float) -> None:
    batch = random_rows(30, 6, weighted=True, missing=missing)
    assert batch.weights is not None
    is_missing = batch.labels.isnan() if math.isnan(missing) else batch.labels == missing
    spoilt = Rows(batch.logits.masked_fill(is_missing, bad), batch.labels, batch.weights.masked_fill(is_missing, bad))
    metric = fed(RankingQuality(TASKS, ignore_index=missing, nan_strategy="error"), [spoilt])
    assert_close(numbers(metric.compute()), expected([batch], missing=missing))


# Where something is missing.


def test_labels_of_one_class_have_no_normalised_entropy() -> None:
    nothing = one_task([0.0, 1.0], [0, 0])
    assert math.isnan(nothing["ne"])
    assert math.isnan(nothing["rce"])
    assert nothing["calibration"] == math.inf
    assert nothing["ctr"] == 0.0
    assert nothing["logloss"] == pytest.approx((math.log(2) + math.log1p(math.e)) / 2, rel=1e-14)
    # Weights whose sums round: equal sums must be seen as equal.
    everything = one_task([0.0, 1.0, 2.0], [1, 1, 1], [0.1, 0.2, 0.3])
    assert math.isnan(everything["ne"])
    assert math.isnan(everything["rce"])
    assert everything["ctr"] == 1.0
    assert math.isfinite(everything["logloss"])
    assert everything["calibration"] < 1.0


def test_a_class_that_comes_later_is_the_one_that_was_missing() -> None:
    metric = RankingQuality(None)
    metric.update(torch.tensor([1.0, -1.0]).double(), torch.tensor([0, 0]))
    assert metric.compute()["ne"].isnan()
    metric.update(torch.tensor([2.0]).double(), torch.tensor([1]))
    rows = [(1.0, 0.0, 1.0), (-1.0, 0.0, 1.0), (2.0, 1.0, 1.0)]
    assert_close(numbers(metric.compute()), quality_reference.quality(rows))


NOTHING: dict[str, tuple[Tensor, Tensor, Tensor | None]] = {
    "no rows": (torch.zeros(0, 1), torch.zeros(0, 1), None),
    "no weight": (torch.zeros(3, 1), torch.ones(3, 1), torch.zeros(3)),
    "no labels": (torch.zeros(3, 1), torch.full((3, 1), -1.0), None),
}


@pytest.mark.parametrize("rows", NOTHING.values(), ids=NOTHING)
def test_without_data_the_weight_is_0_and_all_else_nan(rows: tuple[Tensor, Tensor, Tensor | None]) -> None:
    metric = RankingQuality(["like"], ignore_index=-1)
    metric.update(*rows)
    found = numbers(metric.compute())
    assert found.pop("weight/like") == 0.0
    assert all(math.isnan(value) for value in found.values())
