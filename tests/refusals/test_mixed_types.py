"""A loss type for each task: what is refused, by construction or by forward, and that nothing changes by it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.support.mixed import squared
from tests.support.refusals import expect_refusal, expect_refused_batch, named
from twloss import Loss, MultiTaskLoss, RankingQuality

TASKS = ["click", "time", "stars"]
TYPES: dict[str, Any] = {"click": "bce_with_logits", "time": squared, "stars": "cross_entropy"}
SMOOTH = nn.CrossEntropyLoss()

LOSSES: list[Any] = [
    ({"loss_type": {"click": "bce_with_logits"}}, ValueError, "loss_type: got the tasks ['click']", "'time', 'stars'"),
    ({"loss_type": {**TYPES, "a": squared}}, ValueError, "loss_type: got the tasks", "unknown tasks ['a']"),
    ({"loss_type": {**TYPES, "time": "mse"}}, ValueError, "loss_type['time']: got 'mse'", "bce_with_logits"),
    ({"loss_type": {**TYPES, "time": None}}, TypeError, "loss_type['time']: got NoneType", "a LossType"),
    ({"loss_type": {**TYPES, "time": nn.MSELoss}}, TypeError, "loss_type['time']: got type", "a LossType"),
    (
        {"loss_type": {**TYPES, "time": nn.MSELoss()}},
        ValueError,
        "loss_type['time']: got a MSELoss",
        "reduction='none'",
    ),
    ({"loss_type": SMOOTH}, ValueError, "loss_type: got a CrossEntropyLoss with reduction='mean'", "'none'"),
    ({"loss_type": nn.MSELoss(reduction="sum")}, ValueError, "loss_type: got a MSELoss with reduction='sum'", "'none'"),
    ({"pos_weights": {"time": 2.0}}, ValueError, "pos_weights: got ['time']", "BCE_WITH_LOGITS only: ['click']"),
    ({"pos_weights": {"clik": 2.0}}, ValueError, "pos_weights: got ['clik']", "BCE_WITH_LOGITS only: ['click']"),
    ({"pos_weights": [2.0, 3.0, 1.0]}, ValueError, "pos_weights: got numbers for ['time']", "only: ['click']"),
    ({"pos_weights": {"click": -2.0}}, ValueError, "pos_weights: got", ">= 0"),
    ({"pos_weights": {"click": "2"}}, TypeError, "pos_weights: got str", "a number"),
    ({"loss_type": {**TYPES, "click": squared}, "pos_weights": 2.0}, ValueError, "pos_weights: got one", "BCE_WITH"),
    ({"ignore_index": {"clik": 0}}, ValueError, "ignore_index: got ['clik']", "['click', 'time', 'stars']"),
    ({"ignore_index": {"time": "0"}}, TypeError, "ignore_index: got str", "a number"),
    ({"ignore_index": {"stars": 0.5}}, ValueError, "ignore_index: got 0.5 with CROSS_ENTROPY", "an integer"),
    ({"loss_type": {**TYPES, "click": squared}, "quality": True}, ValueError, "quality: got True", "BCE_WITH_LOGITS"),
    (
        {"quality": RankingQuality(TASKS)},
        ValueError,
        "quality: got one with tasks=('click', 'time', 'stars')",
        "('click',)",
    ),
    ({"quality": RankingQuality(["click"], ignore_index={"click": 3})}, ValueError, "quality: got one with", "None"),
]


@pytest.mark.parametrize(
    ("wrong", "error", "starts", "expected"), named([(*row[:2], row[2], row[3]) for row in LOSSES])
)
def test_a_wrong_argument(wrong: dict[str, Any], error: type[Exception], starts: str, expected: str) -> None:
    arguments = {"loss_type": TYPES, "tasks": TASKS, **wrong}
    expect_refusal(lambda: MultiTaskLoss(**arguments), error, starts, expected, arguments)


@pytest.mark.parametrize(
    ("wrong", "error", "starts", "expected"),
    [
        ({"loss_type": {"a": squared}}, TypeError, "loss_type: got dict", "a callable"),
        ({"loss_type": nn.MSELoss()}, ValueError, "loss_type: got a MSELoss", "reduction='none'"),
        ({"ignore_index": {"a": 1}}, TypeError, "ignore_index: got dict for one task", "a number"),
    ],
)
def test_a_wrong_argument_of_one_task(
    wrong: dict[str, Any], error: type[Exception], starts: str, expected: str
) -> None:
    arguments = {"loss_type": squared, **wrong}
    expect_refusal(lambda: Loss(**arguments), error, starts, expected, arguments)


def test_a_module_may_have_a_reduction_that_is_no_word() -> None:
    class Reduces(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reduction = nn.Linear(1, 1)

        def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            """The unreduced loss."""
            return squared(logits, labels)

    assert Loss(Reduces())(torch.ones(2), torch.zeros(2)).item() == 1.0


def inputs(rows: dict[str, int], **wrong: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits of so many rows, with five classes for the stars."""
    return {task: torch.zeros(n, 5) if task == "stars" else torch.zeros(n) for task, n in rows.items()} | wrong


ROWS = {"click": 4, "time": 2, "stars": 3}
LABELS = {task: torch.zeros(n, dtype=torch.int64) for task, n in ROWS.items()}
GOOD: dict[str, Any] = {"logits": inputs(ROWS), "labels": LABELS, "weights": None}

BATCHES: list[Any] = [
    ({"logits": {"click": torch.zeros(4)}}, ValueError, "logits: got ['click']", "given tensors of 0 rows"),
    ({"labels": {**LABELS, "a": torch.zeros(1)}}, ValueError, "labels: got", "unknown tasks ['a']"),
    (
        {"labels": {**LABELS, "time": torch.zeros(3)}},
        ValueError,
        "labels['time']: got 3 rows",
        "2 as in logits['time']",
    ),
    ({"weights": {**LABELS, "click": torch.ones(3)}}, ValueError, "weights['click']: got 3 rows", "4 as in logits"),
    ({"weights": torch.ones(4)}, ValueError, "weights['time']: got 4 rows", "2 as in logits['time']"),
    ({"labels": torch.zeros(4, 3, dtype=torch.int64)}, ValueError, "labels['time']: got 4 rows", "2 as in"),
    ({"labels": {**LABELS, "stars": torch.zeros(3)}}, TypeError, "labels: got torch.float32", "an integer dtype"),
    (
        {"logits": torch.zeros(4, 3), "labels": torch.zeros(4, 3)},
        ValueError,
        "logits['stars']: got shape (4,)",
        "classes",
    ),
    ({"logits": torch.zeros(4, 2)}, ValueError, "logits: got shape (4, 2)", "(rows, 3)"),
    ({"logits": torch.zeros(4)}, ValueError, "logits: got shape (4,)", "(rows, 3)"),
    ({"logits": [1.0]}, TypeError, "logits: got list", "a Tensor or a mapping task -> Tensor"),
    (
        {"logits": {**GOOD["logits"], "time": torch.zeros(2).long()}},
        TypeError,
        "logits['time']: got torch.int64",
        "float32",
    ),
    (
        {"logits": {**GOOD["logits"], "time": torch.zeros(2, 3)}},
        ValueError,
        "loss_type: the callable gave a loss of shape (2, 2, 3)",
        "the labels' shape",
    ),
    ({"logits": {**GOOD["logits"], "time": [1.0]}}, TypeError, "logits['time']: got list", "a Tensor"),
    ({"logits": {**GOOD["logits"], "time": torch.zeros(2, device="meta")}}, ValueError, "labels", "expected meta"),
]


@pytest.mark.parametrize(("wrong", "error", "starts", "expected"), named(BATCHES))
def test_a_wrong_batch(wrong: dict[str, Any], error: type[Exception], starts: str, expected: str) -> None:
    expect_refused_batch(MultiTaskLoss(TYPES, TASKS), GOOD, wrong, error, starts, expected)


ONE_TYPE: list[Any] = [
    ({"labels": torch.zeros(4, 2)}, ValueError, "logits: got {'a': 4, 'b': 2} rows", "as labels is no mapping"),
    ({"weights": torch.ones(4)}, ValueError, "logits: got {'a': 4, 'b': 2} rows", "as weights is no mapping"),
    (
        {"labels": {"a": torch.zeros(2), "b": torch.zeros(4)}},
        ValueError,
        "labels['a']: got 2 rows",
        "4 as in logits['a']",
    ),
    ({"logits": {"a": torch.zeros(4, 3), "b": torch.zeros(2, 4)}}, ValueError, "logits: got shapes", "of one callable"),
]


@pytest.mark.parametrize(("wrong", "error", "starts", "expected"), named(ONE_TYPE))
def test_a_wrong_batch_of_one_type(wrong: dict[str, Any], error: type[Exception], starts: str, expected: str) -> None:
    good = {name: {"a": torch.zeros(4), "b": torch.zeros(2)} for name in ("logits", "labels")}
    expect_refused_batch(MultiTaskLoss(squared, ["a", "b"]), good, wrong, error, starts, expected)


def test_groups_on_two_devices_are_refused() -> None:
    logits = {"a": torch.zeros(2), "b": torch.zeros(2, device="meta")}
    loss = MultiTaskLoss({"a": squared, "b": "bce_with_logits"}, ["a", "b"])
    expect_refusal(lambda: loss(logits, logits), ValueError, "logits: got", "the same device", logits)
    assert loss.train_metric.update_count == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"logits": {**GOOD["logits"], "time": torch.zeros(2, 3)}},
        {"labels": {**LABELS, "stars": torch.zeros(3)}},
        {"weights": {**LABELS, "stars": torch.ones(2)}},
        {"normalizer": "3"},
    ],
    ids=["loss of a callable", "labels of a later type", "weights of a later type", "normalizer"],
)
def test_a_batch_that_one_type_refuses_is_in_no_quality_either(wrong: dict[str, Any]) -> None:
    """The binary task comes first, and nothing is wrong with it."""
    loss = MultiTaskLoss(TYPES, TASKS, quality=True)
    for mode in (True, False):
        loss.train(mode)
        loss(**GOOD)
        before = [metric.totals.tolist() for metric in (loss.train_quality, loss.eval_quality)]
        with pytest.raises((TypeError, ValueError)):
            loss(**{**GOOD, **wrong})
        assert [metric.totals.tolist() for metric in (loss.train_quality, loss.eval_quality)] == before


def test_soft_labels_of_several_tasks_take_no_weights_by_class() -> None:
    def soft(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return -(labels * logits.log_softmax(-1)).sum(-1)

    good: dict[str, Any] = {"logits": torch.zeros(4, 2, 3), "labels": torch.zeros(4, 2, 3), "weights": None}
    loss = MultiTaskLoss(soft, ["a", "b"])
    for shape in ((4, 2, 3), (4, 2, 1), (3,), (4, 3)):
        expect_refused_batch(
            loss, good, {"weights": torch.ones(shape)}, ValueError, f"weights: got shape {shape}", "(4, 2)"
        )
    expect_refused_batch(
        MultiTaskLoss(nn.MSELoss(reduction="none"), ["a", "b"]),
        good,
        {},
        ValueError,
        "loss_type: the callable gave a loss of shape (4, 2, 3)",
        "(4, 2)",
    )
