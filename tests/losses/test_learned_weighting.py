"""A module as the reduction over tasks: learned uncertainty weighting, trained beside the model on all ranks.

Kendall, Gal and Cipolla 2018, "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and Semantics",
equation 10 for classification: Σ_t exp(-s_t)·L_t + s_t / 2 with a learned s_t = log σ_t².
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.support import reference
from tests.support.cases import Ranker, Rows, Settings, columns, joined, random_rows, split
from tests.support.rank_pool import RankPool
from twloss import MultiTaskLoss

STEPS, RATE, TASKS = 10, 0.1, 3


class UncertaintyWeighting(nn.Module):
    """Σ_t exp(-s_t)·L_t + s_t / 2."""

    def __init__(self, tasks: int, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(torch.zeros(tasks, dtype=dtype))

    def forward(self, losses: Tensor) -> Tensor:
        """The weighted sum."""
        return ((-self.log_variance).exp() * losses + self.log_variance / 2).sum()


def weighted_ranker() -> Ranker:
    """The model, its loss, and in the loss the weighting."""
    names = Settings(TASKS).names()
    return Ranker(
        MultiTaskLoss("bce_with_logits", names, "mean", UncertaintyWeighting(TASKS), global_batch=True), TASKS
    )


def train(rank: int, steps: list[list[Rows]]) -> dict[str, Any]:
    """One rank's training; its parameters, the raw losses of the last step, and the metric's result."""
    ranker = weighted_ranker()
    model: nn.Module = DistributedDataParallel(ranker) if torch.distributed.is_initialized() else ranker
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    for parts in steps:
        optimizer.zero_grad()
        losses = model(parts[rank])
        losses["loss"].backward()
        optimizer.step()
    return {
        "parameters": {name: p.flatten().tolist() for name, p in ranker.named_parameters()},
        "raw": {key: value.item() for key, value in losses.items()},
        "computed": {key: value.item() for key, value in ranker.loss.train_metric.compute().items()},
    }


def sizes(world_size: int) -> list[list[int]]:
    return [[(3 + 5 * rank + step) % 7 for rank in range(world_size)] for step in range(STEPS)]


def test_it_trains_under_ddp_with_the_same_parameters_on_all_ranks(ranks: RankPool) -> None:
    case = Settings(TASKS)
    steps = split(random_rows(case, sum(map(sum, sizes(ranks.world_size))), 4, weighted=False), sizes(ranks.world_size))
    answers = ranks.run(train, steps)
    alone = train(0, [[joined(parts)] for parts in steps])
    for answer in answers:
        assert answer["parameters"] == answers[0]["parameters"]
        for name, values in alone["parameters"].items():
            assert answer["parameters"][name] == pytest.approx(values, rel=1e-10)
    assert any(value != 0.0 for value in answers[0]["parameters"]["loss.global_reduction.log_variance"])


def test_the_raw_losses_stay_what_they_were() -> None:
    case = Settings(TASKS)
    rows = random_rows(case, 9, 4, weighted=False)
    ranker = weighted_ranker()
    with torch.no_grad():
        ranker.loss.global_reduction.log_variance.fill_(0.7)  # type: ignore[union-attr]
    expected = reference.losses(columns(case, rows), case.rule())
    combined = math.fsum(math.exp(-0.7) * expected[f"loss/{name}"] + 0.35 for name in case.names())
    for losses in (ranker(rows), ranker.loss.train_metric.compute()):
        for name in case.names():
            assert losses[f"loss/{name}"].item() == pytest.approx(expected[f"loss/{name}"], rel=1e-12)
        assert losses["loss"].item() == pytest.approx(combined, rel=1e-12)


def test_its_parameters_are_the_losss_once_and_move_with_it() -> None:
    ranker = weighted_ranker()
    assert [name for name, _ in ranker.loss.named_parameters()] == ["global_reduction.log_variance"]
    assert list(ranker.loss.state_dict()) == ["global_reduction.log_variance"]
    ranker.half()
    rows = random_rows(Settings(TASKS), 4, 0, weighted=False)
    ranker(rows.to(torch.float16))["loss"].backward()
    assert ranker.loss.train_metric.compute()["loss"].dtype == torch.float64
