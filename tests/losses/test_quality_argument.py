"""The argument ``quality`` of MultiTaskLoss and Loss: an instance is copied, and one that does not fit is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from tests.support.quality_batches import TASKS, attached, expected, random_rows, train_and_eval
from tests.support.results import assert_close, fed, numbers
from twloss import Loss, LossType, MultiTaskLoss, RankingQuality


def test_an_instance_is_copied_with_its_settings_and_starts_at_0() -> None:
    given = fed(RankingQuality(TASKS, window=5, nan_strategy="ignore"), [random_rows(9)])
    given.persistent(True)
    before = given.totals.clone()
    losses = [attached(given), attached(given)]
    metrics = [metric for loss in losses for metric in train_and_eval(loss)]
    assert len({id(metric) for metric in [given, *metrics]}) == 5
    assert len({metric.totals.data_ptr() for metric in [given, *metrics]}) == 5
    for metric in metrics:
        assert (metric.window, metric.nan_strategy, metric.update_count) == (5, "ignore", 0)
        assert not metric.totals.any()
    losses[0](*random_rows(4))
    assert [metric.update_count for metric in metrics] == [1, 0, 0, 0]
    assert torch.equal(given.totals, before)
    metrics[0].reset()
    given.reset()
    losses[0].eval()(*random_rows(4))
    assert [metric.update_count for metric in metrics] == [0, 1, 0, 0]
    assert {name.partition(".")[0] for name in losses[0].state_dict()} == {"train_quality", "eval_quality"}


def test_a_nan_ignore_index_is_one_whatever_nan_it_is() -> None:
    quality = RankingQuality(TASKS, ignore_index=-math.nan)
    loss = attached(quality, ignore_index=float("nan"))
    batch = random_rows(20, missing=math.nan)
    loss(*batch)
    assert_close(numbers(train_and_eval(loss)[0].compute()), expected([batch], missing=math.nan))


def test_an_equal_ignore_index_of_another_type_is_accepted() -> None:
    """-1 and -1.0 say the same labels are missing."""
    batch = random_rows(20, missing=-1)
    loss = attached(RankingQuality(TASKS, ignore_index=-1), ignore_index=-1.0)
    loss(*batch)
    assert_close(numbers(train_and_eval(loss)[0].compute()), expected([batch], missing=-1))


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "cross-entropy": ({"loss_type": "cross_entropy", "quality": True}, ValueError, "quality: .*(?i:cross_entropy)"),
    "cross-entropy, instance": (
        {"loss_type": LossType.CROSS_ENTROPY, "quality": RankingQuality(TASKS)},
        ValueError,
        "quality: .*BCE_WITH_LOGITS",
    ),
    "callable": ({"loss_type": F.mse_loss, "quality": True}, ValueError, "quality: .*BCE_WITH_LOGITS"),
    "other tasks": ({"quality": RankingQuality(["a", "b", "c"])}, ValueError, "quality: .*'a'.*expected.*'like'"),
    "other order": ({"quality": RankingQuality(TASKS[::-1])}, ValueError, "quality: .*expected"),
    "one task": ({"quality": RankingQuality(None)}, ValueError, "quality: .*None.*expected.*'like'"),
    "no ignore_index": ({"quality": RankingQuality(TASKS), "ignore_index": -1}, ValueError, "quality: .*expected.*-1"),
    "ignore_index": ({"quality": RankingQuality(TASKS, ignore_index=-1)}, ValueError, "quality: .*-1.*expected"),
    "NaN": (
        {"quality": RankingQuality(TASKS, ignore_index=math.nan), "ignore_index": -1},
        ValueError,
        "quality: .*nan",
    ),
    "None": ({"quality": None}, TypeError, "quality: got NoneType, expected a bool or a RankingQuality"),
    "number": ({"quality": 1}, TypeError, "quality: got int, expected"),
    "text": ({"quality": "ne"}, TypeError, "quality: got str, expected"),
    "class": ({"quality": RankingQuality}, TypeError, "quality: got ABCMeta, expected"),
    "another metric": ({"quality": MultiTaskLoss("bce_with_logits", TASKS).train_metric}, TypeError, "quality: got Gl"),
}


@pytest.mark.parametrize(("kwargs", "error", "message"), WRONG.values(), ids=WRONG)
def test_a_quality_that_does_not_fit_is_refused(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MultiTaskLoss(**{"loss_type": "bce_with_logits", "tasks": TASKS, **kwargs})


@pytest.mark.parametrize("quality", [RankingQuality(["loss"]), RankingQuality(None, ignore_index=-1)])
def test_a_quality_that_does_not_fit_one_task_is_refused(quality: RankingQuality) -> None:
    with pytest.raises(ValueError, match=r"quality: .*expected"):
        Loss("bce_with_logits", quality=quality)
    with pytest.raises(ValueError, match="quality"):
        Loss("cross_entropy", quality=True)


@pytest.mark.parametrize("differentiable", ["labels", "weights"])
def test_the_log_loss_keeps_its_digits_where_the_loss_is_torchs_own(differentiable: str) -> None:
    """Labels or weights with a gradient need torch's operator, which in float32 is 7 % off at a logit of -12."""
    loss = Loss("bce_with_logits", quality=True)
    inputs: dict[str, Any] = {"labels": torch.zeros(1000), "weights": torch.ones(1000)}
    inputs[differentiable].requires_grad_()
    loss(torch.full((1000,), -12.0), **inputs)
    assert loss.train_quality.compute()["logloss"].item() == pytest.approx(math.log1p(math.exp(-12)), rel=1e-6)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # by torch's own forward mode
def test_forward_mode_derivatives_end_at_the_quality() -> None:
    loss = Loss("bce_with_logits", quality=True)
    with forward_ad.dual_level():
        logits = forward_ad.make_dual(torch.randn(8), torch.ones(8))
        assert forward_ad.unpack_dual(loss(logits, torch.ones(8), torch.rand(8))).tangent is not None
        assert forward_ad.unpack_dual(loss.train_quality.totals).tangent is None
    # What a transform runs is no batch.
    assert (loss.train_metric.update_count, loss.train_quality.update_count) == (0, 0)


def squared_error(logits: Tensor, labels: Tensor) -> Tensor:
    """A loss of one's own."""
    return (logits - labels) ** 2


SEGMENTS: dict[str, Any] = {"country": ["DE", "US"], "surface": 2}


@pytest.mark.parametrize("own", [None, SEGMENTS, {"country": ("DE", "US"), "surface": 2}])
def test_a_copy_tells_apart_what_the_loss_does_and_the_given_one_stays(own: Any) -> None:
    given = RankingQuality(TASKS, window=3, segments=own)
    given.persistent(True)
    keys, before = given.keys(), given.totals.clone()
    ids = {"country": torch.arange(9) % 3, "surface": torch.arange(27).view(9, 3) % 4}
    if own is None:
        fed(given, [random_rows(9)]).compute()
        before = given.totals.clone()
    loss = attached(given, segments=SEGMENTS)
    loss(*random_rows(9), segments=ids)
    fresh = RankingQuality(TASKS, window=3, segments=SEGMENTS)
    fresh.update(*random_rows(9), segments=ids)
    for metric in train_and_eval(loss):
        assert metric.keys() == fresh.keys()
        assert metric.segments == {"country": ("DE", "US"), "surface": 2}
    assert_close(numbers(loss.train_quality.compute()), numbers(fresh.compute()))
    # A checkpoint of the one is one of the other.
    fresh.persistent(True)
    fresh.load_state_dict(loss.train_quality.state_dict())
    fresh.merge_state(loss.train_quality)
    assert fresh.update_count == 2
    assert (given.keys(), given.segments is None) == (keys, own is None)
    assert torch.equal(given.totals, before)


@pytest.mark.parametrize(
    ("own", "segments"),
    [
        ({"surface": 2, "country": ["DE", "US"]}, SEGMENTS),
        ({"country": ["DE", "FR"], "surface": 2}, SEGMENTS),
        ({"country": ["DE", "US"]}, SEGMENTS),
        (SEGMENTS, None),
    ],
    ids=["another order", "another name", "fewer", "none of the loss"],
)
def test_other_segments_than_the_losses_are_refused(own: Any, segments: Any) -> None:
    with pytest.raises(ValueError, match=r"^quality: got one with segments=.*, expected None.*, as the loss has"):
        attached(RankingQuality(TASKS, segments=own), segments=segments)


def test_the_binary_tasks_of_several_types_have_the_cells() -> None:
    kinds: dict[str, Any] = {
        "like": "bce_with_logits",
        "stars": "cross_entropy",
        "share": squared_error,
        "reply": "bce_with_logits",
    }
    loss = MultiTaskLoss(kinds, [*kinds], segments={"country": 2}, quality=RankingQuality(["like", "reply"]))
    rows = {"like": 4, "stars": 3, "share": 2, "reply": 5}
    labels = {task: torch.arange(count) % 2 for task, count in rows.items()}
    logits = {task: torch.randn(count, *[3] * (task == "stars")) for task, count in rows.items()}
    ids = {task: torch.arange(count) - 1 for task, count in rows.items()}
    loss(logits, {**labels, "share": labels["share"].float()}, segments={"country": ids})
    found = numbers(loss.train_quality.compute())
    cells = {"": [4, 5], "/country=0": [1, 1], "/country=1": [1, 1], "/country=other": [2, 3]}
    oracle = {f"weight/{task}{cell}": n for cell, counts in cells.items() for task, n in zip(("like", "reply"), counts)}
    assert {key: value for key, value in found.items() if key.startswith("weight")} == oracle
