"""Settings after construction: the weights of the tasks may change at any time, and no other option may."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from tests.support import reference
from tests.support.casts import CASTS
from twloss import Loss, LossType, MultiTaskLoss

TASKS = ["a", "b", "c"]
LOGITS = [[0.0, 1.0, -2.0], [0.5, -1.0, 3.0]]
LABELS = [[1.0, 1.0, 0.0], [0.0, 1.0, 0.5]]

FORMS: dict[str, tuple[Any, tuple[float, ...] | None]] = {
    "list": ([1.0, 0.0, 2.5], (1.0, 0.0, 2.5)),
    "integers": ((1, 0, 2), (1.0, 0.0, 2.0)),
    "mapping": ({"c": 2.5, "a": 1.0, "b": 0.0}, (1.0, 0.0, 2.5)),
    "number": (3, (3.0, 3.0, 3.0)),
    "tensor": (torch.tensor([1.0, 0.0, 2.5]), (1.0, 0.0, 2.5)),
    "0-dim tensor": (torch.tensor(3), (3.0, 3.0, 3.0)),
    "none": (None, None),
}


def quiet(make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A loss of any type, without the warning of reductions that are chosen on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return make(*args, **kwargs)


def inputs() -> tuple[Tensor, Tensor]:
    return torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True), torch.tensor(LABELS, dtype=torch.float64)


def columns() -> dict[str, list[reference.Row]]:
    return {
        task: [reference.Row(reference.bce_with_logits(x, y), reference.bce_slope(x, y)) for x, y in zip(*column)]
        for task, *column in zip(TASKS, zip(*LOGITS), zip(*LABELS))
    }


def expected(weights: tuple[float, ...] | None, reduction: str = "mean") -> dict[str, float]:
    return reference.losses(columns(), reference.Rule(global_reduction=reduction, task_weights=weights))


def expected_gradient(weights: tuple[float, ...] | None) -> Tensor:
    slopes = reference.gradients(columns(), reference.Rule(task_weights=weights))
    return torch.tensor(list(slopes.values()), dtype=torch.float64).T


def numbers(losses: dict[str, Tensor]) -> dict[str, float]:
    return {key: value.item() for key, value in losses.items()}


def set_option(loss: nn.Module, name: str, value: object) -> None:
    setattr(loss, name, value)


# The weights of the tasks.


@pytest.mark.parametrize("reduction", ["mean", "sum", "min", "max", "median"])
@pytest.mark.parametrize("at_first", [None, [5.0, 6.0, 7.0]], ids=["from none", "from others"])
@pytest.mark.parametrize(("value", "weights"), FORMS.values(), ids=FORMS)
def test_weights_that_are_set_reach_forward_and_both_metrics_at_once(
    value: Any, weights: tuple[float, ...] | None, at_first: Any, reduction: Any
) -> None:
    loss = quiet(MultiTaskLoss, "bce_with_logits", TASKS, "mean", reduction, task_weights=at_first)
    for training in (True, False):
        loss.train(training)
        loss(*inputs())
    loss.task_weights = value
    assert loss.task_weights == weights
    truth = pytest.approx(expected(weights, reduction), rel=1e-12)
    assert numbers(loss.train_metric.compute()) == truth
    assert numbers(loss.eval_metric.compute()) == truth
    for training in (True, False):
        loss.train(training)
        assert numbers(loss(*inputs())) == truth
    assert loss.train_metric.scalar("loss").compute().item() == pytest.approx(expected(weights, reduction)["loss"])


def test_the_weights_that_are_read_are_floats_or_none() -> None:
    loss: Any = MultiTaskLoss("bce_with_logits", TASKS, task_weights=torch.tensor([1, 2, 3]))
    assert loss.task_weights == (1.0, 2.0, 3.0)
    assert [type(weight) for weight in loss.task_weights] == [float] * 3
    assert quiet(MultiTaskLoss, "bce_with_logits", TASKS).task_weights is None


def test_a_tensor_that_was_set_may_change_afterwards() -> None:
    loss: Any = MultiTaskLoss("bce_with_logits", TASKS)
    weights = torch.tensor([1.0, 0.0, 2.5])
    loss.task_weights = weights
    weights.fill_(100.0)
    assert numbers(loss(*inputs())) == pytest.approx(expected((1.0, 0.0, 2.5)), rel=1e-12)
    assert loss.task_weights == (1.0, 0.0, 2.5)


@pytest.mark.parametrize("name", ["reduction", "task_loss_reduction", "pos_weight", "pos_weights", "task_weights"])
def test_no_setting_of_a_single_loss_can_be_set_by_either_name(name: str) -> None:
    with pytest.raises(AttributeError, match=f"^{name} is read-only: create a new loss$"):
        setattr(Loss("bce_with_logits"), name, None)


def test_a_child_may_be_put_back_in_its_place_and_no_other_there() -> None:
    """As TorchRec's wrapper does with every child of every module."""
    loss = MultiTaskLoss("bce_with_logits", TASKS, quality=True)
    for name, child in list(loss.named_children()):
        setattr(loss, name, child)
        assert getattr(loss, name) is child
        with pytest.raises(AttributeError, match=f"^{name} is read-only: create a new loss$"):
            setattr(loss, name, copy.deepcopy(child))
    assert numbers(loss(*inputs())) == pytest.approx(expected(None), rel=1e-12)


def test_a_callable_reduction_gets_the_new_weights() -> None:
    loss = quiet(MultiTaskLoss, "bce_with_logits", TASKS, "mean", Tensor.sum)
    loss(*inputs())
    loss.task_weights = [1.0, 0.0, 2.5]
    truth = pytest.approx(expected((1.0, 0.0, 2.5), "sum"), rel=1e-12)
    assert numbers(loss(*inputs())) == truth
    assert numbers(loss.train_metric.compute()) == truth


BAD: dict[str, Any] = {
    "too few": [1.0],
    "too many": [1.0] * 4,
    "string": "abc",
    "nan": [1.0, math.nan, 1.0],
    "infinity": [1.0, 1.0, math.inf],
    "bool": True,
    "a bool among numbers": [1.0, True, 1.0],
    "missing task": {"a": 1.0, "b": 1.0},
    "unknown task": {"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0},
    "tensor of another shape": torch.ones(3, 1),
    "tensor of other tasks": torch.ones(2),
    "tensor of bool": torch.ones(3, dtype=torch.bool),
    "complex tensor": torch.ones(3, dtype=torch.complex64),
    "infinite tensor": torch.tensor([1.0, 1.0, math.inf]),
    "meta tensor": torch.ones(3, device="meta"),
    "huge": 10**400,
    "object": [1.0, 1.0, None],
}


@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
def test_bad_weights_are_refused_as_by_the_constructor_and_change_nothing(value: Any) -> None:
    with pytest.raises((TypeError, ValueError)) as at_construction:
        MultiTaskLoss("bce_with_logits", TASKS, task_weights=value)
    loss: Any = MultiTaskLoss("bce_with_logits", TASKS, task_weights=[1.0, 0.0, 2.5])
    loss(*inputs())
    with pytest.raises(type(at_construction.value)) as caught:
        loss.task_weights = value
    assert str(caught.value) == str(at_construction.value)
    assert str(caught.value).startswith("task_weights: ")
    assert loss.task_weights == (1.0, 0.0, 2.5)
    truth = pytest.approx(expected((1.0, 0.0, 2.5)), rel=1e-12)
    assert numbers(loss.train_metric.compute()) == truth
    assert numbers(loss(*inputs())) == truth


@pytest.mark.usefixtures("new_compiler")
@pytest.mark.parametrize("reduction", ["mean", "max"])
def test_new_weights_are_not_compiled_again(reduction: Any) -> None:
    loss = quiet(MultiTaskLoss, "bce_with_logits", TASKS, "mean", reduction)
    counter = CompileCounterWithBackend("eager")
    compiled: Any = torch.compile(loss, fullgraph=True, backend=counter)
    settings: list[tuple[float, ...] | None] = [
        None,
        (1.0, 0.0, 2.5),
        (2.0, 2.0, 2.0),
        None,
        (1.0, 1.0, 1.0),
        (0.5, 4.0, 1.0),
    ]
    for weights in settings:
        loss.task_weights = weights
        logits, labels = inputs()
        losses = compiled(logits, labels)
        truth = pytest.approx(expected(weights, reduction), rel=1e-12)
        assert numbers(losses) == truth
        assert numbers(loss.train_metric.compute()) == truth
        (gradient,) = torch.autograd.grad(losses["loss"], logits)
        if reduction == "mean":
            assert torch.allclose(gradient, expected_gradient(weights), rtol=1e-12, atol=1e-15)
    assert counter.frame_count == 1
    assert loss.train_metric.update_count == len(settings)


@pytest.mark.usefixtures("new_compiler")
@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"], ids=["not compiled", "eager", "aot_eager"])
@pytest.mark.parametrize("at_first", [None, (1.0, 0.0, 2.5)], ids=["from none", "from others"])
def test_weights_set_after_a_forward_do_not_reach_its_backward(
    backend: str | None, at_first: tuple[float, ...] | None
) -> None:
    loss: Any = MultiTaskLoss("bce_with_logits", TASKS, task_weights=at_first)
    call = loss if backend is None else torch.compile(loss, fullgraph=True, backend=backend)
    logits, labels = inputs()
    value = call(logits, labels)["loss"]
    loss.task_weights = [7.0, 8.0, 9.0]
    value.backward()
    assert logits.grad is not None
    assert torch.allclose(logits.grad, expected_gradient(at_first), rtol=1e-12, atol=1e-15)
    logits, labels = inputs()
    call(logits, labels)["loss"].backward()
    assert logits.grad is not None
    assert torch.allclose(logits.grad, expected_gradient((7.0, 8.0, 9.0)), rtol=1e-12, atol=1e-15)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda loss: pickle.loads(pickle.dumps(loss)),
}


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
def test_a_copy_has_the_weights_that_were_set_and_its_own_from_then_on(make_copy: Callable[[Any], Any]) -> None:
    loss: Any = MultiTaskLoss("bce_with_logits", TASKS)
    loss(*inputs())
    loss.task_weights = [1.0, 0.0, 2.5]
    twin = make_copy(loss)
    assert twin.task_weights == (1.0, 0.0, 2.5)
    assert numbers(twin.train_metric.compute()) == pytest.approx(expected((1.0, 0.0, 2.5)), rel=1e-12)
    twin.task_weights = [4.0, 5.0, 6.0]
    for each, weights in ((loss, (1.0, 0.0, 2.5)), (twin, (4.0, 5.0, 6.0))):
        truth = pytest.approx(expected(weights), rel=1e-12)
        assert each.task_weights == weights
        assert numbers(each(*inputs())) == truth
        assert numbers(each.train_metric.compute()) == truth
    loss.task_weights = None
    assert twin.task_weights == (4.0, 5.0, 6.0)
    assert numbers(twin.train_metric.compute()) == pytest.approx(expected((4.0, 5.0, 6.0)), rel=1e-12)


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_casts_leave_weights_that_were_set_exact(cast: Callable[[nn.Module], object]) -> None:
    loss: Any = MultiTaskLoss("bce_with_logits", TASKS)
    weights = (1.0 / 3.0, 0.1, 27.3)
    loss.task_weights = weights
    cast(loss)
    truth = pytest.approx(expected(weights), rel=1e-14)
    assert numbers(loss(*inputs())) == truth
    assert numbers(loss.train_metric.compute()) == truth
    loss.task_weights = weights[::-1]
    assert numbers(loss(*inputs())) == pytest.approx(expected(weights[::-1]), rel=1e-14)


@pytest.mark.parametrize("reentrant", [False, True])
def test_weights_are_in_a_recomputed_forward(reentrant: bool) -> None:
    loss: Any = MultiTaskLoss("bce_with_logits", TASKS)
    loss.task_weights = [1.0, 0.0, 2.5]
    logits, labels = inputs()
    value = checkpoint(lambda x: loss(x, labels)["loss"], logits, use_reentrant=reentrant)
    value.backward()
    assert logits.grad is not None
    assert torch.allclose(logits.grad, expected_gradient((1.0, 0.0, 2.5)), rtol=1e-12, atol=1e-15)
    assert loss.train_metric.update_count == 1


# Every other option.


class Weighting(nn.Module):
    """A reduction with parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.tensor([1.0, 0.0, 2.5], dtype=torch.float64))

    def forward(self, losses: Tensor) -> Tensor:
        """The weighted sum."""
        return (self.factors * losses).sum()


def many() -> Any:
    return quiet(MultiTaskLoss, "bce_with_logits", TASKS, pos_weights=[1.0, 2.0, 3.0], quality=True)


def one() -> Any:
    return quiet(Loss, "bce_with_logits", pos_weight=2.0, quality=True)


SHARED: dict[str, Any] = {
    "loss_type": LossType.CROSS_ENTROPY,
    "mean_over": "weights",
    "ignore_index": -1,
    "global_batch": True,
    "fused": True,
    "gradient_reduction": "sum",
    "process_group": None,
    "quality": False,
    "segments": {"x": 1},
}
OPTIONS: list[tuple[Callable[[], Any], str, Any]] = [
    *((make, name, value) for make in (many, one) for name, value in SHARED.items()),
    (many, "tasks", ("x", "y", "z")),
    (many, "task_loss_reduction", "sum"),
    (many, "global_reduction", "max"),
    (many, "pos_weights", [3.0, 2.0, 1.0]),
    (one, "reduction", "sum"),
    (one, "pos_weight", 3.0),
    (one, "task_weights", [3.0]),
]


def batch_of(make: Callable[[], Any]) -> tuple[Tensor, Tensor]:
    logits, labels = inputs()
    return (logits, labels) if make is many else (logits[:, 0], labels[:, 0])


@pytest.mark.parametrize(
    ("make", "name", "value"), OPTIONS, ids=[f"{make.__name__}-{name}" for make, name, _ in OPTIONS]
)
def test_an_option_can_be_read_but_not_set(make: Callable[[], Any], name: str, value: Any) -> None:
    loss, twin = make(), make()
    before = repr(getattr(loss, name))
    loss(*batch_of(make))
    with pytest.raises(AttributeError, match=rf"(?s)\b{name}\b.*\bnew\b"):
        set_option(loss, name, value)
    assert repr(getattr(loss, name)) == before
    for each in (loss, twin):
        each(*batch_of(make))
    twin(*batch_of(make))
    assert repr(loss(*batch_of(make))) == repr(twin(*batch_of(make)))
    assert torch.equal(loss.train_metric.totals, twin.train_metric.totals)


def test_what_is_read_is_what_was_given() -> None:
    options: dict[str, Any] = {"gradient_reduction": "sum", "mean_over": "weights", "ignore_index": -1}
    loss = quiet(MultiTaskLoss, LossType.BCE_WITH_LOGITS, TASKS, "sum", "max", [1.0, 2.0, 3.0], **options)
    assert list(loss.tasks) == TASKS
    assert list(loss.pos_weights) == [1.0, 2.0, 3.0]
    assert (loss.loss_type, loss.task_loss_reduction, loss.global_reduction) == ("bce_with_logits", "sum", "max")
    assert {name: getattr(loss, name) for name in options} == options
    assert (loss.global_batch, loss.process_group) == (False, None)
    single = quiet(Loss, "bce_with_logits", "sum", pos_weight=2.0, **options)
    assert (single.reduction, {name: getattr(single, name) for name in options}) == ("sum", options)


@pytest.mark.parametrize("make", [many, one])
def test_gradient_reduction_is_the_mean_unless_it_is_the_sum(make: Callable[[], Any]) -> None:
    assert make().gradient_reduction == "mean"
    for bad, error in (("max", ValueError), (None, TypeError), (True, TypeError)):
        options: dict[str, Any] = {"gradient_reduction": bad}
        with pytest.raises(error, match=r"^gradient_reduction: got .*expected"):
            Loss("bce_with_logits", **options)
        with pytest.raises(error, match=r"^gradient_reduction: got .*expected"):
            MultiTaskLoss("bce_with_logits", TASKS, **options)


def test_a_module_that_reduces_stays_the_one_that_is_trained() -> None:
    first, other = Weighting(), Weighting()
    loss = quiet(MultiTaskLoss, "bce_with_logits", TASKS, "mean", first)
    with pytest.raises(AttributeError, match=r"(?s)global_reduction.*\bnew\b"):
        loss.global_reduction = other
    assert loss.global_reduction is first
    assert [name for name, _ in loss.named_parameters()] == ["global_reduction.factors"]
    loss(*inputs())["loss"].backward()
    assert first.factors.grad is not None
    assert other.factors.grad is None


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("make", [many, one])
def test_a_copy_is_as_closed_as_the_original(make: Callable[[], Any], make_copy: Callable[[Any], Any]) -> None:
    loss = make()
    loss(*batch_of(make))
    twin = make_copy(loss)
    with pytest.raises(AttributeError, match=r"(?s)mean_over.*\bnew\b"):
        twin.mean_over = "weights"
    assert repr(twin(*batch_of(make))) == repr(loss(*batch_of(make)))
    assert torch.equal(twin.train_metric.totals, loss.train_metric.totals)


@pytest.mark.usefixtures("new_compiler")
def test_what_torch_itself_sets_on_a_module_can_be_set() -> None:
    loss = quiet(MultiTaskLoss, "bce_with_logits", TASKS, "mean", Weighting())
    loss.train(False).train().requires_grad_(True).to(torch.float64)
    loss.double().to("cpu")
    seen: list[int] = []
    handle = loss.register_forward_hook(lambda *_: seen.append(1))
    truth = pytest.approx(expected((1.0, 0.0, 2.5), "sum")["loss"], rel=1e-12)
    assert loss(*inputs())["loss"].item() == truth
    handle.remove()
    assert seen == [1]
    replaced = {"global_reduction.factors": torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)}
    swapped = torch.func.functional_call(loss, replaced, inputs())
    assert swapped["loss"].item() == pytest.approx(expected((1.0, 2.0, 3.0), "sum")["loss"], rel=1e-12)
    assert loss(*inputs())["loss"].item() == truth
    compiled: Any = torch.compile(loss, fullgraph=True, backend="eager")
    assert compiled(*inputs())["loss"].item() == truth
    loss.compile(backend="eager", fullgraph=True)
    assert loss(*inputs())["loss"].item() == truth


def test_attributes_of_the_users_own_can_be_set() -> None:
    loss = many()
    loss.note = "ours"
    loss.head = nn.Linear(1, 1)
    assert loss.note == "ours"
    assert [name for name, _ in loss.named_parameters()] == ["head.weight", "head.bias"]
    del loss.note
    with pytest.raises(AttributeError):
        _ = loss.note


def test_the_weights_are_those_of_torchs_own_loss_times_a_factor() -> None:
    logits, labels = inputs()
    loss: Any = MultiTaskLoss("bce_with_logits", TASKS)
    loss.task_weights = {"a": 0.0, "b": 3.0, "c": 0.0}
    plain = F.binary_cross_entropy_with_logits(logits[:, 1], labels[:, 1])
    assert loss(logits, labels)["loss"].item() == pytest.approx(plain.item(), rel=1e-12)


def test_a_parameter_may_be_set_as_weights_and_a_module_may_not() -> None:
    loss = MultiTaskLoss("bce_with_logits", ["a", "b"])
    loss.task_weights = torch.nn.Parameter(torch.tensor([2.0, 3.0]))
    assert loss.task_weights == (2.0, 3.0)
    with pytest.raises(TypeError, match="task_weights: got Linear"):
        loss.task_weights = torch.nn.Linear(1, 1)  # type: ignore[assignment]
    assert loss.task_weights == (2.0, 3.0)
    assert not list(loss.parameters())
