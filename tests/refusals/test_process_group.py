"""A rank that asks for sums over a group to which it does not belong, and a mesh that is not of one group."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tests.support.rank_pool import RankPool
from tests.support.refusals import expect_refusal
from twloss import GlobalLoss, Loss, MultiTaskLoss, RankingQuality, get_global_loss_detached

Ranks = dist.ProcessGroup | DeviceMesh


def gradient(group: Ranks) -> str:
    """That of a loss over the group's ranks."""
    logits = torch.zeros(2, requires_grad=True)
    Loss("bce_with_logits", global_batch=True, process_group=group)(logits, torch.ones(2)).backward()
    return str(logits.grad)


WAYS: dict[str, Callable[[Ranks], object]] = {
    "mean": lambda group: get_global_loss_detached(torch.tensor(4.0), process_group=group),
    "sum": lambda group: get_global_loss_detached(torch.tensor(4.0), "sum", process_group=group),
    "weighted mean": lambda group: get_global_loss_detached(torch.tensor(4.0), weight=2.0, process_group=group),
    "global_batch": gradient,
    "compute": lambda group: GlobalLoss(["a"], process_group=group).compute(),
}
GROUPS: dict[str, Callable[[], Ranks]] = {
    "group": lambda: dist.new_group([1]),
    "mesh": lambda: DeviceMesh("cpu", [1]),
}


def outside_of_the_group(rank: int, way: str, kind: str) -> str | None:
    """What rank 0 gets of a group of rank 1."""
    group = GROUPS[kind]()
    if rank == 1:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            return f"no error, but {WAYS[way](group)}"
        except (TypeError, ValueError) as error:
            return str(error)


@pytest.mark.parametrize("kind", GROUPS)
@pytest.mark.parametrize("way", WAYS)
def test_a_rank_outside_of_the_group_is_told_so(two_ranks: RankPool, way: str, kind: str) -> None:
    """A number of ranks of -1, which torch gives for such a group, must turn no sign."""
    message, _ = two_ranks.run(outside_of_the_group, way, kind)
    assert message.startswith("process_group: ")


TAKERS: dict[str, Callable[[DeviceMesh], object]] = {
    "Loss": lambda mesh: Loss("bce_with_logits", process_group=mesh),
    "MultiTaskLoss": lambda mesh: MultiTaskLoss("bce_with_logits", ["a"], process_group=mesh),
    "GlobalLoss": lambda mesh: GlobalLoss(["a"], process_group=mesh),
    "RankingQuality": lambda mesh: RankingQuality(["a"], process_group=mesh),
    "sync": lambda mesh: GlobalLoss(["a"]).sync(process_group=mesh),
    "get_global_loss_detached": lambda mesh: get_global_loss_detached(torch.tensor(4.0), process_group=mesh),
}


def refuse_meshes(rank: int, taker: str) -> None:
    """Meshes of two and three dimensions, with names and without."""
    named = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp"))
    unnamed = DeviceMesh("cpu", [[[0]], [[1]]])
    for mesh, dimensions in ((named, "2 dimensions ('dp', 'tp')"), (unnamed, "3 dimensions (2, 1, 1)")):
        expect_refusal(
            lambda mesh=mesh: TAKERS[taker](mesh),  # type: ignore[misc]
            TypeError,
            f"process_group: got a DeviceMesh of {dimensions}, expected a ProcessGroup, a 1-D DeviceMesh or None",
            ": slice it (mesh['dp']) or flatten it (mesh['dp', 'cp']._flatten())",
            mesh,
        )


@pytest.mark.parametrize("taker", TAKERS)
def test_a_mesh_of_several_dimensions_is_to_be_sliced_or_flattened(two_ranks: RankPool, taker: str) -> None:
    two_ranks.run(refuse_meshes, taker)
