"""The numbers of RankingQuality against the oracle, the definition in the paper and scikit-learn, for all inputs."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.metrics import log_loss  # type: ignore[import-untyped]

from tests.support import quality_reference
from tests.support.quality_batches import TASKS, Rows, columns, expected, one_task, random_rows
from tests.support.results import assert_close, fed, numbers
from twloss import RankingQuality


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("missing", [None, -1.0, -100, 2, math.nan])
def test_every_key_is_the_oracles(weighted: bool, soft: bool, missing: float | None) -> None:
    batches = [random_rows(n, n, soft=soft, weighted=weighted, missing=missing) for n in (50, 0, 1, 333)]
    metric = fed(RankingQuality(TASKS, ignore_index=missing), batches)
    assert_close(numbers(metric.compute()), expected(batches, missing=missing))
    assert metric.update_count == len(batches)


def test_normalised_entropy_of_the_papers_definition_by_hand() -> None:
    """He et al. 2014, equation 1: average log loss per impression / entropy of the background CTR.

    Four impressions, predicted at 1/2, 1/4, 1/5 and 1/5, of which the first is a click. The average log loss is
    -(ln 1/2 + ln 3/4 + ln 4/5 + ln 4/5) / 4 = -ln(1/2 · 3/4 · 16/25) / 4 = ln(25/6) / 4 = 0.3567790...
    The background CTR is 1/4, its entropy -(1/4 · ln 1/4 + 3/4 · ln 3/4) = ln 4 - 3/4 · ln 3 = 0.5623351...
    NE = 0.3567790... / 0.5623351... = 0.6344598..., and RCE = 100 · (1 - NE) = 36.554...
    Calibration, predicted over observed clicks: (1/2 + 1/4 + 1/5 + 1/5) / 1 = 1.15.
    """
    # A probability p is the logit ln(p / (1 - p)): 1/2 is 0, 1/4 is ln(1/3), 1/5 is ln(1/4).
    found = one_task([0.0, -math.log(3), -math.log(4), -math.log(4)], [1, 0, 0, 0])
    logloss, background = math.log(25 / 6) / 4, math.log(4) - 0.75 * math.log(3)
    assert found == pytest.approx(
        {
            "ne": logloss / background,
            "rce": 100 - 100 * logloss / background,
            "calibration": 1.15,
            "ctr": 0.25,
            "logloss": logloss,
            "weight": 4.0,
        },
        rel=1e-14,
    )
    assert found["ne"] == pytest.approx(0.63445988, abs=1e-8)


def test_the_base_rate_itself_has_an_ne_of_1_and_a_calibration_of_1() -> None:
    labels = [1.0] * 3 + [0.0] * 997
    found = one_task([math.log(0.003 / 0.997)] * 1000, labels)
    assert found == pytest.approx(
        {**found, "ne": 1.0, "rce": 0.0, "calibration": 1.0, "ctr": 0.003}, rel=1e-12, abs=1e-10
    )


@pytest.mark.parametrize("positives", [1, 10**6 - 1])
def test_a_rare_class_costs_no_digits(positives: int) -> None:
    """log(1 - 1e-6) of a rounded difference has lost six of its sixteen digits; log1p(-1e-6) none."""
    rows = 10**6
    labels = (torch.arange(rows) < positives).double()
    # Logits of 0 have the loss ln 2 whatever the label, so that only the entropy of the base rate is at stake.
    found = one_task(torch.zeros(rows), labels)
    assert_close(found, quality_reference.quality([(0.0, 1.0, positives), (0.0, 0.0, rows - positives)]), 1e-14)


@pytest.mark.parametrize("rate", [0.1, 1e-3, 1e-5])
def test_float32_logits_that_predict_a_rare_class_have_an_ne_of_1(rate: float) -> None:
    """The loss of a negative is log1p(exp(x)) = 1e-5 here; as a difference from x = -11.5 it would be off by 4%."""
    rows = 10**5
    logits = torch.full((rows,), math.log(rate / (1 - rate)))
    metric = RankingQuality(None)
    metric.update(logits, torch.arange(rows) < rate * rows)
    rounded = logits[0].double().item()
    clicks = round(rate * rows)
    oracle = quality_reference.quality([(rounded, 1.0, clicks), (rounded, 0.0, rows - clicks)])
    assert_close(numbers(metric.compute()), oracle, 1e-6)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_log_loss_is_scikit_learns(weighted: bool) -> None:
    batch = random_rows(500, 3, weighted=weighted)
    found = numbers(fed(RankingQuality(TASKS), [batch]).compute())
    for t, task in enumerate(TASKS):
        labels, weights = batch.labels[:, t], torch.ones(500) if batch.weights is None else batch.weights[:, t]
        predicted = batch.logits[:, t].sigmoid()
        logloss = log_loss(labels.numpy(), predicted.numpy(), sample_weight=weights.numpy())
        base_rate = torch.full((500,), ((labels * weights).sum() / weights.sum()).item(), dtype=torch.float64)
        background = log_loss(labels.numpy(), base_rate.numpy(), sample_weight=weights.numpy())
        assert found[f"logloss/{task}"] == pytest.approx(logloss, rel=1e-12)
        assert found[f"ne/{task}"] == pytest.approx(logloss / background, rel=1e-12)
        calibration = (predicted * weights).sum().item() / (labels * weights).sum().item()
        assert found[f"calibration/{task}"] == pytest.approx(calibration, rel=1e-12)


LABEL_DTYPES = [torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.float32]


@pytest.mark.parametrize("label_dtype", LABEL_DTYPES, ids=str)
@pytest.mark.parametrize("missing", [None, -1, 0.5, 255, math.nan])
def test_labels_of_every_dtype(label_dtype: torch.dtype, missing: float | None) -> None:
    batch = random_rows(100, 1)
    labels = batch.labels.to(label_dtype)
    if missing is not None:
        held = torch.tensor(float(missing)).to(label_dtype)
        if repr(held.double().item()) == repr(float(missing)):
            labels[::3] = held
    batch = Rows(batch.logits, labels)
    metric = fed(RankingQuality(TASKS, ignore_index=missing), [batch])
    assert_close(numbers(metric.compute()), expected([batch], missing=missing))


@pytest.mark.parametrize("weight_dtype", [torch.bool, torch.int64, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(60, 3), (60, 1), (60,)])
def test_weights_of_every_dtype_and_shape(weight_dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    batch, weights = random_rows(60, 2), (4 * torch.rand(shape)).floor().to(weight_dtype)
    metric = fed(RankingQuality(TASKS), [batch._replace(weights=weights)])
    full = weights.reshape(60, -1).expand(60, 3)
    assert_close(numbers(metric.compute()), expected([batch._replace(weights=full)]))


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # bfloat16 and float16 logits are computed in float32: the row sums are float64, so what is left is each row's own
    # rounding, of at most 6 + ulp in float32.
    [(torch.float32, 1e-6), (torch.bfloat16, 1e-6), (torch.float16, 1e-6), (torch.float64, 1e-12)],
)
@pytest.mark.parametrize("weighted", [False, True])
def test_logits_of_every_dtype(dtype: torch.dtype, tolerance: float, weighted: bool) -> None:
    batches = [random_rows(2000, s, weighted=weighted, dtype=dtype) for s in range(3)]
    metric = fed(RankingQuality(TASKS), batches)
    assert_close(numbers(metric.compute()), expected(batches), tolerance)


@pytest.mark.parametrize("column", [(40,), (40, 1)])
def test_mappings_are_the_columns(column: tuple[int, ...]) -> None:
    batch = random_rows(40, 4, weighted=True)
    assert batch.weights is not None
    logits, labels, weights = (
        {task: part[:, t].reshape(column) for t, task in reversed(list(enumerate(TASKS)))}
        for part in (batch.logits, batch.labels, batch.weights)
    )
    for mixed in ((logits, labels, weights), (logits, batch.labels, weights), (batch.logits, labels, batch.weights)):
        metric = RankingQuality(TASKS)
        metric.update(*mixed)
        assert_close(numbers(metric.compute()), expected([batch]))
    metric = RankingQuality(TASKS)
    metric.update(logits, labels={task: value.long() for task, value in labels.items()}, weights=None)
    assert_close(numbers(metric.compute()), expected([batch._replace(weights=None)]))


@pytest.mark.parametrize("shape", [(), (24,), (24, 1), (2, 3, 4), (0,)])
def test_one_task_of_any_shape_has_keys_without_a_name(shape: tuple[int, ...]) -> None:
    logits, labels = torch.randn(shape, dtype=torch.float64), torch.rand(shape)
    weights = torch.rand(shape[-1:])
    metric = RankingQuality(None)
    metric.update(logits, labels, weights)
    batch = Rows(logits, labels, weights.expand(shape))
    assert_close(numbers(metric.compute()), quality_reference.quality(columns([batch], ["x"])["x"]))
