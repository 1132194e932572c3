"""What a step costs in kernels: no loop over tasks hides in it."""

from __future__ import annotations

import pytest
import torch

from benchmarks.counts import KernelLog
from twloss import MultiTaskLoss

TASK_COUNTS = (1, 10, 100)


def kernels(tasks: int, *, weighted: bool, ignore_index: float | None = None) -> list[str]:
    """The kernels of forward, backward and tracking of one step."""
    logits = torch.randn(64, tasks, requires_grad=True)
    labels = torch.randint(0, 2, (64, tasks))
    names = [f"task{t}" for t in range(tasks)]
    pos_weights = [1.5] * tasks if weighted else None
    loss = MultiTaskLoss("bce_with_logits", names, pos_weights=pos_weights, ignore_index=ignore_index)
    count = KernelLog()
    with count:
        loss(logits, labels, torch.rand(64, tasks) if weighted else None)["loss"].backward()
    return count.names


def test_the_counter_counts() -> None:
    with KernelLog() as count:
        (torch.ones(2, 2).T * 2)[0].detach()
    assert count.names == ["aten.ones.default", "aten.mul.Tensor"]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignore_index", [None, -1])
def test_the_number_of_kernels_does_not_depend_on_the_number_of_tasks(
    weighted: bool, ignore_index: float | None
) -> None:
    counts = {tasks: kernels(tasks, weighted=weighted, ignore_index=ignore_index) for tasks in TASK_COUNTS}
    assert counts[1] == counts[10] == counts[100]
    assert sum("log1p" in name or "softplus." in name for name in counts[100]) == 1


def test_at_most_42_kernels_with_weights_and_pos_weights() -> None:
    assert len(kernels(10, weighted=True)) <= 42


def test_at_most_27_kernels_without() -> None:
    """An exact binary cross-entropy is nine of them; with pos_weights it is thirteen."""
    assert len(kernels(10, weighted=False)) <= 27
