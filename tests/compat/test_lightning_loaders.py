"""Two validation loaders in Lightning, on one process and on two: the losses of each set, by the guide's own class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from examples import lightning_ranker as example
from tests.compat.test_lightning import Logged, parts_of, run_example, train_data, values_of
from tests.project.test_docs import SYBIL
from tests.support import reference
from tests.support.by_hand import HandRanker, Rows
from tests.support.launch import as_if_from_torchrun
from tests.support.rank_pool import on_one_or_two
from tests.support.site import DOCS
from twloss import MultiTaskLoss

SIZES = {"recent": (example.EVAL_ROWS, 2), "old": (23, 3)}
TASK_WEIGHTS = [[1.0, 1.0, 1.0], [2.0, 0.5, 1.0]]
"""Of each epoch."""


def of_the_guide() -> type[example.Ranker]:
    """The class as the guide has it."""
    (block,) = (each for each in SYBIL.parse(DOCS / "guides/lightning.md") if "class TwoSets" in each.parsed)
    namespace: dict[str, Any] = {}
    exec(block.parsed, namespace)
    return namespace["TwoSets"]  # type: ignore[no-any-return]


class BySegments(example.Ranker):
    """The other way: one loss, to which each loader's number is the id of its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = MultiTaskLoss(
            "bce_with_logits",
            example.TASKS,
            ignore_index=example.MISSING,
            global_batch=True,
            segments={"set": list(SIZES)},
        )
        self.number = -1
        self.loss.register_forward_pre_hook(self._add_ids, with_kwargs=True)

    def _add_ids(self, _: torch.nn.Module, inputs: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return inputs, {**options, "segments": {"set": torch.full((len(inputs[1]),), self.number)}}

    def validation_step(self, batch: list[Tensor], number: int, dataloader_idx: int = 0) -> None:
        """The example's, of the rows of one set."""
        self.number = dataloader_idx
        super().validation_step(batch, number)
        self.number = -1

    def val_dataloader(self) -> list[DataLoader[Any]]:  # type: ignore[override]
        """Those of both sets."""
        return [self._share(example.rows(*size)) for size in SIZES.values()]


def with_other_task_weights(ranker: type[example.Ranker]) -> type[example.Ranker]:
    """A ranker whose tasks are weighted in another way in each epoch."""

    class Weighing(ranker):  # type: ignore[misc,valid-type]
        def on_train_epoch_start(self) -> None:
            """Set what a copy that was made before would not have."""
            self.loss.task_weights = TASK_WEIGHTS[self.current_epoch]

    return Weighing


def run_on_rank(rank: int, by_segments: bool) -> tuple[list[str], Logged]:
    """One rank's names of the loss's submodules, and what it logged."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    ranker = with_other_task_weights(BySegments if by_segments else of_the_guide())
    names = [name for name, _ in ranker().named_modules()]
    with as_if_from_torchrun(), mock.patch.object(example, "Ranker", ranker):
        _, recorder = run_example(devices=world_size, precision="64-true")
    return names, recorder.logged


def expected(world_size: int) -> list[dict[str, dict[str, float]]]:
    """One process, by hand: the losses of each set at each evaluation, of which the first is that before training."""
    torch.manual_seed(0)
    ranker = HandRanker(example.Ranker().heads, example.TASKS, learning_rate=0.5, missing=example.MISSING)
    data, sets = train_data(), {name: Rows.of(*example.rows(*size).tensors) for name, size in SIZES.items()}
    evaluations = [{name: ranker.losses(rows) for name, rows in sets.items()}]
    for task_weights in TASK_WEIGHTS:
        ranker.rule = reference.Rule(task_weights=task_weights)
        for number, step in enumerate(parts_of(example.TRAIN_ROWS, world_size)):
            ranker.step(data.take([n for share in step for n in share]))
            if number in (3, 7):
                evaluations.append({name: ranker.losses(rows) for name, rows in sets.items()})
    return evaluations


Run = Callable[[bool], list[tuple[list[str], Logged]]]


@pytest.fixture(params=[1, 2], ids=["one process", "two processes"])
def run(request: pytest.FixtureRequest) -> Run:
    """Runs the example by one of the two ways; what each rank has to say."""
    return on_one_or_two(request, run_on_rank)


def test_a_copy_of_the_loss_for_each_loader_has_the_losses_of_its_rows(run: Run) -> None:
    answers = run(False)
    names, logged = answers[0]
    assert names == ["", "heads", "loss", "loss.train_metric", "loss.eval_metric"]
    truth = expected(len(answers))
    for name in SIZES:
        for key in truth[0][name]:
            values = values_of(logged, f"eval/{name}/{key}")
            assert values == pytest.approx([each[name][key] for each in truth], rel=1e-12)


def test_one_loss_with_segments_has_the_losses_of_each_loader(run: Run) -> None:
    answers = run(True)
    _, logged = answers[0]
    truth = expected(len(answers))
    for name in SIZES:
        for key in truth[0][name]:
            values = values_of(logged, f"eval/{key}/set={name}")
            assert values == pytest.approx([each[name][key] for each in truth], rel=1e-12)
