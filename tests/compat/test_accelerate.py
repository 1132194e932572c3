"""examples/accelerate_ranker.py, on one process and on two: an accumulated step is the step of one big batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from examples import accelerate_ranker as example
from tests.support import reference
from tests.support.by_hand import Columns, HandRanker, Rows, mean_of_means, together
from tests.support.launch import as_if_from_torchrun, script
from tests.support.rank_pool import on_one_or_two

EPOCHS = 2


class Answer(NamedTuple):
    """What a rank has computed, and its parameters after the last step."""

    results: dict[str, float]
    parameters: list[float]


class Remembering(example.Ranker):
    """Remembers the last of its kind."""

    last: Remembering

    def __init__(self) -> None:
        super().__init__()
        type(self).last = self


def forget_earlier_accelerators() -> None:
    """A process's Accelerators share their state, whether the next optimizer step is one included."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def _no_earlier_accelerator() -> None:
    forget_earlier_accelerators()


def run_on_rank(rank: int, accumulation_steps: int) -> Answer:
    """Run the example with the setting that a user of accumulate() may have."""
    accelerator = partial(Accelerator, gradient_accumulation_steps=accumulation_steps)
    forget_earlier_accelerators()
    with (
        as_if_from_torchrun(),
        mock.patch.object(example, "Accelerator", accelerator),
        mock.patch.object(example, "Ranker", Remembering),
    ):
        results = example.main(EPOCHS)
    heads = Remembering.last.heads
    return Answer(results, [*heads.weight.flatten().tolist(), *heads.bias.tolist()])


class Truth(NamedTuple):
    """One process by hand, with all rows of a window in one batch."""

    losses: dict[str, float]
    averaged: dict[str, float]
    """The mean over windows of their means."""
    parameters: list[float]


@pytest.fixture(scope="module")
def truth() -> Truth:
    torch.manual_seed(0)
    data = Rows.of(*example.rows().tensors)
    ranker = HandRanker(example.Ranker().heads, example.TASKS, learning_rate=0.5, missing=example.MISSING)
    seen: list[Columns] = []
    for _ in range(EPOCHS):
        seen = [ranker.step(batch) for batch in data.batches(example.WINDOW * example.GLOBAL_BATCH)]
    rule = reference.Rule()
    return Truth(reference.losses(together(seen), rule), mean_of_means(seen, rule), ranker.parameters())


@pytest.fixture(params=[1, 2], ids=["one process", "two processes"])
def run(request: pytest.FixtureRequest) -> Callable[[int], list[Answer]]:
    """Runs the example; what each rank has to say."""
    return on_one_or_two(request, run_on_rank)


@pytest.mark.parametrize("accumulation_steps", [1, 3, 4])
def test_losses_and_parameters_are_those_of_one_process_with_big_batches(
    run: Callable[[int], list[Answer]], truth: Truth, accumulation_steps: int
) -> None:
    for answer in run(accumulation_steps):
        assert answer.results == pytest.approx(truth.losses, rel=1e-12)
        assert answer.parameters == pytest.approx(truth.parameters, rel=1e-12, abs=1e-12)
    # Windows of 40, 40 and 7 rows, whose means have not the same weight.
    assert abs(truth.averaged["loss"] / truth.losses["loss"] - 1) > 1e-3


@pytest.mark.parametrize(
    ("batches", "expected"), [(4, [False, True, True, True]), (5, [False, True, False, True, False])]
)
def test_accumulate_goes_wrong_at_the_end_where_batches_are_fetched_ahead(batches: int, expected: list[bool]) -> None:
    """Why the example does without it: a step too many, or one too few, in the last window of two batches."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    data = DataLoader(TensorDataset(torch.ones(batches, 1)), batch_size=1)
    model, loader = accelerator.prepare(nn.Linear(1, 1, bias=False), data)
    iterator, steps = iter(loader), []
    while window := list(islice(iterator, 2)):
        for (batch,) in window:
            with accelerator.accumulate(model):
                accelerator.backward(model(batch).sum())
                steps.append(accelerator.sync_gradients)
    assert steps == expected
    # And backward() has divided by the two.
    assert model.weight.grad.item() == batches / 2


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_as_a_script(world_size: int, truth: Truth) -> None:
    printed = script(world_size, example.__file__)
    assert printed == pytest.approx(truth.losses, abs=1e-6)
