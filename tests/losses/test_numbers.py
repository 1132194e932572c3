"""The losses' values and gradients against the usual code: one call of torch's loss a task, in a loop."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support import reference
from tests.support.pairwise import pairwise
from twloss import Loss, LossType, MultiTaskLoss

pytestmark = pytest.mark.usefixtures("eager_and_fused")

TASKS = ["like", "reply", "retweet", "dwell"]
ROWS = 29
RTOL = {torch.float32: 1e-6, torch.float64: 1e-12}
POS_WEIGHTS = {
    "none": None,
    "ints": [1, 2, 3, 27],
    "floats": [0.5, 1.0, 27.3, 3.25],
    "tensor": torch.tensor([0.5, 1.0, 27.3, 3.25], dtype=torch.float64),
}
GLOBAL: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": torch.mean,
    "sum": torch.sum,
    "min": torch.amin,
    "max": torch.amax,
    "median": torch.median,
}


def multi_task_loss(*args: object, **kwargs: object) -> MultiTaskLoss:
    """A loss whose reductions are chosen on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return MultiTaskLoss(*args, **kwargs)  # type: ignore[arg-type]


def loop(
    logits: Tensor, labels: Tensor, weights: Tensor | None, pos_weights: object, task_reduction: Any, reduction: Any
) -> dict[str, Tensor]:
    """The task-by-task loop."""
    losses = {}
    for t, task in enumerate(TASKS):
        pos_weight = (
            None if pos_weights is None else torch.as_tensor(pos_weights, dtype=torch.float64)[t].to(logits.dtype)
        )
        losses[f"loss/{task}"] = F.binary_cross_entropy_with_logits(
            logits[:, t],
            labels[:, t].to(logits.dtype),
            weight=None if weights is None else weights[:, t],
            pos_weight=pos_weight,
            reduction=task_reduction,
        )
    losses["loss"] = GLOBAL[reduction](torch.stack(list(losses.values())))
    return losses


def assert_close(actual: Tensor, expected: Tensor, rtol: float) -> None:
    """The largest difference is within ``rtol`` of the largest value."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    scale = expected.abs().max()
    assert (actual - expected).abs().max() <= rtol * scale


@pairwise(
    "eager_and_fused",
    dtype=list(RTOL),
    pos_weights=POS_WEIGHTS,
    label_dtype=[torch.bool, torch.int64, torch.float32, torch.float64],
    weighted={"unweighted": False, "weighted": True},
    eager_and_fused={"eager": False, "fused": True},
)
def test_values_and_gradients_are_those_of_the_loop_over_tasks(
    dtype: torch.dtype, pos_weights: object, label_dtype: torch.dtype, weighted: bool
) -> None:
    logits = 3 * torch.randn(ROWS, len(TASKS), dtype=dtype)
    labels = torch.rand(ROWS, len(TASKS), dtype=torch.float64)
    labels = labels if label_dtype.is_floating_point else labels.round()
    labels = labels.to(label_dtype)
    weights = torch.rand(ROWS, len(TASKS), dtype=dtype) if weighted else None
    for task_reduction, reduction in itertools.product(("mean", "sum"), GLOBAL):
        ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        loss = multi_task_loss(LossType.BCE_WITH_LOGITS, TASKS, task_reduction, reduction, pos_weights)
        result = loss(ours, labels, weights)
        expected = loop(theirs, labels, weights, pos_weights, task_reduction, reduction)
        assert list(result) == ["loss/like", "loss/reply", "loss/retweet", "loss/dwell", "loss"]
        for key, value in expected.items():
            assert_close(result[key], value, RTOL[dtype])
        result["loss"].backward()
        expected["loss"].backward()
        assert ours.grad is not None
        assert theirs.grad is not None
        assert_close(ours.grad, theirs.grad, RTOL[dtype])


@pytest.mark.parametrize("logit", [-1e9, -1e4, -100.0, -1e-9, 0.0, 30.0, 1e4, 1e9])
@pytest.mark.parametrize("label", [0.0, 0.25, 1.0])
def test_extreme_logits_give_the_closed_form(logit: float, label: float) -> None:
    logits = torch.tensor([[logit]], dtype=torch.float64, requires_grad=True)
    loss = MultiTaskLoss("bce_with_logits", ["like"], pos_weights=[3.0])(logits, torch.tensor([[label]]))["loss"]
    assert loss.item() == pytest.approx(reference.bce_with_logits(logit, label, 3.0), rel=1e-12, abs=1e-15)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_cross_entropy_of_several_tasks_is_that_of_the_loop() -> None:
    logits = torch.randn(ROWS, 4, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 5, (ROWS, 4))
    weights = torch.rand(ROWS, 1, dtype=torch.float64)
    result = MultiTaskLoss(LossType.CROSS_ENTROPY, TASKS)(logits, labels, weights)
    for t, task in enumerate(TASKS):
        rows = zip(logits[:, t].tolist(), labels[:, t].tolist(), weights[:, 0].tolist())
        loss_sum = sum(w * reference.cross_entropy(x, c) for x, c, w in rows)
        assert result[f"loss/{task}"].item() == pytest.approx(loss_sum / ROWS, rel=1e-12)
    (grad,) = torch.autograd.grad(result["loss"], logits)
    expected = [
        (F.cross_entropy(logits[:, t], labels[:, t], reduction="none") * weights[:, 0]).mean() for t in range(4)
    ]
    assert_close(grad, torch.autograd.grad(torch.stack(expected).mean(), logits)[0], 1e-12)


@pytest.mark.parametrize("label", [-100, -1, 5])
def test_a_class_that_does_not_exist_is_an_error_and_never_skipped(label: int) -> None:
    labels = torch.tensor([[0], [label]])
    with pytest.raises(IndexError, match="out of bounds"):
        MultiTaskLoss("cross_entropy", ["topic"])(torch.zeros(2, 1, 5), labels)


@pytest.mark.parametrize("shape", [(ROWS,), (ROWS, 3), (2, 3, 4)])
def test_one_task_takes_any_shape(shape: tuple[int, ...]) -> None:
    logits = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    labels = torch.rand(shape, dtype=torch.float64)
    expected = F.binary_cross_entropy_with_logits(logits, labels, pos_weight=torch.tensor(2.5, dtype=torch.float64))
    loss = Loss("bce_with_logits", pos_weight=2.5)(logits, labels)
    assert loss.shape == ()
    assert_close(loss, expected, 1e-12)
    assert_close(torch.autograd.grad(loss, logits)[0], torch.autograd.grad(expected, logits)[0], 1e-12)


def test_one_task_cross_entropy() -> None:
    logits = torch.randn(ROWS, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 5, (ROWS,))
    loss, expected = Loss("cross_entropy")(logits, labels), F.cross_entropy(logits, labels)
    assert_close(loss, expected, 1e-12)
    assert_close(torch.autograd.grad(loss, logits)[0], torch.autograd.grad(expected, logits)[0], 1e-12)


@pytest.mark.parametrize("shape", [(), (ROWS,), (ROWS, 1), (3, 5), (2, 3, 4)])
@pytest.mark.parametrize("missing", [None, -100])
@pytest.mark.parametrize("mean_over", ["rows", "weights"])
def test_one_task_of_classes_takes_any_shape_before_them(shape: tuple[int, ...], missing: Any, mean_over: Any) -> None:
    """A language model's positions, say."""
    logits = torch.randn(*shape, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 5, shape)
    if missing is not None and shape:
        labels[..., 0] = missing
    weights = torch.rand(shape[-1:] or (), dtype=torch.float64)
    counted = 0.0
    terms = []
    for place in itertools.product(*map(range, shape)):
        if (label := int(labels[place])) != missing:
            weight = weights[place[-1:]].item()
            counted += 1 if mean_over == "rows" else weight
            terms.append(weight * (logits[place].logsumexp(0) - logits[place][label]))
    loss = Loss("cross_entropy", mean_over=mean_over, ignore_index=missing)(logits, labels, weights)
    expected = torch.stack(terms).sum() / counted if terms else 0.0 * logits.sum()
    assert_close(loss, expected, 1e-12)
    assert_close(torch.autograd.grad(loss, logits)[0], torch.autograd.grad(expected, logits)[0], 1e-12)


def test_classes_that_are_not_the_last_dimension_are_refused() -> None:
    """As torch's own cross_entropy takes them."""
    with pytest.raises(ValueError, match=r"logits: got shape \(4, 5, 3\) with labels \(4, 3\), expected .* classes"):
        Loss("cross_entropy")(torch.zeros(4, 5, 3), torch.zeros(4, 3, dtype=torch.int64))


def squared_error(logits: Tensor, labels: Tensor) -> Tensor:
    """A loss that the package does not know."""
    return F.mse_loss(logits, labels, reduction="none")


def smoothed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """A loss over classes that the package does not know."""
    return F.cross_entropy(logits.movedim(-1, 1), labels, reduction="none", label_smoothing=0.1)


@pytest.mark.parametrize("label_dtype", [torch.int64, torch.float32])
def test_a_callable_takes_the_place_of_a_loss_type(label_dtype: torch.dtype) -> None:
    logits = torch.randn(ROWS, 4, dtype=torch.float64, requires_grad=True)
    labels = (4 * torch.rand(ROWS, 4)).round().to(label_dtype)
    weights = torch.rand(ROWS, dtype=torch.float64)
    result = MultiTaskLoss(squared_error, TASKS)(logits, labels, weights)
    expected = ((logits - labels) ** 2 * weights.unsqueeze(1)).mean(0)
    assert_close(torch.stack(list(result.values())[:-1]), expected, 1e-12)
    assert_close(torch.autograd.grad(result["loss"], logits)[0], torch.autograd.grad(expected.mean(), logits)[0], 1e-12)
    one = Loss(squared_error)(logits[:, 0], labels[:, 0], weights)
    assert_close(one, expected[0], 1e-12)


def test_a_callable_may_have_classes() -> None:
    logits, labels = torch.randn(ROWS, 4, 5), torch.randint(0, 5, (ROWS, 4))
    result = MultiTaskLoss(smoothed_cross_entropy, TASKS)(logits, labels)
    for t, task in enumerate(TASKS):
        expected = F.cross_entropy(logits[:, t], labels[:, t], label_smoothing=0.1)
        assert_close(result[f"loss/{task}"], expected, 1e-6)


def ten_times_the_sum(losses: Tensor) -> Tensor:
    """A global reduction that overwrites what it is given."""
    return losses.mul_(10).sum()


@pytest.mark.parametrize("loss_type", ["bce_with_logits", squared_error])
def test_a_global_reduction_in_place_does_not_reach_the_tasks_own_losses(loss_type: Any) -> None:
    logits = torch.randn(ROWS, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.rand(ROWS, 4, dtype=torch.float64)
    of_row: tuple[Callable[[float, float], float], ...] = reference.bce_with_logits, reference.bce_slope
    if loss_type is squared_error:
        of_row = (lambda x, y: (x - y) ** 2), (lambda x, y: 2 * (x - y))
    columns = {
        task: [reference.Row(of_row[0](x, y), of_row[1](x, y)) for x, y in zip(*column)]
        for task, *column in zip(TASKS, logits.T.tolist(), labels.T.tolist())
    }
    expected = reference.losses(columns, reference.Rule(global_reduction="sum"))
    expected["loss"] *= 10
    loss = MultiTaskLoss(loss_type, TASKS, global_reduction=ten_times_the_sum, global_batch=True)
    result = loss(logits, labels)
    (grad,) = torch.autograd.grad(result["loss"], logits, retain_graph=True)
    slopes = reference.gradients(columns, reference.Rule(global_reduction="sum"))
    for t, task in enumerate(TASKS):
        assert grad[:, t].tolist() == pytest.approx([10 * slope for slope in slopes[task]], rel=1e-12)
        (own,) = torch.autograd.grad(result[f"loss/{task}"], logits, retain_graph=True)
        assert own[:, t].tolist() == pytest.approx(slopes[task], rel=1e-12)
    for losses in (result, loss.train_metric.compute(), loss.train_metric.compute()):
        assert {key: value.item() for key, value in losses.items()} == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_computed_in_float32(dtype: torch.dtype) -> None:
    logits = torch.randn(4096, 2).to(dtype).requires_grad_()
    labels = torch.randint(0, 2, (4096, 2)).to(dtype)
    loss = MultiTaskLoss("bce_with_logits", ["like", "reply"])
    result = loss(logits, labels)["loss"]
    exact = F.binary_cross_entropy_with_logits(logits.detach().double(), labels.double())
    assert result.dtype == torch.float32
    assert result.item() == pytest.approx(exact.item(), rel=1e-6)
    assert loss.train_metric.compute()["loss"].item() == pytest.approx(exact.item(), rel=1e-7)
    result.backward()
    assert logits.grad is not None
    assert logits.grad.dtype == dtype


def difference(logits: Tensor, labels: Tensor) -> Tensor:
    return logits - labels


@pytest.mark.parametrize("way", ["plain", "weighted", "compiled", "learned labels", "learned weights", "a callable"])
def test_losses_of_float32_rows_are_summed_in_float64(way: str) -> None:
    """2^30 and a thousand times 40, losses that are exact; their sum is no float32 in whatever order."""
    logits = torch.tensor([2.0**30] + [40.0] * 1000).unsqueeze(1).requires_grad_()
    labels = torch.zeros(1001, 1, requires_grad=way == "learned labels")
    weights = torch.ones(1001, 1, requires_grad=way == "learned weights")
    loss = multi_task_loss(difference if way == "a callable" else "bce_with_logits", ["like"], "sum")
    step = torch.compile(loss, fullgraph=True) if way == "compiled" else loss
    step(logits, labels, *([] if way in ("plain", "a callable") else [weights]))
    assert loss.train_metric.compute()["loss"].item() == 2**30 + 40_000


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("pos_weights", [None, 3.0])
def test_weights_labels_and_predictions_of_float32_rows_are_summed_in_float64(
    pos_weights: float | None, is_compiled: bool
) -> None:
    """The weights are 2^24, 1, 1 and 1; their sum is no float32, which are even there."""
    weights = torch.tensor([[2.0**24], [1.0], [1.0], [1.0]])
    loss = multi_task_loss("bce_with_logits", ["like"], pos_weights=pos_weights, mean_over="weights", quality=True)
    step = torch.compile(loss, fullgraph=True) if is_compiled else loss
    step(torch.zeros(4, 1, requires_grad=True), torch.ones(4, 1), weights)
    total = loss.train_metric.totals[0, 0, 1, 0].item()
    log_loss, *of_quality = loss.train_quality.totals[0, 0, :4, 0].tolist()
    assert (total, *of_quality) == (2**24 + 3, 2**24 + 3, 2**24 + 3, (2**24 + 3) / 2)
    assert log_loss == pytest.approx((2**24 + 3) * torch.tensor(2.0).log().item(), rel=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["logits", "labels", "both"])
@pytest.mark.parametrize("loss_type", ["bce_with_logits", "cross_entropy", squared_error])
def test_a_row_of_weight_0_adds_exactly_0(loss_type: Any, where: str, bad: float) -> None:
    """0·NaN is NaN: a product with the weights lets the bad row into the sums and the gradient."""
    classes = loss_type == "cross_entropy"
    logits = torch.randn((6, 2, 3) if classes else (6, 2), dtype=torch.float64)
    labels = torch.randint(0, 2, (6, 2)) if classes else torch.rand(6, 2, dtype=torch.float64)
    weights = torch.rand(6, 2, dtype=torch.float64)
    weights[1], weights[4, 0] = 0.0, -0.0
    out = weights == 0
    spoilt_logits, spoilt_labels = logits.clone(), labels.clone()
    if where != "labels":
        spoilt_logits[out] = bad
    if where != "logits":
        spoilt_labels[out] = -100 if classes else bad
    spoilt_logits.requires_grad_()
    loss = MultiTaskLoss(loss_type, ["like", "reply"])
    result = loss(spoilt_logits, spoilt_labels, weights)
    clean = MultiTaskLoss(loss_type, ["like", "reply"])(logits, labels, weights)
    for key, value in clean.items():
        assert_close(result[key], value, 1e-12)
        assert_close(loss.train_metric.compute()[key], value, 1e-12)
    (grad,) = torch.autograd.grad(result["loss"], spoilt_logits)
    assert (grad[out] == 0).all()
    assert grad.isfinite().all()
    assert (grad[~out] != 0).all()


def test_tiny_and_negative_weights_count() -> None:
    logits = torch.zeros(3, 1, dtype=torch.float64)
    weights = torch.tensor([[1e-310], [-1.0], [2.0]], dtype=torch.float64)
    result = MultiTaskLoss("bce_with_logits", ["like"], pos_weights=1)(logits, torch.ones(3, 1), weights)["loss"]
    assert result.item() == pytest.approx(weights.sum().item() * reference.softplus(0.0) / 3, rel=1e-15)


@pytest.mark.parametrize("mean_over", ["rows", "weights"])
@pytest.mark.parametrize(("weight", "rounded"), [(1e39, 3.4028234663852886e38), (-1e39, -3.4028234663852886e38)])
def test_a_finite_weight_that_float32_does_not_hold_is_the_largest_it_holds(
    weight: float, rounded: float, mean_over: Any
) -> None:
    logits = torch.zeros(2, requires_grad=True)
    loss = Loss("bce_with_logits", mean_over=mean_over)
    result = loss(logits, torch.ones(2), torch.tensor([weight, 1.0], dtype=torch.float64))
    result.backward()
    divisor = 2.0 if mean_over == "rows" else rounded
    assert result.item() == pytest.approx(math.log(2) * rounded / divisor, rel=1e-6)
    assert loss.train_metric.compute()["loss"].item() == pytest.approx(math.log(2) * rounded / divisor, rel=1e-6)
    assert logits.grad is not None
    assert logits.grad[0].item() == pytest.approx(-0.5 * rounded / divisor, rel=1e-6)


@pytest.mark.parametrize("weight", [math.inf, math.nan])
def test_a_weight_that_is_not_finite_stays_visible(weight: float) -> None:
    loss = Loss("bce_with_logits")
    weights = torch.tensor([weight, 1.0], dtype=torch.float64)
    assert not loss(torch.zeros(2), torch.ones(2), weights).isfinite()


@pytest.mark.parametrize("weight", [2**24 + 1, 1e39, 1e-46])
def test_of_float64_logits_weights_are_not_rounded(weight: float) -> None:
    logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    result = Loss("bce_with_logits")(logits, torch.ones(2), torch.tensor([weight, 0.0], dtype=torch.float64))
    result.backward()
    assert result.item() == pytest.approx(math.log(2) * weight / 2, rel=1e-12)
    assert logits.grad is not None
    assert logits.grad[0].item() == pytest.approx(-weight / 4, rel=1e-12)


@pytest.mark.parametrize("loss_type", ["cross_entropy", squared_error])
def test_rows_of_negative_weight_count_and_get_their_gradient(loss_type: Any) -> None:
    """Weights of both signs, 0 among them, in more rows than a vector holds."""
    classes = loss_type == "cross_entropy"
    logits = torch.randn((ROWS, 2, 3) if classes else (ROWS, 2), dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 3, (ROWS, 2)) if classes else torch.rand(ROWS, 2, dtype=torch.float64)
    weights = torch.randn(ROWS, 2, dtype=torch.float64)
    weights[3] = 0.0
    result = MultiTaskLoss(loss_type, ["like", "reply"], global_reduction="sum", global_batch=True)(
        logits, labels, weights
    )
    (grad,) = torch.autograd.grad(result["loss"], logits)
    for t, task in enumerate(["like", "reply"]):
        rows = list(zip(logits[:, t].tolist(), labels[:, t].tolist(), weights[:, t].tolist()))
        if classes:
            losses = [w * reference.cross_entropy(x, c) for x, c, w in rows]
            slopes = [
                [w * (math.exp(-reference.cross_entropy(x, k)) - (k == c)) / ROWS for k in range(3)] for x, c, w in rows
            ]
        else:
            losses = [w * (x - y) ** 2 for x, y, w in rows]
            slopes = [[2 * w * (x - y) / ROWS] for x, y, w in rows]
        assert result[f"loss/{task}"].item() == pytest.approx(math.fsum(losses) / ROWS, rel=1e-12)
        for n, slope in enumerate(slopes):
            assert grad[n, t].reshape(-1).tolist() == pytest.approx(slope, rel=1e-12, abs=1e-16)


def test_gradients_reach_learned_weights() -> None:
    weights = torch.rand(ROWS, 1, dtype=torch.float64, requires_grad=True)
    logits, labels = torch.randn(ROWS, 4, dtype=torch.float64), torch.rand(ROWS, 4)
    (grad,) = torch.autograd.grad(MultiTaskLoss("bce_with_logits", TASKS)(logits, labels, weights)["loss"], weights)
    unweighted = F.binary_cross_entropy_with_logits(logits, labels.double(), reduction="none")
    assert_close(grad, unweighted.mean(1, keepdim=True) / ROWS, 1e-12)


@pytest.mark.parametrize("shape", [(ROWS, 4), (ROWS, 1), (ROWS,)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64, torch.bool])
def test_weights_broadcast_over_tasks(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    logits, labels = torch.randn(ROWS, 4, dtype=torch.float64), torch.rand(ROWS, 4)
    weights = (3 * torch.rand(shape)).to(dtype)
    full = (weights if weights.ndim == 2 else weights.unsqueeze(1)).expand(ROWS, 4).double()
    result = MultiTaskLoss("bce_with_logits", TASKS)(logits, labels, weights)
    expected = loop(logits, labels, full, None, "mean", "mean")
    for key, value in expected.items():
        assert_close(result[key], value, 1e-12)


def test_weights_of_one_dimension_are_of_the_rows_also_where_there_are_as_many_tasks() -> None:
    logits, labels, weights = torch.randn(4, 4), torch.rand(4, 4), torch.tensor([1.0, 0.0, 2.0, 0.5])
    result = MultiTaskLoss("bce_with_logits", TASKS)(logits, labels, weights)
    for key, value in loop(logits, labels, weights.unsqueeze(1).expand(4, 4), None, "mean", "mean").items():
        assert_close(result[key], value, 1e-6)


def test_an_empty_batch_is_0_with_a_connected_gradient() -> None:
    logits = torch.zeros(0, 2, requires_grad=True)
    loss = MultiTaskLoss("bce_with_logits", ["like", "reply"])
    result = loss(logits, torch.zeros(0, 2), torch.zeros(0))
    assert {key: value.item() for key, value in result.items()} == {"loss/like": 0.0, "loss/reply": 0.0, "loss": 0.0}
    result["loss"].backward()
    assert logits.grad is not None
    assert Loss("cross_entropy")(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)).item() == 0.0
