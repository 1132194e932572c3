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
    # Where autograd differentiates a loss that is not asked for, it makes NaN of 0 times infinity, as ever.
    is_weighted = way == "weight of 0" or not kind.endswith("bce")
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


@pytest.mark.usefixtures("new_compiler")
@pairwise(kind=list(TYPES), bad=BAD, reduction=["sum", "mean"], way=["compiled", "transformed", "labels that learn"])
def test_nor_has_it_one_in_compiled_code_and_where_autograd_differentiates(
    kind: str, bad: float, reduction: str, way: str
) -> None:
    """Also after the weights were set to what they are, without a compilation of its own."""
    loss_type = TYPES[kind]
    loss: Any = loss_of(loss_type, reduction, global_batch=True)
    logits, labels = inputs_of(loss_type, bad, 2)
    call = torch.compile(loss, fullgraph=True, backend="aot_eager") if way == "compiled" else loss
    if way == "compiled":
        call(logits, labels)
    loss.task_weights = (1.0, 0.0)
    if way == "transformed":
        grads = torch.func.grad(lambda logits: loss(logits, labels)["loss"])(logits)
        of_a, of_b = grads["a"], grads["b"]
    else:
        for each in labels.values():
            each.requires_grad_(way == "labels that learn" and each.is_floating_point())
        of_a, of_b = torch.autograd.grad(call(logits, labels)["loss"], [logits["a"], logits["b"]])
    _, slopes = slopes_of(loss_type["a"] if isinstance(loss_type, dict) else loss_type)
    tasks = 2 if reduction == "mean" else 1
    assert of_a.view(2, -1).tolist() == [pytest.approx([each / 2 / tasks for each in slopes], rel=1e-12)] * 2
    assert of_b.eq(0).all()


@pytest.mark.parametrize("task_weights", [None, (1.0, 0.0)], ids=["", "a weight of 0"])
@pytest.mark.parametrize("passes", [1, 2])
def test_second_derivatives_of_one_task_know_nothing_of_the_others(passes: int, task_weights: Any) -> None:
    """A penalty of one task's gradient beside another task's loss: of (x - 1)³ at 3, 2·f'·f'' = 2·12·12."""

    def cubed(logits: Tensor, labels: Tensor) -> Tensor:
        return (logits - labels) ** 3

    logits = torch.tensor([[3.0, 3.0]], dtype=torch.float64, requires_grad=True)
    losses = loss_of(cubed, "mean", task_weights=task_weights)(logits, torch.ones(1, 2))
    (slope,) = torch.autograd.grad(losses["loss/a"], logits, create_graph=True)
    other = losses["loss/b"]
    if passes == 2:
        (of_b,) = torch.autograd.grad(other, logits, create_graph=True)
        assert of_b.tolist() == [[0.0, 12.0]]
        (found,) = torch.autograd.grad(slope.square().sum(), logits)
    else:
        (found,) = torch.autograd.grad(other + slope.square().sum(), logits)
    assert found.tolist() == [[288.0, 12.0 if passes == 1 else 0.0]]


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("task_weights", [None, (1.0, 0.0)], ids=["", "a weight of 0"])
def test_many_gradients_at_once_are_those_of_each(kind: str, task_weights: Any) -> None:
    loss_type = TYPES[kind]
    logits, labels = inputs_of(loss_type, 0.0, 2)
    losses = loss_of(loss_type, "mean", task_weights=task_weights)(logits, labels)
    entries = torch.stack([losses["loss/a"], losses["loss/b"]])
    found = torch.autograd.grad(
        entries, list(logits.values()), torch.eye(2, dtype=torch.float64), is_grads_batched=True
    )
    for t, (task, grads) in enumerate(zip("ab", found)):
        _, slopes = slopes_of(loss_type[task] if isinstance(loss_type, dict) else loss_type)
        expected = [[each / 2 for each in slopes]] * 2
        assert grads[t].view(2, -1).tolist() == pytest.approx(torch.tensor(expected).numpy(), rel=1e-6)
        assert grads[1 - t].eq(0).all()


@pytest.mark.parametrize("rows", [2, 48])
@pytest.mark.parametrize("fused", [False, True])
def test_autograd_itself_may_be_compiled(rows: int, fused: bool, new_compiler: None) -> None:
    """The forward ran eagerly, and the backward pass is traced."""
    loss = MultiTaskLoss("bce_with_logits", ["a", "b"], pos_weights=[2.0, 3.0], fused=fused)
    logits = torch.zeros(rows, 2, requires_grad=True)
    weights = torch.tensor([[1.0, 0.0]]).repeat(rows, 1)
    result = loss(logits, torch.ones(rows, 2), weights)["loss"]
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        result.backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [pytest.approx([-0.5 / rows, 0.0])] * rows


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


@pytest.mark.usefixtures("new_compiler")
@pytest.mark.parametrize("way", ["eager", "fused", "compiled", "by autograd"])
@pytest.mark.parametrize("upstream", [math.inf, math.nan])
def test_a_task_of_weight_0_has_a_gradient_of_0_whatever_comes_back(way: str, upstream: float) -> None:
    """Where a loss scale overflows, say."""
    loss: Any = MultiTaskLoss("bce_with_logits", ["a", "b"], task_weights=(1.0, 0.0), fused=way == "fused")
    call = torch.compile(loss, fullgraph=True, backend="aot_eager") if way == "compiled" else loss
    logits = torch.ones(40, 2, requires_grad=True)
    labels = torch.zeros(40, 2, requires_grad=way == "by autograd")
    (found,) = torch.autograd.grad(call(logits, labels)["loss"], logits, torch.tensor(upstream))
    assert found[:, 1].eq(0).all()
    assert not found[:, 0].isfinite().any()
