"""Negatives that were sampled down: the quality in the population, by docs/quality.md's table of what to do about it.

A population of groups of rows, each with its own share of positives. Of the negatives of each group a tenth was kept,
so that the sums of a sample with weights are those of the population, to the last digit; and a second population, drawn
at random from known probabilities. The oracle has all rows of the population, and sees no sample.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import quality_reference
from tests.support.results import assert_close, numbers
from twloss import Loss, MultiTaskLoss, RankingQuality

RATE = 0.1
GROUPS = ((10, 500), (3, 1000), (40, 200), (1, 2000), (25, 50))
"""The positives and negatives of each group of rows that a model can't tell from each other."""
WEIGHTED, SHIFTED, BOTH, NOTHING = "weights", "shift", "both", "nothing"

# How the model was trained, on what it is evaluated, and what to do: the table of docs/quality.md.
TABLE = [
    ("all rows", "all rows", NOTHING),
    ("weighted sample", "all rows", NOTHING),
    ("sample", "all rows", SHIFTED),
    ("all rows", "sample", WEIGHTED),
    ("weighted sample", "sample", WEIGHTED),
    ("sample", "sample", BOTH),
]


def ideal_logit(positives: float, negatives: float, trained_on: str) -> float:
    """The logit of least loss of a group: the log odds, by weight, of the rows that it was trained on."""
    return math.log(positives / (negatives * RATE if trained_on == "sample" else negatives))


def rows_of(trained_on: str, evaluated_on: str) -> tuple[Tensor, Tensor]:
    """The model's logits and the labels of all rows to evaluate on ``(rows, 1)``."""
    logits, labels = [], []
    for positives, negatives in GROUPS:
        kept = round(negatives * RATE) if evaluated_on == "sample" else negatives
        logits += [ideal_logit(positives, negatives, trained_on)] * (positives + kept)
        labels += [1.0] * positives + [0.0] * kept
    return tuple(torch.tensor(each, dtype=torch.float64).unsqueeze(1) for each in (logits, labels))  # type: ignore[return-value]


def weights_of(labels: Tensor) -> Tensor:
    return torch.where(labels == 1, 1.0, 1.0 / RATE).double()


def population() -> dict[str, float]:
    """The quality of the probabilities of the groups, of all rows."""
    rows = [(math.log(p / n), y, float(count)) for p, n in GROUPS for y, count in ((1.0, p), (0.0, n))]
    return quality_reference.result({"like": rows})


def measured(logits: Tensor, labels: Tensor, remedy: str, *, attached: bool = False) -> dict[str, float]:
    quality = RankingQuality(["like"], logit_shift=math.log(RATE) if remedy in (SHIFTED, BOTH) else None)
    weights = weights_of(labels) if remedy in (WEIGHTED, BOTH) else None
    if not attached:
        quality.update(logits, labels, weights)
        return numbers(quality.compute())
    loss = MultiTaskLoss("bce_with_logits", ["like"], quality=quality).eval()
    loss(logits, labels, weights)
    return numbers(loss.eval_quality.compute())


@pytest.mark.parametrize("attached", [False, True], ids=["alone", "attached"])
@pytest.mark.parametrize(("trained_on", "evaluated_on", "remedy"), TABLE)
def test_what_to_do_gives_the_quality_in_the_population(
    trained_on: str, evaluated_on: str, remedy: str, attached: bool
) -> None:
    found = measured(*rows_of(trained_on, evaluated_on), remedy, attached=attached)
    assert_close(found, population(), 1e-11)
    assert found["calibration/like"] == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize(("trained_on", "evaluated_on", "remedy"), TABLE)
def test_anything_else_does_not(trained_on: str, evaluated_on: str, remedy: str) -> None:
    """The normalised entropy is another one; the calibration too, but where logits and labels are off by the same."""
    for other in {NOTHING, WEIGHTED, SHIFTED, BOTH} - {remedy}:
        found = measured(*rows_of(trained_on, evaluated_on), other)
        assert abs(found["ne/like"] / population()["ne/like"] - 1) > 0.05
        if {remedy, other} != {NOTHING, BOTH}:
            assert abs(math.log(found["calibration/like"])) > math.log(2)


@pytest.mark.parametrize("trained_on", ["all rows", "sample", "weighted sample"])
def test_the_ideal_logits_are_those_of_least_loss(trained_on: str) -> None:
    """The loss is convex, and its gradient by each group's logit is 0 there."""
    heads = torch.tensor([ideal_logit(*group, trained_on) for group in GROUPS], dtype=torch.float64, requires_grad=True)
    _, labels = rows_of(trained_on, trained_on.removeprefix("weighted "))
    counts = [p + round(n * (1.0 if trained_on == "all rows" else RATE)) for p, n in GROUPS]
    logits = heads.repeat_interleave(torch.tensor(counts)).unsqueeze(1)
    weights = weights_of(labels) if trained_on == "weighted sample" else None
    Loss("bce_with_logits")(logits, labels, weights).backward()
    assert heads.grad is not None
    assert heads.grad.abs().max() < 1e-15


def test_pos_weights_move_the_ideal_logit_by_their_logarithm() -> None:
    factor = 27.3
    logits, labels = rows_of("all rows", "all rows")
    trained = (logits + math.log(factor)).requires_grad_()
    loss = MultiTaskLoss(
        "bce_with_logits",
        ["like"],
        pos_weights=factor,
        quality=RankingQuality(["like"], logit_shift=-math.log(factor)),
    )
    loss(trained, labels)["loss"].backward()
    assert trained.grad is not None
    counts = torch.tensor([sum(group) for group in GROUPS])
    of_groups = [part.sum().item() for part in trained.grad.split(counts.tolist())]
    assert of_groups == pytest.approx([0.0] * len(GROUPS), abs=1e-14)
    assert_close(numbers(loss.train_quality.compute()), population(), 1e-11)


# Drawn at random.


def drawn() -> tuple[Tensor, Tensor, Tensor]:
    """The true log odds of 100,000 rows, their labels, and which of them are kept."""
    generator = torch.Generator().manual_seed(0)
    draws: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    truth = torch.randn(100_000, **draws) - 3.0
    labels = (torch.rand(100_000, **draws) < truth.sigmoid()).double()
    return truth, labels, (labels == 1) | (torch.rand(100_000, **draws) < RATE)


@pytest.mark.parametrize(("trained_on", "evaluated_on", "remedy"), TABLE)
def test_a_population_drawn_at_random(trained_on: str, evaluated_on: str, remedy: str) -> None:
    """To within four standard errors of 7,000 positives and as many kept negatives."""
    truth, labels, kept = drawn()
    oracle = quality_reference.result({"like": [(x, y, 1.0) for x, y in zip(truth.tolist(), labels.tolist())]})
    logits = truth - math.log(RATE) if trained_on == "sample" else truth
    if evaluated_on == "sample":
        logits, labels = logits[kept], labels[kept]
    found = measured(logits.unsqueeze(1), labels.unsqueeze(1), remedy)
    for key in ("calibration/like", "ne/like", "ctr/like", "logloss/like", "weight/like"):
        assert found[key] == pytest.approx(oracle[key], rel=0.06)
    assert found["calibration/like"] == pytest.approx(1.0, rel=0.06)


def test_of_several_tasks_weights_are_right_where_no_shift_is() -> None:
    """Rows that are negative in both tasks are sampled: a negative of one that is a positive of the other is kept."""
    generator = torch.Generator().manual_seed(1)
    labels = (torch.rand(100_000, 2, generator=generator) < torch.tensor([0.05, 0.3])).double()
    positive = labels.amax(1) == 1
    kept = positive | (torch.rand(100_000, generator=generator) < RATE)
    # The base rates are all there is to know, and the ideal logit of each task in the sample is its log odds there.
    logits = labels.mean(0).logit().expand_as(labels)
    of_sample = labels[kept].mean(0).logit()
    weights = torch.where(positive, 1.0, 1.0 / RATE)[kept]
    tasks = ["rare", "common"]
    weighted = RankingQuality(tasks)
    weighted.update(logits[kept], labels[kept], weights)
    found = numbers(weighted.compute())
    assert [found[f"calibration/{task}"] for task in tasks] == pytest.approx([1.0, 1.0], rel=0.03)
    shift = (logits[0] - of_sample).tolist()
    assert all(abs(by / math.log(RATE)) < 0.9 for by in shift)
