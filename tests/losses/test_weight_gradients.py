"""The gradient by a weight is its row's loss, at a weight of 0 too: weights can be learned."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support import reference
from twloss import Loss, MultiTaskLoss

pytestmark = pytest.mark.usefixtures("eager_and_fused")

TASKS = ["a", "b"]
POSITIVE = [2.0, 3.0]
MISSING = -1
WEIGHTS = [[1.0, 0.0], [0.0, 2.0], [0.5, 0.0], [0.0, 0.0], [3.0, 1.5]]
OUT = [(n, t) for n, row in enumerate(WEIGHTS) for t, w in enumerate(row) if w == 0]


def squared(logits: Tensor, labels: Tensor) -> Tensor:
    """A callable, against any labels."""
    return (logits - labels).square()


def plain_bce(logits: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="none")


def plain_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none").view(labels.shape)


# What makes the loss.
KINDS: dict[str, dict[str, Any]] = {
    "bce": {"loss_type": "bce_with_logits"},
    "bce with pos_weights": {"loss_type": "bce_with_logits", "pos_weights": POSITIVE},
    "cross-entropy": {"loss_type": "cross_entropy"},
    "callable": {"loss_type": squared},
}
by_kind = pytest.mark.parametrize("kind", KINDS)


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def inputs(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Logits and weights that require grad, and labels."""
    classes = kind == "cross-entropy"
    logits = torch.randn((5, 2, 3) if classes else (5, 2), dtype=torch.float64)
    labels = torch.randint(0, 3, (5, 2)) if classes else torch.rand(5, 2, dtype=torch.float64)
    return logits.requires_grad_(), labels, tensor(WEIGHTS).requires_grad_()


def row_loss(kind: str, x: Any, y: Any, t: int) -> float:
    """One row's loss, by the oracle."""
    if kind == "cross-entropy":
        return reference.cross_entropy(x, y)
    if kind == "callable":
        return float((x - y) ** 2)
    return reference.bce_with_logits(x, y, POSITIVE[t] if kind == "bce with pos_weights" else 1.0)


def row_losses(kind: str, logits: Tensor, labels: Tensor) -> list[list[float]]:
    return [
        [row_loss(kind, x, y, t) for t, (x, y) in enumerate(zip(xs, ys))]
        for xs, ys in zip(logits.tolist(), labels.tolist())
    ]


def expected(losses: list[list[float]], reduction: str, mean_over: str) -> list[list[float]]:
    """The derivative by each weight of the mean of both tasks' losses."""
    result = []
    sums = [math.fsum(row[t] for row in WEIGHTS) for t in range(2)]
    means = [math.fsum(w[t] * row[t] for w, row in zip(WEIGHTS, losses)) / sums[t] for t in range(2)]
    for row in losses:
        if reduction == "sum":
            result.append([x / 2 for x in row])
        elif mean_over == "rows":
            result.append([x / (2 * len(losses)) for x in row])
        else:
            result.append([(x - mean) / (2 * weight) for x, mean, weight in zip(row, means, sums)])
    return result


def close(found: Any, exact: Any) -> bool:
    """Whether nested lists or tensors agree."""
    return torch.allclose(torch.as_tensor(found), tensor(exact), rtol=1e-12, atol=1e-14)


@by_kind
@pytest.mark.parametrize(("reduction", "mean_over"), [("sum", "rows"), ("mean", "rows"), ("mean", "weights")])
def test_the_gradient_by_a_weight_is_the_rows_loss(kind: str, reduction: Any, mean_over: Any) -> None:
    logits, labels, weights = inputs(kind)
    loss = MultiTaskLoss(
        tasks=TASKS, task_loss_reduction=reduction, mean_over=mean_over, global_batch=True, **KINDS[kind]
    )
    result = loss(logits, labels, weights)["loss"]
    by_logit, by_weight = torch.autograd.grad(result, (logits, weights))
    losses = row_losses(kind, logits, labels)
    assert close(by_weight, expected(losses, reduction, mean_over))
    # All else is as with weights that no gradient is asked for.
    plain = loss(logits, labels, weights.detach())["loss"]
    assert close(result, plain.item())
    assert close(by_logit, torch.autograd.grad(plain, logits)[0].tolist())
    assert all((by_logit[n, t] == 0).all() for n, t in OUT)


@pytest.mark.parametrize("kind", ["bce", "cross-entropy", "callable"])
def test_a_single_loss_too(kind: str) -> None:
    logits, labels, weights = inputs(kind)
    loss = Loss(KINDS[kind]["loss_type"])
    (found,) = torch.autograd.grad(loss(logits[:, 0], labels[:, 0], weights[:, 0]), weights)
    assert close(found[:, 0], [row[0] / 5 for row in row_losses(kind, logits, labels)])
    assert (found[:, 1] == 0).all()


@by_kind
@pytest.mark.parametrize("shape", [(5,), (5, 1)])
def test_weights_of_whole_rows_get_the_sum_of_the_tasks_losses(kind: str, shape: tuple[int, ...]) -> None:
    logits, labels, _ = inputs(kind)
    weights = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    loss = MultiTaskLoss(tasks=TASKS, **KINDS[kind])
    result = loss(logits, labels, weights)["loss"]
    by_logit, by_weight = torch.autograd.grad(result, (logits, weights))
    assert result.item() == 0.0
    assert (by_logit == 0).all()
    assert close(by_weight.flatten(), [math.fsum(row) / 10 for row in row_losses(kind, logits, labels)])


NOT_FINITE = [math.nan, math.inf, -math.inf]


@by_kind
@pytest.mark.parametrize("junk", NOT_FINITE)
def test_a_row_of_weight_0_that_is_not_finite_adds_nothing(kind: str, junk: float) -> None:
    logits, labels, weights = inputs(kind)
    exact = row_losses(kind, logits, labels)
    with torch.no_grad():
        for n, t in OUT:
            # Its loss is NaN or infinity, so that there is no derivative by its weight.
            logits[n, t] = junk
            if kind == "cross-entropy":
                labels[n, t] = 0
            else:
                labels[n, t] = 1.0 if junk < 0 else 0.0
    loss = MultiTaskLoss(tasks=TASKS, **KINDS[kind])
    result = loss(logits, labels, weights)["loss"]
    by_logit, by_weight = torch.autograd.grad(result, (logits, weights))
    terms = [w * x for ws, xs in zip(WEIGHTS, exact) for w, x in zip(ws, xs)]
    assert close(result, math.fsum(terms) / 10)
    assert by_logit.isfinite().all()
    assert all((by_logit[n, t] == 0).all() for n, t in OUT)
    slopes = [[0.0 if w == 0 else x / 10 for w, x in zip(ws, xs)] for ws, xs in zip(WEIGHTS, exact)]
    assert close(by_weight, slopes)
    assert all(by_weight[n, t] == 0 for n, t in OUT)


@pytest.mark.parametrize("kind", ["bce", "bce with pos_weights", "callable"])
@pytest.mark.parametrize("junk", NOT_FINITE)
def test_a_label_that_is_not_finite_adds_nothing(kind: str, junk: float) -> None:
    logits, labels, weights = inputs(kind)
    exact = row_losses(kind, logits, labels)
    for n, t in OUT:
        labels[n, t] = junk
    result = MultiTaskLoss(tasks=TASKS, **KINDS[kind])(logits, labels, weights)["loss"]
    by_logit, by_weight = torch.autograd.grad(result, (logits, weights))
    assert close(result, math.fsum(w * x for ws, xs in zip(WEIGHTS, exact) for w, x in zip(ws, xs)) / 10)
    assert all(by_logit[n, t] == 0 for n, t in OUT)
    assert close(by_weight, [[0.0 if w == 0 else x / 10 for w, x in zip(ws, xs)] for ws, xs in zip(WEIGHTS, exact)])


def test_an_infinite_logit_whose_loss_is_finite_has_that_loss_as_gradient() -> None:
    """Class 1 is impossible, and the label is another one."""
    logits = tensor([[0.5, -math.inf, 1.0], [0.0, 1.0, 2.0]]).requires_grad_()
    weights = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    result = Loss("cross_entropy", "mean")(logits, torch.tensor([0, 1]), weights)
    by_logit, by_weight = torch.autograd.grad(result, (logits, weights))
    assert result.item() == 0.0
    assert (by_logit == 0).all()
    assert close(by_weight, [reference.cross_entropy([0.5, 1.0], 0) / 2, reference.cross_entropy([0, 1, 2], 1) / 2])


@pytest.mark.parametrize("label", [-100, 7])
def test_a_class_that_does_not_exist_adds_nothing_at_weight_0(label: int) -> None:
    logits, labels, weights = inputs("cross-entropy")
    exact = row_losses("cross-entropy", logits, labels)
    for n, t in OUT:
        labels[n, t] = label
    result = MultiTaskLoss("cross_entropy", TASKS)(logits, labels, weights)["loss"]
    by_logit, by_weight = torch.autograd.grad(result, (logits, weights))
    assert close(result, math.fsum(w * x for ws, xs in zip(WEIGHTS, exact) for w, x in zip(ws, xs)) / 10)
    assert all((by_logit[n, t] == 0).all() for n, t in OUT)
    assert by_weight.isfinite().all()


@by_kind
def test_a_missing_label_gives_its_weight_no_gradient(kind: str) -> None:
    logits, labels, weights = inputs(kind)
    exact = row_losses(kind, logits, labels)
    labels[0, 0] = labels[3, 1] = MISSING
    loss = MultiTaskLoss(tasks=TASKS, ignore_index=MISSING, **KINDS[kind])
    by_logit, by_weight = torch.autograd.grad(loss(logits, labels, weights)["loss"], (logits, weights))
    assert (by_logit[0, 0] == 0).all()
    slopes = [[x / 8 for x in row] for row in exact]  # 4 rows have a label
    slopes[0][0] = slopes[3][1] = 0.0
    assert close(by_weight, slopes)


@by_kind
def test_an_empty_batch(kind: str) -> None:
    logits, labels, _ = inputs(kind)
    weights = torch.zeros(0, 2, dtype=torch.float64, requires_grad=True)
    result = MultiTaskLoss(tasks=TASKS, **KINDS[kind])(logits[:0], labels[:0], weights)["loss"]
    (by_logit, by_weight) = torch.autograd.grad(result, (logits, weights))
    assert result.item() == 0.0
    assert (by_logit == 0).all()
    assert by_weight.shape == (0, 2)


@by_kind
@pytest.mark.usefixtures("new_compiler")
def test_compiled_too(kind: str) -> None:
    logits, labels, weights = inputs(kind)
    loss = torch.compile(MultiTaskLoss(tasks=TASKS, **KINDS[kind]), fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(loss(logits, labels, weights)["loss"], weights)
    assert close(found, expected(row_losses(kind, logits, labels), "mean", "rows"))


# Learning to reweight: the gradient of a validation loss by the weights of a training step.

Inner = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits, labels, weights) -> the weighted mean over rows."""


def plain(rows: Callable[[Tensor, Tensor], Tensor]) -> Inner:
    return lambda logits, labels, weights: (weights * rows(logits, labels)).mean(0).mean()


REWEIGHTED: dict[str, tuple[Any, Callable[[Tensor, Tensor], Tensor]]] = {
    "bce": ("bce_with_logits", plain_bce),
    "cross-entropy": ("cross_entropy", plain_cross_entropy),
    "callable": (squared, squared),
}
by_loss = pytest.mark.parametrize("kind", REWEIGHTED)


class Problem:
    """A linear model of two tasks, and the rows that it is trained and validated on."""

    def __init__(self, kind: str) -> None:
        self.classes = 3 if kind == "cross-entropy" else 1
        self.matrix = torch.randn(4, 2 * self.classes, dtype=torch.float64)
        self.train, self.validation = (torch.randn(6, 4, dtype=torch.float64) for _ in range(2))
        self.labels = torch.randint(0, 3, (2, 6, 2)) if self.classes > 1 else torch.rand(2, 6, 2, dtype=torch.float64)

    def logits(self, features: Tensor, matrix: Tensor) -> Tensor:
        """Of the two tasks."""
        logits = features @ matrix
        return logits.unflatten(1, (2, 3)) if self.classes > 1 else logits


def by_autograd(problem: Problem, loss: Inner, eps: Tensor) -> Tensor:
    matrix = problem.matrix.clone().requires_grad_()
    inner = loss(problem.logits(problem.train, matrix), problem.labels[0], eps)
    (slope,) = torch.autograd.grad(inner, matrix, create_graph=True)
    outer = loss(
        problem.logits(problem.validation, matrix - 0.5 * slope), problem.labels[1], torch.ones_like(problem.labels[1])
    )
    return torch.autograd.grad(outer, eps)[0]


def by_transforms(problem: Problem, loss: Inner, eps: Tensor) -> Tensor:
    def inner(matrix: Tensor, weights: Tensor) -> Tensor:
        return loss(problem.logits(problem.train, matrix), problem.labels[0], weights)

    def outer(weights: Tensor) -> Tensor:
        stepped = problem.matrix - 0.5 * torch.func.grad(inner)(problem.matrix, weights)
        return loss(problem.logits(problem.validation, stepped), problem.labels[1], torch.ones_like(problem.labels[1]))

    gradient: Tensor = torch.func.grad(outer)(eps.detach())
    return gradient


@by_loss
@pytest.mark.parametrize("gradient", [by_autograd, by_transforms])
def test_learning_to_reweight_is_that_of_plain_torch(kind: str, gradient: Any) -> None:
    loss_type, rows = REWEIGHTED[kind]
    problem = Problem(kind)
    eps = torch.zeros(6, 2, dtype=torch.float64, requires_grad=True)
    loss = MultiTaskLoss(loss_type, TASKS)
    found = gradient(problem, lambda *inputs: loss(*inputs)["loss"], eps)
    exact = by_autograd(problem, plain(rows), eps)
    assert (exact != 0).all()
    assert torch.allclose(found, exact, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("gradient", [by_autograd, by_transforms])
def test_learning_to_reweight_with_a_single_loss(gradient: Any) -> None:
    problem = Problem("bce")
    eps = torch.zeros(6, 2, dtype=torch.float64, requires_grad=True)
    found = gradient(problem, Loss("bce_with_logits"), eps)
    assert torch.allclose(found, by_autograd(problem, plain(plain_bce), eps), rtol=1e-10, atol=1e-15)


@by_kind
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # gradcheck's own
def test_second_derivatives_fit_the_first_at_weights_of_0_too(kind: str) -> None:
    """By weight and logit, in either order; of a callable, whose rows may be coupled, only where no weight is 0."""
    logits, labels, weights = inputs(kind)
    if kind == "callable":
        weights = (weights.detach() + 0.5).requires_grad_()
    loss = MultiTaskLoss(task_loss_reduction="sum", tasks=TASKS, global_batch=True, **KINDS[kind])
    assert torch.autograd.gradgradcheck(lambda x, w: loss(x, labels, w)["loss"], (logits, weights))
    assert torch.autograd.gradcheck(
        lambda x, w: loss(x, labels, w)["loss"],
        (logits, (weights.detach() + 0.5).requires_grad_()),
        check_forward_ad=True,
    )


@by_kind
def test_many_gradients_at_once(kind: str) -> None:
    """``is_grads_batched``, which knows fewer operations than ``torch.vmap``."""
    logits, labels, weights = inputs(kind)
    result = MultiTaskLoss(tasks=TASKS, **KINDS[kind])(logits, labels, weights)["loss/a"]
    singly = torch.autograd.grad(result, [logits, weights], retain_graph=True)
    at_once = torch.autograd.grad([result], [logits, weights], [tensor([1.0, 3.0])], is_grads_batched=True)
    for one, both in zip(singly, at_once):
        assert torch.allclose(both, torch.stack((one, 3 * one)), rtol=1e-12, atol=0)
