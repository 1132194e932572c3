"""What each rank sends: the tensors that reach the process group, and the figures of docs/guides/several-hosts.md."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.rank_pool import RankPool
from twloss import GlobalLoss, MultiTaskLoss, RankingQuality

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "several-hosts.md"
FORWARD, LOSS, QUALITY = "forward", "GlobalLoss", "RankingQuality"
WINDOW, WINDOW_ROWS = "RankingQuality, window", "RankingQuality, window_rows"
ROWS_SENT = {FORWARD: 3, LOSS: 8, QUALITY: 10, WINDOW: 16, WINDOW_ROWS: 18}
COMPUTED: dict[str, Callable[[list[str]], GlobalLoss | RankingQuality]] = {
    LOSS: GlobalLoss,
    QUALITY: RankingQuality,
    WINDOW: lambda tasks: RankingQuality(tasks, window=100),
    WINDOW_ROWS: lambda tasks: RankingQuality(tasks, window_rows=5000),
}

Sent = tuple[str, torch.dtype, tuple[int, ...]]


class ProcessGroupLog(TorchDispatchMode):
    """Notes what reaches the process group: the collective's name, the dtype and the shape."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sent: list[Sent] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            tensors = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
            self.sent += [(str(func), tensor.dtype, tuple(tensor.shape)) for tensor in tensors]
        return func(*args, **(kwargs or {}))


def tensors_sent(rank: int, call: str, tasks: int, rows: int, steps: int) -> list[Sent]:
    """By this rank, in the last step, or in a compute() after all of them."""
    names = [f"task {index}" for index in range(tasks)]
    rows += rank
    log = ProcessGroupLog()
    logits, labels = torch.zeros(rows, tasks), torch.ones(rows, tasks)
    if call == FORWARD:
        loss = MultiTaskLoss("bce_with_logits", names, global_batch=True)
        for _ in range(steps):
            log.sent.clear()
            with log:
                loss(logits.requires_grad_(), labels)["loss"].backward()
        return log.sent
    metric = COMPUTED[call](names)
    for _ in range(steps):
        if isinstance(metric, GlobalLoss):
            metric.update(torch.ones(tasks), rows)
        else:
            metric.update(logits, labels)
    with log:
        metric.compute()
    return log.sent


def payload(ranks: RankPool, call: str, tasks: int) -> int:
    """The bytes that each of some real ranks handed to the process group."""
    ((_, dtype, shape),) = ranks.run(tensors_sent, call, tasks, 3, 1)[0]
    size: int = math.prod(shape) * dtype.itemsize
    return size


@pytest.mark.parametrize("call", ROWS_SENT)
@pytest.mark.parametrize("tasks", [1, 10, 300])
def test_one_float64_tensor_whose_size_depends_on_the_tasks_alone(ranks: RankPool, call: str, tasks: int) -> None:
    expected = [("c10d.allreduce_.default", torch.float64, (ROWS_SENT[call], tasks))]
    for rows, steps in ((1, 1), (64, 1), (1, 9)):
        assert ranks.run(tensors_sent, call, tasks, rows, steps) == [expected] * ranks.world_size


def tensors_sent_for_all(rank: int, tasks: int) -> list[Sent]:
    """By this rank, in a compute() of a loss that tracks its quality too."""
    loss = MultiTaskLoss("bce_with_logits", [f"task {index}" for index in range(tasks)], quality=True)
    loss(torch.zeros(2 + rank, tasks), torch.ones(2 + rank, tasks))
    log = ProcessGroupLog()
    with log:
        loss.compute()
    return log.sent


@pytest.mark.parametrize("tasks", [1, 200])
def test_all_metrics_of_a_loss_are_one_tensor_of_the_guides_size(two_ranks: RankPool, tasks: int) -> None:
    assert "4,096 numbers (32,768\nbytes) at least, which is room for the losses and the quality of 200 tasks" in (
        GUIDE.read_text(encoding="utf-8")
    )
    expected = [("c10d.allreduce_.default", torch.float64, (4096,))]
    assert two_ranks.run(tensors_sent_for_all, tasks) == [expected] * 2


def test_the_guide_gives_the_shapes_and_the_bytes_a_task(two_ranks: RankPool) -> None:
    lines = re.findall(r"^\| .*: \((\d+), T\) \| (\d+) T \|$", GUIDE.read_text(encoding="utf-8"), re.MULTILINE)
    assert [int(rows) for rows, _ in lines] == list(ROWS_SENT.values())
    assert [int(size) for _, size in lines] == [payload(two_ranks, call, 1) for call in ROWS_SENT]


def test_the_guides_table_is_that_of_the_tensors_in_a_ring(two_ranks: RankPool) -> None:
    lines = re.findall(r"^\| ([\d,]+(?: \| [\d,]+)+) \|$", GUIDE.read_text(encoding="utf-8"), re.MULTILINE)
    table = [[int(cell.replace(",", "")) for cell in line.split(" | ")] for line in lines]
    assert [line[0] for line in table] == [2, 8, 64, 2000, 10_000]
    sizes = [payload(two_ranks, call, 10) for call in (FORWARD, LOSS, QUALITY)]
    for ranks, *cells in table:
        assert cells == [*(round(2 * (ranks - 1) / ranks * size) for size in sizes), (ranks - 1) * sizes[1]]


def ring(rank: int, length: int) -> list[float]:
    """Sum over ranks by a ring, each step a message to the next rank; the sum, then the numbers that were sent."""
    world_size = dist.get_world_size()
    parts = list(torch.full((length,), float(rank + 1), dtype=torch.float64).chunk(world_size))
    sent = 0
    for step in range(2 * (world_size - 1)):
        outgoing = parts[(rank - step) % world_size].clone()
        place = (rank - step - 1) % world_size
        incoming = torch.empty_like(parts[place])
        request = dist.isend(outgoing, (rank + 1) % world_size)
        dist.recv(incoming, (rank - 1) % world_size)
        assert request is not None
        request.wait()
        # Once around to add, and once more to hand the sums on.
        parts[place] = parts[place] + incoming if step < world_size - 1 else incoming
        sent += outgoing.numel()
    return [*torch.cat(parts).unique().tolist(), float(sent)]


def test_a_ring_sends_what_the_guide_says(ranks: RankPool) -> None:
    world_size, length = ranks.world_size, 60
    expected = [sum(range(1, world_size + 1)), 2 * (world_size - 1) * length // world_size]
    assert ranks.run(ring, length) == [expected] * world_size
