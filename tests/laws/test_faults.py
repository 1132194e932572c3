"""Faults: what goes wrong on one rank must not hang the others, nor cost anyone's sums."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from tests.support.metrics import numbers_of_this_rank
from tests.support.patience import PATIENCE, SECONDS
from tests.support.rank_pool import CONTEXT, RankPool, preload_the_tests
from twloss import GlobalLoss, MultiTaskLoss, get_global_loss_detached, global_sums


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


BATCH = torch.zeros(3, 1), torch.ones(3, 1)


def save_sums(loss: MultiTaskLoss) -> object:
    loss.train_metric.persistent(True)
    with global_sums(loss):
        return loss.state_dict()


def sync_on_step(loss: MultiTaskLoss) -> object:
    return GlobalLoss(["a"], process_group=loss.process_group, dist_sync_on_step=True)(torch.ones(1), 1)


# What one rank calls and the other does not, by the name that the error has for it.
ALONE: dict[str, Callable[[MultiTaskLoss], object]] = {
    "GlobalLoss.compute()": lambda loss: loss.train_metric.compute(),
    "GlobalLoss.compute_async()": lambda loss: loss.train_metric.compute_async().wait(),
    "RankingQuality.compute()": lambda loss: loss.train_quality.scalar("ne/a").compute(),
    "GlobalLoss.sync()": lambda loss: loss.train_metric.sync(),
    "GlobalLoss.forward() with dist_sync_on_step=True": sync_on_step,
    "global_sums()": save_sums,
    "get_global_loss_detached()": lambda loss: get_global_loss_detached(
        torch.ones(()), process_group=loss.process_group
    ),
    "forward with global_batch=True": lambda loss: loss(*BATCH),
}


def call_alone(rank: int, name: str) -> tuple[str, str, str]:
    """The error of the one rank that makes a call, in a group whose time is short, and its cause's type and text."""
    group = dist.new_group([0, 1], timeout=PATIENCE)
    loss = MultiTaskLoss("bce_with_logits", ["a"], global_batch=True, process_group=group, quality=True)
    loss(*BATCH)
    found = "", "", ""
    if rank == 0:
        _set_pg_timeout(timedelta(seconds=1), group)
        try:
            ALONE[name](loss)
        except RuntimeError as error:
            found = str(error), type(error.__cause__).__name__, str(error.__cause__)
        assert loss.train_metric.update_count == loss.train_quality.update_count == 1
    dist.barrier()
    return found


@pytest.mark.parametrize("name", ALONE)
def test_a_call_on_one_rank_alone_is_an_error_that_names_it(two_ranks: RankPool, name: str) -> None:
    (message, kind, cause), of_the_other = two_ranks.run(call_alone, name)
    assert message.startswith(f"{name}: the collective failed; every rank has to call it")
    assert kind in ("RuntimeError", "DistBackendError")
    assert "imed out" in cause
    assert message.endswith(cause)
    assert ("an empty batch" in message) == name.startswith("forward")
    assert of_the_other == ("", "", "")


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
