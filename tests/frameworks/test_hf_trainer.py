"""examples/hf_trainer.py, on one process and on two: three micro-batches are one batch, and the evaluation is exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.support import quality_reference, reference
from tests.support.by_hand import HandRanker, Rows
from tests.support.launch import as_if_from_torchrun, script
from tests.support.rank_pool import on_one_or_two

pytest.importorskip("transformers", reason="needs the extra hugging-face; see constraints-frameworks.txt")

from accelerate.state import AcceleratorState, GradientState, PartialState

from examples import hf_trainer as example
from twloss import MultiTaskLoss

EPOCHS = 3
# The Trainer adds the micro-batches' losses up in float32.
FLOAT32 = 4 * 2**-24
MISSING = -1


class Answer(NamedTuple):
    """What a rank has logged, and its parameters after the last step."""

    train: list[dict[str, float]]
    evaluations: list[dict[str, float]]
    parameters: list[float]


class SomeMissing(example.Rows):
    """Three labels in ten are missing, and none of them of the same rows."""

    def __init__(self, count: int, seed: int) -> None:
        super().__init__(count, seed)
        generator = torch.Generator().manual_seed(seed + 10)
        self.labels[torch.rand(self.labels.shape, generator=generator) < 0.3] = MISSING


class MissingRanker(example.Ranker):
    """Leaves missing labels out."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = MultiTaskLoss("bce_with_logits", example.TASKS, ignore_index=MISSING)


class WithoutKwargs(example.Ranker):
    """Takes what the example's takes, and nothing else; remembers what it got."""

    counts: ClassVar[set[Tensor | None]] = set()

    def forward(  # type: ignore[override]
        self, features: Tensor, labels: Tensor, num_items_in_batch: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The example's."""
        self.counts.add(num_items_in_batch)
        return super().forward(features, labels, num_items_in_batch)


class LogitsAlone(example.Ranker):
    """A model that knows of no loss: it is no submodule, though found through it, as the example logs it."""

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["loss"] = self._modules.pop("loss")

    def forward(self, features: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:  # type: ignore[override]
        """No loss."""
        assert labels is None
        return {"logits": self.heads(features)}


class LossOfTheTrainer(example.RankerTrainer):
    """Gives the loss to the Trainer, as the guide has it."""

    def __init__(self, model: example.Ranker, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, compute_loss_func=self.loss_of, **kwargs)

    def loss_of(self, outputs: dict[str, Tensor], labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        """What is trained on."""
        loss = self.model.loss
        loss.train(torch.is_grad_enabled())
        value: Tensor = loss(outputs["logits"], labels, normalizer=num_items_in_batch)["loss"]
        return value


PLAIN: dict[str, type] = {}
WITH_MISSING: dict[str, type] = {"Ranker": MissingRanker, "Rows": SomeMissing}
OUTSIDE = {"Ranker": LogitsAlone, "RankerTrainer": LossOfTheTrainer}


def answer_of(trainer: example.RankerTrainer) -> Answer:
    history = trainer.state.log_history
    heads = trainer.model.heads
    return Answer(
        [entry for entry in history if "train/loss" in entry],
        [entry for entry in history if "eval_loss" in entry],
        [*heads.weight.flatten().tolist(), *heads.bias.tolist()],
    )


def run_on_rank(rank: int, changes: dict[str, type] = PLAIN) -> Answer:
    PartialState._reset_state()
    AcceleratorState._reset_state()
    GradientState._reset_state()
    with as_if_from_torchrun(), mock.patch.dict(vars(example), changes):
        return answer_of(example.main(EPOCHS))


@pytest.fixture(params=[1, 2], ids=["one process", "two processes"])
def run(request: pytest.FixtureRequest) -> Callable[..., list[Answer]]:
    """Runs the example; what each rank has to say."""
    return on_one_or_two(request, run_on_rank)


class Truth(NamedTuple):
    """One process by hand, with all rows of a window in one batch."""

    train: list[dict[str, float]]
    evaluations: list[dict[str, float]]
    parameters: list[float]
    averaged: float
    """The loss of the first window as the mean of its micro-batches' means."""


def truth_of(rows: type[example.Rows], missing: float | None) -> Truth:
    torch.manual_seed(0)
    data, held_out = (rows(count, seed) for count, seed in ((example.TRAIN_ROWS, 1), (example.EVAL_ROWS, 2)))
    train, evaluation = (Rows.of(part.features, part.labels) for part in (data, held_out))
    ranker = HandRanker(example.Ranker().heads, example.TASKS, learning_rate=0.5, missing=missing)
    parts = [ranker.losses(batch)["loss"] for batch in train.batches(example.GLOBAL_BATCH)]
    losses, qualities = [], []
    for _ in range(EPOCHS):
        losses.append(reference.losses(ranker.step(train), reference.Rule()))
        qualities.append(quality_of(ranker, evaluation))
    return Truth(losses, qualities, ranker.parameters(), sum(parts) / len(parts))


def quality_of(ranker: HandRanker, rows: Rows) -> dict[str, float]:
    logits = [
        [b + sum(w * x for w, x in zip(row, features)) for row, b in zip(ranker.matrix, ranker.bias)]
        for features in rows.features
    ]
    return quality_reference.result(
        {
            task: [(x[t], y[t], 1.0) for x, y in zip(logits, rows.labels) if y[t] != ranker.missing]
            for t, task in enumerate(example.TASKS)
        }
    )


@pytest.mark.parametrize("changes", [PLAIN, OUTSIDE], ids=["loss in the model", "loss of the Trainer"])
def test_three_micro_batches_are_one_batch(run: Callable[..., list[Answer]], changes: dict[str, type]) -> None:
    truth = truth_of(example.Rows, None)
    for answer in run(changes):
        assert answer.parameters == pytest.approx(truth.parameters, rel=1e-12, abs=1e-12)
        assert [entry["loss"] for entry in answer.train] == pytest.approx(
            [losses["loss"] for losses in truth.train], rel=FLOAT32
        )
        for entry, losses in zip(answer.train, truth.train, strict=True):
            assert {key: entry[f"train/{key}"] for key in losses} == pytest.approx(losses, rel=1e-12)
    # The usual loss is another number.
    assert abs(truth.averaged / truth.train[0]["loss"] - 1) > 1e-4


def test_without_kwargs_the_model_is_told_no_count() -> None:
    """Why the example's forward has them."""
    run_on_rank(0, {"Ranker": WithoutKwargs})
    assert WithoutKwargs.counts == {None}


def test_the_evaluation_is_that_of_its_rows_each_counted_once(run: Callable[..., list[Answer]]) -> None:
    truth = truth_of(example.Rows, None)
    for answer in run():
        for entry, quality in zip(answer.evaluations, truth.evaluations, strict=True):
            assert quality_reference.close({key: entry[f"eval_{key}"] for key in quality}, quality, 1e-12)


def test_missing_labels_are_counted_by_task(run: Callable[..., list[Answer]]) -> None:
    truth = truth_of(SomeMissing, MISSING)
    for answer in run(WITH_MISSING):
        assert answer.parameters == pytest.approx(truth.parameters, rel=1e-12, abs=1e-12)
        for entry, losses in zip(answer.train, truth.train, strict=True):
            assert entry["loss"] == pytest.approx(losses["loss"], rel=FLOAT32)
            assert {key: entry[f"train/{key}"] for key in losses} == pytest.approx(losses, rel=1e-12)


@pytest.mark.parametrize("world_size", [1, 2])
def test_as_a_script(world_size: int) -> None:
    printed = script(world_size, example.__file__)
    for key, value in truth_of(example.Rows, None).evaluations[-1].items():
        assert printed[f"eval_{key}"] == pytest.approx(value, abs=1e-6)
