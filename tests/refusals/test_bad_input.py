"""Wrong batches, one a line: forward() and update() raise a TypeError or ValueError that names the input.

The values of tensors are not looked at, as that would wait for the device. All else about them is, before any use: the
running sums are those of the batches before.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.refusals import EITHER, HUGE, WrongError, expect_refusal, expect_refused_batch, named, sums_of
from twloss import GlobalLoss, Loss, MultiTaskLoss

pytestmark = pytest.mark.usefixtures("eager_and_fused")

TASKS = ["like", "reply"]
TWO, THREE, LABELS = torch.ones(2), torch.ones(3), torch.ones(3, 2)
INDICES = torch.zeros(3, 2, dtype=torch.int64)
COLUMNS = {"like": THREE, "reply": THREE}
META = THREE.to("meta")
EITHER_FORM = "a Tensor or a mapping task -> Tensor"

# What makes the loss, and a good batch for it.
LOSSES: dict[str, tuple[type[Loss | MultiTaskLoss], dict[str, Any], dict[str, Any]]] = {
    "one": (Loss, {"loss_type": "bce_with_logits"}, {"logits": THREE, "labels": THREE}),
    "one of classes": (Loss, {"loss_type": "cross_entropy"}, {"logits": torch.ones(3, 4), "labels": INDICES[:, 0]}),
    "tasks": (MultiTaskLoss, {"loss_type": "bce_with_logits", "tasks": TASKS}, {"logits": LABELS, "labels": LABELS}),
    "classes": (
        MultiTaskLoss,
        {"loss_type": "cross_entropy", "tasks": TASKS},
        {"logits": torch.ones(3, 2, 4), "labels": INDICES},
    ),
    "own": (MultiTaskLoss, {"loss_type": torch.sub, "tasks": TASKS}, {"logits": LABELS, "labels": LABELS}),
}

# which loss, what is wrong about its batch, error, how the message starts, what was expected.
BATCHES: list[tuple[str, dict[str, Any], WrongError, str, str]] = [
    ("tasks", {"logits": None}, TypeError, "logits: got NoneType", EITHER_FORM),
    ("tasks", {"logits": LABELS.tolist()}, TypeError, "logits: got list", EITHER_FORM),
    ("tasks", {"logits": [THREE, THREE]}, TypeError, "logits: got list", EITHER_FORM),
    ("tasks", {"logits": LABELS.numpy()}, TypeError, "logits: got ndarray", EITHER_FORM),
    ("tasks", {"logits": INDICES}, TypeError, "logits: got torch.int64", "float16, bfloat16, float32 or float64"),
    ("tasks", {"logits": INDICES > 0}, TypeError, "logits: got torch.bool", "float16, bfloat16, float32 or float64"),
    ("tasks", {"logits": LABELS + 0j}, TypeError, "logits: got torch.complex64", "a real dtype"),
    ("tasks", {"logits": LABELS.to(torch.float8_e5m2)}, TypeError, "logits: got torch.float8_e5m2", "float32"),
    ("tasks", {"logits": torch.ones(4, 2)}, ValueError, "logits: got shape (4, 2) with labels (3, 2)", "labels' shape"),
    ("tasks", {"logits": torch.ones(3, 1)}, ValueError, "logits: got shape (3, 1) with labels (3, 2)", "labels' shape"),
    ("tasks", {"logits": torch.ones(3, 2, 1)}, ValueError, "logits: got shape (3, 2, 1)", "the labels' shape"),
    ("tasks", {"logits": THREE}, ValueError, "logits: got shape (3,)", "the labels' shape"),
    ("tasks", {"logits": LABELS.to("meta")}, ValueError, "labels: got a tensor on cpu", "meta"),
    ("tasks", {"logits": LABELS.to_sparse()}, EITHER, "logits: got", "expected"),
    ("tasks", {"logits": LABELS.to_mkldnn()}, EITHER, "logits: got", "expected"),
    ("tasks", {"labels": None}, TypeError, "labels: got NoneType", EITHER_FORM),
    ("tasks", {"labels": LABELS.tolist()}, TypeError, "labels: got list", EITHER_FORM),
    ("tasks", {"labels": LABELS.numpy()}, TypeError, "labels: got ndarray", EITHER_FORM),
    ("tasks", {"labels": LABELS + 0j}, TypeError, "labels: got torch.complex64", "a real dtype"),
    ("tasks", {"labels": torch.ones(2, 3)}, ValueError, "labels: got shape (2, 3)", "(rows, 2)"),
    ("tasks", {"labels": THREE}, ValueError, "labels: got shape (3,)", "(rows, 2)"),
    ("tasks", {"labels": torch.ones(3, 2, 1)}, ValueError, "labels: got shape (3, 2, 1)", "(rows, 2)"),
    ("tasks", {"labels": LABELS.to("meta")}, ValueError, "labels: got a tensor on meta", "cpu"),
    ("tasks", {"labels": LABELS.to_sparse()}, EITHER, "labels: got", "expected"),
    ("tasks", {"weights": 2.0}, TypeError, "weights: got float", EITHER_FORM),
    ("tasks", {"weights": [1.0] * 3}, TypeError, "weights: got list", EITHER_FORM),
    ("tasks", {"weights": np.ones(3)}, TypeError, "weights: got ndarray", EITHER_FORM),
    ("tasks", {"weights": THREE + 0j}, TypeError, "weights: got torch.complex64", "a real dtype"),
    ("tasks", {"weights": torch.ones(())}, ValueError, "weights: got shape ()", "(3, 2), (3, 1) or (3,)"),
    ("tasks", {"weights": TWO}, ValueError, "weights: got shape (2,)", "(3, 2), (3, 1) or (3,)"),
    ("tasks", {"weights": torch.ones(1, 2)}, ValueError, "weights: got shape (1, 2)", "(3, 2), (3, 1) or (3,)"),
    ("tasks", {"weights": torch.ones(3, 2, 1)}, ValueError, "weights: got shape (3, 2, 1)", "(3, 2), (3, 1) or (3,)"),
    ("tasks", {"weights": META}, ValueError, "weights: got a tensor on meta", "cpu"),
    ("tasks", {"weights": LABELS.to_sparse()}, EITHER, "weights: got", "sparse"),
    ("tasks", {"normalizer": "3"}, TypeError, "normalizer: got str", "a Tensor or a number"),
    ("tasks", {"normalizer": [3.0, 3.0]}, TypeError, "normalizer: got list", "a Tensor or a number"),
    ("tasks", {"normalizer": {"like": 3, "reply": 3}}, TypeError, "normalizer: got dict", "a Tensor or a number"),
    ("tasks", {"normalizer": True}, TypeError, "normalizer: got bool", "a Tensor or a number"),
    ("tasks", {"normalizer": 3j}, TypeError, "normalizer: got complex", "a Tensor or a number"),
    ("tasks", {"normalizer": math.nan}, ValueError, "normalizer: got nan", "finite"),
    ("tasks", {"normalizer": -math.inf}, ValueError, "normalizer: got -inf", "finite"),
    ("tasks", {"normalizer": HUGE}, EITHER, "normalizer: got", "expected"),
    ("tasks", {"normalizer": THREE}, ValueError, "normalizer: got shape (3,)", "() or (2,)"),
    ("tasks", {"normalizer": torch.ones(1, 2)}, ValueError, "normalizer: got shape (1, 2)", "(2,)"),
    ("tasks", {"normalizer": TWO + 0j}, TypeError, "normalizer: got torch.complex64", "a real dtype"),
    ("tasks", {"normalizer": TWO.to("meta")}, ValueError, "normalizer: got a tensor on meta", "cpu"),
    ("tasks", {"normalizer": TWO.to_sparse()}, EITHER, "normalizer: got", "expected"),
    ("tasks", {"logits": {}}, ValueError, "logits: got []", "['like', 'reply']: missing tasks ['like', 'reply']"),
    ("tasks", {"logits": {"like": THREE}}, ValueError, "logits: got ['like']", "missing tasks ['reply']"),
    (
        "tasks",
        {"labels": {**COLUMNS, "x": THREE}},
        ValueError,
        "labels: got ['like', 'reply', 'x']",
        "unknown tasks ['x']",
    ),
    ("tasks", {"labels": {0: THREE, 1: THREE}}, ValueError, "labels: got [0, 1]", "unknown tasks [0, 1]"),
    ("tasks", {"weights": {"like": 1.0, "reply": 2.0}}, TypeError, "weights['like']: got float", "a Tensor"),
    ("tasks", {"labels": {**COLUMNS, "reply": None}}, TypeError, "labels['reply']: got NoneType", "a Tensor"),
    ("tasks", {"labels": {**COLUMNS, "like": LABELS}}, ValueError, "labels['like']: got shape (3, 2)", "(rows, 1)"),
    ("tasks", {"labels": {**COLUMNS, "like": torch.ones(())}}, ValueError, "labels['like']: got shape ()", "(rows,)"),
    ("tasks", {"labels": {**COLUMNS, "like": TWO}}, ValueError, "labels: got {'like': 2, 'reply': 3} rows", "the same"),
    ("tasks", {"logits": {"like": TWO, "reply": TWO}}, ValueError, "logits: got shape (2, 2)", "the labels' shape"),
    ("tasks", {"weights": {"like": TWO, "reply": TWO}}, ValueError, "weights: got shape (2, 2)", "(3, 2)"),
    ("tasks", {"weights": {**COLUMNS, "reply": META}}, ValueError, "weights: got {'like': 'cpu'", "the same device"),
    ("tasks", {"weights": {**COLUMNS, "like": META}}, ValueError, "weights: got {'like': 'meta'", "the same device"),
    ("tasks", {"logits": {**COLUMNS, "like": THREE + 0j}}, TypeError, "logits", "torch.complex64"),
    ("tasks", {"logits": {**COLUMNS, "like": THREE.to_sparse()}}, EITHER, "logits", "sparse"),
    ("classes", {"logits": LABELS}, ValueError, "logits: got shape (3, 2)", "a last dimension of classes"),
    ("classes", {"logits": torch.ones(3, 2, 0)}, ValueError, "logits: got shape (3, 2, 0)", "at least one class"),
    ("classes", {"logits": torch.ones(3, 4, 2)}, ValueError, "logits: got shape (3, 4, 2)", "classes"),
    ("classes", {"logits": torch.ones(3, 2, 4).long()}, TypeError, "logits: got torch.int64", "float32"),
    ("classes", {"labels": torch.ones(3, 2, 4)}, ValueError, "labels: got shape (3, 2, 4)", "(rows, 2)"),
    ("classes", {"labels": LABELS}, TypeError, "labels: got torch.float32", "class indices of an integer dtype"),
    ("classes", {"weights": torch.ones(3, 2, 4)}, ValueError, "weights: got shape (3, 2, 4)", "(3, 2)"),
    ("classes", {"logits": COLUMNS}, ValueError, "logits['like']: got shape (3,)", "(rows, classes)"),
    (
        "classes",
        {"logits": {"like": torch.ones(3, 0), "reply": LABELS}},
        ValueError,
        "logits",
        "at least one class",
    ),
    (
        "classes",
        {"logits": {"like": INDICES, "reply": torch.ones(3, 4).long()}},
        TypeError,
        "logits",
        "torch.int64",
    ),
    ("one", {"logits": {"loss": THREE}}, TypeError, "logits: got dict", "a Tensor"),
    ("one", {"labels": None}, TypeError, "labels: got NoneType", "a Tensor"),
    ("one", {"labels": torch.ones(3, 1)}, ValueError, "logits: got shape (3,) with labels (3, 1)", "the labels' shape"),
    ("one", {"weights": {"loss": THREE}}, TypeError, "weights: got dict", "a Tensor"),
    ("one", {"weights": TWO}, ValueError, "weights: got shape (2,)", "broadcasts to the labels' (3,)"),
    ("one", {"weights": torch.ones(1, 3)}, ValueError, "weights: got shape (1, 3)", "broadcasts to the labels' (3,)"),
    ("one", {"normalizer": TWO}, ValueError, "normalizer: got shape (2,)", "(1,)"),
    ("one of classes", {"logits": THREE}, ValueError, "logits: got shape (3,)", "a last dimension of classes"),
    ("one of classes", {"labels": torch.ones(3, 4)}, ValueError, "logits: got shape (3, 4)", "dimension of classes"),
    ("one of classes", {"labels": torch.ones(3)}, TypeError, "labels: got torch.float32", "class indices"),
]

# which tasks, what is wrong about the sums, error, how the message starts, what was expected.
SUMS: list[tuple[list[str] | None, dict[str, Any], WrongError, str, str]] = [
    (TASKS, {"loss_sum": None}, TypeError, "loss_sum: got NoneType", "a Tensor"),
    (TASKS, {"loss_sum": np.ones(2)}, TypeError, "loss_sum: got ndarray", "a Tensor"),
    (TASKS, {"loss_sum": [1.0, 2.0]}, TypeError, "loss_sum: got list", "a Tensor"),
    (TASKS, {"loss_sum": TWO + 0j}, TypeError, "loss_sum: got torch.complex64", "a real dtype"),
    (TASKS, {"loss_sum": torch.ones(())}, ValueError, "loss_sum: got shape ()", "(2,)"),
    (TASKS, {"loss_sum": {"like": 1.0, "reply": 1.0}}, TypeError, "loss_sum: got dict", "a Tensor"),
    (TASKS, {"loss_sum": torch.ones(1)}, ValueError, "loss_sum: got shape (1,)", "(2,)"),
    (TASKS, {"loss_sum": torch.ones(1, 2)}, ValueError, "loss_sum: got shape (1, 2)", "(2,)"),
    (TASKS, {"loss_sum": TWO.to_sparse()}, EITHER, "loss_sum: got", "sparse"),
    (TASKS, {"weight": None}, TypeError, "weight: got NoneType", "a Tensor or a number"),
    (TASKS, {"weight": np.ones(2)}, TypeError, "weight: got ndarray", "a Tensor or a number"),
    (TASKS, {"weight": {"like": 1.0, "reply": 1.0}}, TypeError, "weight: got dict", "a Tensor or a number"),
    (TASKS, {"weight": "1"}, TypeError, "weight: got str", "a Tensor or a number"),
    (TASKS, {"weight": [1, 1]}, TypeError, "weight: got list", "a Tensor or a number"),
    (TASKS, {"weight": True}, TypeError, "weight: got bool", "a Tensor or a number"),
    (TASKS, {"weight": torch.ones(2, device="meta")}, ValueError, "weight: got a tensor on meta", "cpu"),
    (TASKS, {"weight": 1j}, TypeError, "weight: got complex", "a Tensor or a number"),
    (TASKS, {"weight": math.nan}, ValueError, "weight: got nan", "a finite number"),
    (TASKS, {"weight": math.inf}, ValueError, "weight: got inf", "a finite number"),
    (TASKS, {"weight": HUGE}, EITHER, "weight: got", "expected"),
    (TASKS, {"weight": torch.ones(1)}, ValueError, "weight: got shape (1,)", "(2,) or ()"),
    (TASKS, {"weight": torch.ones(2, 1)}, ValueError, "weight: got shape (2, 1)", "(2,) or ()"),
    (TASKS, {"weight": TWO + 0j}, TypeError, "weight: got torch.complex64", "a real dtype"),
    (TASKS, {"weight": TWO.to_sparse()}, EITHER, "weight: got", "sparse"),
    (None, {"loss_sum": 1.0}, TypeError, "loss_sum: got float", "a Tensor"),
    (None, {"loss_sum": torch.ones(1, 1)}, ValueError, "loss_sum: got shape (1, 1)", "(1,)"),
    (None, {"weight": TWO}, ValueError, "weight: got shape (2,)", "(1,) or ()"),
]


FORMS_OF_WEIGHT = "a Tensor or a number"
SUM, FLAT = torch.ones(()), {"like": torch.ones(()), "reply": torch.ones(())}
BOTH_NAMES = "['like', 'reply']"

# what is wrong about the sums that a loss gets by task; error, how the message starts, what was expected.
BY_TASK: list[tuple[dict[str, Any], WrongError, str, str]] = [
    ({"loss_sum": {}}, ValueError, "loss_sum: got []", f"{BOTH_NAMES}: missing tasks {BOTH_NAMES}"),
    ({"loss_sum": {"like": SUM}}, ValueError, "loss_sum: got ['like']", "missing tasks ['reply']"),
    ({"loss_sum": {**FLAT, "x": SUM}}, ValueError, "loss_sum: got ['like', 'reply', 'x']", "unknown tasks ['x']"),
    ({"loss_sum": {0: SUM, 1: SUM}}, ValueError, "loss_sum: got [0, 1]", "unknown tasks [0, 1]"),
    ({"loss_sum": {**FLAT, "reply": 1.0}}, TypeError, "loss_sum['reply']: got float", "a Tensor"),
    ({"loss_sum": {**FLAT, "reply": None}}, TypeError, "loss_sum['reply']: got NoneType", "a Tensor"),
    ({"loss_sum": {**FLAT, "like": TWO}}, ValueError, "loss_sum['like']: got shape (2,)", "a 0-dim Tensor"),
    ({"loss_sum": {**FLAT, "like": torch.ones(1)}}, ValueError, "loss_sum['like']: got shape (1,)", "a 0-dim Tensor"),
    ({"loss_sum": {**FLAT, "like": SUM + 0j}}, TypeError, "loss_sum['like']: got torch.complex64", "a real dtype"),
    ({"loss_sum": {**FLAT, "reply": SUM.to("meta")}}, ValueError, "loss_sum['reply']: got a tensor on meta", "cpu"),
    ({"loss_sum": {t: SUM.to("meta") for t in TASKS}}, ValueError, "weight: got a tensor on cpu", "meta"),
    ({"weight": {"like": 1}}, ValueError, "weight: got ['like']", "missing tasks ['reply']"),
    ({"weight": {**FLAT, "x": 1}}, ValueError, "weight: got ['like', 'reply', 'x']", "unknown tasks ['x']"),
    ({"weight": {**FLAT, "reply": None}}, TypeError, "weight['reply']: got NoneType", FORMS_OF_WEIGHT),
    ({"weight": {**FLAT, "reply": "1"}}, TypeError, "weight['reply']: got str", FORMS_OF_WEIGHT),
    ({"weight": {**FLAT, "reply": True}}, TypeError, "weight['reply']: got bool", FORMS_OF_WEIGHT),
    ({"weight": {**FLAT, "reply": math.nan}}, ValueError, "weight['reply']: got nan", "a finite number"),
    ({"weight": {**FLAT, "reply": -math.inf}}, ValueError, "weight['reply']: got -inf", "a finite number"),
    ({"weight": {**FLAT, "reply": HUGE}}, EITHER, "weight['reply']: got", "a finite number"),
    ({"weight": {**FLAT, "reply": torch.ones(1)}}, ValueError, "weight['reply']: got shape (1,)", "a 0-dim Tensor"),
    ({"weight": {**FLAT, "reply": SUM + 0j}}, TypeError, "weight['reply']: got torch.complex64", "a real dtype"),
    ({"weight": {**FLAT, "reply": SUM.to("meta")}}, ValueError, "weight['reply']: got a tensor on meta", "cpu"),
    ({"normalizer": THREE}, ValueError, "normalizer: got shape (3,)", "() or (2,)"),
    ({"normalizer": math.nan}, ValueError, "normalizer: got nan", "finite"),
    ({"normalizer": "3"}, TypeError, "normalizer: got str", FORMS_OF_WEIGHT),
    ({"normalizer": TWO.to("meta")}, ValueError, "normalizer: got a tensor on meta", "cpu"),
]

GIVEN_TYPES: dict[str, Any] = {"x": "given", "like": "bce_with_logits", "y": "given"}
GIVEN = {"x": SUM, "y": (SUM, 2)}
PAIR = "a 0-dim Tensor or (loss_sum, weight)"
PAIRS = "a mapping of ['x', 'y'] to losses or (loss_sum, weight), as these are of type GIVEN"

# what is wrong about a batch with given losses; error, how the message starts, what was expected.
GIVEN_ONES: list[tuple[dict[str, Any], WrongError, str, str]] = [
    ({"given": None}, TypeError, "given: got NoneType", PAIRS),
    ({"given": SUM}, TypeError, "given: got Tensor", PAIRS),
    ({"given": [SUM, SUM]}, TypeError, "given: got list", PAIRS),
    ({"given": {}}, ValueError, "given: got []", "['x', 'y']: missing tasks ['x', 'y']"),
    ({"given": {"x": SUM}}, ValueError, "given: got ['x']", "missing tasks ['y']"),
    ({"given": {**GIVEN, "z": SUM}}, ValueError, "given: got ['x', 'y', 'z']", "unknown tasks ['z']"),
    ({"given": {**GIVEN, "like": SUM}}, ValueError, "given: got ['x', 'y', 'like']", "unknown tasks ['like']"),
    ({"given": {**GIVEN, "y": None}}, TypeError, "given['y']: got NoneType", PAIR),
    ({"given": {**GIVEN, "y": 1.0}}, TypeError, "given['y']: got float", PAIR),
    ({"given": {**GIVEN, "y": {"loss_sum": SUM}}}, TypeError, "given['y']: got dict", PAIR),
    ({"given": {**GIVEN, "y": (SUM,)}}, TypeError, "given['y']: got tuple", PAIR),
    ({"given": {**GIVEN, "y": (SUM, 1, 2)}}, TypeError, "given['y']: got tuple", PAIR),
    ({"given": {**GIVEN, "y": torch.ones(1)}}, ValueError, "given['y']: got shape (1,)", "a 0-dim Tensor"),
    ({"given": {**GIVEN, "y": THREE}}, ValueError, "given['y']: got shape (3,)", "a 0-dim Tensor"),
    ({"given": {**GIVEN, "y": (THREE, 3)}}, ValueError, "given['y']: got shape (3,)", "a 0-dim Tensor"),
    ({"given": {**GIVEN, "y": (1.0, 3)}}, TypeError, "given['y']: got float", "a Tensor"),
    ({"given": {**GIVEN, "y": SUM + 0j}}, TypeError, "given['y']: got torch.complex64", "a real dtype"),
    ({"given": {**GIVEN, "y": SUM.to("meta")}}, ValueError, "given['y']: got a tensor on meta", "cpu"),
    ({"given": {**GIVEN, "y": (SUM, None)}}, TypeError, "given['y'][1]: got NoneType", FORMS_OF_WEIGHT),
    ({"given": {**GIVEN, "y": (SUM, False)}}, TypeError, "given['y'][1]: got bool", FORMS_OF_WEIGHT),
    ({"given": {**GIVEN, "y": (SUM, math.inf)}}, ValueError, "given['y'][1]: got inf", "a finite number"),
    ({"given": {**GIVEN, "y": (SUM, HUGE)}}, EITHER, "given['y'][1]: got", "a finite number"),
    ({"given": {**GIVEN, "y": (SUM, TWO)}}, ValueError, "given['y'][1]: got shape (2,)", "a 0-dim Tensor"),
    ({"given": {**GIVEN, "y": (SUM, SUM.to("meta"))}}, ValueError, "given['y'][1]: got a tensor on meta", "cpu"),
    ({"logits": torch.ones(3, 3)}, ValueError, "logits: got shape (3, 3)", "the labels' shape"),
    ({"labels": torch.ones(3, 3)}, ValueError, "labels: got shape (3, 3)", "(rows, 1)"),
    ({"logits": {"like": THREE, "x": THREE}}, ValueError, "logits: got ['like', 'x']", "unknown tasks ['x']"),
    ({"normalizer": torch.ones(1)}, ValueError, "normalizer: got shape (1,)", "() or (3,)"),
]


@pytest.mark.parametrize(("wrong", "error", "starts", "expected"), named(BY_TASK))
def test_wrong_sums_of_a_loss_by_task(wrong: dict[str, Any], error: WrongError, starts: str, expected: str) -> None:
    loss = MultiTaskLoss("given", TASKS)
    good: dict[str, Any] = {"loss_sum": FLAT, "weight": TWO}
    loss.from_sums(**good)
    before, sums = sums_of(loss), {**good, **wrong}
    expect_refusal(lambda: loss.from_sums(**sums), error, starts, expected, sums)
    assert sums_of(loss) == before


@pytest.mark.parametrize(("wrong", "error", "starts", "expected"), named(GIVEN_ONES))
def test_wrong_given_losses(wrong: dict[str, Any], error: WrongError, starts: str, expected: str) -> None:
    loss = MultiTaskLoss(GIVEN_TYPES, list(GIVEN_TYPES), quality=True)
    good: dict[str, Any] = {"logits": torch.ones(3, 1), "labels": torch.ones(3, 1), "given": GIVEN}
    loss(**good)
    expect_refused_batch(loss, good, wrong, error, starts, expected)
    assert loss.train_quality.update_count == 1


@pytest.mark.parametrize("given", [{}, {"like": SUM}, {"like": (SUM, 1), "reply": SUM}, SUM])
@pytest.mark.parametrize("name", ["tasks", "own"])
def test_a_given_loss_without_given_tasks(name: str, given: Any) -> None:
    make, settings, good = LOSSES[name]
    loss = make(**settings)
    start = "given: got one for a loss without tasks of type GIVEN"
    expect_refused_batch(loss, good, {"given": given}, ValueError, start, "expected None")
    one = Loss("bce_with_logits")
    with pytest.raises(TypeError, match="given"):
        one(THREE, THREE, given=given)  # type: ignore[call-arg]


@pytest.mark.parametrize("reductions", [("sum", "mean"), ("mean", "max"), ("mean", "median")])
def test_a_normalizer_of_sums_that_do_not_add_up(reductions: Any) -> None:
    loss = MultiTaskLoss("given", TASKS, *reductions, global_batch=True)
    sums = {"loss_sum": TWO, "weight": 2, "normalizer": 3}
    expect_refusal(lambda: loss.from_sums(**sums), ValueError, "normalizer: got one with", "'mean' over rows", sums)  # type: ignore[arg-type]
    assert not loss.train_metric.update_called


@pytest.mark.parametrize(("name", "wrong", "error", "starts", "expected"), named(BATCHES))
def test_a_wrong_batch(name: str, wrong: dict[str, Any], error: WrongError, starts: str, expected: str) -> None:
    make, settings, good = LOSSES[name]
    loss = make(**settings)
    loss(**good)
    expect_refused_batch(loss, good, wrong, error, starts, expected)


@pytest.mark.parametrize("method", ["update", "forward", "from_sums"])
@pytest.mark.parametrize(("tasks", "wrong", "error", "starts", "expected"), named(SUMS))
def test_wrong_sums(
    tasks: list[str] | None, wrong: dict[str, Any], error: WrongError, starts: str, expected: str, method: str
) -> None:
    owner: Any = GlobalLoss(tasks)
    if method == "from_sums":
        if any(isinstance(each, dict) for each in wrong.values()):
            return  # what a loss takes
        owner = Loss("given") if tasks is None else MultiTaskLoss("given", tasks)
    good: dict[str, Any] = {"loss_sum": torch.ones(() if tasks is None else 2), "weight": 1}
    getattr(owner, method)(**good)
    before, sums = sums_of(owner), {**good, **wrong}
    expect_refusal(lambda: getattr(owner, method)(**sums), error, starts, expected, sums)
    assert sums_of(owner) == before
