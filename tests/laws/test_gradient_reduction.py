"""``gradient_reduction``: exact under wrappers that add gradients as well, and the warning where none is exact."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.support import reference
from tests.support.cases import FORMS, REDUCTIONS, Ranker, Rows, Settings, columns, joined, random_rows
from tests.support.gradient_errors import case_parts, errors_of, flat_gradients
from tests.support.rank_pool import RankPool
from twloss import Loss, MultiTaskLoss

TASKS = ["a", "b", "c"]
SIZES = [3, 10]
Step = tuple[dict[str, float], list[list[float]]]


def by_hand(model: nn.Module, rows: Rows, average: bool) -> Step:
    """Gradients that a loop of one's own adds, or averages, over ranks."""
    losses = model(rows)
    losses["loss"].backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad)
        if average:
            parameter.grad /= dist.get_world_size()
    return {key: value.item() for key, value in losses.items()}, flat_gradients(model)


def add_only(bucket: Any) -> torch.futures.Future[Tensor]:
    """What a communication hook of DDP does that adds."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    future: torch.futures.Future[list[Tensor]] = work.get_future()
    return future.then(lambda done: done.value()[0])


def wrapped(ranker: nn.Module, how: str) -> nn.Module:
    if how == "hook":
        model = DistributedDataParallel(ranker)
        model.register_comm_hook(None, lambda _, bucket: add_only(bucket))
        return model
    if how == "average":
        return DistributedDataParallel(ranker)
    fully_shard(ranker, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    assert isinstance(ranker, FSDPModule)
    ranker.set_gradient_divide_factor(1.0)
    return ranker


def step(rank: int, case: Settings, parts: list[Rows], rule: str, how: str) -> Step:
    """One rank's losses and gradients."""
    ranker = case.ranker(global_batch=True, gradient_reduction=rule)
    if how == "by hand":
        return by_hand(ranker, parts[rank], average=rule == "mean")
    model = wrapped(ranker, how)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
        losses = model(parts[rank])
    losses["loss"].backward()
    return {key: value.item() for key, value in losses.items()}, flat_gradients(model)


@pytest.mark.parametrize(
    ("rule", "how"),
    [("sum", "by hand"), ("sum", "hook"), ("sum", "fsdp2"), ("mean", "by hand"), ("mean", "average")],
)
@pytest.mark.parametrize("form", FORMS)
def test_gradients_over_ranks_are_those_of_one_process(two_ranks: RankPool, rule: str, how: str, form: str) -> None:
    for reduction in REDUCTIONS if how == "by hand" else ("mean",):
        case = Settings(3, "mean", reduction, (0.5, 27.3, 4.0), task_weights=(1.0, 0.5, 2.0), form=form)
        parts = case_parts(case, 2, weighted=True)
        errors = errors_of(case, parts, two_ranks.run(step, case, parts, rule, how))
        assert errors.loss <= 1e-12
        assert errors.gradient <= 1e-12


class Learned(nn.Module):
    """A reduction with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64))

    def forward(self, losses: Tensor) -> Tensor:
        """Weighed by its parameter, and not linear in the losses."""
        return ((-self.scale).exp() * losses.square() + self.scale).sum()


def learned_gradients(rank: int, parts: list[Rows], rule: Any) -> tuple[list[float], list[float]]:
    """The gradients by a reduction's parameter and by a head, over ranks."""
    torch.manual_seed(0)
    weight = torch.randn(3, dtype=torch.float64, requires_grad=True)
    loss = MultiTaskLoss("bce_with_logits", TASKS, "mean", Learned(), global_batch=True, gradient_reduction=rule)
    loss(parts[rank].features[:, :3] * weight, parts[rank].labels)["loss"].backward()
    found = []
    for parameter in (*loss.parameters(), weight):
        grad = parameter.grad
        assert grad is not None
        dist.all_reduce(grad)
        found.append((grad / (dist.get_world_size() if rule == "mean" else 1)).tolist())
    return found[0], found[1]


@pytest.mark.parametrize("rule", ["mean", "sum"])
def test_a_reductions_own_parameters_have_the_gradient_of_one_process(two_ranks: RankPool, rule: str) -> None:
    parts = case_parts(Settings(3), 2, weighted=False)
    rows = joined(parts)
    torch.manual_seed(0)
    weight = torch.randn(3, dtype=torch.float64, requires_grad=True)
    learned = Learned()
    losses = F.binary_cross_entropy_with_logits(rows.features[:, :3] * weight, rows.labels.double(), reduction="none")
    learned(losses.mean(0)).backward()
    assert learned.scale.grad is not None
    assert weight.grad is not None
    for of_scale, of_weight in two_ranks.run(learned_gradients, parts, rule):
        assert of_scale == pytest.approx(learned.scale.grad.tolist(), rel=1e-12)
        assert of_weight == pytest.approx(weight.grad.tolist(), rel=1e-12)


FACTORS = torch.tensor([3.0, -1.0, 0.5], dtype=torch.float64)


def gradient_of_task_losses(rank: int, parts: list[Rows], rule: Any) -> list[float]:
    """The gradient by a head, over ranks, of a global loss of one's own."""
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    loss = MultiTaskLoss("bce_with_logits", TASKS, global_batch=True, gradient_reduction=rule)
    *losses, _ = loss(parts[rank].features[:, :3] * weight, parts[rank].labels).values()
    (torch.stack(losses) @ FACTORS).backward()
    assert weight.grad is not None
    dist.all_reduce(weight.grad)
    found: list[float] = (weight.grad / (dist.get_world_size() if rule == "mean" else 1)).tolist()
    return found


@pytest.mark.parametrize("rule", ["mean", "sum"])
def test_the_tasks_own_losses_have_the_gradient_of_one_process(two_ranks: RankPool, rule: str) -> None:
    parts = case_parts(Settings(3), 2, weighted=False)
    rows = joined(parts)
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    losses = F.binary_cross_entropy_with_logits(rows.features[:, :3] * weight, rows.labels.double(), reduction="none")
    (losses.mean(0) @ FACTORS).backward()
    assert weight.grad is not None
    for found in two_ranks.run(gradient_of_task_losses, parts, rule):
        assert found == pytest.approx(weight.grad.tolist(), rel=1e-12)


def logits_of(case: Settings, rows: Rows) -> Tensor:
    """What the ranker makes of rows."""
    with torch.no_grad():
        logits: Tensor = Ranker(case.loss(), case.tasks).heads(rows.features)
    return logits


def input_gradients(rank: int, case: Settings, parts: list[Rows], rule: str) -> list[list[float]]:
    """The gradient by this rank's own logits, by task."""
    loss = case.loss(global_batch=True, gradient_reduction=rule)
    logits = logits_of(case, parts[rank]).requires_grad_()
    (found,) = torch.autograd.grad(loss(logits, parts[rank].labels, parts[rank].weights)["loss"], logits)
    columns_of_task: list[list[float]] = found.T.tolist()
    return columns_of_task


@pytest.mark.parametrize("task_reduction", ["mean", "sum"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_gradient_by_a_ranks_own_rows_is_that_of_one_process(
    two_ranks: RankPool, task_reduction: str, reduction: str
) -> None:
    case = Settings(3, task_reduction, reduction, ignore_index=-1.0)
    parts = random_rows(case, sum(SIZES), 5, weighted=True).cut(SIZES)
    exact = reference.gradients(columns(case, joined(parts)), case.rule())
    results = two_ranks.run(input_gradients, case, parts, "sum")
    assert any(slope for slopes in exact.values() for slope in slopes)
    for t, slopes in enumerate(exact.values()):
        assert [*results[0][t], *results[1][t]] == pytest.approx(slopes, rel=1e-12, abs=1e-15)


def test_by_default_it_is_multiplied_by_the_number_of_ranks(two_ranks: RankPool) -> None:
    """Which is what the average over ranks undoes; "mean" is the default's name."""
    case = Settings()
    parts = case_parts(case, 2, weighted=True)
    exact = reference.gradients(columns(case, joined(parts)), case.rule())
    results = two_ranks.run(input_gradients, case, parts, "mean")
    for t, slopes in enumerate(exact.values()):
        assert [*results[0][t], *results[1][t]] == pytest.approx([2 * slope for slope in slopes], rel=1e-12)


def single_step(rank: int, logits: list[Tensor], labels: list[Tensor]) -> tuple[float, list[float]]:
    """A loss of one task."""
    loss = Loss("bce_with_logits", global_batch=True, gradient_reduction="sum")
    own = logits[rank].clone().requires_grad_()
    result = loss(own, labels[rank])
    return result.item(), torch.autograd.grad(result, own)[0].tolist()


def test_the_loss_of_one_task_has_it_too(two_ranks: RankPool) -> None:
    logits, labels = (list(torch.rand(13, dtype=torch.float64).split(SIZES)) for _ in range(2))
    whole, targets = torch.cat(logits).tolist(), torch.cat(labels).tolist()
    results = two_ranks.run(single_step, logits, labels)
    rows = [reference.Row(reference.bce_with_logits(x, y), reference.bce_slope(x, y)) for x, y in zip(whole, targets)]
    value = reference.losses({"": rows}, reference.Rule())["loss"]
    assert [result[0] for result in results] == pytest.approx([value] * 2, rel=1e-12)
    slopes = reference.gradients({"": rows}, reference.Rule())[""]
    assert [*results[0][1], *results[1][1]] == pytest.approx(slopes, rel=1e-12)


def penalty(features: Tensor, loss: Tensor) -> Tensor:
    """The squared gradient of a loss by the features, to be differentiated again."""
    return torch.autograd.grad(loss, features, create_graph=True)[0].square().sum()


def penalised(rank: int, parts: list[Rows], matrix: Tensor) -> list[list[float]]:
    """The gradient of the penalties of all ranks by the parameters, added over ranks."""
    matrix = matrix.clone().requires_grad_()
    features = parts[rank].features.requires_grad_()
    loss = MultiTaskLoss("bce_with_logits", TASKS, global_batch=True, gradient_reduction="sum")
    own = penalty(features, loss(features @ matrix, parts[rank].labels)["loss"])
    (found,) = torch.autograd.grad(own, matrix)
    dist.all_reduce(found)
    rows: list[list[float]] = found.tolist()
    return rows


def test_a_gradient_penalty_is_that_of_one_process(two_ranks: RankPool) -> None:
    parts = random_rows(Settings(), sum(SIZES), 5, weighted=False).cut(SIZES)
    whole = joined(parts)
    matrix = torch.randn(3, 3, dtype=torch.float64)
    leaf, features = matrix.clone().requires_grad_(), whole.features.clone().requires_grad_()
    loss = F.binary_cross_entropy_with_logits(features @ leaf, whole.labels)
    (exact,) = torch.autograd.grad(penalty(features, loss), leaf)
    for found in two_ranks.run(penalised, parts, matrix):
        assert torch.allclose(torch.tensor(found, dtype=torch.float64), exact, rtol=1e-10)


def test_on_one_process_both_are_the_same() -> None:
    logits, labels = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), torch.rand(5, 3, dtype=torch.float64)
    (exact,) = torch.autograd.grad(F.binary_cross_entropy_with_logits(logits, labels), logits)
    for rule in ("mean", "sum"):
        loss: Any = MultiTaskLoss("bce_with_logits", TASKS, global_batch=True, gradient_reduction=rule)
        (found,) = torch.autograd.grad(loss(logits, labels)["loss"], logits)
        assert torch.allclose(found, exact, rtol=1e-12)


CONSTRUCTORS: dict[str, Any] = {
    "Loss": lambda **options: Loss("bce_with_logits", **options),
    "MultiTaskLoss": lambda **options: MultiTaskLoss("bce_with_logits", TASKS, **options),
}


@pytest.mark.parametrize("constructor", CONSTRUCTORS.values(), ids=CONSTRUCTORS)
def test_other_reductions_are_refused(constructor: Any) -> None:
    for wrong in ("avg", "none", ""):
        with pytest.raises(ValueError, match="gradient_reduction"):
            constructor(global_batch=True, gradient_reduction=wrong)
    assert constructor(gradient_reduction="sum").gradient_reduction == "sum"
    assert constructor().gradient_reduction == "mean"


# A normalizer whose gradient DDP would divide by the number of ranks.


def warned(rank: int, one_task: bool, options: dict[str, Any], normalizer: float | None) -> list[tuple[str, str]]:
    """The warnings of a forward on a rank: category and text."""
    loss: Any = Loss("bce_with_logits", **options) if one_task else MultiTaskLoss("bce_with_logits", TASKS, **options)
    logits = torch.zeros(4) if one_task else torch.zeros(4, 3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss(logits, logits, normalizer=normalizer)
    return [(each.category.__name__, str(each.message)) for each in caught]


@pytest.mark.parametrize("one_task", [False, True], ids=["MultiTaskLoss", "Loss"])
def test_a_normalizer_on_several_ranks_without_the_global_batch_warns(two_ranks: RankPool, one_task: bool) -> None:
    for found in two_ranks.run(warned, one_task, {}, 8.0):
        assert [category for category, _ in found] == ["UserWarning"]
        assert "normalizer" in found[0][1]
        assert "global_batch" in found[0][1]


@pytest.mark.parametrize("one_task", [False, True], ids=["MultiTaskLoss", "Loss"])
def test_without_a_normalizer_or_with_the_global_batch_there_is_no_warning(two_ranks: RankPool, one_task: bool) -> None:
    assert two_ranks.run(warned, one_task, {}, None) == [[], []]
    assert two_ranks.run(warned, one_task, {"global_batch": True}, 8.0) == [[], []]


@pytest.mark.parametrize("one_task", [False, True], ids=["MultiTaskLoss", "Loss"])
@pytest.mark.parametrize("global_batch", [False, True])
def test_a_normalizer_in_one_process_does_not_warn(one_task: bool, global_batch: bool) -> None:
    assert warned(0, one_task, {"global_batch": global_batch}, 8.0) == []
