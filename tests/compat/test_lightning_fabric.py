"""Lightning's Fabric, as the guide has it, on one process and on two: one process's losses and parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from lightning import Fabric

from examples import tensorboard_logging as example
from tests.support import reference
from tests.support.by_hand import Columns, HandRanker, Rows, together
from tests.support.launch import as_if_from_torchrun
from tests.support.rank_pool import on_one_or_two


class Answer(NamedTuple):
    """What a rank has computed, and its parameters after the last step."""

    losses: dict[str, float]
    parameters: list[float]


def run_on_rank(rank: int) -> Answer:
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    with as_if_from_torchrun():
        fabric = Fabric(accelerator="cpu", devices=world_size, strategy="ddp" if world_size > 1 else "auto")
        fabric.launch()
        torch.manual_seed(0)
        ranker = example.Ranker()
        model, optimizer = fabric.setup(ranker, torch.optim.SGD(ranker.parameters(), lr=0.5))
        for features, labels in example.share_of(example.rows(example.TRAIN_ROWS, seed=1)):
            optimizer.zero_grad()
            fabric.backward(model(features, labels)["loss"])
            optimizer.step()
    losses = {key: value.item() for key, value in ranker.loss.train_metric.compute().items()}
    return Answer(losses, [*ranker.heads.weight.flatten().tolist(), *ranker.heads.bias.tolist()])


@pytest.fixture(params=[1, 2], ids=["one process", "two processes"])
def run(request: pytest.FixtureRequest) -> Callable[[], list[Answer]]:
    """Trains; what each rank has to say."""
    return on_one_or_two(request, run_on_rank)


def test_losses_and_parameters_are_those_of_one_process(run: Callable[[], list[Answer]]) -> None:
    torch.manual_seed(0)
    ranker = HandRanker(example.Ranker().heads, example.TASKS, learning_rate=0.5, missing=example.MISSING)
    data = Rows.of(*example.rows(example.TRAIN_ROWS, seed=1))
    seen: list[Columns] = [ranker.step(batch) for batch in data.batches(example.GLOBAL_BATCH)]
    losses = reference.losses(together(seen), reference.Rule())
    for answer in run():
        assert answer.losses == pytest.approx(losses, rel=1e-12)
        assert answer.parameters == pytest.approx(ranker.parameters(), rel=1e-12, abs=1e-12)
