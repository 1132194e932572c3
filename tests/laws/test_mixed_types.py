"""The two laws for tasks of different kinds, each with rows of its own, on one process and on real ranks."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.support import reference
from tests.support.laws import TOLERANCE, Columns, expect_exact_gradients, expect_split_invariance, run_steps
from tests.support.mixed import (
    TYPES,
    Batch,
    Mixed,
    Ranker,
    Scaled,
    columns,
    joined,
    mixed_cases,
    parameter_gradients,
    random_batch,
)
from tests.support.rank_pool import RankPool
from tests.support.tiers import dozens
from twloss import MultiTaskLoss


def run(rank: int, case: Mixed, steps: list[list[Batch]], global_batch: bool) -> dict[str, Any]:
    """The life of a ``Ranker``."""
    return run_steps(rank, Ranker(case, global_batch=global_batch), steps)


def all_columns(case: Mixed, steps: list[list[Batch]]) -> Columns:
    """The oracle's view of the rows of all steps and ranks."""
    return columns(case, joined([batch for parts in steps for batch in parts]))


def by_step(case: Mixed, steps: list[list[Batch]]) -> list[tuple[Columns, list[list[float]]]]:
    """The oracle's view of each step's rows of all ranks, and its gradients."""
    return [(columns(case, joined(parts)), parameter_gradients(case, joined(parts))) for parts in steps]


@given(mixed_cases(world_size=1, of_kinds=tuple(TYPES)))
@dozens(2)
def test_both_laws_on_one_process(case: tuple[Mixed, list[list[Batch]]]) -> None:
    options, steps = case
    for global_batch in (False, True):
        results = [run(0, options, steps, global_batch)]
        expect_split_invariance(options, all_columns(options, steps), results)
        expect_exact_gradients(options, by_step(options, steps), results)


@given(data=st.data())
@pytest.mark.parametrize("global_batch", [False, True])
def test_both_laws_on_ranks(ranks: RankPool, data: st.DataObject, global_batch: bool) -> None:
    options, steps = data.draw(mixed_cases(ranks.world_size, tuple(TYPES)))
    results = ranks.run(run, options, steps, global_batch)
    expect_split_invariance(options, all_columns(options, steps), results)
    if global_batch:
        expect_exact_gradients(options, by_step(options, steps), results)


KINDS = ("binary", "three classes", "squared", "binary", "five classes")
WITH_GIVEN = ("given", "three classes", "given", "binary", "five classes")


def run_added(rank: int, case: Mixed, parts: list[Batch]) -> list[list[float]]:
    """The gradients of the heads, which are added over ranks by hand."""
    ranker = Ranker(case, global_batch=True, gradient_reduction="sum")
    ranker(parts[rank])["loss"].backward()
    for parameter in ranker.heads.parameters():
        torch.distributed.all_reduce(parameter.grad)
    return [each.grad.flatten().tolist() for each in ranker.heads.parameters() if each.grad is not None]


@pytest.mark.parametrize("kinds", [KINDS, WITH_GIVEN, ("given",) * 5])
def test_gradients_that_are_added_are_those_of_one_process(ranks: RankPool, kinds: tuple[str, ...]) -> None:
    case = Mixed(kinds, weighted=True)
    sizes = [[3, 1, 0, 2, 4], [0, 5, 0, 1, 0], [2, 0, 1, 0, 3]]
    parts = [random_batch(case, sizes[rank], rank) for rank in range(ranks.world_size)]
    expected = parameter_gradients(case, joined(parts))
    for found in ranks.run(run_added, case, parts):
        for ours, theirs in zip(found, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=TOLERANCE, abs=TOLERANCE)


def run_window(
    rank: int, case: Mixed, steps: list[list[Batch]], total: list[float] | None
) -> tuple[list[list[float]], float]:
    """The gradients of one window of micro-batches, and their losses in all; without a total, the loss counts."""
    ranker = Ranker(case, global_batch=True)
    is_distributed = torch.distributed.is_initialized()
    model: nn.Module = DistributedDataParallel(ranker) if is_distributed else ranker
    normalizer = torch.zeros(len(case.kinds), dtype=torch.float64) if total is None else torch.tensor(total).double()
    if total is None:
        for batch in (parts[rank] for parts in steps):
            labels = {task: part.labels for task, part in batch.items()}
            weights = {task: part.weights for task, part in batch.items() if part.weights is not None}
            normalizer += ranker.loss.count(labels, weights or None)
        if is_distributed:
            torch.distributed.all_reduce(normalizer)
    loss = 0.0
    for parts in steps:
        part = model(parts[rank], normalizer)["loss"]
        part.backward()
        loss += part.item()
    return [each.grad.flatten().tolist() for each in model.parameters() if each.grad is not None], loss


def window(kinds: tuple[str, ...] = KINDS, **options: Any) -> tuple[Mixed, list[list[Batch]], list[float]]:
    """Micro-batches of two ranks, and each task's number of rows; one task has none at all."""
    case = Mixed(kinds, weighted=True, **options)
    sizes = [[[3, 1, 0, 2, 4], [0, 5, 0, 1, 0]], [[0, 0, 0, 2, 0], [1, 2, 0, 0, 3]]]
    steps = [
        [random_batch(case, own, 2 * step + rank) for rank, own in enumerate(each)] for step, each in enumerate(sizes)
    ]
    return case, steps, [float(sum(own[t] for each in sizes for own in each)) for t in range(len(KINDS))]


@pytest.mark.parametrize("kinds", [KINDS, WITH_GIVEN, ("given",) * 5])
def test_a_normalizer_of_each_task_makes_accumulation_exact(two_ranks: RankPool, kinds: tuple[str, ...]) -> None:
    case, steps, total = window(kinds)
    # One process knows all at once: a task without a row is out of the mean over tasks, as its total of 0 says.
    expected = parameter_gradients(case, joined([batch for parts in steps for batch in parts]))
    alone = run_window(0, case, [[batch] for parts in steps for batch in parts], total)
    for found, _ in (alone, *two_ranks.run(run_window, case, steps, total)):
        for ours, theirs in zip(found, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=TOLERANCE, abs=TOLERANCE)


@pytest.mark.parametrize("mean_over", ["rows", "weights"])
@pytest.mark.parametrize("missing", [None, {f"a.{t} {kind}": -1.0 for t, kind in enumerate(KINDS)}])
def test_what_the_loss_counts_makes_accumulation_exact(two_ranks: RankPool, mean_over: str, missing: Any) -> None:
    case, steps, _ = window(mean_over=mean_over, ignore_index=missing)
    everything = joined([batch for parts in steps for batch in parts])
    expected = parameter_gradients(case, everything)
    loss = reference.losses(columns(case, everything), case.rule())["loss"]
    alone = run_window(0, case, [[batch] for parts in steps for batch in parts], None)
    for found, value in (alone, *two_ranks.run(run_window, case, steps, None)):
        assert value == pytest.approx(loss, rel=TOLERANCE)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=TOLERANCE, abs=TOLERANCE)


def test_a_normalizer_on_several_ranks_still_warns(two_ranks: RankPool) -> None:
    case, steps, total = window()
    assert two_ranks.run(run_warned, case, steps, total) == [True, True]


def run_warned(rank: int, case: Mixed, steps: list[list[Batch]], total: list[float]) -> bool:
    """Whether a loss that is not over ranks says so."""
    ranker = Ranker(case)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ranker(steps[0][rank], torch.tensor(total))
    return any("global_batch=True" in str(each.message) for each in caught)


LEARNED_NAMES = ("price", "event", "time")
# Of each rank, the rows of each task: a rank without the learned type's, one without any, and one without the event.
LEARNED_SIZES = [(0, 2, 0), (0, 0, 0), (3, 0, 1)]
LEARNED_STEPS = 2


class WithLearnedNoise(nn.Module):
    """A head a task; two of the tasks share a type that has a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(1, 1, dtype=torch.float64) for _ in LEARNED_NAMES)
        self.noise = noise = Scaled()
        types: dict[str, Any] = {"price": noise, "event": "bce_with_logits", "time": noise}
        self.loss = MultiTaskLoss(types, LEARNED_NAMES, global_batch=True)
        with torch.no_grad():
            for parameter in self.heads.parameters():
                parameter.fill_(0.5)

    def forward(self, features: dict[str, Tensor], labels: dict[str, Tensor]) -> Tensor:
        """The global loss."""
        logits = {task: head(features[task]) for task, head in zip(LEARNED_NAMES, self.heads)}
        return self.loss(logits, labels)["loss"]


def learned_parts(sizes: tuple[int, ...], seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Features ``(rows, 1)`` and labels ``(rows,)`` of each task."""
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.rand(2, rows, generator=generator, dtype=torch.float64) for rows in sizes]
    return (
        {task: each[0].unsqueeze(1) for task, each in zip(LEARNED_NAMES, inputs)},
        {task: each[1] for task, each in zip(LEARNED_NAMES, inputs)},
    )


def run_learned(rank: int) -> list[list[float]]:
    """By step, what DDP makes of the gradient by the noise, and by each head's matrix and bias."""
    ranker = WithLearnedNoise()
    model = DistributedDataParallel(ranker)
    found = []
    for step in range(LEARNED_STEPS):
        model.zero_grad()
        # One step begins with the rank that has none at all.
        model(*learned_parts(LEARNED_SIZES[(rank + step) % 3], rank + step)).backward()
        gradients = [each.grad for each in (ranker.noise.scale, *ranker.heads.parameters())]
        found.append([each.item() for each in gradients if isinstance(each, Tensor)])
    return found


def test_a_learned_type_has_the_gradient_of_one_process_though_ranks_have_none_of_its_rows(ranks: RankPool) -> None:
    results = ranks.run(run_learned)
    for step in range(LEARNED_STEPS):
        parts = [learned_parts(LEARNED_SIZES[(r + step) % 3], r + step) for r in range(ranks.world_size)]
        rows = {
            task: [pair for x, y in parts for pair in zip(x[task].flatten().tolist(), y[task].tolist(), strict=True)]
            for task in LEARNED_NAMES
        }
        present = sum(bool(each) for each in rows.values())
        by_scale, by_head = 0.0, []
        for task, pairs in rows.items():
            share = 1 / (present * len(pairs)) if pairs else 0.0
            errors = [0.5 * x + 0.5 - y for x, y in pairs]
            if task == "event":
                slopes = [share * reference.bce_slope(0.5 * x + 0.5, y) for x, y in pairs]
            else:
                slopes = [share * e / 2 for e in errors]  # 2e / s² at s = 2
                by_scale += math.fsum(share * (1 - e * e / 4) for e in errors)  # 2/s - 2e²/s³
            by_head += [math.fsum(g * x for g, (x, _) in zip(slopes, pairs)), math.fsum(slopes)]
        for result in results:
            assert result[step] == pytest.approx([by_scale, *by_head], rel=TOLERANCE, abs=TOLERANCE)
