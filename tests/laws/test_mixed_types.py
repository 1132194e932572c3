"""The two laws for tasks of different kinds, each with rows of its own, on one process and on real ranks."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.support import reference
from tests.support.mixed import Batch, Mixed, Ranker, columns, joined, mixed_cases, parameter_gradients, random_batch
from tests.support.rank_pool import RankPool
from twloss import MultiTaskLoss

TOLERANCE = 1e-12
on_ranks = settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])


def run_steps(rank: int, case: Mixed, steps: list[list[Batch]], options: dict[str, Any]) -> dict[str, Any]:
    """One rank's life: its part of every step, forward and backward, then compute()."""
    ranker = Ranker(case, **options)
    # DDP as it comes: with find_unused_parameters=False, a head that a step does not reach is an error.
    model: nn.Module = DistributedDataParallel(ranker) if torch.distributed.is_initialized() else ranker
    values, gradients = [], []
    for parts in steps:
        model.zero_grad()
        losses = model(parts[rank])
        losses["loss"].backward()
        values.append({key: value.item() for key, value in losses.items()})
        gradients.append([each.grad.flatten().tolist() for each in ranker.heads.parameters() if each.grad is not None])
    computed = ranker.loss.train_metric.compute()
    return {"values": values, "gradients": gradients, "computed": {key: v.item() for key, v in computed.items()}}


def expect_split_invariance(case: Mixed, steps: list[list[Batch]], results: list[dict[str, Any]]) -> None:
    """compute() is the oracle's of all rows, in the tasks' order, and the same on all ranks."""
    rows = joined([batch for parts in steps for batch in parts])
    expected = reference.losses(columns(case, rows), case.rule())
    for result in results:
        assert result["computed"] == pytest.approx(expected, rel=TOLERANCE, abs=1e-300, nan_ok=True)
        assert list(result["computed"]) == list(expected)
        assert repr(result["computed"]) == repr(results[0]["computed"])


def expect_exact_gradients(case: Mixed, steps: list[list[Batch]], results: list[dict[str, Any]]) -> None:
    """Each step's losses and gradients are the oracle's of the rows of all ranks."""
    for step, parts in enumerate(steps):
        rows = joined(parts)
        expected = reference.losses(columns(case, rows), case.rule())
        expected = {key: 0.0 if math.isnan(value) else value for key, value in expected.items()}
        if case.global_reduction == "norm" and not any(expected.values()):
            expected["loss"] = 1.0
        gradients = parameter_gradients(case, rows)
        scale = max([1e-300, *(abs(value) for each in gradients for value in each)])
        for result in results:
            assert result["values"][step] == pytest.approx(expected, rel=TOLERANCE, abs=1e-300)
            assert len(result["gradients"][step]) == len(gradients)
            for ours, theirs in zip(result["gradients"][step], gradients):
                assert ours == pytest.approx(theirs, rel=0, abs=TOLERANCE * scale)


@given(mixed_cases(world_size=1))
@settings(max_examples=150)
def test_both_laws_on_one_process(case: tuple[Mixed, list[list[Batch]]]) -> None:
    options, steps = case
    for global_batch in (False, True):
        results = [run_steps(0, options, steps, {"global_batch": global_batch})]
        expect_split_invariance(options, steps, results)
        expect_exact_gradients(options, steps, results)


@on_ranks
@given(data=st.data())
@pytest.mark.parametrize("global_batch", [False, True])
def test_both_laws_on_ranks(ranks: RankPool, data: st.DataObject, global_batch: bool) -> None:
    options, steps = data.draw(mixed_cases(ranks.world_size))
    results = ranks.run(run_steps, options, steps, {"global_batch": global_batch})
    expect_split_invariance(options, steps, results)
    if global_batch:
        expect_exact_gradients(options, steps, results)


KINDS = ("binary", "three classes", "squared", "binary", "five classes")


def run_added(rank: int, case: Mixed, parts: list[Batch]) -> list[list[float]]:
    """The gradients of the heads, which are added over ranks by hand."""
    ranker = Ranker(case, global_batch=True, gradient_reduction="sum")
    ranker(parts[rank])["loss"].backward()
    for parameter in ranker.heads.parameters():
        torch.distributed.all_reduce(parameter.grad)
    return [each.grad.flatten().tolist() for each in ranker.heads.parameters() if each.grad is not None]


def test_gradients_that_are_added_are_those_of_one_process(ranks: RankPool) -> None:
    case = Mixed(KINDS, weighted=True)
    sizes = [[3, 1, 0, 2, 4], [0, 5, 0, 1, 0], [2, 0, 1, 0, 3]]
    parts = [random_batch(case, sizes[rank], rank) for rank in range(ranks.world_size)]
    expected = parameter_gradients(case, joined(parts))
    for found in ranks.run(run_added, case, parts):
        for ours, theirs in zip(found, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=TOLERANCE, abs=TOLERANCE)


def run_window(rank: int, case: Mixed, steps: list[list[Batch]], total: list[float]) -> list[list[float]]:
    """The gradients of one window of micro-batches, whose rows are known in all."""
    model: nn.Module = Ranker(case, global_batch=True)
    if torch.distributed.is_initialized():
        model = DistributedDataParallel(model)
    for parts in steps:
        model(parts[rank], torch.tensor(total, dtype=torch.float64))["loss"].backward()
    return [each.grad.flatten().tolist() for each in model.parameters() if each.grad is not None]


def window() -> tuple[Mixed, list[list[Batch]], list[float]]:
    """Micro-batches of two ranks, and each task's number of rows; one task has none at all."""
    case = Mixed(KINDS, weighted=True)
    sizes = [[[3, 1, 0, 2, 4], [0, 5, 0, 1, 0]], [[0, 0, 0, 2, 0], [1, 2, 0, 0, 3]]]
    steps = [
        [random_batch(case, own, 2 * step + rank) for rank, own in enumerate(each)] for step, each in enumerate(sizes)
    ]
    return case, steps, [float(sum(own[t] for each in sizes for own in each)) for t in range(len(KINDS))]


def test_a_normalizer_of_each_task_makes_accumulation_exact(two_ranks: RankPool) -> None:
    case, steps, total = window()
    # One process knows all at once: a task without a row is out of the mean over tasks, as its total of 0 says.
    expected = parameter_gradients(case, joined([batch for parts in steps for batch in parts]))
    alone = run_window(0, case, [[batch] for parts in steps for batch in parts], total)
    for found in (alone, *two_ranks.run(run_window, case, steps, total)):
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


class LearnedNoise(nn.Module):
    """A regression of which the noise is learned too."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """((x - y) / s)² + 2 log s."""
        return ((logits - labels) / self.scale).square() + 2 * self.scale.log()


LEARNED_NAMES = ("price", "event", "time")
# Of each rank, the rows of each task: a rank without the learned type's, one without any, and one without the event.
LEARNED_SIZES = [(0, 2, 0), (0, 0, 0), (3, 0, 1)]
LEARNED_STEPS = 2


class WithLearnedNoise(nn.Module):
    """A head a task; two of the tasks share a type that has a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(1, 1, dtype=torch.float64) for _ in LEARNED_NAMES)
        self.noise = noise = LearnedNoise()
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
