"""Labels that are a distribution over classes: a callable gives one loss for each row of them."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from twloss import Loss, MultiTaskLoss

NAN = math.nan


def soft(logits: Tensor, labels: Tensor) -> Tensor:
    """-Σ over classes of y·log softmax(x)."""
    return -(labels * logits.log_softmax(-1)).sum(-1)


def log_softmax(logits: list[float]) -> list[float]:
    total = math.log(math.fsum(map(math.exp, logits)))
    return [x - total for x in logits]


def row_losses(logits: Tensor, labels: Tensor) -> list[float]:
    """The loss of each row, by itself."""
    pairs = zip(logits.flatten(0, -2).tolist(), labels.flatten(0, -2).tolist(), strict=True)
    return [-math.fsum(y * x for x, y in zip(log_softmax(xs), ys)) for xs, ys in pairs]


def random_inputs(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(*shape, dtype=torch.float64), torch.rand(*shape, dtype=torch.float64).softmax(-1)


@pytest.mark.parametrize("classes", [1, 3, 5])
@pytest.mark.parametrize("weighted", [False, True])
def test_one_task(classes: int, weighted: bool) -> None:
    """As many rows as classes too, where weights (rows,) would fit the labels from the wrong side."""
    logits, labels = random_inputs(5, classes)
    weights = torch.rand(5).double() if weighted else None
    expected = row_losses(logits, labels)
    factors = [1.0] * 5 if weights is None else weights.tolist()
    total = math.fsum(w * row for w, row in zip(factors, expected))
    for mean_over, divisor in (("rows", 5.0), ("weights", math.fsum(factors))):
        loss = Loss(soft, mean_over=mean_over)  # type: ignore[arg-type]
        assert loss(logits, labels, weights).item() == pytest.approx(total / divisor, rel=1e-13)
        assert loss.train_metric.compute()["loss"].item() == pytest.approx(total / divisor, rel=1e-13)


def test_more_dimensions_of_one_task() -> None:
    logits, labels = random_inputs(2, 3, 4)
    weights = torch.rand(2, 3).double()
    factors = weights.flatten().tolist()
    total = math.fsum(w * row for w, row in zip(factors, row_losses(logits, labels)))
    assert Loss(soft)(logits, labels, weights).item() == pytest.approx(total / 6, rel=1e-13)


def by_task(values: Tensor) -> dict[str, Tensor]:
    return dict(zip("ab", values.unbind(1)))


@pytest.mark.parametrize("form", [lambda values: values, by_task])
@pytest.mark.parametrize("types", [soft, {"a": soft, "b": soft}, {"a": soft, "b": functools.partial(soft)}])
def test_several_tasks(form: Any, types: Any) -> None:
    logits, labels = random_inputs(4, 2, 3)
    weights = torch.rand(4, 2).double()
    losses = MultiTaskLoss(types, ["a", "b"])(form(logits), form(labels), weights)
    for t, task in enumerate("ab"):
        rows = zip(row_losses(logits[:, t], labels[:, t]), weights[:, t].tolist(), strict=True)
        assert losses[f"loss/{task}"].item() == pytest.approx(math.fsum(w * row for row, w in rows) / 4, rel=1e-13)


def test_tasks_with_rows_of_their_own() -> None:
    logits, labels = random_inputs(4, 2, 3)
    rows = {"a": 4, "b": 1}
    losses = MultiTaskLoss(soft, ["a", "b"])(
        {task: each[: rows[task]] for task, each in by_task(logits).items()},
        {task: each[: rows[task]] for task, each in by_task(labels).items()},
    )
    assert losses["loss/b"].item() == pytest.approx(row_losses(logits[:1, 1], labels[:1, 1])[0], rel=1e-13)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("ignore_index", [NAN, -1.0])
def test_a_row_of_which_a_label_is_missing_is_missing(several: bool, ignore_index: float) -> None:
    logits, labels = random_inputs(4, 3)
    expected = row_losses(logits, labels)
    labels[0], labels[2, 1] = ignore_index, ignore_index
    logits.requires_grad_()
    if several:
        losses = MultiTaskLoss(soft, ["a"], ignore_index=ignore_index)(logits.unsqueeze(1), labels.unsqueeze(1))
        loss = losses["loss/a"]
    else:
        loss = Loss(soft, ignore_index=ignore_index)(logits, labels)
    assert loss.item() == pytest.approx((expected[1] + expected[3]) / 2, rel=1e-13)
    loss.backward()
    assert logits.grad is not None
    assert (logits.grad[[0, 2]] == 0).all()
    for row in (1, 3):  # (Σy·softmax(x) - y) / 2
        softmax = [math.exp(x) for x in log_softmax(logits[row].tolist())]
        slopes = [(p - y) / 2 for p, y in zip(softmax, labels[row].tolist())]
        assert logits.grad[row].tolist() == pytest.approx(slopes, rel=1e-12)


def test_a_row_of_weight_0_may_be_anything() -> None:
    logits, labels = random_inputs(3, 3)
    expected = row_losses(logits, labels)
    logits[1] = NAN
    logits.requires_grad_()
    loss = Loss(soft, mean_over="weights")(logits, labels, torch.tensor([1.0, 0.0, 2.0]))
    assert loss.item() == pytest.approx((expected[0] + 2 * expected[2]) / 3, rel=1e-13)
    loss.backward()
    assert logits.grad is not None
    assert (logits.grad[1] == 0).all()
    assert logits.grad.isfinite().all()


def test_a_callable_with_valid_gets_that_of_the_rows() -> None:
    shapes = []

    def with_valid(logits: Tensor, labels: Tensor, *, valid: Tensor) -> Tensor:
        shapes.append(tuple(valid.shape))
        return soft(logits, labels)

    logits, labels = random_inputs(4, 2, 3)
    MultiTaskLoss(with_valid, ["a", "b"], ignore_index=NAN)(logits, labels)
    assert shapes == [(4, 2)]


def test_elementwise_callables_stay_elementwise() -> None:
    logits, labels = random_inputs(4, 4)
    weights = torch.rand(4).double()  # of the columns, as torch broadcasts
    loss = Loss(nn.MSELoss(reduction="none"))(logits, labels, weights)
    rows = zip(logits.tolist(), labels.tolist())
    expected = math.fsum(w * (x - y) ** 2 for xs, ys in rows for x, y, w in zip(xs, ys, weights.tolist()))
    assert loss.item() == pytest.approx(expected / 16, rel=1e-13)


@pytest.mark.parametrize("rows", [1, 3])
def test_elementwise_callables_with_valid_stay_elementwise(rows: int) -> None:
    shapes = []

    def squared(logits: Tensor, labels: Tensor, *, valid: Tensor) -> Tensor:
        loss = (logits - labels).square().where(valid, 0.0)
        shapes.append(tuple(loss.shape))
        return loss

    logits, labels = random_inputs(rows, 3)
    labels[0, 1] = NAN
    loss = Loss(squared, "sum", ignore_index=NAN, global_batch=True)(logits, labels)
    pairs = zip(logits.flatten().tolist(), labels.flatten().tolist())
    assert loss.item() == pytest.approx(math.fsum((x - y) ** 2 for x, y in pairs if not math.isnan(y)), rel=1e-13)
    assert shapes == [(rows, 3)]


def test_a_callable_that_takes_no_empty_batch_is_elementwise() -> None:
    logits, labels = random_inputs(4, 3)
    loss = Loss(lambda x, y: (x - y).square() / y.max())(logits, labels, torch.ones(4, 1))
    rows = zip(logits.flatten().tolist(), labels.flatten().tolist())
    expected = math.fsum((x - y) ** 2 for x, y in rows) / 12 / max(labels.flatten().tolist())
    assert loss.item() == pytest.approx(expected, rel=1e-13)


def test_no_rows_are_no_data() -> None:
    logits = torch.zeros(0, 3, requires_grad=True)
    loss = Loss(soft)(logits, torch.zeros(0, 3))
    loss.backward()
    assert loss.item() == 0.0
    assert MultiTaskLoss(soft, ["a", "b"])(torch.zeros(0, 2, 3), torch.zeros(0, 2, 3))["loss"].item() == 0.0


def smoothed(logits: Tensor, labels: Tensor, smoothing: float) -> list[float]:
    """Cross-entropy against 1 - ε + ε/C for the label and ε/C for the other classes."""
    result = []
    for xs, label in zip(logits.flatten(0, -2).tolist(), labels.flatten().tolist(), strict=True):
        logs = log_softmax(xs)
        result.append(-(1 - smoothing) * logs[int(label)] - smoothing * math.fsum(logs) / len(logs))
    return result


def test_torchs_modules_of_classes_serve_several_tasks() -> None:
    """Their classes are the second dimension: as many classes as tasks would otherwise be taken for each other."""
    logits, labels = torch.randn(4, 3, 3).double(), torch.randint(0, 3, (4, 3))
    module = nn.CrossEntropyLoss(label_smoothing=0.1, reduction="none")
    tasks = ["a", "b", "c"]
    losses = MultiTaskLoss(module, tasks)(logits, labels)
    nll = MultiTaskLoss(nn.NLLLoss(reduction="none"), tasks)(logits.log_softmax(-1), labels)
    for t, task in enumerate(tasks):
        expected = smoothed(logits[:, t], labels[:, t], 0.1)
        assert losses[f"loss/{task}"].item() == pytest.approx(math.fsum(expected) / 4, rel=1e-13)
        expected = smoothed(logits[:, t], labels[:, t], 0.0)
        assert nll[f"loss/{task}"].item() == pytest.approx(math.fsum(expected) / 4, rel=1e-13)
    distributions = F.one_hot(labels, 3).double()
    assert MultiTaskLoss(module, tasks)(logits, distributions)["loss"].item() == pytest.approx(losses["loss"].item())
    one = Loss(module)(logits[:, 0], labels[:, 0])
    assert one.item() == pytest.approx(losses["loss/a"].item(), rel=1e-13)
    mixed = MultiTaskLoss({"a": module, "b": "bce_with_logits"}, ["a", "b"])
    found = mixed({"a": logits[:, 0], "b": torch.zeros(4)}, {"a": labels[:, 0], "b": torch.zeros(4)})
    assert found["loss/a"].item() == pytest.approx(losses["loss/a"].item(), rel=1e-13)


def masked(logits: Tensor, labels: Tensor, *, valid: Tensor) -> Tensor:
    """0 by its own hand where a label is missing; of one task, ``valid`` has the labels' shape."""
    assert valid.shape == labels.shape
    return soft(logits, labels).where(valid.all(-1), 0.0)


@pytest.mark.parametrize("rows", [0, 1, 3, 4])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_one_task_with_a_callable_that_uses_valid(rows: int, reduction: Any) -> None:
    logits, labels = random_inputs(rows, 3)
    total = math.fsum(row_losses(logits, labels))
    loss = Loss(masked, reduction, global_batch=True)(logits, labels)
    assert loss.item() == pytest.approx(total / max(rows, 1) if reduction == "mean" else total, rel=1e-13)


@pytest.mark.parametrize("rows", [3, 4])
def test_one_task_with_a_callable_that_uses_valid_and_a_missing_row(rows: int) -> None:
    logits, labels = random_inputs(rows, 3)
    expected = math.fsum(row_losses(logits, labels)[1:]) / (rows - 1)
    labels[0, 1] = NAN
    loss = Loss(masked, ignore_index=NAN)
    assert loss(logits, labels).item() == pytest.approx(expected, rel=1e-13)
    assert loss.train_metric.compute()["loss"].item() == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 3)])
def test_weights_of_several_tasks_are_of_the_rows(shape: tuple[int, ...]) -> None:
    """Three rows, tasks and classes, which nothing but their places tells apart."""
    logits, labels = random_inputs(3, 3, 3)
    weights = torch.rand(*shape, dtype=torch.float64)
    losses = MultiTaskLoss(soft, ["a", "b", "c"])(logits, labels, weights)
    factors = weights.view(3, -1).expand(3, 3)
    for t, task in enumerate("abc"):
        rows = zip(row_losses(logits[:, t], labels[:, t]), factors[:, t].tolist(), strict=True)
        assert losses[f"loss/{task}"].item() == pytest.approx(math.fsum(w * row for row, w in rows) / 3, rel=1e-13)


@pytest.mark.usefixtures("new_compiler")
def test_soft_labels_of_one_task_compile_to_one_graph() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    loss = Loss(soft)
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    seen = []
    for _ in range(4):
        logits, labels = random_inputs(4, 3)
        seen += row_losses(logits, labels)
        assert compiled(logits, labels).item() == pytest.approx(math.fsum(seen[-4:]) / 4, rel=1e-12)
    assert counter.frame_count == 1
    assert loss.train_metric.compute()["loss"].item() == pytest.approx(math.fsum(seen) / 16, rel=1e-12)


def test_soft_labels_of_one_task_under_vmap() -> None:
    logits, labels = random_inputs(2, 4, 3)
    loss = Loss(soft)
    expected = [math.fsum(row_losses(x, y)) / 4 for x, y in zip(logits, labels)]
    assert torch.func.vmap(loss)(logits, labels).tolist() == pytest.approx(expected, rel=1e-13)
    assert loss.train_metric.update_count == 0
