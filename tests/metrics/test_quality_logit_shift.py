"""``logit_shift`` of RankingQuality: the quality of shifted logits, and a part of what its sums are of."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torchmetrics import MetricCollection

from tests.support.quality_batches import TASKS, Rows, random_rows
from tests.support.results import assert_close, compute_each, fed, numbers
from tests.support.shifted_quality import SHIFT, expected_of_shifted
from twloss import RankingQuality

FORMS: dict[str, Any] = {
    "list": list(SHIFT),
    "tensor": torch.tensor(SHIFT, dtype=torch.float64),
    "mapping": dict(zip(TASKS[::-1], SHIFT[::-1])),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("weighted", [False, True])
def test_every_key_is_that_of_the_shifted_logits(form: Any, weighted: bool) -> None:
    batches = [random_rows(rows, rows, weighted=weighted, missing=-1) for rows in (50, 0, 1, 333)]
    metric = fed(RankingQuality(TASKS, ignore_index=-1, logit_shift=form), batches)
    assert metric.logit_shift == SHIFT
    assert_close(numbers(metric.compute()), expected_of_shifted(batches, missing=-1))


def test_one_number_is_that_of_all_tasks() -> None:
    metric = fed(RankingQuality(TASKS, logit_shift=-2), [random_rows(20)])
    assert metric.logit_shift == (-2.0, -2.0, -2.0)
    assert_close(numbers(metric.compute()), expected_of_shifted([random_rows(20)], (-2.0, -2.0, -2.0)))


def test_one_task() -> None:
    metric = RankingQuality(None, logit_shift=math.log(0.1))
    metric.update(torch.tensor([math.log(10.0)] * 2, dtype=torch.float64), torch.tensor([0, 1]))
    assert metric.logit_shift == (math.log(0.1),)
    assert metric.compute()["logloss"].item() == pytest.approx(math.log(2), rel=1e-15)


def test_none_and_0_are_the_same() -> None:
    batch = random_rows(30, weighted=True)
    plain, by_0 = (fed(RankingQuality(TASKS, logit_shift=shift), [batch]) for shift in (None, 0.0))
    assert (plain.logit_shift, by_0.logit_shift) == (None, (0.0,) * 3)
    assert torch.equal(plain.totals, by_0.totals)
    plain.merge_state(by_0)
    assert torch.equal(plain.totals, 2 * by_0.totals)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_infinite_and_huge_logits_stay_what_they_are(dtype: torch.dtype) -> None:
    logits = torch.tensor([math.inf, -math.inf, 1e30, -1e30], dtype=dtype).unsqueeze(1).expand(4, 3)
    batch = Rows(logits, (logits > 0).to(dtype))
    metric = fed(RankingQuality(TASKS, logit_shift=SHIFT, nan_strategy="error"), [batch])
    assert_close(numbers(metric.compute()), expected_of_shifted([batch]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_is_added_in_float32_at_least(dtype: torch.dtype) -> None:
    batch = random_rows(200, dtype=dtype)
    metric = fed(RankingQuality(TASKS, logit_shift=SHIFT), [batch])
    assert_close(numbers(metric.compute()), expected_of_shifted([batch]), 1e-6)


def test_it_can_not_be_changed() -> None:
    metric = RankingQuality(TASKS, logit_shift=SHIFT)
    with pytest.raises(AttributeError, match="logit_shift"):
        metric.logit_shift = None  # type: ignore[misc]
    assert metric.logit_shift == SHIFT


def test_a_step_a_copy_and_a_cast_keep_it() -> None:
    batch = random_rows(9)
    metric = RankingQuality(TASKS, logit_shift=SHIFT, window=2)
    of_batch = {key: value for key, value in numbers(metric(*batch)).items() if not key.startswith("window_")}
    assert_close(of_batch, expected_of_shifted([batch]))
    twin = metric.clone().bfloat16()
    fed(twin, [batch])
    found = {key: value for key, value in numbers(twin.compute()).items() if not key.startswith("window_")}
    assert_close(found, expected_of_shifted([batch, batch]))


@pytest.mark.usefixtures("new_compiler")
def test_a_compiled_update() -> None:
    metric = RankingQuality(TASKS, logit_shift=SHIFT)
    update = torch.compile(metric.update, fullgraph=True)
    batches = [random_rows(rows, rows, weighted=True) for rows in (32, 7)]
    for batch in batches:
        update(*batch)
    assert_close(numbers(metric.compute()), expected_of_shifted(batches))


# A part of what the sums are of.


@pytest.mark.parametrize("swap", [False, True], ids=["", "the other way"])
@pytest.mark.parametrize(("first", "second"), [(None, -1.0), ([1.0, 2.0, 3.0], [1.0, 2.0, 4.0])])
def test_sums_of_another_shift_are_neither_loaded_nor_merged(first: Any, second: Any, swap: bool) -> None:
    shifts = (second, first) if swap else (first, second)
    saved, loaded = (fed(RankingQuality(TASKS, logit_shift=shift), [random_rows(9)]) for shift in shifts)
    saved.persistent(True)
    loaded.persistent(True)
    before = loaded.totals.clone()
    with pytest.raises(RuntimeError, match=r"got sums of logit_shift=\[.*\], expected logit_shift=\["):
        loaded.load_state_dict(saved.state_dict())
    with pytest.raises(ValueError, match="logit_shift"):
        loaded.merge_state(saved)
    assert torch.equal(loaded.totals, before)


def test_sums_of_the_same_shift_are_loaded_and_merged() -> None:
    saved = fed(RankingQuality(TASKS, logit_shift=-1), [random_rows(9)])
    loaded = RankingQuality(TASKS, logit_shift=dict.fromkeys(TASKS, -1.0))
    saved.persistent(True)
    loaded.persistent(True)
    loaded.load_state_dict(saved.state_dict())
    loaded.merge_state(saved)
    batch = random_rows(9)
    assert_close(numbers(loaded.compute()), expected_of_shifted([batch, batch], (-1.0,) * 3))


def test_a_collection_does_not_take_metrics_of_two_shifts_for_one() -> None:
    metrics = {"raw": RankingQuality(TASKS), "shifted": RankingQuality(TASKS, logit_shift=SHIFT)}
    collection = MetricCollection(dict(metrics))
    batches = [random_rows(9, step) for step in range(3)]
    for batch in batches:
        collection.update(*batch)
    found = numbers(compute_each(collection))
    for name, shift in (("raw", (0.0,) * 3), ("shifted", SHIFT)):
        own = {key.removeprefix(f"{name}_"): value for key, value in found.items() if key.startswith(name)}
        assert_close(own, expected_of_shifted(batches, shift))
