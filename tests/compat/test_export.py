"""torch.export, and FakeTensorMode, whose tensors have no values: programs are right, and no such tensor is kept."""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, export, load, save

from tests.support import reference
from tests.support.by_hand import Columns, columns_of
from twloss import GlobalLoss, MultiTaskLoss
from twloss._sums.ranks import ColumnNames

TASKS = ["like", "reply"]
NAN = math.nan
Inputs = tuple[Tensor, Tensor, Tensor]

pytestmark = [
    pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="torch 2.6 can't tell an export"),
    pytest.mark.usefixtures("new_compiler"),
    # torchmetrics copies a state's default, of which torch warns where it is fake.
    pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor:UserWarning"),
]


class Model(nn.Module):
    """Logits, scaled by a parameter, and their losses."""

    def __init__(self, loss_type: Any = "bce_with_logits", **options: Any) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.loss = MultiTaskLoss(loss_type, TASKS, **options)

    def forward(self, logits: Tensor, labels: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """The losses by task, and the global one."""
        losses: dict[str, Tensor] = self.loss(logits * self.scale, labels, weights)
        return losses


def batch(rows: int) -> Inputs:
    """Logits, labels of which some are missing, and weights of which some are 0."""
    labels, weights = torch.rand(rows, 2, dtype=torch.float64), torch.rand(rows, 2, dtype=torch.float64)
    labels[1::3], weights[2::3] = NAN, 0.0
    return 3 * torch.randn(rows, 2, dtype=torch.float64), labels, weights


def exported(model: nn.Module, inputs: Inputs, *, strict: bool) -> Any:
    rows = Dim("rows", min=0)
    return export(model, inputs, dynamic_shapes=({0: rows},) * 3, strict=strict)


def numbers(losses: dict[str, Tensor]) -> dict[str, float]:
    return {key: value.item() for key, value in losses.items()}


def by_hand(inputs: Inputs, pos_weights: tuple[float, float] = (1.0, 1.0)) -> Columns:
    logits, labels, weights = (each.tolist() for each in inputs)
    return columns_of(logits, labels, weights, TASKS, NAN, pos_weights)


def expect(losses: dict[str, Tensor], columns: Columns, rule: reference.Rule) -> None:
    """Losses as they are in forward, where no data is a loss of 0."""
    exact = {key: 0.0 if math.isnan(value) else value for key, value in reference.losses(columns, rule).items()}
    assert numbers(losses) == pytest.approx(exact, rel=1e-12, abs=1e-300)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "factors": {"pos_weights": (2.0, 0.5), "task_weights": (1.0, 3.0), "quality": True},
    "sum and max": {"task_loss_reduction": "sum", "global_reduction": "max", "global_batch": True},
    "over weights": {"mean_over": "weights", "fused": True},
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_an_exported_program_takes_any_number_of_rows(options: dict[str, Any], strict: bool) -> None:
    """Losses and gradients are right, and the model's sums are left alone."""
    model = Model(ignore_index=NAN, **options)
    program = exported(model, batch(6), strict=strict).module()
    rule = reference.Rule(**{name: options[name] for name in options if name in reference.Rule.__dataclass_fields__})
    for rows in (6, 7, 64, 1, 0):
        logits, labels, weights = batch(rows)
        losses = program(logits.requires_grad_(), labels, weights)
        columns = by_hand((logits, labels, weights), options.get("pos_weights", (1.0, 1.0)))
        expect(losses, columns, rule)
        losses["loss"].backward()
        assert logits.grad is not None
        if rows > 1:  # of fewer, a task may have no data, and a maximum no slope
            exact = torch.tensor(list(reference.gradients(columns, rule).values()), dtype=torch.float64).T
            torch.testing.assert_close(logits.grad, exact, rtol=1e-12, atol=1e-15)
    assert model.loss.train_metric.update_count == 0


def test_without_missing_labels_no_rows_are_a_loss_of_0() -> None:
    model = Model({"like": "bce_with_logits", "reply": lambda x, y: (x - y).square()})
    inputs = batch(6)[0], torch.rand(6, 2, dtype=torch.float64), torch.ones(6, 2, dtype=torch.float64)
    program = exported(model, inputs, strict=False).module()
    assert set(numbers(program(*(each[:0] for each in inputs))).values()) == {0.0}
    square = (inputs[0][:, 1] - inputs[1][:, 1]).square().mean().item()
    assert program(*inputs)["loss/reply"].item() == pytest.approx(square, rel=1e-12)


class OfSums(nn.Module):
    """The mean of squares of two tasks, one after the other in each row: sums that the model makes."""

    def __init__(self, form: str, **options: Any) -> None:
        super().__init__()
        is_beside = form in ("given", "bare")
        types: Any = {"like": "given", "reply": lambda x, y: (x - y).square()} if is_beside else "given"
        self.loss = MultiTaskLoss(types, TASKS, **options)
        self.form = form

    def forward(self, logits: Tensor, labels: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """The losses by task, and the global one."""
        sums, rows = (weights * (logits - labels).square()).sum(0), logits.shape[0]
        if self.form in ("given", "bare"):
            given: Any = sums[0] if self.form == "bare" else (sums[0], rows)
            return self.loss(logits[:, 1:], labels[:, 1:], given={"like": given})
        if self.form == "by task":
            return self.loss.from_sums(
                dict(zip(TASKS, sums)), {"reply": rows, "like": torch.ones_like(labels[:, 0]).sum()}
            )
        return self.loss.from_sums(sums, rows if self.form == "number" else torch.ones_like(labels).sum(0))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("form", ["number", "(tasks,)", "by task", "given", "bare"])
@pytest.mark.parametrize(
    "options", [{}, {"task_loss_reduction": "sum", "global_reduction": "max", "global_batch": True}], ids=["", "sum"]
)
def test_a_program_that_makes_sums_takes_any_number_of_rows(options: dict[str, Any], form: str, strict: bool) -> None:
    model = OfSums(form, **options)
    inputs = batch(6)[0], torch.rand(6, 2, dtype=torch.float64), torch.ones(6, 2, dtype=torch.float64)
    program = exported(model, inputs, strict=strict).module()
    for rows in (6, 9, 1, 0):
        logits, labels = torch.randn(rows, 2, dtype=torch.float64), torch.rand(rows, 2, dtype=torch.float64)
        losses = program(logits.requires_grad_(), labels, torch.ones_like(labels))
        pairs = zip(logits.T.tolist(), labels.T.tolist())
        squares = [[(x - y) ** 2 for x, y in zip(*columns)] for columns in pairs]
        divisors = [1.0 if options else max(rows, 1)] * 2
        if form == "bare":
            divisors[0] = 1.0
        values = [math.fsum(each) / n for each, n in zip(squares, divisors)]
        present = values[:1] if form == "bare" and rows == 0 else values
        exact = [*values, max(present) if options else math.fsum(present) / len(present)]
        assert [value.item() for value in losses.values()] == pytest.approx(exact, rel=1e-12)
        losses["loss"].backward()
        assert logits.grad is not None
        assert logits.grad.isfinite().all()
    assert model.loss.train_metric.update_count == 0


def test_a_saved_program_has_operators_of_torch_alone() -> None:
    """It can be loaded where this package is not installed."""
    program, file = exported(Model(ignore_index=NAN), batch(6), strict=False), io.BytesIO()
    assert not any("twloss" in str(node.target) for node in program.graph.nodes)
    save(program, file)
    file.seek(0)
    inputs = batch(9)
    expect(load(file).module()(*inputs), by_hand(inputs), reference.Rule())


# What a call without values leaves behind.


def in_an_export(loss: nn.Module, inputs: Inputs) -> None:
    export(loss, inputs, strict=False)


def in_fake_tensor_mode(loss: nn.Module, inputs: Inputs) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        loss(*map(mode.from_tensor, inputs))


without_values = pytest.mark.parametrize("call", [in_an_export, in_fake_tensor_mode])


@without_values
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_first_call_without_values_leaves_no_fake_constant(
    mixed: bool, dtype: torch.dtype, device: str, call: Callable[[nn.Module, Inputs], None]
) -> None:
    """Neither of the tasks, nor of their order, nor of many rows that are seen as fewer."""
    pos_weights, rule = (2.0, 0.5), reference.Rule(task_weights=(1.0, 3.0))
    types: Any = "bce_with_logits"
    if mixed:
        types = {"like": "bce_with_logits", "between": lambda x, y: (x - y).square(), "reply": "bce_with_logits"}
        rule = reference.Rule(task_weights=(1.0, 5.0, 3.0))
    loss = MultiTaskLoss(
        types,
        list(types) if mixed else TASKS,
        pos_weights=dict(zip(TASKS, pos_weights)) if mixed else pos_weights,
        task_weights=rule.task_weights,
        ignore_index=NAN,
    ).to(device)
    logits, labels, weights = (each.to(dtype) for each in batch(600))
    columns = by_hand((logits, labels, weights), pos_weights)
    if mixed:
        # Between the two, so that the order of the groups is not the tasks'; its loss is 0.
        logits, labels, weights = (
            torch.stack((t[:, 0], t[:, 0].nan_to_num(), t[:, 1]), 1) for t in (logits, labels, weights)
        )
        labels[:, 1] = logits[:, 1]
        columns = {"like": columns["like"], "between": [reference.Row(0.0)], "reply": columns["reply"]}
    call(loss, (logits, labels, weights))
    losses = loss(logits, labels, weights)
    exact = reference.losses(columns, rule)
    for result in (losses, loss.train_metric.compute()):
        assert {type(value) for value in result.values()} == {Tensor}
        assert numbers(result) == pytest.approx(exact, rel=1e-12 if dtype == torch.float64 else 1e-5)
    assert loss.train_metric.update_count == 1
    assert type(loss.train_metric.totals) is Tensor


@without_values
@pytest.mark.parametrize("form", ["number", "(tasks,)", "by task", "given", "bare"])
def test_a_first_call_of_sums_without_values_leaves_no_fake_constant(
    form: str, call: Callable[[nn.Module, Inputs], None]
) -> None:
    model = OfSums(form, task_weights=(1.0, 3.0), global_batch=True)
    call(model, (torch.ones(6, 2), torch.zeros(6, 2), torch.ones(6, 2)))
    losses = model(torch.ones(4, 2), torch.zeros(4, 2), torch.ones(4, 2))
    like = 4.0 if form == "bare" else 1.0
    for result in (losses, model.loss.train_metric.compute()):
        assert {type(value) for value in result.values()} == {Tensor}
        assert numbers(result) == {"loss/like": like, "loss/reply": 1.0, "loss": (like + 3.0) / 2}
    assert model.loss.train_metric.update_count == 1


def test_task_weights_that_are_set_without_values_are_not_fake() -> None:
    loss, inputs = MultiTaskLoss("bce_with_logits", TASKS, ignore_index=NAN), batch(6)
    loss(*inputs)
    with FakeTensorMode(allow_non_fake_inputs=True):
        loss.task_weights = (1.0, 3.0)
    exact = reference.losses(by_hand(inputs), reference.Rule(task_weights=(1.0, 3.0)))
    assert numbers(loss(*inputs)) == pytest.approx(exact, rel=1e-12)


def test_hashes_of_names_are_not_fake() -> None:
    with torch.device("meta"):
        names = ColumnNames(TASKS)
    with FakeTensorMode():
        names.pack(torch.zeros(2, 2, dtype=torch.float64))
    hashes = [float(zlib.crc32(task.encode())) for task in TASKS]
    assert names.pack(torch.zeros(2, 2, dtype=torch.float64)).tolist() == [[0.0, 0.0], [0.0, 0.0], hashes]


def test_a_metrics_sums_are_not_fake() -> None:
    """Neither after an update, nor after a call, which computes of this batch alone."""
    metric = GlobalLoss(TASKS)
    metric.to("meta")
    with FakeTensorMode() as mode:
        sums = mode.from_tensor(torch.ones(2))
        metric.update(sums, 4)
        assert set(metric(sums, 4)) == {"loss/like", "loss/reply", "loss"}
    metric.update(torch.tensor([3.0, 8.0]), 4)
    assert numbers(metric.compute()) == {"loss/like": 0.75, "loss/reply": 2.0, "loss": 1.375}
    assert metric.update_count == 1
