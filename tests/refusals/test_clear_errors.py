"""Errors that say what is wrong in a line, in the caller's own words."""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.nn.parallel import replicate

from tests.support.rank_pool import RankPool
from twloss import GlobalLoss, Loss, MultiTaskLoss, RankingQuality, get_global_loss_detached

TASKS = ["like", "reply"]

# A callable, whose logits and labels may have any further dimensions, but whose result is of the rows.


@pytest.mark.parametrize(("logits", "labels"), [((4, 1), (4,)), ((4,), (4, 1)), ((3,), (4,)), ((4, 4, 1), (4, 2))])
def test_a_callable_with_shapes_that_do_not_fit_names_both(logits: tuple[int, ...], labels: tuple[int, ...]) -> None:
    loss = Loss(lambda x, y: (x - y).square())
    with pytest.raises(ValueError, match="shape") as caught:
        loss(torch.zeros(logits), torch.zeros(labels))
    message = str(caught.value)
    assert str(logits) in message
    assert str(labels) in message
    assert "class indices" not in message
    assert not loss.train_metric.update_called


# DTensors.

ZEROS = torch.zeros(4, 2)
Call = Callable[[Callable[[Tensor], Any]], object]


def with_a_loss(*inputs: Any) -> object:
    return MultiTaskLoss("bce_with_logits", TASKS)(*inputs)


def with_a_single_loss(*inputs: Any) -> object:
    return Loss("bce_with_logits")(*inputs)


def columns(values: Any) -> dict[str, Any]:
    return {"like": values, "reply": torch.zeros(4)}


# What is called, given a function that makes a DTensor of a tensor.
DTENSORS: dict[str, Call] = {
    "logits": lambda d: with_a_loss(d(ZEROS), ZEROS),
    "labels": lambda d: with_a_loss(ZEROS, d(ZEROS)),
    "weights": lambda d: with_a_loss(ZEROS, ZEROS, d(ZEROS)),
    "all": lambda d: with_a_loss(d(ZEROS), d(ZEROS), d(ZEROS)),
    "logits by task": lambda d: with_a_loss(columns(d(torch.zeros(4))), ZEROS),
    "labels by task": lambda d: with_a_loss(ZEROS, columns(d(torch.zeros(4)))),
    "weights by task": lambda d: with_a_loss(ZEROS, ZEROS, columns(d(torch.zeros(4)))),
    "logits of one task": lambda d: with_a_single_loss(d(ZEROS), ZEROS),
    "labels of one task": lambda d: with_a_single_loss(ZEROS, d(ZEROS)),
    "weights of one task": lambda d: with_a_single_loss(ZEROS, ZEROS, d(ZEROS)),
    "logits of the quality": lambda d: RankingQuality(TASKS).update(d(ZEROS), ZEROS),
    "loss_sum": lambda d: GlobalLoss(TASKS).update(d(torch.zeros(2)), torch.ones(2)),
    "weight": lambda d: GlobalLoss(TASKS).update(torch.zeros(2), d(torch.ones(2))),
    "local_loss": lambda d: get_global_loss_detached(d(torch.zeros(()))),
    "local_loss by task": lambda d: get_global_loss_detached({"like": d(torch.zeros(()))}),
    "weight of local_loss": lambda d: get_global_loss_detached(torch.zeros(()), weight=d(torch.ones(()))),
}


def errors_of_dtensors(rank: int) -> dict[str, tuple[str, str]]:
    """The error's type and text of each call."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found = {}
    for name, call in DTENSORS.items():
        try:
            call(lambda values: distribute_tensor(values, mesh, [Replicate()]))
        except Exception as error:
            found[name] = (type(error).__name__, str(error))
        else:
            found[name] = ("nothing", "")
    return found


@pytest.fixture(scope="module")
def dtensor_errors(two_ranks: RankPool) -> dict[str, tuple[str, str]]:
    found: dict[str, tuple[str, str]] = two_ranks.run(errors_of_dtensors)[0]
    return found


@pytest.mark.parametrize("name", DTENSORS)
def test_a_dtensor_is_refused_with_the_way_out(name: str, dtensor_errors: dict[str, tuple[str, str]]) -> None:
    kind, message = dtensor_errors[name]
    assert kind == "TypeError"
    assert ".to_local()" in message
    if name not in ("all", "logits of the quality"):
        assert message.startswith(name.split(maxsplit=1)[0])


# Many tasks: a message of a line, in a time that grows as they do.

FEW, MANY, ABSENT = 5_000, 50_000, "task4444"


def a_mapping_without_one(argument: str, names: list[str]) -> Callable[[], object]:
    inputs: dict[str, Any] = dict.fromkeys(("logits", "labels", "weights"), torch.zeros(1, len(names)))
    inputs[argument] = {task: torch.zeros(1) for task in names if task != ABSENT}
    loss = MultiTaskLoss("bce_with_logits", names)
    return lambda: loss(**inputs)


def a_mapping_with_one_too_many(names: list[str]) -> Callable[[], object]:
    loss, row = MultiTaskLoss("bce_with_logits", names), torch.zeros(1)
    return lambda: loss(dict.fromkeys([*names, "another"], row), row.expand(1, len(names)))


def constants_without_one(argument: str, names: list[str]) -> Callable[[], object]:
    options: Any = {argument: {task: 2.0 for task in names if task != ABSENT}}
    return lambda: MultiTaskLoss("bce_with_logits", names, **options)


def an_unknown_key(names: list[str]) -> Callable[[], object]:
    metric = MultiTaskLoss("bce_with_logits", names).train_metric
    return lambda: metric.scalar("nonsense")


def detached_losses_without_a_weight(names: list[str]) -> Callable[[], object]:
    losses = dict.fromkeys(names, torch.zeros(()))
    weights = {task: 1.0 for task in names if task != ABSENT}
    return lambda: get_global_loss_detached(losses, weight=weights)


# What raises, given the names of the tasks, and what its message names.
WRONG_CALLS: dict[str, tuple[Callable[[list[str]], Callable[[], object]], str]] = {
    **{
        f"{name} by task without one": (partial(a_mapping_without_one, name), ABSENT)
        for name in ("logits", "labels", "weights")
    },
    "a mapping with one too many": (a_mapping_with_one_too_many, "another"),
    "pos_weights without one": (partial(constants_without_one, "pos_weights"), ABSENT),
    "task_weights without one": (partial(constants_without_one, "task_weights"), ABSENT),
    "pos_weights for three": (
        lambda names: lambda: MultiTaskLoss("bce_with_logits", names, pos_weights=[1.0] * 3),
        "pos_weights",
    ),
    "a reduction that is a list": (
        lambda names: lambda: MultiTaskLoss("bce_with_logits", names, [1.0]),  # type: ignore[arg-type]
        "task_loss_reduction",
    ),
    "an unknown key": (an_unknown_key, "nonsense"),
    "detached losses without a weight": (detached_losses_without_a_weight, ABSENT),
    "one twice": (lambda names: lambda: GlobalLoss([*names, ABSENT]), ABSENT),
}


def seconds_of(call: Callable[[], object], name: str) -> float:
    """This process's own time for an error that names it in a line, whatever else the machine does."""
    start = time.process_time()
    with pytest.raises((TypeError, ValueError), match=rf"{name}\b") as caught:
        call()
    end = time.process_time()
    assert len(str(caught.value)) < 500
    return end - start


@pytest.mark.parametrize(("wrong", "name"), WRONG_CALLS.values(), ids=WRONG_CALLS)
def test_an_error_of_many_tasks_is_a_line_and_looks_at_each_once(wrong: Any, name: str) -> None:
    """Ten times the tasks take ten times as long; to look for each of them among all would take a hundred times."""
    few, many = (wrong([f"task{t}" for t in range(count)]) for count in (FEW, MANY))
    for_few = max(0.001, *(seconds_of(few, name) for _ in range(3)))
    assert min(seconds_of(many, name) for _ in range(2)) < 40 * for_few


# Sums that were not finite.


def test_updates_that_were_not_finite_are_counted_by_task() -> None:
    metric = GlobalLoss(TASKS)
    for loss_sum in ([math.nan, 1.0], [1.0, math.inf], [1.0, 1.0], [math.nan, 1.0]):
        metric.update(torch.tensor(loss_sum), 1)
    with pytest.warns(UserWarning, match=r"^GlobalLoss: skipped updates that were not finite: like: 2, reply: 1$"):
        metric.compute()
    metric.nan_strategy = "error"
    with pytest.raises(RuntimeError, match=r"^GlobalLoss: skipped updates that were not finite: like: 2, reply: 1$"):
        metric.compute()


def test_updates_of_many_tasks_that_were_not_finite_are_told_in_a_line() -> None:
    metric = GlobalLoss([f"task{t}" for t in range(FEW)])
    metric.update(torch.full((FEW,), math.nan), 1)
    with pytest.warns(UserWarning, match=r": task0: 1, task1: 1, .*, task11: 1, … 5,000 in all$") as caught:
        metric.compute()
    assert len(str(caught[0].message)) < 500


# Labels that no class index can be.


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.5])
def test_a_missing_class_that_is_no_whole_number_is_refused(value: float) -> None:
    for build in (
        lambda: Loss("cross_entropy", ignore_index=value),
        lambda: MultiTaskLoss("cross_entropy", TASKS, ignore_index=value),
    ):
        with pytest.raises(ValueError, match=r"^ignore_index: got " + re.escape(str(value))):
            build()


@pytest.mark.parametrize("value", [-100, 3.0])
def test_a_missing_class_that_is_a_whole_number_is_fine(value: float) -> None:
    logits, labels = torch.tensor([[0.0, 1.0], [2.0, 3.0]]), torch.tensor([0, int(value)])
    expected = pytest.approx(math.log1p(math.e), rel=1e-6)
    assert Loss("cross_entropy", ignore_index=value)(logits, labels).item() == expected
    loss = MultiTaskLoss("cross_entropy", ["topic"], ignore_index=value)
    assert loss(logits.unsqueeze(1), labels.unsqueeze(1))["loss"].item() == expected


@pytest.mark.parametrize("value", [math.nan, 0.5])
def test_other_losses_may_miss_any_number(value: float) -> None:
    loss = Loss("bce_with_logits", ignore_index=value)
    assert loss(torch.zeros(2), torch.tensor([1.0, value])).item() == pytest.approx(math.log(2), rel=1e-6)


# Classes of one task are the last dimension.

SHAPES = [((2, 3, 4), (2, 4)), ((2, 3, 4, 5), (2, 4, 5)), ((3,), (3,)), ((), ()), ((2, 3), (3,))]


@pytest.mark.parametrize(("logits", "labels"), SHAPES)
def test_classes_of_a_single_loss_are_the_last_dimension(logits: tuple[int, ...], labels: tuple[int, ...]) -> None:
    """Torch's (rows, classes, positions) is refused where the sizes tell it."""
    loss = Loss("cross_entropy")
    with pytest.raises(ValueError, match=r"^(logits|labels): got shape") as caught:
        loss(torch.zeros(logits), torch.zeros(labels, dtype=torch.int64))
    assert str(logits) in str(caught.value)
    assert not loss.train_metric.update_called


def test_rows_and_classes_are_taken() -> None:
    for rows in (2, 0):
        result = Loss("cross_entropy")(torch.zeros(rows, 3), torch.zeros(rows, dtype=torch.int64))
        assert result.item() == pytest.approx(math.log(3) if rows else 0.0, rel=1e-6)


# nn.DataParallel: the replicas that it makes of each module, in each forward, and drops after it.

REPLICATED: dict[str, Callable[[], nn.Module]] = {
    "Loss": lambda: Loss("bce_with_logits"),
    "MultiTaskLoss": lambda: nn.Sequential(nn.Linear(2, 2), MultiTaskLoss("bce_with_logits", TASKS, quality=True)),
    "GlobalLoss": lambda: nn.Sequential(nn.Linear(2, 2), GlobalLoss(TASKS)),
    "RankingQuality": lambda: RankingQuality(TASKS),
}


def without_devices(tensors: list[Tensor], devices: list[int], *_: Any, **__: Any) -> list[list[Tensor]]:
    return [tensors for _ in devices]


@pytest.fixture
def _no_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicas on CPUs: torch's own, but that their tensors are no copies on several devices."""
    # The module, of whose name the package has a function.
    monkeypatch.setattr(sys.modules[replicate.__module__], "_broadcast_coalesced_reshape", without_devices)


@pytest.mark.usefixtures("_no_devices")
@pytest.mark.parametrize("replicated", REPLICATED)
def test_replicas_of_data_parallel_are_refused(replicated: str) -> None:
    model = REPLICATED[replicated]()
    with pytest.raises(RuntimeError, match=r"nn\.DataParallel: got .* expected DistributedDataParallel"):
        replicate(model, [0, 1])


@pytest.mark.usefixtures("_no_devices")
def test_replicas_of_a_model_without_a_loss_are_not() -> None:
    model, features = nn.Sequential(nn.Linear(2, 2)), torch.ones(3, 2)
    assert all(torch.equal(each(features), model(features)) for each in replicate(model, [0, 1]))
