"""Lightning's callbacks on the exact evaluation loss, and its advice about ``sync_dist``, on one process and on two."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.trainer.connectors.logger_connector.result import warning_cache

from examples import lightning_ranker as example
from tests.compat.test_lightning import Views, eval_data, parts_of, run_example, train_data, values_of
from tests.support.by_hand import HandRanker
from tests.support.launch import as_if_from_torchrun
from tests.support.rank_pool import RankPool, on_one_or_two

LEARNING_RATE, PATIENCE, MOST_EPOCHS = 4.0, 3, 20


def in_great_steps(self: example.Ranker) -> torch.optim.Optimizer:
    """An optimiser after whose first steps the evaluation loss rises."""
    return torch.optim.SGD(self.parameters(), lr=LEARNING_RATE)


class Tensors(example.Ranker):
    """Logs what compute() gives as tensors, which Lightning takes for those of a rank, by all of its options."""

    def on_validation_epoch_end(self) -> None:
        """All evaluation rows since the last time."""
        losses = self.loss.compute()
        ways: dict[str, Any] = {"bare": {}, "zero": {"rank_zero_only": True}, "synced": {"sync_dist": True}}
        for name, options in ways.items():
            self.log_dict({f"{name}/{key}": value for key, value in losses.items()}, **options)


class Answer(NamedTuple):
    """What a rank has seen."""

    evals: list[float]
    """The evaluation losses that it logged while it trained."""
    last: dict[str, float]
    """All that callbacks read in the end."""
    advice: list[str]
    """What Lightning said about sync_dist."""


def run_on_rank(rank: int, ranker: type[example.Ranker], folder: str | None, epochs: int) -> Answer:
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    warning_cache.clear()  # in which Lightning keeps what it has said
    with (
        as_if_from_torchrun(),
        mock.patch.object(example, "Ranker", ranker),
        mock.patch.object(ranker, "configure_optimizers", in_great_steps),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        results, recorder = run_example(devices=world_size, folder=folder, precision="64-true", max_epochs=epochs)
    evals = values_of(recorder.logged, "eval/loss")[1:]  # after the untrained one
    return Answer(evals, results, [text for each in caught if "sync_dist" in (text := str(each.message))])


Run = Callable[..., list[Answer]]


@pytest.fixture(params=[1, 2], ids=["one process", "two processes"])
def run(request: pytest.FixtureRequest) -> Run:
    """Runs the example; what each rank has to say."""
    return on_one_or_two(request, run_on_rank)


class Evaluation(NamedTuple):
    """One of those by hand."""

    loss: float
    parameters: list[float]
    steps: int


def expected(world_size: int) -> list[Evaluation]:
    """The evaluations of one process, by hand, up to the last of three in a row that are not the best."""
    torch.manual_seed(0)
    heads, data, held_out = example.Ranker().heads, train_data(), eval_data()
    ranker = HandRanker(heads, example.TASKS, learning_rate=LEARNING_RATE, missing=example.MISSING)
    evaluations: list[Evaluation] = []
    best, since, steps = math.inf, 0, 0
    for _ in range(MOST_EPOCHS):
        for number, step in enumerate(parts_of(example.TRAIN_ROWS, world_size)):
            ranker.step(data.take([n for share in step for n in share]))
            steps += 1
            if number in (3, 7):
                loss = ranker.losses(held_out)["loss"]
                evaluations.append(Evaluation(loss, ranker.parameters(), steps))
                best, since = (loss, 0) if loss < best else (best, since + 1)
                if since == PATIENCE:
                    return evaluations
    raise AssertionError("the loss has to rise")


@pytest.mark.parametrize("ranker", [example.Ranker, Views], ids=["by one collective", "views"])
def test_training_stops_and_the_best_weights_are_kept_by_the_loss_of_all_rows(
    run: Run, ranker: type[example.Ranker], tmp_path: Path
) -> None:
    answers = run(ranker, str(tmp_path), MOST_EPOCHS)
    truth = expected(len(answers))
    for answer in answers:
        assert answer.evals == pytest.approx([each.loss for each in truth], rel=1e-9)
        assert answer.last["eval/loss"] == answers[0].evals[-1]
        assert answer.advice == []
    best = min(truth)
    assert best != truth[-1]
    (file,) = tmp_path.iterdir()
    kept: dict[str, Any] = torch.load(file, weights_only=False)
    assert kept["global_step"] == best.steps
    heads = kept["state_dict"]
    parameters = [*heads["heads.weight"].flatten().tolist(), *heads["heads.bias"].tolist()]
    assert parameters == pytest.approx(best.parameters, rel=1e-9)
    scores = [state.get("best_score", state.get("best_model_score")) for state in kept["callbacks"].values()]
    assert [score.item() for score in scores] == pytest.approx([best.loss] * 2, rel=1e-9)


def test_tensors_are_what_lightning_gives_advice_about(two_ranks: RankPool) -> None:
    """One warning a key, which the test above would see; rank_zero_only ends none, and sync_dist changes no number."""
    answers = two_ranks.run(run_on_rank, Tensors, None, 1)
    keys = [f"loss/{task}" for task in example.TASKS] + ["loss"]
    warned = [key for key in answers[0].last if any(f"'{key}'" in each for each in answers[0].advice)]
    assert sorted(warned) == sorted(f"{name}/{key}" for name in ("bare", "zero") for key in keys)
    assert len(warned) == len(answers[0].advice)
    for answer in answers:
        assert [answer.last[f"synced/{key}"] for key in keys] == [answer.last[f"bare/{key}"] for key in keys]
