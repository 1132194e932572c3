"""Faults: what goes wrong on one rank must not hang the others, nor cost anyone's sums."""

from __future__ import annotations

import os
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support.metrics import numbers_of_this_rank
from tests.support.patience import PATIENCE, SECONDS
from tests.support.rank_pool import CONTEXT, RankPool, preload_the_tests
from twloss import GlobalLoss, MultiTaskLoss


def compute_beside_a_dead_rank(rank: int, store: str, connection: Connection) -> None:
    """Rank 1 dies; rank 0 computes, gets an error, and goes on with its own sums."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=PATIENCE)
    metric = GlobalLoss(["a"])
    metric.update(torch.tensor([3.0]), 2)
    metric.compute()
    if rank == 1:
        os._exit(0)
    try:
        metric.compute()
        message = ""
    except RuntimeError as error:
        message = str(error)
    metric.update(torch.tensor([3.0]), 2)
    metric.distributed_available_fn = lambda: False
    connection.send((message, metric.compute()["loss"].item(), metric.update_count))


def test_a_rank_that_dies_is_an_error_on_the_others_and_costs_no_sums(tmp_path: Path) -> None:
    ours, theirs = CONTEXT.Pipe()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    preload_the_tests()
    processes = [
        CONTEXT.Process(target=compute_beside_a_dead_rank, args=(rank, str(tmp_path / "store"), theirs), daemon=True)
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    assert ours.poll(SECONDS)
    message, loss, updates = ours.recv()
    for process in processes:
        process.kill()
        process.join()
    # It was told that the other is gone, and did not wait until the time was out.
    assert message
    assert "imed out" not in message
    assert (loss, updates) == (1.5, 2)


def fail_within_compute(rank: int) -> list[Any]:
    """A reduction that raises once, on all ranks, after the sums were synced."""
    calls = []

    def reduction(losses: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 1:
            raise ZeroDivisionError("reduction")
        return losses.sum()

    metric = GlobalLoss(["a"], "mean", reduction)
    metric.update(torch.tensor([float(rank)]), 1)
    with pytest.raises(ZeroDivisionError):
        metric.compute()
    local = numbers_of_this_rank(metric)["loss"]
    metric.update(torch.tensor([float(rank)]), 1)
    return [local, metric.compute()["loss"].item()]


def test_an_exception_in_compute_leaves_the_metric_usable(two_ranks: RankPool) -> None:
    assert two_ranks.run(fail_within_compute) == [[0.0, 0.5], [1.0, 0.5]]


def test_a_failed_forward_leaves_sums_and_counts() -> None:
    loss = MultiTaskLoss("bce_with_logits", ["a", "b"])
    loss(torch.zeros(2, 2), torch.ones(2, 2))
    before = loss.train_metric.totals.clone()
    wrongs: list[Any] = [torch.ones(2, 3), torch.ones(3, 2), torch.ones(2, 2, dtype=torch.complex64), [[1.0, 1.0]]]
    for wrong in wrongs:
        with pytest.raises((TypeError, ValueError)):
            loss(torch.zeros(2, 2), wrong)
    assert torch.equal(loss.train_metric.totals, before)


def test_a_failed_reduction_leaves_sums_and_counts() -> None:
    loss = MultiTaskLoss("bce_with_logits", ["a", "b"], "mean", lambda losses: losses, global_batch=True)
    with pytest.raises(ValueError, match="global_reduction"):
        loss(torch.zeros(2, 2), torch.ones(2, 2))
    assert not loss.train_metric.update_called
