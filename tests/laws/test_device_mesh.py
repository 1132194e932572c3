"""A one-dimensional ``DeviceMesh`` in place of a process group: the sums are over its ranks, and no others."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from tests.support import reference
from tests.support.cases import Ranker, Rows, Settings, columns, joined
from tests.support.gradient_errors import case_parts, errors_of, flat_gradients
from tests.support.metrics import Kind, numbers_of_this_rank, of_every_kind
from tests.support.rank_pool import RankPool
from tests.support.results import assert_close, fed, numbers
from twloss import GlobalLoss, MultiTaskLoss, RankingQuality, get_global_loss_detached

Step = tuple[dict[str, float], list[list[float]]]


def mesh_of(world_size: int) -> DeviceMesh:
    """All ranks hold different rows; of four, pairs hold the same ones."""
    return init_device_mesh(
        "cpu", (world_size // 2, 2) if world_size == 4 else (world_size, 1), mesh_dim_names=("dp", "tp")
    )


def step_on_a_slice(rank: int, case: Settings, parts: list[Rows], world_size: int) -> tuple[Step, dict[str, float]]:
    """A rank's losses and gradients, and what compute() gives after it."""
    data_parallel = mesh_of(world_size)["dp"]
    loss = case.loss(global_batch=True, process_group=data_parallel)
    model = DistributedDataParallel(Ranker(loss, case.tasks), process_group=data_parallel.get_group())
    losses = model(parts[data_parallel.get_local_rank()])
    losses["loss"].backward()
    return (numbers(losses), flat_gradients(model)), numbers(loss.train_metric.compute())


def expect_one_process(ranks: RankPool, data_parallel: int) -> None:
    """A step's loss and gradient, and compute(), are those of one process with the rows of so many ranks."""
    case = Settings(3, "mean", "max", (0.5, 27.3, 4.0))
    parts = case_parts(case, data_parallel, weighted=True)
    steps, computed = zip(*ranks.run(step_on_a_slice, case, parts, ranks.world_size))
    errors = errors_of(case, parts, list(steps))
    assert max(errors.loss, errors.gradient) <= 1e-12
    expected = reference.losses(columns(case, joined(parts)), case.rule())
    for found in computed:
        assert found == pytest.approx(expected, rel=1e-12)


def test_a_slice_of_a_mesh_is_summed_over(ranks: RankPool) -> None:
    expect_one_process(ranks, ranks.world_size)


def test_ranks_with_the_same_rows_are_not_summed_over(four_ranks: RankPool) -> None:
    """Of four ranks, two by two hold the same rows, as in tensor parallelism: they count once."""
    expect_one_process(four_ranks, 2)


def detached_over_slices(rank: int, world_size: int) -> list[float]:
    """The mean of rank + 1 over the ranks of either dimension, and over all of a flattened mesh."""
    mesh = mesh_of(world_size)
    loss = torch.tensor(rank + 1.0)
    groups = mesh["dp"], mesh["tp"], mesh["dp", "tp"]._flatten("all_ranks")
    return [get_global_loss_detached(loss, process_group=group).item() for group in groups]


def test_a_detached_loss_is_averaged_over_a_slice_or_a_flattened_mesh(four_ranks: RankPool) -> None:
    found = four_ranks.run(detached_over_slices, 4)
    assert found == [[2.0, 1.5, 2.5], [3.0, 1.5, 2.5], [2.0, 3.5, 2.5], [3.0, 3.5, 2.5]]


def test_a_detached_loss_is_averaged_over_a_slice_of_two_or_three_ranks(ranks: RankPool) -> None:
    mean = (1 + ranks.world_size) / 2
    found = ranks.run(detached_over_slices, ranks.world_size)
    assert found == [[mean, rank + 1.0, mean] for rank in range(ranks.world_size)]


def compute_in_a_mesh(rank: int, kind: Kind, batches: list[Any]) -> list[dict[str, float]]:
    """What compute() and a sync give over ranks 0 and 2; of rank 1, outside of the mesh, the sync of its own."""
    mesh = DeviceMesh("cpu", [0, 2])
    metric = fed(kind.make(), batches[rank])
    metric.sync(process_group=mesh, distributed_available=lambda: rank != 1)
    synced = numbers(metric.compute()) if rank != 1 else numbers_of_this_rank(metric)
    if rank == 1:
        return [synced]
    return [numbers(fed(kind.make(process_group=mesh), batches[rank]).compute()), synced]


@of_every_kind
def test_a_mesh_limits_the_ranks_of_compute_and_of_a_sync(three_ranks: RankPool, kind: Kind) -> None:
    batches = [kind.batches(count, seed=100 * rank) for rank, count in enumerate((2, 4, 1))]
    first, own, last = three_ranks.run(compute_in_a_mesh, kind, batches)
    computed, synced = kind.expected(batches[0], batches[2]), kind.expected(batches[0], batches[2], of=3)
    for found in (first, last):
        assert_close(found[0], computed)
        assert_close(found[1], synced)
    assert_close(own[0], kind.expected(batches[1], of=3))


def groups_of_a_mesh(rank: int) -> list[bool]:
    """Whether what is given a mesh holds its group, as do copies and a quality."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp"))
    group = mesh.get_group("dp")
    kinds: list[Any] = [GlobalLoss, RankingQuality]
    metrics = [kind(["a"], process_group=mesh["dp"]) for kind in kinds]
    losses = [
        MultiTaskLoss("bce_with_logits", ["a"], quality=metrics[1], process_group=each) for each in (mesh["dp"], group)
    ]
    losses.append(
        MultiTaskLoss(
            "bce_with_logits", ["a"], quality=RankingQuality(["a"], process_group=group), process_group=mesh["dp"]
        )
    )
    owners = [*metrics, *losses, *(each.train_quality for each in losses), *(each.train_metric for each in losses)]
    copies = [copy for each in owners for copy in copies_of(each)]
    return [each.process_group is group for each in (*owners, *copies)]


def copies_of(owner: Any) -> list[Any]:
    return [copy.deepcopy(owner), pickle.loads(pickle.dumps(owner))]


def test_the_attribute_is_the_meshs_group_also_in_copies_and_beside_a_quality(two_ranks: RankPool) -> None:
    for found in two_ranks.run(groups_of_a_mesh):
        assert found == [True] * len(found)


def compiled_step(rank: int, logits: Tensor, labels: Tensor) -> list[float]:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp"))
    loss = MultiTaskLoss("bce_with_logits", ["a"], global_batch=True, process_group=mesh["dp"])
    torch._dynamo.reset()
    forward = torch.compile(loss, fullgraph=True)
    with warnings.catch_warnings():
        # torch.compile of any autograd function.
        warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)
        return [forward(logits[rank:], labels[rank:])["loss"].item() for _ in range(2)]


def test_a_loss_on_a_mesh_compiles(two_ranks: RankPool) -> None:
    logits = torch.tensor([[0.5], [-1.0], [2.0]], dtype=torch.float64)
    found = two_ranks.run(compiled_step, logits, torch.ones(3, 1))
    losses = [reference.softplus(-value) for value in (0.5, -1.0, 2.0, -1.0, 2.0)]
    for values in found:
        assert values == pytest.approx([sum(losses) / 5] * 2, rel=1e-12)
