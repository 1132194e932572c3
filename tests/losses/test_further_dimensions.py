"""A callable is given logits and labels of whatever further dimensions, once a forward, on the rows there are."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from twloss import Loss, MultiTaskLoss

NAN = math.nan
TASKS = ["watch", "spend"]


def log_normal(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log likelihood of a label under exp(N(m, s)), where the two outputs are m and ln s."""
    mean, log_scale = logits.unbind(-1)
    standard = (labels.log() - mean) / log_scale.exp()
    return standard.square() / 2 + log_scale + labels.log() + math.log(2 * math.pi) / 2


def by_hand(logits: list[float], label: float) -> float:
    mean, log_scale = logits
    deviation = (math.log(label) - mean) / math.exp(log_scale)
    return deviation**2 / 2 + log_scale + math.log(label * math.sqrt(2 * math.pi))


def pinball(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum of the losses of three quantiles."""
    errors = labels.unsqueeze(-1) - logits
    levels = torch.tensor([0.1, 0.5, 0.9], dtype=logits.dtype)
    return torch.maximum(levels * errors, (levels - 1) * errors).sum(-1)


def inputs(outputs: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(5, 2, outputs, dtype=torch.float64), torch.rand(5, 2, dtype=torch.float64) + 0.5


def mean_by_hand(logits: Tensor, labels: Tensor, factors: list[float]) -> float:
    rows = zip(logits.tolist(), labels.tolist(), factors, strict=True)
    return math.fsum(w * by_hand(x, y) for x, y, w in rows if w) / len(factors)


def of_task(values: Tensor) -> dict[str, Tensor]:
    return dict(zip(TASKS, values.unbind(1)))


@pytest.mark.parametrize("form", [lambda values: values, of_task], ids=["tensors", "mappings"])
@pytest.mark.parametrize("types", [log_normal, {"watch": log_normal, "spend": "bce_with_logits"}], ids=["one", "mixed"])
def test_a_head_with_two_outputs_and_float_labels(form: Any, types: Any) -> None:
    logits, labels = inputs()
    weights = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0], dtype=torch.float64)
    logits[1] = NAN
    given, loss = form(logits), MultiTaskLoss(types, TASKS)
    if isinstance(types, dict):
        given = {"watch": logits[:, 0], "spend": torch.zeros(5, dtype=torch.float64)}
    losses = loss(given, of_task(labels) if isinstance(types, dict) else form(labels), weights)
    for t, task in enumerate(TASKS if types is log_normal else ["watch"]):
        expected = mean_by_hand(logits[:, t], labels[:, t], weights.tolist())
        assert losses[f"loss/{task}"].item() == pytest.approx(expected, rel=1e-12)
        assert loss.train_metric.compute()[f"loss/{task}"].item() == pytest.approx(expected, rel=1e-12)


def test_tasks_with_rows_of_their_own() -> None:
    logits, labels = inputs()
    rows = {"watch": 5, "spend": 2}
    losses = MultiTaskLoss(log_normal, TASKS)(
        {task: each[: rows[task]] for task, each in of_task(logits).items()},
        {task: each[: rows[task]] for task, each in of_task(labels).items()},
    )
    for t, task in enumerate(TASKS):
        count = rows[task]
        expected = mean_by_hand(logits[:count, t], labels[:count, t], [1.0] * count)
        assert losses[f"loss/{task}"].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("form", [lambda values: values, of_task], ids=["tensors", "mappings"])
def test_labels_with_more_dimensions_than_classes(form: Any) -> None:
    """Targets (rows, tasks, steps, 2), of which a row is missing where one number of it is."""
    logits, labels = torch.randn(4, 2, 3, 2, dtype=torch.float64), torch.randn(4, 2, 3, 2, dtype=torch.float64)
    labels[1, 0, 2, 1] = NAN
    losses = MultiTaskLoss(lambda x, y: (x - y).abs().sum((-1, -2)), TASKS, ignore_index=NAN)(
        form(logits), form(labels)
    )
    for t, task in enumerate(TASKS):
        rows = [math.fsum((x - y).abs().flatten().tolist()) for x, y in zip(logits[:, t], labels[:, t])]
        rows = [row for row in rows if not math.isnan(row)]
        assert losses[f"loss/{task}"].item() == pytest.approx(math.fsum(rows) / len(rows), rel=1e-12)


@pytest.mark.parametrize("ignore_index", [None, NAN])
@pytest.mark.parametrize("weighted", [False, True])
def test_one_task_with_two_outputs(weighted: bool, ignore_index: float | None) -> None:
    logits, labels = (values[:, 0].clone() for values in inputs())
    factors = [1.0, 0.0, 2.0, 0.5, 1.0] if weighted else [1.0] * 5
    loss = Loss(log_normal, "sum", ignore_index=ignore_index, global_batch=True)
    if ignore_index is not None:
        labels[3], factors[3] = NAN, 0.0
    expected = 5 * mean_by_hand(logits, labels, factors)
    found = loss(logits.requires_grad_(), labels, torch.tensor(factors).double() if weighted else None)
    assert found.item() == pytest.approx(expected, rel=1e-12)
    found.backward()
    assert logits.grad is not None
    assert ((logits.grad == 0).all(-1) == torch.tensor([factor == 0 for factor in factors])).all()


@pytest.mark.parametrize("outputs", [3, 5])
def test_quantiles_of_as_many_outputs_as_rows(outputs: int) -> None:
    logits, labels = inputs(3)
    loss = Loss(pinball)(logits[:, 0], labels[:, 0], torch.ones(5))
    assert loss.item() == pytest.approx(pinball(logits[:, 0], labels[:, 0]).mean().item(), rel=1e-12)


class Counting:
    """A callable that notes the rows of each call, and takes no empty batch."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The squared error of each row, of whatever it has."""
        if len(labels) == 0:
            raise ValueError("no rows")
        self.rows.append(len(labels))
        return (logits - labels).square().flatten(1).sum(1)


@pytest.mark.parametrize("weights", [None, torch.ones(4)], ids=["without", "with weights"])
@pytest.mark.parametrize("shape", [(4, 4), (4, 3, 2)], ids=str)
def test_it_is_called_once_on_the_rows_there_are(shape: tuple[int, ...], weights: Tensor | None) -> None:
    function = Counting()
    loss = Loss(function, ignore_index=NAN)
    for _ in range(2):
        loss(torch.ones(shape), torch.zeros(shape), weights)
    assert function.rows == [4, 4]


@pytest.mark.parametrize("classes", [3, 4])
def test_rows_and_columns_of_weight_0_are_told_apart_by_the_result(classes: int) -> None:
    """Four weights beside (4, 4) labels are of the rows where the loss is of rows, and else of the columns."""
    logits, labels = torch.randn(4, classes, dtype=torch.float64), torch.randn(4, classes, dtype=torch.float64)
    weights = torch.tensor([1.0, 0.0, 2.0, 1.0], dtype=torch.float64)
    logits[1] = NAN
    found = logits.clone().requires_grad_()
    Loss(lambda x, y: (x - y).square().sum(-1), "sum", global_batch=True)(found, labels, weights).backward()
    assert torch.allclose(found.grad[[0, 2, 3]], (2 * weights.unsqueeze(1) * (logits - labels))[[0, 2, 3]])  # type: ignore[index]
    assert (found.grad[1] == 0).all()  # type: ignore[index]
    if classes == 4:
        logits = torch.randn(4, 4, dtype=torch.float64)
        logits[:, 1] = NAN
        found = logits.clone().requires_grad_()
        Loss(lambda x, y: (x - y).square(), "sum", global_batch=True)(found, labels, weights).backward()
        assert torch.allclose(found.grad[:, [0, 2, 3]], (2 * weights * (logits - labels))[:, [0, 2, 3]])  # type: ignore[index]
        assert (found.grad[:, 1] == 0).all()  # type: ignore[index]


@pytest.mark.usefixtures("new_compiler")
@pytest.mark.parametrize("masked", ["weights", "label"])
@pytest.mark.parametrize("classes", [3, 4])
@pytest.mark.parametrize("by_row", [True, False])
def test_compiled_code_masks_the_same_rows(by_row: bool, classes: int, masked: str) -> None:
    logits, labels = torch.randn(4, classes, dtype=torch.float64), torch.randn(4, classes, dtype=torch.float64)
    weights = torch.tensor([1.0, 0.0, 2.0, 1.0], dtype=torch.float64)
    weights = weights if by_row or classes == 4 else weights[:3]
    if masked == "label":
        labels[1, 1] = NAN
    else:
        logits[1 if by_row else slice(None), slice(None) if by_row else 1] = NAN
    gradients: list[Any] = []
    for backend in (None, "aot_eager"):
        loss: Any = Loss(squared_rows if by_row else squared, "sum", ignore_index=NAN, global_batch=True)
        function = torch.compile(loss, fullgraph=True, backend=backend) if backend else loss
        leaf = logits.clone().requires_grad_()
        function(leaf, labels, weights if masked == "weights" else None).backward()
        gradients.append(leaf.grad)
    assert gradients[0].isfinite().all()
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=0)
    zeros: Tensor = gradients[0] == 0
    assert zeros[1].all() if by_row else (zeros[:, 1].all() if masked == "weights" else zeros[1, 1])


def squared(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits - labels).square()


def squared_rows(logits: Tensor, labels: Tensor) -> Tensor:
    return squared(logits, labels).sum(-1)


def test_one_number_of_one_task() -> None:
    """Of no dimension at all."""
    for label, expected in ((0.0, 2.0), (-1.0, 0.0)):
        logit = torch.tensor(1.0, requires_grad=True)
        Loss(squared, ignore_index=-1.0)(logit, torch.tensor(label)).backward()
        assert logit.grad is not None
        assert logit.grad.item() == expected


@pytest.mark.parametrize("shape", [(3,), (4, 2), (4, 1, 1)])
def test_weights_that_fit_no_rows_are_refused(shape: tuple[int, ...]) -> None:
    loss = Loss(squared)
    with pytest.raises(ValueError, match=r"^weights: got shape .*expected one that broadcasts to the labels' \(4,\)"):
        loss(torch.zeros(4), torch.zeros(4), torch.ones(shape))
    assert loss.train_metric.update_count == 0


def test_weights_of_the_last_dimension_of_the_rows_serve_all_others() -> None:
    """As a tensor broadcasts: from the last dimension on."""
    logits, labels = (torch.randn(2, 3, 5, dtype=torch.float64) for _ in range(2))
    weights = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
    found = Loss(lambda x, y: (x - y).square().sum(-1))(logits.requires_grad_(), labels, weights)
    pairs = zip(logits.tolist(), labels.tolist())
    rows = [(w, x, y) for xs, ys in pairs for w, x, y in zip(weights.tolist(), xs, ys)]
    assert found.item() == pytest.approx(
        math.fsum(w * (a - b) ** 2 for w, x, y in rows for a, b in zip(x, y)) / 6, rel=1e-12
    )
