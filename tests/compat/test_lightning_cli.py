"""examples/lightning_cli.py: the loss's options from YAML and the command line, and what is trained with them."""

from __future__ import annotations

import math
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from torch import Tensor

from examples import lightning_cli as example
from tests.support import reference
from tests.support.by_hand import HandRanker, Rows
from tests.support.launch import script
from tests.support.lightning_warnings import lightnings_own_warnings
from twloss import LossType, MultiTaskLoss, RankingQuality

CONFIG = str(Path(example.__file__).with_suffix(".yaml"))
TASKS = ["like", "reply", "share"]


@pytest.fixture(autouse=True)
def _no_word_of_what_lightning_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jsonargparse warns of how Lightning calls it, and this is its own switch for that."""
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


def command_line(*arguments: str) -> AbstractContextManager[Any]:
    """As if Python had been started with the example and these."""
    return mock.patch.object(sys, "argv", [example.__file__, *arguments])


def fit(folder: Path, *arguments: str) -> example.Ranker:
    """What the command line trains, in float64, with its saved configuration in the folder."""
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    where = ["--trainer.precision=64-true", f"--trainer.default_root_dir={folder}"]
    with lightnings_own_warnings(), command_line("fit", *arguments, *quiet, *where):
        model = example.main().model
    assert isinstance(model, example.Ranker)
    return model


def parameters_by_hand(rule: reference.Rule, pos_weights: list[float]) -> list[float]:
    torch.manual_seed(0)
    heads = example.Ranker(MultiTaskLoss("bce_with_logits", TASKS)).heads
    ranker = HandRanker(heads, TASKS, learning_rate=0.5, missing=example.MISSING, rule=rule, pos_weights=pos_weights)
    data = Rows.of(*example.rows(len(TASKS)).tensors)
    for _ in range(2):
        for batch in data.batches(example.BATCH):
            ranker.step(batch)
    return ranker.parameters()


def expect_parameters(model: example.Ranker, expected: list[float]) -> None:
    found = [*model.heads.weight.flatten().tolist(), *model.heads.bias.tolist()]
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_the_options_of_the_file_are_those_that_are_trained_with(tmp_path: Path) -> None:
    model = fit(tmp_path, "--config", CONFIG)
    expect_parameters(model, parameters_by_hand(reference.Rule(), [1.0, 4.0, 2.0]))


def test_the_command_line_is_in_place_of_the_file(tmp_path: Path) -> None:
    options = "--model.loss.pos_weights=3", "--model.loss.task_weights={like: 1, reply: 2, share: 0.5}"
    model = fit(tmp_path, "--config", CONFIG, *options, "--model.loss.global_reduction=sum")
    rule = reference.Rule(global_reduction="sum", task_weights=[1.0, 2.0, 0.5])
    expect_parameters(model, parameters_by_hand(rule, [3.0] * 3))


def test_the_configuration_that_lightning_saves_trains_the_same_again(tmp_path: Path) -> None:
    options = ["--model.loss.mean_over=weights", "--model.loss.task_weights=[1, 2, 3]", "--model.loss.quality=true"]
    first = fit(tmp_path / "first", "--config", CONFIG, *options)
    saved = tmp_path / "first" / "config.yaml"
    again = fit(tmp_path / "again", "--config", str(saved))
    for loss in (first.loss, again.loss):
        assert (loss.mean_over, loss.task_weights, loss.quality) == ("weights", (1.0, 2.0, 3.0), True)
    rule = reference.Rule(mean_over="weights", task_weights=[1.0, 2.0, 3.0])
    for model in (first, again):
        expect_parameters(model, parameters_by_hand(rule, [1.0, 4.0, 2.0]))


def loss_of(*arguments: str) -> MultiTaskLoss:
    """The loss that the command line makes, with nothing run."""
    quiet = "--seed_everything=0", "--trainer.accelerator=cpu", "--trainer.logger=false"
    with lightnings_own_warnings(), command_line(*quiet, *arguments):
        cli = LightningCLI(example.Ranker, run=False)
    loss = cli.model.loss
    assert isinstance(loss, MultiTaskLoss)
    return loss


def squared_error(logits: Tensor, labels: Tensor) -> Tensor:
    """A loss of one's own."""
    return (logits - labels) ** 2


def test_kinds_by_task_and_a_quality_with_options(tmp_path: Path) -> None:
    """A type for each task, one of them a function, and an argument that is itself a class of the package."""
    config = tmp_path / "kinds.yaml"
    config.write_text(
        f"""
        model:
          loss:
            class_path: twloss.MultiTaskLoss
            init_args:
              loss_type: {{click: bce_with_logits, watch_time: {__name__}.squared_error, stars: cross_entropy}}
              tasks: [click, watch_time, stars]
              ignore_index: {{click: -1}}
              quality:
                class_path: twloss.RankingQuality
                init_args: {{tasks: [click], ignore_index: -1, window: 9, logit_shift: {{click: -2.5}}}}
        """
    )
    loss = loss_of(f"--config={config}")
    kinds = LossType.BCE_WITH_LOGITS, squared_error, LossType.CROSS_ENTROPY
    assert loss.loss_type == dict(zip(("click", "watch_time", "stars"), kinds))
    assert isinstance(loss.train_quality, RankingQuality)
    assert (loss.train_quality.window, loss.train_quality.logit_shift) == (9, (-2.5,))


def test_segments_of_names_and_of_numbers(tmp_path: Path) -> None:
    config = tmp_path / "segments.yaml"
    config.write_text(
        """
        model:
          loss:
            class_path: twloss.MultiTaskLoss
            init_args:
              loss_type: bce_with_logits
              tasks: [click, like]
              segments: {country: [DE, "NO"], surface: 3}
              quality: true
        """
    )
    loss = loss_of(f"--config={config}")
    assert loss.segments == loss.train_quality.segments == {"country": ("DE", "NO"), "surface": 3}
    assert loss_of(f"--config={config}", "--model.loss.segments={day: 7}").segments == {"day": 7}
    assert loss_of(f"--config={config}", "--model.loss.segments=null").segments is None


def test_given_tasks_alone_and_beside_others(tmp_path: Path) -> None:
    alone = loss_of(f"--config={CONFIG}", "--model.loss.loss_type=given", "--model.loss.pos_weights=null")
    assert alone.loss_type == LossType.GIVEN
    config = tmp_path / "given.yaml"
    config.write_text(
        """
        model:
          loss:
            class_path: twloss.MultiTaskLoss
            init_args:
              loss_type: {click: bce_with_logits, aux: given}
              tasks: [click, aux]
              task_weights: {click: 1, aux: 0.01}
        """
    )
    loss = loss_of(f"--config={config}")
    assert loss.loss_type == {"click": LossType.BCE_WITH_LOGITS, "aux": LossType.GIVEN}
    result = loss(torch.zeros(2, 1), torch.ones(2, 1), given={"aux": torch.tensor(50.0)})
    assert result["loss"].item() == pytest.approx((math.log(2) + 0.5) / 2, rel=1e-6)


def test_nan_as_the_missing_label() -> None:
    loss = loss_of(f"--config={CONFIG}", "--model.loss.ignore_index=.nan")
    assert loss.ignore_index != loss.ignore_index


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--model.loss.mean_over=avg", "Literal['rows', 'weights']"),
        ("--model.loss.loss_type=bce", "{BCE_WITH_LOGITS,CROSS_ENTROPY,GIVEN}"),
        ("--model.loss.taks=[a]", "taks"),
    ],
)
def test_a_wrong_option_is_refused_with_what_was_expected(
    option: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        loss_of(f"--config={CONFIG}", option)
    assert expected in capsys.readouterr().err


def test_as_a_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with lightnings_own_warnings():
        script(1, example.__file__, "fit", "--config", CONFIG)
    assert (tmp_path / "config.yaml").is_file()
