"""Losses that are built inside of a transform, of names from an enumeration, or of modules that were imported anew."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from enum import Enum
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.project.test_structure import lists_of_the_map
from tests.support.patience import SECONDS
from twloss import GlobalLoss, Loss, MultiTaskLoss, RankingQuality

LOGITS, LABELS = torch.tensor([[0.0, 2.0], [1.0, -1.0]]), torch.tensor([[1.0, 1.0], [0.0, 1.0]])
BY_TASK = F.binary_cross_entropy_with_logits(LOGITS.double(), LABELS.double(), reduction="none").mean(0)


class Task(str, Enum):
    """Names as members."""

    LIKE = "like"
    REPLY = "reply"


NAMES = ["like", "reply"]


def of_columns(values: Tensor) -> dict[str, Tensor]:
    return {task: values[:, t] for t, task in enumerate(Task)}


@pytest.mark.parametrize("mapped", [False, True])
def test_members_of_an_enumeration_are_names(mapped: bool) -> None:
    options: Any = {"pos_weights": dict.fromkeys(Task, 1.0), "task_weights": dict.fromkeys(Task, 1.0)}
    loss = MultiTaskLoss("bce_with_logits", list(Task), quality=True, **(options if mapped else {}))
    inputs = (of_columns(LOGITS), of_columns(LABELS)) if mapped else (LOGITS, LABELS)
    losses = loss(*inputs)
    assert {key: value.item() for key, value in losses.items()} == pytest.approx(
        {"loss/like": BY_TASK[0].item(), "loss/reply": BY_TASK[1].item(), "loss": BY_TASK.mean().item()}, rel=1e-6
    )
    assert list(losses) == list(loss.train_metric.compute()) == ["loss/like", "loss/reply", "loss"]
    assert list(loss.train_quality.compute())[:2] == ["ne/like", "ne/reply"]
    assert loss.train_metric.scalar("loss/like").compute().item() == pytest.approx(BY_TASK[0].item(), rel=1e-6)
    expect_plain_names(loss)
    expect_plain_names(loss.train_metric)
    expect_plain_names(loss.train_quality)


def expect_plain_names(owner: Any) -> None:
    """Strings and nothing else, in copies as well."""
    for each in (owner, copy.deepcopy(owner), pickle.loads(pickle.dumps(owner))):
        assert list(each.tasks) == NAMES
        assert [type(task) for task in each.tasks] == [str, str]


@pytest.mark.parametrize("metric", [GlobalLoss(list(Task)), RankingQuality(tuple(Task), window=2)])
def test_members_name_the_keys_of_metrics(metric: GlobalLoss | RankingQuality) -> None:
    expect_plain_names(metric)
    keys = metric.keys()
    assert all(type(key) is str and "Task" not in key for key in keys)
    assert {key.partition("/")[2] for key in keys} - {""} == set(NAMES)


# Built inside of a transform.


def in_grad(function: Callable[[Tensor], Tensor]) -> None:
    torch.func.grad(function)(torch.ones(3))


def in_vmap(function: Callable[[Tensor], Tensor]) -> None:
    torch.func.vmap(function)(torch.ones(2, 3))


def in_both(function: Callable[[Tensor], Tensor]) -> None:
    torch.func.vmap(torch.func.grad(function))(torch.ones(2, 3))


def built(transform: Callable[[Callable[[Tensor], Tensor]], None], make: Callable[[], Any]) -> Any:
    """What ``make`` gives while the transform runs."""
    made: list[Any] = []

    def function(values: Tensor) -> Tensor:
        made.append(make())
        return values.sum()

    transform(function)
    return made[0]


def expect_plain_states(*metrics: Any) -> None:
    """Tensors with memory of their own, that no transform has wrapped."""
    for metric in metrics:
        assert type(metric.totals) is Tensor
        assert metric.totals.data_ptr() != 0
        assert not metric.totals.requires_grad
        pickle.loads(pickle.dumps(metric))


in_transforms = pytest.mark.parametrize("transform", [in_grad, in_vmap, in_both])


@in_transforms
def test_a_loss_that_is_built_in_a_transform(transform: Any) -> None:
    loss = built(
        transform,
        lambda: MultiTaskLoss(
            "bce_with_logits", NAMES, pos_weights=[1.0, 1.0], task_weights=[1.0, 3.0], ignore_index=-1, quality=True
        ),
    )
    logits = LOGITS.clone().requires_grad_()
    losses = loss(logits, LABELS)
    losses["loss"].backward()
    assert losses["loss"].item() == pytest.approx(((BY_TASK[0] + 3 * BY_TASK[1]) / 2).item(), rel=1e-6)
    slopes = (LOGITS.sigmoid() - LABELS) * torch.tensor([1.0, 3.0]) / 4
    assert logits.grad is not None
    assert torch.allclose(logits.grad, slopes)
    assert loss.train_metric.compute()["loss"].item() == pytest.approx(losses["loss"].item(), rel=1e-6)
    assert loss.train_quality.compute()["logloss/like"].item() == pytest.approx(BY_TASK[0].item(), rel=1e-6)
    loss.eval()(LOGITS, LABELS)
    assert loss.eval_metric.update_count == 1
    expect_plain_states(loss.train_metric, loss.eval_metric, loss.train_quality, loss.eval_quality)
    loss.train_metric.reset()
    expect_plain_states(loss.train_metric, copy.deepcopy(loss).train_metric)


@in_transforms
def test_a_loss_of_one_task_that_is_built_in_a_transform(transform: Any) -> None:
    loss = built(transform, lambda: Loss("bce_with_logits", pos_weight=2.0))
    result = loss(LOGITS[:, 0], LABELS[:, 0])
    positive = torch.tensor(2.0)
    exact = F.binary_cross_entropy_with_logits(LOGITS[:, 0], LABELS[:, 0], pos_weight=positive)
    assert result.item() == pytest.approx(exact.item(), rel=1e-6)
    assert loss.train_metric.compute()["loss"].item() == pytest.approx(exact.item(), rel=1e-6)
    expect_plain_states(loss.train_metric)


@in_transforms
def test_metrics_that_are_built_in_a_transform(transform: Any) -> None:
    metric = built(transform, lambda: GlobalLoss(NAMES, task_weights=[1.0, 2.0]))
    metric.update(torch.tensor([3.0, 8.0]), torch.tensor([3.0, 4.0]))
    assert {key: value.item() for key, value in metric.compute().items()} == {
        "loss/like": 1.0,
        "loss/reply": 2.0,
        "loss": 2.5,
    }
    quality = built(transform, lambda: RankingQuality(NAMES, window=2))
    quality.update(LOGITS, LABELS)
    assert quality.compute()["logloss/reply"].item() == pytest.approx(BY_TASK[1].item(), rel=1e-6)
    expect_plain_states(metric, quality)


@in_transforms
def test_a_metric_that_moves_in_a_transform(transform: Any) -> None:
    """Its zeros too, to which reset() goes back."""
    with torch.device("meta"):
        metric = GlobalLoss(NAMES)
    built(transform, lambda: metric(torch.tensor([3.0, 8.0]), torch.tensor([3.0, 4.0])))
    for _ in range(2):
        expect_plain_states(metric)
        metric.update(torch.tensor([3.0, 8.0]), torch.tensor([3.0, 4.0]))
        assert metric.compute()["loss"].item() == 1.5
        metric.reset()


# Reloaded, as in a notebook.

CHECK = """
import importlib, math, sys, warnings
import torch, twloss

def check(compiled):
    torch._dynamo.reset()
    loss = twloss.MultiTaskLoss("bce_with_logits", ["like", "reply"], pos_weights=[1.0, 1.0], quality=True)
    twloss.Loss(twloss.LossType.CROSS_ENTROPY)(torch.zeros(2, 3), torch.tensor([0, 1]))
    function = torch.compile(loss, fullgraph=True, backend="eager") if compiled else loss
    for count in (1, 2):
        logits = torch.zeros(4, 2, requires_grad=True)
        losses = function(logits, torch.ones(4, 2))
        losses["loss"].backward()
        assert math.isclose(losses["loss"].item(), math.log(2), rel_tol=1e-6), losses
        assert torch.allclose(logits.grad, torch.tensor(-1 / 16)), logits.grad
        assert loss.train_metric.update_count == count
        assert math.isclose(loss.train_metric.compute()["loss"].item(), math.log(2), rel_tol=1e-6)
        assert loss.train_quality.update_count == count

check(True)
for names in (["twloss"], sys.argv[1:]):
    for name in names:
        importlib.reload(sys.modules[name])
    check(False)
    check(True)
print("reloaded", len(names))
"""


def test_a_reload_leaves_losses_that_work() -> None:
    """Of the package, and of each module below it first."""
    modules = lists_of_the_map()[-1]
    assert len(modules) > 10
    names = [*(f"twloss.{module.removesuffix('.py').replace('/', '.')}" for module in modules), "twloss"]
    command = [sys.executable, "-W", "ignore", "-c", CHECK, *names]
    process = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == ["reloaded", str(len(names))]


# Imported anew, as by a server that reloads its plug-ins.

PURGE = """
import gc, math, sys
import torch

def step(loss, function):
    before = loss.train_metric.update_count
    logits = torch.zeros(4, 2, requires_grad=True)
    losses = function(logits, torch.ones(4, 2))
    losses["loss"].backward()
    assert math.isclose(losses["loss"].item(), math.log(2), rel_tol=1e-6), losses
    assert torch.allclose(logits.grad, torch.tensor(-1 / 16)), logits.grad
    assert loss.train_metric.update_count == loss.train_quality.update_count == before + 1
    assert math.isclose(loss.train_metric.compute()["loss"].item(), math.log(2), rel_tol=1e-6)

alive = []
for generation in range(4):
    for name in [name for name in sys.modules if name.partition(".")[0] == "twloss"]:
        del sys.modules[name]
    import twloss
    loss = twloss.MultiTaskLoss("bce_with_logits", ["like", "reply"], quality=True)
    alive.append((loss, torch.compile(loss, fullgraph=True, backend="eager")))
    for loss, compiled in alive:
        step(loss, loss)
        step(loss, compiled)
    if generation == 2:
        # The first generation goes, and takes no operator of a later one with it.
        del alive[0], loss, compiled
        torch._dynamo.reset()
        gc.collect()
print("imported")
"""


def test_the_package_can_be_purged_and_imported_again() -> None:
    """Losses of each generation go on, compiled too."""
    command = [sys.executable, "-W", "ignore", "-c", PURGE]
    process = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == ["imported"]


# A torch that was built without torch.distributed has none of these names.

WITHOUT_DISTRIBUTED = """
import sys
import torch, torchmetrics
import torch.distributed as dist

for name in ("ProcessGroup", "GroupMember", "DeviceMesh", "is_initialized", "get_world_size", "get_rank"):
    delattr(dist, name)
dist.is_available = lambda: False
sys.modules["torch.distributed.device_mesh"] = None
import twloss

loss = twloss.MultiTaskLoss("bce_with_logits", ["like"], global_batch=True, quality=True)
loss(torch.zeros(2, 1), torch.ones(2, 1))
print(round(loss.train_metric.compute()["loss"].item(), 4), twloss.get_global_loss_detached(torch.tensor(4.0)).item())
try:
    twloss.Loss("bce_with_logits", process_group=[0, 1])
except TypeError as error:
    print(str(error).partition(",")[0])
"""


def test_a_torch_without_distributed_has_losses_of_one_process() -> None:
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_DISTRIBUTED]
    process = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines() == ["0.6931 4.0", "process_group: got list"]
