"""What adds nothing to a loss adds nothing to its gradient: a task of weight 0, a row left out."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.pairwise import pairwise
from twloss import GlobalLoss, MultiTaskLoss

BAD = [math.nan, math.inf]


def squared(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits - labels).square()


def loss_of(loss_type: Any, reduction: Any, **options: Any) -> MultiTaskLoss:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return MultiTaskLoss(loss_type, ["a", "b"], global_reduction=reduction, **options)


def inputs_of(loss_type: Any, bad: float, rows: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Logits of 0 and labels of 1, but for task b's first logit."""
    types = loss_type if isinstance(loss_type, dict) else dict.fromkeys("ab", loss_type)
    shapes = {task: (rows, 2) if kind == "cross_entropy" else (rows,) for task, kind in types.items()}
    logits = {task: torch.zeros(shape, dtype=torch.float64) for task, shape in shapes.items()}
    logits["b"].view(-1)[0] = bad
    labels = {task: torch.ones(rows, dtype=torch.int64 if len(shapes[task]) > 1 else torch.float64) for task in types}
    return {task: each.requires_grad_() for task, each in logits.items()}, labels


def slopes_of(kind: Any) -> tuple[float, list[float]]:
    """The loss of a row, and its derivative by its logits."""
    if kind == "bce_with_logits":
        return math.log(2), [-0.5]
    if kind == "cross_entropy":
        return math.log(2), [0.5, -0.5]
    return 1.0, [-2.0]


TYPES: dict[str, Any] = {
    "bce": "bce_with_logits",
    "classes": "cross_entropy",
    "callable": squared,
    "bce, classes": {"a": "bce_with_logits", "b": "cross_entropy"},
    "classes, callable": {"a": "cross_entropy", "b": squared},
    "callable, bce": {"a": squared, "b": "bce_with_logits"},
}


@pytest.mark.usefixtures("new_compiler")
@pairwise(
    kind=list(TYPES),
    bad=BAD,
    reduction=["sum", "mean"],
    way=["weight of 0", "not asked for"],
    options=[{}, {"global_batch": True}, {"fused": True}],
)
def test_a_task_that_adds_nothing_has_no_gradient_whatever_its_loss(
    kind: str, bad: float, reduction: str, way: str, options: dict[str, bool]
) -> None:
    if options.get("fused") and "bce" not in kind:
        options = {}
    loss_type, rows = TYPES[kind], 3
    is_weighted = way == "weight of 0"
    if is_weighted:
        options = {**options, "task_weights": (1.0, 0.0)}  # type: ignore[dict-item]
    loss = loss_of(loss_type, reduction, **options)
    logits, labels = inputs_of(loss_type, bad, rows)
    losses = loss(logits, labels)
    value, slopes = slopes_of(loss_type["a"] if isinstance(loss_type, dict) else loss_type)
    tasks = 2 if is_weighted and reduction == "mean" else 1
    result = losses["loss" if is_weighted else "loss/a"]
    assert result.item() == pytest.approx(value / tasks, rel=1e-12)
    of_a, of_b = torch.autograd.grad(result, [logits["a"], logits["b"]], retain_graph=True)
    again = torch.autograd.grad(result, logits["b"], create_graph=True)[0]
    assert of_a.view(rows, -1).tolist() == [pytest.approx([each / rows / tasks for each in slopes], rel=1e-12)] * rows
    assert of_b.eq(0).all()
    assert again.eq(0).all()
    # The task's own loss has its gradient all the same.
    (own,) = torch.autograd.grad(losses["loss/b"], logits["b"])
    assert own.flatten()[-1].item() != 0


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("bad", BAD)
def test_a_compiled_loss_has_no_gradient_of_a_task_of_weight_0(reduction: str, bad: float, new_compiler: None) -> None:
    loss = loss_of("bce_with_logits", reduction, global_batch=True, task_weights=(1.0, 0.0))
    logits = torch.tensor([[0.0, bad], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    result = torch.compile(loss, fullgraph=True, backend="aot_eager")(logits, torch.ones(2, 2))["loss"]
    (found,) = torch.autograd.grad(result, logits)
    tasks = 2 if reduction == "mean" else 1
    assert result.item() == pytest.approx(math.log(2) / tasks, rel=1e-12)
    assert found.tolist() == [[pytest.approx(-0.25 / tasks, rel=1e-12), 0.0]] * 2


@pytest.mark.parametrize("bad", BAD)
def test_a_metric_leaves_out_a_task_of_weight_0(bad: float) -> None:
    """Also where its sums are let in as they are."""
    metric = GlobalLoss(["a", "b"], "mean", "sum", task_weights=(1.0, 0.0), nan_strategy="disable")
    metric.update(torch.tensor([3.0, bad]), 2)
    result = metric.compute()
    assert result["loss"].item() == 1.5
    assert not result["loss/b"].isfinite()


@pytest.mark.parametrize("loss_type", ["bce_with_logits", squared])
def test_the_derivative_by_a_factor_of_0_is_the_slope(loss_type: Any) -> None:
    """A gradient by a factor that happens to be 0 has a derivative, from which a Jacobian-vector product is made."""
    logits = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    losses = loss_of(loss_type, "mean", global_batch=True)(logits, torch.ones(1, 2))
    factors = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    stacked = torch.stack([losses["loss/a"], losses["loss/b"]])
    (gradient,) = torch.autograd.grad(stacked, logits, factors, create_graph=True)
    assert gradient.tolist() == [[0.0, 0.0]]
    (found,) = torch.autograd.grad(gradient, factors, torch.tensor([[1.0, 10.0]], dtype=torch.float64))
    slope = slopes_of(loss_type)[1][0]
    assert found.tolist() == [slope, 10 * slope]


@pytest.mark.usefixtures("new_compiler")
@pairwise(
    way=["eager", "fused", "compiled"],
    upstream=[math.inf, -math.inf, math.nan],
    rows=[5, 48, 1024],
    masked_by=["weights", "labels"],
    pos_weights={"": None, "pos_weights": [2.0, 3.0]},
)
def test_a_row_that_does_not_count_has_a_gradient_of_0_whatever_comes_back(
    way: str, upstream: float, rows: int, masked_by: str, pos_weights: Any
) -> None:
    """Infinity comes back where a loss scale overflows."""
    missing = -1.0 if masked_by == "labels" else None
    options: dict[str, Any] = {"pos_weights": pos_weights, "ignore_index": missing, "fused": way == "fused"}
    loss: Any = MultiTaskLoss("bce_with_logits", ["a", "b"], **options)
    if way == "compiled":
        loss = torch.compile(loss, fullgraph=True, backend="aot_eager")
    out = torch.arange(rows * 2).view(rows, 2) % 3 == 0
    logits = torch.ones(rows, 2, requires_grad=True)
    labels, weights = torch.ones(rows, 2), None
    if missing is None:
        weights = torch.ones(rows, 2).masked_fill(out, 0.0)
    else:
        labels = labels.masked_fill(out, missing)
    (found,) = torch.autograd.grad(loss(logits, labels, weights)["loss"], logits, torch.tensor(upstream))
    assert found[out].eq(0).all()
    assert not found[~out].isfinite().any()
