"""A rank that asks for sums over a group to which it does not belong."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from tests.support.rank_pool import RankPool
from twloss import Loss, get_global_loss_detached


def gradient(group: dist.ProcessGroup) -> str:
    """That of a loss over the group's ranks."""
    logits = torch.zeros(2, requires_grad=True)
    Loss("bce_with_logits", global_batch=True, process_group=group)(logits, torch.ones(2)).backward()
    return str(logits.grad)


WAYS: dict[str, Callable[[dist.ProcessGroup], object]] = {
    "mean": lambda group: get_global_loss_detached(torch.tensor(4.0), process_group=group),
    "sum": lambda group: get_global_loss_detached(torch.tensor(4.0), "sum", process_group=group),
    "weighted mean": lambda group: get_global_loss_detached(torch.tensor(4.0), weight=2.0, process_group=group),
    "global_batch": gradient,
}


def outside_of_the_group(rank: int, way: str) -> str | None:
    """What rank 0 gets of a group of rank 1."""
    group = dist.new_group([1])
    if rank == 1:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            return f"no error, but {WAYS[way](group)}"
        except (TypeError, ValueError) as error:
            return str(error)


@pytest.mark.parametrize("way", WAYS)
def test_a_rank_outside_of_the_group_is_told_so(two_ranks: RankPool, way: str) -> None:
    """A number of ranks of -1, which torch gives for such a group, must turn no sign."""
    message, _ = two_ranks.run(outside_of_the_group, way)
    assert message.startswith("process_group: ")
