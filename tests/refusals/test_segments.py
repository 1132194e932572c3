"""Wrong ids of segments, one a line: an error that names them, after which no sum is changed, nor any input."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.refusals import EITHER, WrongError, expect_refusal, expect_refused_batch
from twloss import GlobalLoss, Loss, MultiTaskLoss, RankingQuality

TASKS = ["like", "reply"]
SEGMENTS: dict[str, Any] = {"country": ["DE", "US"], "surface": 3}
THREE, LABELS = torch.ones(3), torch.ones(3, 2)
IDS = torch.zeros(3, dtype=torch.int64)
GOOD = {"country": IDS, "surface": IDS}
COUNTRY = "segments['country']: got"

# what is wrong about the ids, error, how the message starts, what was expected; of one task and of several.
OF_ALL: list[tuple[Any, WrongError, str, str]] = [
    (None, TypeError, "segments: got NoneType", "a mapping of ['country', 'surface'] to ids"),
    (IDS, TypeError, "segments: got Tensor", "a mapping of ['country', 'surface'] to ids"),
    ([IDS, IDS], TypeError, "segments: got list", "a mapping of ['country', 'surface'] to ids"),
    ({}, ValueError, "segments: got []", "ids of ['country', 'surface']"),
    ({"country": IDS}, ValueError, "segments: got ['country']", "ids of ['country', 'surface']"),
    ({**GOOD, "x": IDS}, ValueError, "segments: got ['country', 'surface', 'x']", "ids of ['country', 'surface']"),
    ({**GOOD, "country": None}, TypeError, f"{COUNTRY} NoneType", "a Tensor"),
    ({**GOOD, "country": 1}, TypeError, f"{COUNTRY} int", "a Tensor"),
    ({**GOOD, "country": [0, 0, 0]}, TypeError, f"{COUNTRY} list", "a Tensor"),
    ({**GOOD, "country": ["DE"] * 3}, TypeError, f"{COUNTRY} list", "a Tensor"),
    ({**GOOD, "country": np.zeros(3, dtype=np.int64)}, TypeError, f"{COUNTRY} ndarray", "a Tensor"),
    ({**GOOD, "country": THREE}, TypeError, f"{COUNTRY} torch.float32", "integers"),
    ({**GOOD, "country": THREE.half()}, TypeError, f"{COUNTRY} torch.float16", "integers"),
    ({**GOOD, "country": THREE > 0}, TypeError, f"{COUNTRY} torch.bool", "integers"),
    ({**GOOD, "country": THREE + 0j}, TypeError, f"{COUNTRY} torch.complex64", "expected"),
    ({**GOOD, "country": IDS.to_sparse()}, EITHER, f"{COUNTRY}", "dense"),
    ({**GOOD, "country": IDS.to("meta")}, ValueError, f"{COUNTRY} a tensor on meta", "cpu, where the labels are"),
]
OF_SEVERAL: list[tuple[Any, WrongError, str, str]] = [
    ({**GOOD, "country": IDS[:2]}, ValueError, f"{COUNTRY} shape (2,)", "(3,), (3, 1) or (3, 2)"),
    ({**GOOD, "country": IDS[0]}, ValueError, f"{COUNTRY} shape ()", "(3,), (3, 1) or (3, 2)"),
    ({**GOOD, "country": IDS.view(1, 3)}, ValueError, f"{COUNTRY} shape (1, 3)", "(3,), (3, 1) or (3, 2)"),
    ({**GOOD, "country": IDS.view(3, 1, 1)}, ValueError, f"{COUNTRY} shape (3, 1, 1)", "(3,), (3, 1) or (3, 2)"),
    ({**GOOD, "country": {"like": IDS}}, ValueError, f"{COUNTRY} ['like']", "missing tasks ['reply']"),
    (
        {**GOOD, "country": {"like": IDS, "reply": IDS, "x": IDS}},
        ValueError,
        f"{COUNTRY} ['like', 'reply', 'x']",
        "unknown tasks ['x']",
    ),
    (
        {**GOOD, "country": {"like": IDS, "reply": IDS[:2]}},
        ValueError,
        "segments['country']['reply']: got 2 rows",
        "3",
    ),
    (
        {**GOOD, "country": {"like": IDS, "reply": THREE}},
        TypeError,
        "segments['country']['reply']: got torch.float32",
        "integers",
    ),
    ({**GOOD, "country": {"like": IDS, "reply": None}}, TypeError, "segments['country']['reply']: got NoneType", ""),
    (
        {**GOOD, "country": {"like": IDS, "reply": IDS.to("meta")}},
        ValueError,
        f"{COUNTRY} {{'like': 'cpu', 'reply': 'meta'}}",
        "the same device",
    ),
]
OF_ONE: list[tuple[Any, WrongError, str, str]] = [
    ({"country": IDS[:2], "surface": IDS[:2]}, ValueError, "segments: got ids of shape (2,)", "broadcasts to (3,)"),
    ({**GOOD, "country": IDS[:2]}, ValueError, "segments: got shapes {'country': (2,), 'surface': (3,)}", "same rows"),
    (
        {"country": IDS.view(3, 1), "surface": IDS.view(3, 1)},
        ValueError,
        "segments: got ids of shape (3, 1)",
        "broadcasts to (3,)",
    ),
    ({**GOOD, "country": {"loss": IDS}}, TypeError, f"{COUNTRY} dict", "a Tensor"),
]


def squared(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return (logits - labels).square()


TYPES: dict[str, Any] = {
    "one type": "bce_with_logits",
    "own": squared,
    "two types": {"like": "bce_with_logits", "reply": squared},
}


@pytest.mark.usefixtures("eager_and_fused")
@pytest.mark.parametrize("loss_type", TYPES.values(), ids=TYPES)
@pytest.mark.parametrize(("ids", "error", "starts", "expected"), OF_ALL + OF_SEVERAL)
def test_wrong_ids_of_several_tasks(ids: Any, error: WrongError, starts: str, expected: str, loss_type: Any) -> None:
    loss = MultiTaskLoss(loss_type, TASKS, segments=SEGMENTS)
    if isinstance(loss_type, dict):
        starts, expected = "segments", ""  # each type looks at its own tasks
    good: dict[str, Any] = {"logits": LABELS, "labels": LABELS, "segments": GOOD}
    loss(**good)
    expect_refused_batch(loss, good, {"segments": ids}, error, starts, expected)


@pytest.mark.parametrize("loss_type", ["bce_with_logits", squared], ids=["binary", "own"])
@pytest.mark.parametrize(("ids", "error", "starts", "expected"), OF_ALL + OF_ONE)
def test_wrong_ids_of_one_task(ids: Any, error: WrongError, starts: str, expected: str, loss_type: Any) -> None:
    loss = Loss(loss_type, segments=SEGMENTS)
    good: dict[str, Any] = {"logits": THREE, "labels": THREE, "segments": GOOD}
    loss(**good)
    expect_refused_batch(loss, good, {"segments": ids}, error, starts, expected)


@pytest.mark.parametrize(
    ("tasks", "ids", "error", "starts", "expected"),
    [*[(TASKS, *row) for row in OF_ALL + OF_SEVERAL], *[(None, *row) for row in OF_ALL + OF_ONE]],
)
def test_wrong_ids_of_a_quality(tasks: Any, ids: Any, error: WrongError, starts: str, expected: str) -> None:
    metric = RankingQuality(tasks, segments=SEGMENTS)
    values = LABELS if tasks else THREE
    metric.update(values, values, segments=GOOD)
    before = metric.totals.tolist()
    for call in (metric.update, metric.forward):
        refused = functools.partial(call, values, values, segments=ids)
        expect_refusal(refused, error, starts, expected, ids)
        assert metric.totals.tolist() == before


def test_ids_for_tasks_of_different_numbers_of_rows_are_by_task() -> None:
    loss = MultiTaskLoss("bce_with_logits", TASKS, segments=SEGMENTS)
    rows = {"like": torch.ones(3), "reply": torch.ones(2)}
    own = {"like": IDS, "reply": IDS[:2]}
    good: dict[str, Any] = {"logits": rows, "labels": rows, "segments": {"country": own, "surface": own}}
    loss(**good)
    wrong = {"country": IDS, "surface": own}
    start = "segments['country']: got a Tensor for tasks of {'like': 3, 'reply': 2} rows"
    expect_refused_batch(loss, good, {"segments": wrong}, TypeError, start, "a mapping task -> Tensor")


@pytest.mark.parametrize("ids", [GOOD, {}, IDS], ids=["ids", "empty", "a tensor"])
@pytest.mark.parametrize("loss_type", TYPES.values(), ids=TYPES)
def test_ids_that_were_not_asked_for(loss_type: Any, ids: Any) -> None:
    loss = MultiTaskLoss(loss_type, TASKS)
    good: dict[str, Any] = {"logits": LABELS, "labels": LABELS}
    loss(**good)
    start = "segments: got ids, expected None, as this was made with segments=None"
    expect_refused_batch(loss, good, {"segments": ids}, ValueError, start, "")


def test_sums_made_elsewhere_are_of_no_cell() -> None:
    of_one = Loss("bce_with_logits", segments=SEGMENTS)
    of_several = MultiTaskLoss("bce_with_logits", TASKS, segments=SEGMENTS)
    for loss, sums in ((of_one, THREE[0]), (of_several, LABELS[0])):
        starts = "segments: got ['country', 'surface'] and from_sums()"
        expect_refusal(functools.partial(loss.from_sums, sums, 1), ValueError, starts, "None", sums)
        assert loss.train_metric.update_count == 0


CELLS = torch.ones(8, 2)
SUMS: list[tuple[dict[str, Any], WrongError, str, str]] = [
    ({"loss_sum": CELLS[0]}, ValueError, "loss_sum: got shape (2,)", "(8, 2)"),
    ({"loss_sum": CELLS[:7]}, ValueError, "loss_sum: got shape (7, 2)", "(8, 2)"),
    ({"loss_sum": CELLS.T}, ValueError, "loss_sum: got shape (2, 8)", "(8, 2)"),
    ({"loss_sum": CELLS.flatten()}, ValueError, "loss_sum: got shape (16,)", "(8, 2)"),
    ({"weight": 1.0}, TypeError, "weight: got float", "a Tensor (8, 2)"),
    ({"weight": CELLS[0]}, ValueError, "weight: got shape (2,)", "(8, 2)"),
    ({"weight": CELLS[0, 0]}, ValueError, "weight: got shape ()", "(8, 2)"),
]


@pytest.mark.parametrize(("wrong", "error", "starts", "expected"), SUMS)
def test_wrong_sums_of_cells(wrong: dict[str, Any], error: WrongError, starts: str, expected: str) -> None:
    metric = GlobalLoss(TASKS, segments=SEGMENTS)
    good: dict[str, Any] = {"loss_sum": CELLS, "weight": CELLS}
    metric.update(**good)
    before, batch = metric.totals.tolist(), {**good, **wrong}
    for call in (metric.update, metric.forward):
        expect_refusal(functools.partial(call, **batch), error, starts, expected, batch)
        assert metric.totals.tolist() == before


@pytest.mark.parametrize(("of", "arguments"), [(Loss, {}), (MultiTaskLoss, {"tasks": TASKS})])
def test_a_loss_whose_sums_are_all_given_has_no_cells(of: Any, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^segments: got .* with GIVEN alone, which has no rows, expected None$"):
        of("given", **arguments, segments=SEGMENTS)
