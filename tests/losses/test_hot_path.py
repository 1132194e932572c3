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


def kernels_with_cells(tasks: int, ids: int, *, quality: bool) -> list[str]:
    """Those of one step, with two dimensions of so many ids."""
    segments = {"a": ids, "b": ids}
    names = [f"task{t}" for t in range(tasks)]
    loss = MultiTaskLoss("bce_with_logits", names, segments=segments, quality=quality)
    logits, labels = torch.randn(64, tasks, requires_grad=True), torch.ones(64, tasks)
    count = KernelLog()
    with count:
        loss(logits, labels, segments={name: torch.zeros(64, dtype=torch.int64) for name in segments})[
            "loss"
        ].backward()
    return count.names


@pytest.mark.parametrize("quality", [False, True])
def test_the_number_of_kernels_does_not_depend_on_the_number_of_cells(quality: bool) -> None:
    counts = {(tasks, ids): kernels_with_cells(tasks, ids, quality=quality) for tasks in (10, 100) for ids in (10, 100)}
    first = counts[10, 10]
    assert all(names == first for names in counts.values())
    assert not {"aten._local_scalar_dense.default", "aten.nonzero.default"} & set(first)


def test_at_most_42_kernels_with_weights_and_pos_weights() -> None:
    assert len(kernels(10, weighted=True)) <= 42


def test_at_most_27_kernels_without() -> None:
    """An exact binary cross-entropy is nine of them; with pos_weights it is thirteen."""
    assert len(kernels(10, weighted=False)) <= 27
