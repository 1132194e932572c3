"""What autograd, the function transforms and a device that must not be waited for ask of the loss."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.func import grad, hessian, jvp, vmap

from tests.support import reference
from twloss import GlobalLoss, Loss, MultiTaskLoss

pytestmark = pytest.mark.usefixtures("eager_and_fused")

TASKS = ["a", "b"]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all kinds": {
        "pos_weights": [2.0, 3.0],
        "task_weights": [1.0, 0.5],
        "mean_over": "weights",
        "ignore_index": math.nan,
        "global_batch": True,
    },
    "median": {"global_reduction": "median", "ignore_index": -1, "global_batch": True},
    "min": {"global_reduction": "min", "global_batch": True},
    "sum": {"task_loss_reduction": "sum", "global_reduction": "sum", "global_batch": True},
}


def inputs(rows: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    weights = torch.rand(rows, 2, dtype=torch.float64)
    weights[1] = 0.0
    return torch.randn(rows, 2, dtype=torch.float64), torch.rand(rows, 2, dtype=torch.float64), weights


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_first_and_second_derivatives_are_those_of_finite_differences(options: dict[str, Any]) -> None:
    logits, labels, weights = inputs()
    loss = MultiTaskLoss("bce_with_logits", TASKS, **options)

    def function(x: Tensor) -> Tensor:
        value: Tensor = loss(x, labels, weights)["loss"]
        return value

    assert torch.autograd.gradcheck(function, logits.requires_grad_())
    assert torch.autograd.gradgradcheck(function, logits)


def test_derivatives_of_cross_entropy() -> None:
    labels, weights = torch.randint(0, 3, (5,)), torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0], dtype=torch.float64)
    loss = Loss("cross_entropy")
    logits = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: loss(x, labels, weights), logits)
    assert torch.autograd.gradgradcheck(lambda x: loss(x, labels, weights), logits)


def test_derivatives_by_labels_and_weights() -> None:
    """Distillation learns from soft labels, reweighting from learned weights."""
    logits, labels, _ = inputs()
    weights = 1 + torch.rand(7, 2, dtype=torch.float64)
    loss = MultiTaskLoss("bce_with_logits", TASKS, mean_over="weights")
    arguments = (logits.requires_grad_(), labels.requires_grad_(), weights)
    assert torch.autograd.gradcheck(lambda x, y, w: loss(x, y, w)["loss"], arguments)


@pytest.mark.parametrize("learned_weights", [False, True])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("loss_type", ["bce_with_logits", lambda x, y: (x - y).square()])
def test_a_row_of_weight_0_gives_its_label_no_gradient(loss_type: Any, bad: float, learned_weights: bool) -> None:
    """A teacher learns nothing from a row that is left out, whatever its student says of it."""
    logits, labels, weights = inputs()
    logits[1] = bad
    loss = MultiTaskLoss(loss_type, TASKS)
    losses = loss(logits, labels.requires_grad_(), weights.requires_grad_(learned_weights))
    (found,) = torch.autograd.grad(losses["loss"], labels)
    slopes = 2 * (labels - logits) if callable(loss_type) else -logits
    expected = (weights * slopes / 14).detach()
    expected[1] = 0.0
    assert (found[1] == 0).all()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("loss_type", ["bce_with_logits", "cross_entropy"])
def test_a_row_of_weight_0_is_in_no_second_derivative_either(loss_type: Any) -> None:
    classes = loss_type == "cross_entropy"
    logits = torch.randn((4, 2, 3) if classes else (4, 2), dtype=torch.float64)
    labels = torch.ones(4, 2, dtype=torch.int64)
    weights = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0], [0.5, 0.0]], dtype=torch.float64)
    logits[weights == 0] = math.nan
    loss = MultiTaskLoss(loss_type, TASKS, pos_weights=None if classes else [2.0, 3.0])
    (first,) = torch.autograd.grad(loss(logits.requires_grad_(), labels, weights)["loss"], logits, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), logits)
    assert (second[weights == 0] == 0).all()
    assert (second[weights != 0] != 0).all()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own forward mode
def test_many_derivatives_at_once_and_forward_mode_by_torchs_older_interfaces() -> None:
    logits, labels, weights = inputs()
    loss = MultiTaskLoss("bce_with_logits", TASKS, pos_weights=[2.0, 3.0])

    def function(x: Tensor) -> Tensor:
        losses = loss(x, labels, weights)
        return torch.stack([losses["loss/a"], losses["loss/b"]])

    jacobian = torch.autograd.functional.jacobian(function, logits, vectorize=True)
    assert torch.equal(jacobian, torch.autograd.functional.jacobian(function, logits))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(logits, torch.ones_like(logits))
        tangent = torch.autograd.forward_ad.unpack_dual(function(dual)).tangent
    assert tangent is not None
    assert torch.allclose(tangent, jacobian.sum((1, 2)), rtol=1e-12)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own forward mode
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_transforms_give_right_derivatives_and_track_nothing(options: dict[str, Any]) -> None:
    logits, labels, weights = inputs()
    loss = MultiTaskLoss("bce_with_logits", TASKS, **options)

    def function(x: Tensor, y: Tensor = labels) -> Tensor:
        value: Tensor = loss(x, y, weights)["loss"]
        return value

    by_grad = grad(function)(logits)
    many = torch.stack([logits, logits + 1])
    by_vmap = vmap(grad(function))(many)
    of_both = vmap(function)(many, torch.stack([labels, labels]))
    _, by_jvp, *_ = jvp(function, (logits,), (torch.ones_like(logits),))
    by_hessian = hessian(function)(logits)
    assert not loss.train_metric.update_called

    leaf = logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad(function(leaf), leaf)
    assert loss.train_metric.update_called
    assert torch.allclose(by_grad, expected, rtol=1e-12)
    assert torch.allclose(by_vmap[0], expected, rtol=1e-12)
    assert torch.allclose(of_both, torch.stack([function(logits), function(logits + 1)]), rtol=1e-12)
    assert by_jvp.item() == pytest.approx(expected.sum().item(), rel=1e-10)
    second = torch.autograd.functional.hessian(function, logits)
    assert torch.allclose(by_hessian, second, rtol=1e-10, atol=1e-15)


# torchmetrics copies a state's default, of which torch warns where it is fake.
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor:UserWarning")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_forward_backward_and_update_read_no_value(options: dict[str, Any]) -> None:
    """Fake tensors have none: whatever waits for the device raises."""
    with FakeTensorMode():
        loss = MultiTaskLoss("bce_with_logits", TASKS, **options)
        for mode in (True, False):
            loss.train(mode)
            for weights in (None, torch.rand(4, 2), torch.rand(4)):
                loss(torch.randn(4, 2, requires_grad=True), torch.rand(4, 2), weights)["loss"].backward()


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor:UserWarning")
def test_no_value_is_read_of_class_labels_mappings_normalizers_and_sums() -> None:
    with FakeTensorMode():
        loss = MultiTaskLoss("cross_entropy", TASKS, ignore_index=-1)
        logits = {"a": torch.randn(4, 2, requires_grad=True), "b": torch.randn(4, 5, requires_grad=True)}
        labels = {task: torch.zeros(4, dtype=torch.int64) for task in TASKS}
        loss(logits, labels, normalizer=torch.tensor([3, 4]))["loss"].backward()
        Loss("bce_with_logits", ignore_index=-1)(torch.randn(4, requires_grad=True), torch.rand(4)).backward()
        for strategy in ("warn", "error", "ignore", "disable"):
            GlobalLoss(TASKS, nan_strategy=strategy).update(torch.rand(2), torch.rand(2))


def test_the_check_sees_a_value_that_is_read() -> None:
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        torch.rand(1).item()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; fake tensors show the same on any machine")
def test_a_gpu_is_never_waited_for() -> None:
    loss = MultiTaskLoss("bce_with_logits", TASKS, **OPTIONS["all kinds"]).to("cuda")
    logits, labels, weights = (x.to("cuda") for x in inputs())
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss(logits.requires_grad_(), labels, weights)["loss"].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Saved:
    """A tensor that a graph has saved for its backward pass; it lives as long as the graph does."""

    alive: ClassVar[weakref.WeakSet[Saved]] = weakref.WeakSet()

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.alive.add(self)


def graphs_alive(step: Callable[[], object], steps: int = 300) -> int:
    """The number of saved tensors of so many steps that outlive them."""
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.values):
        for _ in range(steps):
            step()
    gc.collect()
    return len(Saved.alive)


def test_no_graph_is_kept_alive_over_300_steps_without_backward() -> None:
    loss = MultiTaskLoss("bce_with_logits", TASKS, pos_weights=[2.0, 3.0])
    logits, labels, weights = torch.randn(4, 2, requires_grad=True), torch.rand(4, 2), torch.rand(4, 2)
    assert graphs_alive(lambda: loss(logits, labels, weights)) == 0
    assert loss.train_metric.update_count == 300


@pytest.mark.parametrize("quality", [False, True], ids=["", "quality"])
@pytest.mark.parametrize("ignore_index", [None, -1.0], ids=["", "ignore_index"])
def test_weights_that_are_learned_leave_no_graph_in_the_running_sums(ignore_index: float | None, quality: bool) -> None:
    loss = MultiTaskLoss(
        "bce_with_logits", TASKS, mean_over="weights", ignore_index=ignore_index, quality=quality, task_weights=[1, 2]
    )
    logits, labels = torch.randn(4, 2, requires_grad=True), torch.rand(4, 2)
    leaf = torch.rand(4, 2, requires_grad=True)
    assert graphs_alive(lambda: loss(logits, labels, leaf.square()), 20) == 0
    for training in (True, False):
        loss.train(training)
        loss(logits, labels, leaf.square())
        metrics = [loss.train_metric, *([loss.train_quality] if quality else [])]
        assert not any(metric.totals.requires_grad for metric in metrics)
    twin = copy.deepcopy(loss)
    assert torch.equal(twin.train_metric.totals, loss.train_metric.totals)
    assert twin.eval_metric.update_count == 1
    value = twin.train_metric.compute()["loss"]
    assert not value.requires_grad
    with torch.no_grad():
        one = loss(logits, labels, leaf.square())["loss"]
    assert value.item() == pytest.approx(one.item(), rel=1e-6)
    metric = GlobalLoss(TASKS)
    assert not metric((2 * leaf).sum(0), (3 * leaf).sum(0))["loss"].requires_grad
    metric.update((2 * leaf).sum(0), (3 * leaf).sum(0))
    assert not metric.totals.requires_grad
    assert copy.deepcopy(metric).update_count == 2


def tensors_alive() -> int:
    gc.collect()
    # Not isinstance(), which asks a few deprecated objects of torch for their class, and they warn.
    return sum(issubclass(type(each), Tensor) for each in gc.get_objects())


def test_1000_steps_with_learned_weights_keep_as_much_as_50() -> None:
    loss = MultiTaskLoss("bce_with_logits", TASKS, mean_over="weights")
    logits, labels = torch.randn(4, 2, requires_grad=True), torch.rand(4, 2)
    leaf = torch.rand(4, 2, requires_grad=True)

    def step() -> None:
        loss(logits, labels, leaf.square())

    def steps(count: int) -> int:
        kept = graphs_alive(step, count)
        return kept + tensors_alive()

    after_50 = steps(50)
    assert steps(950) == after_50
    assert loss.train_metric.update_count == 1000


def test_a_sum_that_is_not_detached_keeps_every_graph() -> None:
    """The naive version."""
    total = torch.zeros(())
    logits = torch.randn(4, 2, requires_grad=True)

    def step() -> None:
        nonlocal total
        total = total + logits.sigmoid().sum()

    assert graphs_alive(step) >= 300


def test_an_undetached_sum_given_to_update_is_not_kept_alive() -> None:
    metric = GlobalLoss(["a"])
    leaf = torch.ones(1, requires_grad=True)
    metric.update(leaf * 2, leaf * 1)
    assert not metric.totals.requires_grad
    assert metric.compute()["loss"].item() == 2.0


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_update_compute_and_reset_without_gradients_then_training(mode: Any) -> None:
    loss = MultiTaskLoss("bce_with_logits", TASKS, pos_weights=[2.0, 3.0])
    logits, labels, weights = inputs()
    with mode():
        loss(logits, labels, weights)
        loss.train_metric.compute()
        loss.train_metric.reset()
        loss(logits, labels, weights)
        loss.to("meta")
        loss.to_empty(device="cpu")
    loss(logits.requires_grad_(), labels, weights)["loss"].backward()
    assert loss.train_metric.update_count == 1
    assert logits.grad is not None


def test_a_loss_that_is_built_in_inference_mode_trains() -> None:
    with torch.inference_mode():
        loss = MultiTaskLoss("bce_with_logits", TASKS, pos_weights=[2.0, 3.0], task_weights=[1.0, 2.0])
    twin = MultiTaskLoss("bce_with_logits", TASKS, pos_weights=[2.0, 3.0], task_weights=[1.0, 2.0])
    logits, labels, weights = inputs()
    result = loss(logits.requires_grad_(), labels, weights)["loss"]
    result.backward()
    assert result.item() == twin(logits, labels, weights)["loss"].item()
    assert torch.equal(loss.train_metric.totals, twin.train_metric.totals)


@pytest.mark.parametrize("normalizer", [None, 2.0])
@pytest.mark.parametrize("pos_weight", [None, 3.0])
def test_one_row_of_one_task_is_differentiated_twice(normalizer: float | None, pos_weight: float | None) -> None:
    logit, label = torch.tensor(0.3, dtype=torch.float64, requires_grad=True), torch.tensor(0.7, dtype=torch.float64)
    result = Loss("bce_with_logits", pos_weight=pos_weight)(logit, label, normalizer=normalizer)
    (slope,) = torch.autograd.grad(result, logit, create_graph=True)
    (curvature,) = torch.autograd.grad(slope, logit)
    assert slope.item() == pytest.approx(reference.bce_slope(0.3, 0.7, pos_weight or 1.0) / (normalizer or 1.0))
    expected = (0.3 + 0.7 * (pos_weight or 1.0)) * reference.sigmoid(0.3) * reference.sigmoid(-0.3)
    assert curvature.item() == pytest.approx(expected / (normalizer or 1.0))
