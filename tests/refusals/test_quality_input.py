"""Wrong batches of RankingQuality, one a line: an error that names the input, after which the sums are as before."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.refusals import EITHER, WrongError, expect_refusal
from twloss import RankingQuality

TASKS = ["like", "reply"]
TWO, THREE, LABELS = torch.ones(2), torch.ones(3), torch.ones(3, 2)
COLUMNS = {"like": THREE, "reply": THREE}
META = THREE.to("meta")
GOOD: dict[bool, dict[str, Any]] = {
    True: {"logits": LABELS, "labels": LABELS, "weights": None},
    False: {"logits": THREE, "labels": THREE, "weights": None},
}

# what is wrong about a batch of two tasks, error, how the message starts, what was expected.
BATCHES: list[tuple[dict[str, Any], WrongError, str, str]] = [
    ({"logits": None}, TypeError, "logits: got NoneType", "a Tensor"),
    ({"logits": LABELS.tolist()}, TypeError, "logits: got list", "a Tensor"),
    ({"logits": LABELS.numpy()}, TypeError, "logits: got ndarray", "a Tensor"),
    ({"logits": 1.0}, TypeError, "logits: got float", "a Tensor"),
    ({"logits": LABELS.long()}, TypeError, "logits: got torch.int64", "float16, bfloat16, float32 or float64"),
    ({"logits": LABELS > 0}, TypeError, "logits: got torch.bool", "float16, bfloat16, float32 or float64"),
    ({"logits": LABELS + 0j}, TypeError, "logits: got torch.complex64", "a real dtype"),
    ({"logits": LABELS.to(torch.float8_e5m2)}, TypeError, "logits: got torch.float8_e5m2", "float32"),
    ({"logits": LABELS.to_sparse()}, EITHER, "logits: got", "dense"),
    ({"logits": torch.ones(4, 2)}, ValueError, "logits: got shape (4, 2) with labels (3, 2)", "labels' shape"),
    ({"logits": torch.ones(3, 1)}, ValueError, "logits: got shape (3, 1) with labels (3, 2)", "labels' shape"),
    ({"logits": torch.ones(3, 2, 2)}, ValueError, "logits: got shape (3, 2, 2)", "the labels' shape"),
    ({"logits": THREE}, ValueError, "logits: got shape (3,)", "the labels' shape"),
    ({"logits": LABELS.to("meta")}, ValueError, "labels: got a tensor on cpu", "meta"),
    ({"logits": {"like": THREE}}, ValueError, "logits: got ['like']", "missing tasks ['reply']"),
    ({"logits": {}}, ValueError, "logits: got []", "['like', 'reply']: missing tasks ['like', 'reply']"),
    ({"logits": {**COLUMNS, "like": THREE + 0j}}, TypeError, "logits['like']: got torch.complex64", "real"),
    ({"logits": {**COLUMNS, "like": THREE.long()}}, TypeError, "logits['like']: got torch.int64", "float16"),
    ({"logits": {"like": TWO, "reply": TWO}}, ValueError, "logits: got shape (2, 2)", "the labels' shape"),
    ({"labels": None}, TypeError, "labels: got NoneType", "a Tensor"),
    ({"labels": LABELS.tolist()}, TypeError, "labels: got list", "a Tensor"),
    ({"labels": LABELS.numpy()}, TypeError, "labels: got ndarray", "a Tensor"),
    ({"labels": LABELS + 0j}, TypeError, "labels: got torch.complex64", "a real dtype"),
    ({"labels": torch.ones(2, 3)}, ValueError, "labels: got shape (2, 3)", "(rows, 2)"),
    ({"labels": THREE}, ValueError, "labels: got shape (3,)", "(rows, 2)"),
    ({"labels": torch.ones(3, 2, 1)}, ValueError, "labels: got shape (3, 2, 1)", "(rows, 2)"),
    ({"labels": LABELS.to("meta")}, ValueError, "labels: got a tensor on meta", "cpu"),
    ({"labels": LABELS.to_sparse()}, EITHER, "labels: got", "dense"),
    ({"labels": {**COLUMNS, "x": THREE}}, ValueError, "labels: got ['like', 'reply', 'x']", "unknown tasks ['x']"),
    ({"labels": {**COLUMNS, "reply": None}}, TypeError, "labels['reply']: got NoneType", "a Tensor"),
    ({"labels": {**COLUMNS, "like": LABELS}}, ValueError, "labels['like']: got shape (3, 2)", "(rows, 1)"),
    ({"labels": {**COLUMNS, "like": TWO}}, ValueError, "labels: got {'like': 2, 'reply': 3} rows", "the same"),
    ({"weights": 2.0}, TypeError, "weights: got float", "a Tensor"),
    ({"weights": [1.0] * 3}, TypeError, "weights: got list", "a Tensor"),
    ({"weights": np.ones(3)}, TypeError, "weights: got ndarray", "a Tensor"),
    ({"weights": THREE + 0j}, TypeError, "weights: got torch.complex64", "a real dtype"),
    ({"weights": torch.ones(())}, ValueError, "weights: got shape ()", "(3, 2), (3, 1) or (3,)"),
    ({"weights": TWO}, ValueError, "weights: got shape (2,)", "(3, 2), (3, 1) or (3,)"),
    ({"weights": torch.ones(1, 2)}, ValueError, "weights: got shape (1, 2)", "(3, 2), (3, 1) or (3,)"),
    ({"weights": META}, ValueError, "weights: got a tensor on meta", "cpu"),
    ({"weights": LABELS.to_sparse()}, EITHER, "weights: got", "dense"),
    ({"weights": {"like": THREE}}, ValueError, "weights: got ['like']", "missing tasks ['reply']"),
    ({"weights": {"like": 1.0, "reply": 2.0}}, TypeError, "weights['like']: got float", "a Tensor"),
    ({"weights": {**COLUMNS, "reply": META}}, ValueError, "weights: got {'like': 'cpu'", "the same device"),
    ({"weights": {"like": TWO, "reply": TWO}}, ValueError, "weights: got shape (2, 2)", "(3, 2)"),
]

# what is wrong about a batch of the one-task form.
ONE: list[tuple[dict[str, Any], WrongError, str, str]] = [
    ({"logits": {"loss": THREE}}, TypeError, "logits: got dict", "a Tensor"),
    ({"logits": torch.ones(3, 1)}, ValueError, "logits: got shape (3, 1) with labels (3,)", "the labels' shape"),
    ({"labels": None}, TypeError, "labels: got NoneType", "a Tensor"),
    ({"labels": {"loss": THREE}}, TypeError, "labels: got dict", "a Tensor"),
    ({"labels": torch.ones(3, 1)}, ValueError, "logits: got shape (3,) with labels (3, 1)", "the labels' shape"),
    ({"labels": META}, ValueError, "labels: got a tensor on meta", "cpu"),
    ({"weights": {"loss": THREE}}, TypeError, "weights: got dict", "a Tensor"),
    ({"weights": TWO}, ValueError, "weights: got shape (2,)", "broadcasts to the labels' (3,)"),
    ({"weights": torch.ones(1, 3)}, ValueError, "weights: got shape (1, 3)", "broadcasts to the labels' (3,)"),
]


def expect_refused_update(
    metric: RankingQuality, good: dict[str, Any], wrong: dict[str, Any], error: WrongError, starts: str, expected: str
) -> None:
    metric.update(**good)
    before, batch = metric.totals.tolist(), {**good, **wrong}
    for call in (metric.update, metric.forward):
        expect_refusal(functools.partial(call, **batch), error, starts, expected, batch)
        assert metric.totals.tolist() == before


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize(("wrong", "error", "starts", "expected"), BATCHES)
def test_a_wrong_batch(
    wrong: dict[str, Any], error: WrongError, starts: str, expected: str, window: int | None
) -> None:
    expect_refused_update(RankingQuality(TASKS, window=window), GOOD[True], wrong, error, starts, expected)


@pytest.mark.parametrize(("wrong", "error", "starts", "expected"), ONE)
def test_a_wrong_batch_of_one_task(wrong: dict[str, Any], error: WrongError, starts: str, expected: str) -> None:
    expect_refused_update(RankingQuality(None), GOOD[False], wrong, error, starts, expected)
