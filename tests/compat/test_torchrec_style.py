"""examples/torchrec_style.py, on one process and on two: a train pipeline logs the losses of one process."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from examples import torchrec_style as example
from tests.support import reference
from tests.support.by_hand import Columns, HandRanker, Rows, mean_of_means, together
from tests.support.launch import script
from tests.support.rank_pool import RankPool

POS_WEIGHTS = [1.0, 27.3, 4.0]
RULE = reference.Rule()


def run_on_rank(rank: int) -> list[dict[str, float]]:
    return example.main()


@pytest.fixture(params=[1, 2], ids=["one process", "two processes"])
def run(request: pytest.FixtureRequest) -> Callable[[], list[list[dict[str, float]]]]:
    """Runs the example; what each rank has logged."""
    if request.param == 1:
        return lambda: [run_on_rank(0)]
    pool: RankPool = request.getfixturevalue("two_ranks")
    return lambda: pool.run(run_on_rank)


@pytest.fixture(scope="module")
def steps() -> list[Columns]:
    """The rows of each step, trained on by hand in one process."""
    torch.manual_seed(0)
    model = example.ModelAndLoss(nn.Linear(example.FEATURES, len(example.TASKS), dtype=torch.float64))
    data = example.rows()
    assert isinstance(model.model, nn.Linear)
    ranker = HandRanker(model.model, example.TASKS, learning_rate=0.1, pos_weights=POS_WEIGHTS)
    rows = Rows.of(data.features, data.labels, data.weights)
    return [ranker.step(batch) for batch in rows.batches(example.GLOBAL_BATCH)]


def logged(steps: list[Columns]) -> list[dict[str, float]]:
    intervals = [steps[start : start + example.LOG_EVERY] for start in range(0, len(steps), example.LOG_EVERY)]
    return [reference.losses(together(interval), RULE) for interval in intervals]


def test_what_is_logged_is_the_loss_of_one_process(
    run: Callable[[], list[list[dict[str, float]]]], steps: list[Columns]
) -> None:
    # Two intervals of 45 rows, and a last one of a single row, of which the second rank had none.
    expected = logged(steps)
    assert [len(step["like"]) for step in steps] == [15] * 6 + [1]
    for answer in run():
        assert len(answer) == len(expected) == 3
        for values, truth in zip(answer, expected):
            assert values == pytest.approx(truth, rel=1e-12)
    assert abs(mean_of_means(steps, RULE)["loss"] / reference.losses(together(steps), RULE)["loss"] - 1) > 1e-3


def test_the_model_gives_the_loss_to_train_on_and_detached_outputs() -> None:
    torch.manual_seed(0)
    model = example.ModelAndLoss(nn.Linear(example.FEATURES, len(example.TASKS), dtype=torch.float64))
    batch = example.rows()[:20]
    loss, outputs = model(batch)
    assert loss.requires_grad
    assert not any(value.requires_grad for value in outputs.values())
    assert isinstance(model.model, nn.Linear)
    truth = HandRanker(model.model, example.TASKS, learning_rate=0.1, pos_weights=POS_WEIGHTS).losses(
        Rows.of(batch.features, batch.labels, batch.weights)
    )
    assert {key: outputs[key].item() for key in truth} == pytest.approx(truth, rel=1e-12)
    assert loss.item() == outputs["loss"].item()


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_as_a_script(world_size: int, steps: list[Columns]) -> None:
    printed = script(world_size, example.__file__)
    ends = [*range(example.LOG_EVERY, len(steps), example.LOG_EVERY), len(steps)]
    expected = {f"step {n} {key}": x for n, losses in zip(ends, logged(steps)) for key, x in losses.items()}
    assert printed == pytest.approx(expected, abs=1e-6)
