"""``global_batch=True``: a step on uneven ranks is the step of one process, however the model is wrapped."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from benchmarks.counts import CollectiveLog
from tests.support.cases import FORMS, REDUCTIONS, Rows, Settings
from tests.support.gradient_errors import Errors, case_parts, errors_of, flat_gradients, measure
from tests.support.pairwise import pairwise
from tests.support.rank_pool import RankPool

FLOAT64 = Errors(1e-12, 1e-12)
FLOAT32 = Errors(1e-5, 1e-5)
COMBINATIONS = list(itertools.product(("mean", "sum"), REDUCTIONS))


def expect_at_most(errors: Errors, bound: Errors) -> None:
    assert errors.loss <= bound.loss
    assert errors.gradient <= bound.gradient


@pairwise(
    reductions=COMBINATIONS,
    weighted={"": False, "weights": True},
    positive={"": None, "pos_weights": (0.5, 27.3, 4.0)},
    form=FORMS,
)
def test_loss_and_gradient_are_those_of_one_process(
    ranks: RankPool, reductions: tuple[str, str], weighted: bool, positive: tuple[float, ...] | None, form: str
) -> None:
    case = Settings(3, *reductions, positive, form=form)
    expect_at_most(measure(ranks, case, weighted=weighted, global_batch=True), FLOAT64)
    expect_at_most(measure(ranks, case, torch.float32, weighted=weighted, global_batch=True), FLOAT32)


@pytest.mark.parametrize(("task_reduction", "reduction"), COMBINATIONS)
def test_the_plain_rule_is_far_off(ranks: RankPool, task_reduction: str, reduction: str) -> None:
    """What is gained: each rank's own loss, its gradient averaged by DDP, on the same rows."""
    plain = measure(ranks, Settings(3, task_reduction, reduction), global_batch=False)
    assert plain.gradient > 0.1
    assert plain.loss > 0.01


def backward(model: nn.Module, rows: Rows) -> tuple[dict[str, float], list[list[float]]]:
    """One rank's losses and gradients of a step."""
    with warnings.catch_warnings():
        # The tasks' losses are views of one tensor; what this warns of, an update in place, autograd refuses for them.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
        # torch.compile of any autograd function.
        warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)
        losses = model(rows)
    losses["loss"].backward()
    return {key: value.item() for key, value in losses.items()}, flat_gradients(model)


def wrapped_step(rank: int, case: Settings, parts: list[Rows], wrap: str) -> tuple[dict[str, float], list[list[float]]]:
    """One rank's step of a model that is wrapped in another way than DDP's default."""
    ranker = case.ranker(global_batch=True)
    model: nn.Module = ranker
    if wrap == "fsdp2":
        fully_shard(ranker, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    elif wrap == "compile":
        model = DistributedDataParallel(torch.compile(ranker, fullgraph=True, backend="aot_eager"))
    else:
        model = DistributedDataParallel(ranker, gradient_as_bucket_view=True)
    return backward(model, parts[rank])


@pytest.mark.parametrize(
    ("wrap", "reduction", "ranks"),
    [
        *[("compile", "mean", 2), ("compile", "max", 2), ("compile", "norm", 3)],
        *[("fsdp2", "mean", 2), ("fsdp2", "max", 2), ("fsdp2", "norm", 3)],
        *[("bucket views", "mean", 2), ("bucket views", "max", 3), ("bucket views", "norm", 3)],
    ],
    indirect=["ranks"],
)
@pytest.mark.parametrize("form", FORMS)
def test_however_the_model_is_wrapped(ranks: RankPool, wrap: str, reduction: str, form: str) -> None:
    case = Settings(3, "mean", reduction, (0.5, 27.3, 4.0), form=form)
    parts = case_parts(case, ranks.world_size, weighted=True)
    expect_at_most(errors_of(case, parts, ranks.run(wrapped_step, case, parts, wrap)), FLOAT64)


@pytest.mark.parametrize("wrap", ["fsdp2", "bucket views"])
def test_a_fused_pass_however_the_model_is_wrapped(two_ranks: RankPool, wrap: str) -> None:
    case = Settings(3, "mean", "mean", (0.5, 27.3, 4.0), fused=True)
    parts = case_parts(case, 2, weighted=True)
    expect_at_most(errors_of(case, parts, two_ranks.run(wrapped_step, case, parts, wrap)), FLOAT64)


def checkpointed_step(
    rank: int, case: Settings, parts: list[Rows]
) -> tuple[tuple[dict[str, float], list[list[float]]], list[str], list[str], int]:
    """One rank's step, the collectives of its forward and of its backward, and how often the batch was counted."""
    model = case.ranker(global_batch=True, gradient_reduction="sum")
    with CollectiveLog() as forward:
        result = checkpoint(model, parts[rank], use_reentrant=False)
    with CollectiveLog() as backward:
        result["loss"].backward()
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
    losses = {key: value.item() for key, value in result.items()}
    return (losses, flat_gradients(model)), forward.names, backward.names, model.loss.train_metric.update_count


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpointed_block_takes_its_collective_again_in_backward(two_ranks: RankPool, form: str) -> None:
    """The loss and the gradient are one process's, and the batch counts once."""
    case = Settings(global_reduction="max", form=form)
    parts = case_parts(case, 2, weighted=True)
    results = two_ranks.run(checkpointed_step, case, parts)
    expect_at_most(errors_of(case, parts, [step for step, *_ in results]), FLOAT64)
    for _, forward, backward, count in results:
        assert (len(forward), len(backward), count) == (1, 1, 1)


def step_in_a_subgroup(rank: int, case: Settings, parts: list[Rows]) -> Any:
    """Ranks 1 and 2 train together, rank 0 not at all."""
    group = dist.new_group([1, 2])
    if rank == 0:
        return None
    model = DistributedDataParallel(case.ranker(global_batch=True, process_group=group), process_group=group)
    return backward(model, parts[rank - 1])


@pytest.mark.parametrize("form", FORMS)
def test_in_a_sub_group(three_ranks: RankPool, form: str) -> None:
    case = Settings(global_reduction="median", form=form)
    parts = case_parts(case, 2, weighted=True)
    expect_at_most(errors_of(case, parts, three_ranks.run(step_in_a_subgroup, case, parts)[1:]), FLOAT64)


def hybrid_step(rank: int, case: Settings, parts: list[Rows]) -> tuple[dict[str, float], list[list[float]]]:
    """Parameters sharded over pairs of ranks and replicated over the pairs."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = case.ranker(global_batch=True)
    fully_shard(model, mesh=mesh)
    return backward(model, parts[rank])


def test_under_hybrid_sharding(four_ranks: RankPool) -> None:
    case = Settings(global_reduction="sum")
    parts = case_parts(case, 4, weighted=True)
    expect_at_most(errors_of(case, parts, four_ranks.run(hybrid_step, case, parts)), FLOAT64)


def in_a_world_of_one(rank: int, case: Settings, parts: list[Rows]) -> tuple[dict[str, float], list[list[float]]]:
    group = [dist.new_group([r]) for r in range(dist.get_world_size())][rank]
    model = case.ranker(global_batch=True, process_group=group)
    return backward(model, parts[0])


@pytest.mark.parametrize("form", FORMS)
def test_one_rank_and_no_process_group_are_the_plain_loss(two_ranks: RankPool, form: str) -> None:
    case = Settings(form=form)
    parts = case_parts(case, 2, weighted=True)[:1]
    expect_at_most(errors_of(case, parts, two_ranks.run(in_a_world_of_one, case, parts)), FLOAT64)
    model = case.ranker(global_batch=True)
    expect_at_most(errors_of(case, parts, [backward(model, parts[0])]), FLOAT64)
