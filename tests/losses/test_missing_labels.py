"""Labels that are missing: ``ignore_index``, tasks without data, and inputs by task."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.support import reference
from tests.support.metrics import weights_of
from tests.support.rank_pool import RankPool, eager_alone
from twloss import Loss, MultiTaskLoss, RankingQuality

pytestmark = pytest.mark.usefixtures("eager_and_fused")

BAD = [math.nan, math.inf, -math.inf]


def shifted(logits: Tensor, labels: Tensor) -> Tensor:
    """A loss that is not finite at a logit of 0 with a label of 0, which stand for what is left out."""
    return (logits - labels).abs().log()


@pytest.mark.parametrize("ignore_index", [-1.0, math.nan, -100])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("loss_type", ["bce_with_logits", shifted])
def test_a_missing_row_is_as_if_it_were_not_there(loss_type: Any, bad: float, ignore_index: float) -> None:
    logits, labels = torch.randn(6, 2, dtype=torch.float64), torch.rand(6, 2, dtype=torch.float64)
    missing = torch.tensor([[1, 0], [0, 0], [0, 1], [0, 0], [0, 0], [1, 1]], dtype=torch.bool)
    spoilt = logits.masked_fill(missing, bad).requires_grad_()
    loss = MultiTaskLoss(loss_type, ["a", "b"], ignore_index=ignore_index)
    result = loss(spoilt, labels.masked_fill(missing, ignore_index))
    (grad,) = torch.autograd.grad(result["loss"], spoilt)
    for t, task in enumerate(["a", "b"]):
        present = logits[:, t][~missing[:, t]].requires_grad_()
        alone = Loss(loss_type)(present, labels[:, t][~missing[:, t]])
        assert result[f"loss/{task}"].item() == pytest.approx(alone.item(), rel=1e-12)
        assert loss.train_metric.compute()[f"loss/{task}"].item() == pytest.approx(alone.item(), rel=1e-12)
        (expected,) = torch.autograd.grad(alone / 2, present)
        assert torch.allclose(grad[:, t][~missing[:, t]], expected, rtol=1e-12, atol=0)
    assert (grad[missing] == 0).all()


@pytest.mark.parametrize("label_dtype", [torch.int64, torch.int8, torch.uint8, torch.bool, torch.float32])
@pytest.mark.parametrize("ignore_index", [-100, 255, 0.5, math.nan])
def test_ignore_index_is_compared_as_a_number_in_every_label_dtype(
    label_dtype: torch.dtype, ignore_index: float
) -> None:
    """-100 is 156 in uint8: a comparison in the labels' dtype would drop the wrong rows."""
    labels = torch.tensor([[0], [1], [1]]).to(label_dtype)
    if label_dtype in (torch.uint8, torch.float32):
        labels[2] = 156
    loss = MultiTaskLoss("bce_with_logits", ["a"], ignore_index=ignore_index)
    loss(torch.zeros(3, 1), labels)
    assert weights_of(loss.train_metric) == pytest.approx([3])
    if label_dtype == torch.uint8 and ignore_index == 255:
        labels[2] = 255
        loss(torch.zeros(3, 1), labels)
        assert weights_of(loss.train_metric) == pytest.approx([5])


def test_missing_class_labels_need_not_be_classes() -> None:
    logits = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[0, -100], [1, 2], [-100, 0], [2, 1], [0, 0]])
    result = MultiTaskLoss("cross_entropy", ["a", "b"], ignore_index=-100)(logits, labels)
    for t, task in enumerate(["a", "b"]):
        expected = F.cross_entropy(logits[:, t], labels[:, t], ignore_index=-100)
        assert result[f"loss/{task}"].item() == pytest.approx(expected.item(), rel=1e-12)
    (grad,) = torch.autograd.grad(result["loss"], logits)
    assert (grad[labels == -100] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "min", "max", "median"])
@pytest.mark.parametrize("task_reduction", ["mean", "sum"])
def test_a_task_without_data_is_0_in_forward_nan_in_compute_and_in_no_reduction(
    task_reduction: Any, reduction: Any
) -> None:
    logits = torch.tensor([[2.0, math.inf, -1.0], [0.5, math.nan, 3.0]], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[1.0, -1.0, 0.0], [1.0, -1.0, 0.0]])
    columns = {
        "a": [reference.Row(reference.softplus(-2.0)), reference.Row(reference.softplus(-0.5))],
        "b": [],
        "c": [reference.Row(reference.softplus(-1.0)), reference.Row(reference.softplus(3.0))],
    }
    expected = reference.losses(columns, reference.Rule(task_reduction, reduction))
    loss = MultiTaskLoss(
        "bce_with_logits", ["a", "b", "c"], task_reduction, reduction, ignore_index=-1, global_batch=True
    )
    result = loss(logits, labels)
    assert {key: value.item() for key, value in result.items()} == pytest.approx({**expected, "loss/b": 0.0}, rel=1e-12)
    computed = {key: value.item() for key, value in loss.train_metric.compute().items()}
    assert computed == pytest.approx(expected, rel=1e-12, nan_ok=True)
    (grad,) = torch.autograd.grad(result["loss"], logits)
    assert (grad[:, 1] == 0).all()
    assert grad.isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "min", "median"])
def test_no_task_has_data(reduction: Any) -> None:
    loss = MultiTaskLoss("bce_with_logits", ["a", "b"], "mean", reduction, ignore_index=-1, global_batch=True)
    logits = torch.full((3, 2), math.nan, requires_grad=True)
    result = loss(logits, torch.full((3, 2), -1))
    assert [value.item() for value in result.values()] == [0.0, 0.0, 0.0]
    result["loss"].backward()
    assert logits.grad is not None
    assert (logits.grad == 0).all()
    assert all(value.isnan() for value in loss.train_metric.compute().values())


def test_task_weights_are_in_the_reduction_alone() -> None:
    logits = torch.tensor([[0.0, 0.0]], dtype=torch.float64)
    for weights in ([3.0, 0.5], {"b": 0.5, "a": 3.0}, torch.tensor([3.0, 0.5])):
        loss = MultiTaskLoss("bce_with_logits", ["a", "b"], task_weights=weights)
        for result in (loss(logits, torch.ones(1, 2)), loss.train_metric.compute()):
            values = {key: value.item() for key, value in result.items()}
            half = math.log(2)
            assert values == pytest.approx({"loss/a": half, "loss/b": half, "loss": 1.75 * half}, rel=1e-12)


def test_mean_over_weights_divides_by_their_sum() -> None:
    """What torch's own cross-entropy does with class weights."""
    logits, labels = torch.randn(7, 3, dtype=torch.float64), torch.randint(0, 3, (7,))
    class_weights = torch.tensor([0.2, 3.0, 1.0], dtype=torch.float64)
    expected = F.cross_entropy(logits, labels, weight=class_weights)
    loss = Loss("cross_entropy", mean_over="weights")
    assert loss(logits, labels, class_weights[labels]).item() == pytest.approx(expected.item(), rel=1e-12)
    assert loss.train_metric.compute()["loss"].item() == pytest.approx(expected.item(), rel=1e-12)


class Heads(nn.Module):
    """Two heads of their own, whose second has labels on some steps and some ranks only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 1), nn.Linear(2, 1)
        self.loss = MultiTaskLoss("bce_with_logits", ["a", "b"], ignore_index=-1, global_batch=True)

    def forward(self, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The losses."""
        losses: dict[str, Tensor] = self.loss({"a": self.a(features), "b": self.b(features)}, labels)
        return losses


def train_a_head_without_labels(rank: int) -> tuple[bool, list[float]]:
    model = DistributedDataParallel(Heads(), find_unused_parameters=False)
    for step in range(4):
        labels = torch.full((3, 2), -1.0)
        labels[:, 0] = 1.0
        if step == 3 and rank == 1:
            labels[0, 1] = 0.0
        model.zero_grad()
        model(torch.ones(3, 2), labels)["loss"].backward()
        if step == 2:
            absent = all((p.grad == 0).all().item() for p in model.module.b.parameters() if p.grad is not None)
    return absent, [p.grad.abs().sum().item() for p in model.module.b.parameters() if p.grad is not None]


@eager_alone
def test_the_head_of_a_task_without_data_stays_connected_under_ddp(ranks: RankPool) -> None:
    """DDP waits for every parameter's gradient: a head that is not in the graph makes its next forward raise."""
    for absent, gradients in ranks.run(train_a_head_without_labels):
        assert absent
        assert len(gradients) == 2
        assert min(gradients) > 0


# Inputs by task.


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_mappings_are_the_columns(shape: tuple[int, ...]) -> None:
    logits = {task: torch.randn(shape, dtype=torch.float64, requires_grad=True) for task in ("b", "a")}
    labels = {"a": torch.randint(0, 2, shape), "b": torch.rand(shape)}
    weights = {task: torch.rand(6) for task in ("a", "b")}
    loss = MultiTaskLoss("bce_with_logits", ["a", "b"])
    result = loss(logits, labels, weights)
    for task in ("a", "b"):
        expected = F.binary_cross_entropy_with_logits(
            logits[task].flatten(), labels[task].flatten().double(), weight=weights[task]
        )
        assert result[f"loss/{task}"].item() == pytest.approx(expected.item(), rel=1e-12)
    result["loss"].backward()
    assert all(value.grad is not None for value in logits.values())
    stacked = torch.stack([labels["a"].double().flatten(), labels["b"].double().flatten()], 1)
    mixed = loss(logits, stacked, torch.stack([weights["a"], weights["b"]], 1))
    assert mixed["loss"].item() == result["loss"].item()


def distance(logits: Tensor, labels: Tensor) -> Tensor:
    """A loss over classes that tells the label: its distance from the class 2^24."""
    return 0.0 * logits.sum(-1) + (labels - 2**24)


def one(logits: Tensor, _: Tensor) -> Tensor:
    """A loss that counts rows."""
    return 0.0 * logits + 1.0


@pytest.mark.parametrize("narrow", [torch.bool, torch.uint8, torch.int16, torch.int32])
def test_class_labels_of_several_integer_dtypes_are_not_rounded(narrow: torch.dtype) -> None:
    """2^24 + 1 is 2^24 in float32."""
    loss = MultiTaskLoss(distance, ["a", "b"])
    labels = {"a": torch.tensor([0, 1, 1]).to(narrow), "b": torch.tensor([2**24 + 1, 2**24 + 3, 2**24 + 5])}
    result = loss(torch.zeros(3, 2, 4, dtype=torch.float64), labels)
    assert result["loss/b"].item() == 3.0
    assert result["loss/a"].item() == pytest.approx(2 / 3 - 2**24, rel=1e-15)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float32])
def test_labels_and_weights_of_integers_beside_floats_are_not_rounded(narrow: torch.dtype) -> None:
    logits = {"a": torch.zeros(3, dtype=torch.float64), "b": torch.zeros(3, dtype=torch.float64)}
    labels = {"a": torch.tensor([0, 1, 1]).to(narrow), "b": torch.tensor([2**24 + 1, 2**24 + 3, 2**24 + 5])}
    result = MultiTaskLoss(lambda x, y: 0.0 * x + (y - 2**24), ["a", "b"])(logits, labels)
    assert result["loss/b"].item() == 3.0
    weights = {"a": torch.ones(3).to(narrow), "b": torch.tensor([2**24 + 1, 1, 1])}
    loss = MultiTaskLoss("bce_with_logits", ["a", "b"], "sum", global_batch=True)
    loss(logits, {task: torch.ones(3) for task in logits}, weights)
    computed = loss.train_metric.compute()
    assert computed["loss/b"].item() / math.log(2) == pytest.approx(16_777_219, rel=1e-14)


@pytest.mark.parametrize("narrow", [torch.bool, torch.uint8, torch.int16, torch.int32])
@pytest.mark.parametrize("ignore_index", [2**24 + 1, 2**53 + 1])
def test_missing_labels_of_several_integer_dtypes_are_told_from_their_neighbours(
    ignore_index: int, narrow: torch.dtype
) -> None:
    labels = {
        "a": torch.tensor([0, 1, 1, 0]).to(narrow),
        "b": torch.tensor([ignore_index - 1, ignore_index, 1, ignore_index]),
    }
    loss = MultiTaskLoss(one, ["a", "b"], "sum", ignore_index=ignore_index, global_batch=True)
    result = loss(torch.zeros(4, 2), labels)
    assert [result["loss/a"].item(), result["loss/b"].item()] == [4.0, 2.0]


def test_class_counts_may_differ_between_tasks() -> None:
    logits = {"few": torch.randn(5, 2, dtype=torch.float64), "many": torch.randn(5, 9, dtype=torch.float64)}
    for values in logits.values():
        values.requires_grad_()
    labels = {"few": torch.randint(0, 2, (5,)), "many": torch.randint(0, 9, (5,))}
    result = MultiTaskLoss("cross_entropy", ["few", "many"])(logits, labels)
    result["loss"].backward()
    for task, values in logits.items():
        expected = F.cross_entropy(values, labels[task])
        assert result[f"loss/{task}"].item() == pytest.approx(expected.item(), rel=1e-12)
        (grad,) = torch.autograd.grad(expected / 2, values)
        assert values.grad is not None
        assert torch.allclose(values.grad, grad, rtol=1e-12, atol=1e-15)


def test_a_class_that_only_another_task_has_costs_infinity() -> None:
    """It has a probability of 0."""
    logits = {"few": torch.tensor([[0.5, -1.0], [2.0, 0.0]]), "many": torch.randn(2, 5)}
    leaves = {task: each.requires_grad_() for task, each in logits.items()}
    labels = {"few": torch.tensor([0, 3]), "many": torch.tensor([4, 1])}
    result = MultiTaskLoss("cross_entropy", ["few", "many"])(leaves, labels)
    assert result["loss/few"].item() == math.inf
    assert result["loss/many"].item() == pytest.approx(F.cross_entropy(logits["many"], labels["many"]).item(), rel=1e-6)


def test_missing_and_unknown_tasks_are_named() -> None:
    loss = MultiTaskLoss("bce_with_logits", ["a", "b"])
    with pytest.raises(ValueError, match=r"labels: .*\['b'\].*\['c'\]"):
        loss(torch.zeros(2, 2), {"a": torch.zeros(2), "c": torch.zeros(2)})
    assert not loss.train_metric.update_called


@pytest.mark.parametrize("rows", [1, 8, 16, 17, 33])
@pytest.mark.parametrize("settings", [{}, {"pos_weight": 2.0}])
def test_a_weight_of_nan_is_not_taken_for_0(rows: int, settings: dict[str, float]) -> None:
    """Wherever in a vector it stands: a kernel's blocks of 8 or 16 and its remainder may compare differently."""
    for place in range(rows):
        logits = torch.zeros(rows, requires_grad=True)
        weights = torch.ones(rows)
        weights[place] = math.nan
        value = Loss("bce_with_logits", **settings)(logits, torch.ones(rows), weights)  # type: ignore[arg-type]
        value.backward()
        assert value.isnan()
        assert logits.grad is not None
        assert logits.grad.isnan().nonzero().flatten().tolist() == [place]
        assert Loss(lambda x, y: (x - y) ** 2)(logits, torch.ones(rows), weights).isnan()


def test_a_0_dim_logit_of_one_task_takes_a_pos_weight() -> None:
    logit = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    value = Loss("bce_with_logits", pos_weight=2.0)(logit, torch.tensor(1.0))
    value.backward()
    assert value.item() == pytest.approx(2 * math.log1p(math.exp(-0.3)), rel=1e-14)
    assert logit.grad is not None
    assert logit.grad.item() == pytest.approx(-2 / (1 + math.exp(0.3)), rel=1e-14)


# Labels of several dtypes, each compared in its own.

BFLOAT16, FLOAT16, FLOAT32, FLOAT64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
OWN_DTYPES: dict[str, tuple[float, dict[str, tuple[torch.dtype, list[float]]]]] = {
    # -999 is -1000 in bfloat16.
    "bfloat16 beside int64": (
        -999,
        {"a": (BFLOAT16, [1, -999, 0, -999, 1]), "b": (torch.int64, [0, -999, 1, -1000, 0])},
    ),
    "bfloat16 beside float32": (-999.0, {"a": (BFLOAT16, [1, -999, 0, 0, 1]), "b": (FLOAT32, [0, -999, 1, -1000, 0])}),
    "float32 beside float64": (
        0.1,
        {"a": (FLOAT32, [0.1, 1, 0.1, 0, 0.5]), "b": (FLOAT64, [0.1, 0.10000000149011612, 1, 0, 0.1])},
    ),
    "three floats": (
        0.1,
        {"a": (FLOAT16, [0.1, 1, 0, 0, 1]), "b": (BFLOAT16, [0, 0.1, 0.1, 1, 0]), "c": (FLOAT32, [0.1, 0, 0, 1, 0.1])},
    ),
    # -100 is 156 in uint8 where a number is wrapped.
    "uint8 beside int64": (-100, {"a": (torch.uint8, [1, 156, 0, 1, 0]), "b": (torch.int64, [-100, 156, 1, 0, -100])}),
    "255": (255, {"a": (torch.uint8, [1, 255, 0, 255, 0]), "b": (torch.int8, [-1, 0, 1, 1, 0])}),
    "bool beside int64": (1, {"a": (torch.bool, [1, 0, 0, 1, 0]), "b": (torch.int64, [1, 0, 2, 0, 0])}),
    "bool beside float16": (0.1, {"a": (torch.bool, [1, 0, 0, 1, 0]), "b": (FLOAT16, [0.1, 1, 0, 0.5, 0.1])}),
    "a fraction": (0.5, {"a": (torch.int32, [1, 0, 0, 1, 0]), "b": (FLOAT32, [0.5, 0, 1, 0.5, 0])}),
    "NaN": (
        math.nan,
        {
            "a": (BFLOAT16, [math.nan, 1, 0, math.nan, 1]),
            "b": (torch.int64, [1, 0, 1, 1, 0]),
            "c": (torch.bool, [1] * 5),
        },
    ),
}
of_own_dtypes = pytest.mark.parametrize(("ignore_index", "columns"), OWN_DTYPES.values(), ids=OWN_DTYPES)
LOGITS = [0.5, -1.0, 2.0, 0.25, -3.0]


def of_one_dtype(ignore_index: float, dtype: torch.dtype, labels: list[float]) -> tuple[Tensor, list[reference.Row]]:
    """A column, and the oracle's rows of it: a label is missing where it is what the column makes of ignore_index."""
    column = torch.tensor(labels, dtype=FLOAT64).to(dtype)
    missing = torch.tensor(ignore_index, dtype=dtype).item() if dtype.is_floating_point else ignore_index
    rows = []
    for x, y in zip(LOGITS, column.tolist()):
        valid = not (y == missing or (math.isnan(y) and math.isnan(missing)))
        rows.append(reference.Row(reference.bce_with_logits(x, float(y)), weight=1.0, valid=valid))
    return column, rows


@of_own_dtypes
@pytest.mark.parametrize("layout", ["mapping", "wide mapping"])
def test_a_missing_label_is_one_in_its_own_dtype(
    ignore_index: float, columns: dict[str, tuple[torch.dtype, list[float]]], layout: str
) -> None:
    made = {task: of_one_dtype(ignore_index, *column) for task, column in columns.items()}
    labels = {task: column if layout == "mapping" else column.unsqueeze(1) for task, (column, _) in made.items()}
    rows = {task: rows for task, (_, rows) in made.items()}
    truth = pytest.approx(reference.losses(rows, reference.Rule()), rel=1e-12)
    loss = MultiTaskLoss("bce_with_logits", list(columns), ignore_index=ignore_index, quality=True)
    logits = torch.tensor(LOGITS, dtype=FLOAT64).unsqueeze(1).repeat(1, len(columns)).requires_grad_()
    losses = loss(logits, labels)
    assert {key: value.item() for key, value in losses.items()} == truth
    assert {key: value.item() for key, value in loss.train_metric.compute().items()} == truth
    (gradient,) = torch.autograd.grad(losses["loss"], logits)
    for t, column in enumerate(rows.values()):
        assert [slope == 0.0 for slope in gradient[:, t].tolist()] == [not row.valid for row in column]
    by_hand = RankingQuality(list(columns), ignore_index=ignore_index)
    by_hand.update(logits.detach(), labels)
    for quality in (by_hand.compute(), loss.train_quality.compute()):
        for task, column in rows.items():
            assert quality[f"weight/{task}"].item() == sum(row.valid for row in column)
            assert quality[f"logloss/{task}"].item() == pytest.approx(losses[f"loss/{task}"].item(), rel=1e-12)


@of_own_dtypes
def test_a_task_alone_and_beside_others_has_the_same_missing_labels(
    ignore_index: float, columns: dict[str, tuple[torch.dtype, list[float]]]
) -> None:
    logits = torch.tensor(LOGITS, dtype=FLOAT64)
    labels = {task: of_one_dtype(ignore_index, *column)[0] for task, column in columns.items()}
    losses = MultiTaskLoss("bce_with_logits", list(columns), ignore_index=ignore_index)(
        dict.fromkeys(columns, logits), labels
    )
    for task, (dtype, values) in columns.items():
        column, rows = of_one_dtype(ignore_index, dtype, values)
        alone = Loss("bce_with_logits", ignore_index=ignore_index)(logits, column).item()
        assert alone == pytest.approx(reference.losses({task: rows}, reference.Rule())["loss"], rel=1e-12)
        assert losses[f"loss/{task}"].item() == pytest.approx(alone, rel=1e-12)
        quality = RankingQuality(None, ignore_index=ignore_index)
        quality.update(logits, column)
        assert quality.compute()["weight"].item() == sum(row.valid for row in rows)


@pytest.mark.usefixtures("new_compiler")
@pytest.mark.parametrize("case", ["bfloat16 beside int64", "float32 beside float64"])
def test_compiled_code_compares_in_the_same_dtype(case: str) -> None:
    ignore_index, columns = OWN_DTYPES[case]
    made = {task: of_one_dtype(ignore_index, *column) for task, column in columns.items()}
    truth = reference.losses({task: rows for task, (_, rows) in made.items()}, reference.Rule())
    loss = MultiTaskLoss("bce_with_logits", list(columns), ignore_index=ignore_index)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    logits = torch.tensor(LOGITS, dtype=FLOAT64).unsqueeze(1).repeat(1, len(columns))
    losses = compiled(logits, {task: column for task, (column, _) in made.items()})
    assert {key: value.item() for key, value in losses.items()} == pytest.approx(truth, rel=1e-12)
