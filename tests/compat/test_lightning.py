"""examples/lightning_ranker.py, on one process and on two: what Lightning logs is the loss of all rows of all ranks."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from benchmarks.counts import CollectiveLog
from examples import lightning_ranker as example
from tests.support import reference
from tests.support.by_hand import Columns, HandRanker, Rows, columns_of, mean_of_means, together
from tests.support.launch import as_if_from_torchrun, command
from tests.support.lightning_warnings import lightnings_own_warnings
from tests.support.rank_pool import RankPool, on_one_or_two
from twloss import GlobalLoss, MultiTaskLoss, PendingResult

RULE = reference.Rule()
Logged = list[tuple[int, dict[str, float]]]


class Recorder(DummyLogger):
    """Keeps what Lightning logs: the number of steps done, and the values."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: Logged = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Lightning's call, of values that are Python floats."""
        self.logged.append((step or 0, {key: value for key, value in metrics.items() if key != "epoch"}))


def train_data() -> Rows:
    return Rows.of(*example.rows(example.TRAIN_ROWS, seed=1).tensors)


def eval_data() -> Rows:
    return Rows.of(*example.rows(example.EVAL_ROWS, seed=2).tensors)


def parts_of(count: int, world_size: int) -> list[list[list[int]]]:
    """The rows of each step on each rank, from the example's description of its shares."""
    size = example.GLOBAL_BATCH // world_size
    shares = [list(range(rank, count, world_size)) for rank in range(world_size)]
    steps = -(-len(shares[0]) // size)
    return [[share[step * size : (step + 1) * size] for share in shares] for step in range(steps)]


def expected(world_size: int) -> dict[str, Any]:
    """One process, by hand: two epochs of eight steps, with an evaluation after every four."""
    torch.manual_seed(0)
    data, held_out = train_data(), eval_data()
    ranker = HandRanker(example.Ranker().heads, example.TASKS, learning_rate=0.5, missing=example.MISSING)
    untrained, steps, epochs, evals, naive = ranker.losses(held_out), [], [], [], []
    everything: list[Columns] = []
    for _ in range(2):
        seen: list[Columns] = []
        for number, step in enumerate(parts_of(example.TRAIN_ROWS, world_size)):
            seen.append(ranker.step(data.take([n for share in step for n in share])))
            steps.append(reference.losses(seen[-1], RULE))
            if number in (3, 7):
                evals.append(ranker.losses(held_out))
        everything += seen
        epochs.append(reference.losses(together(seen), RULE))
        naive.append(mean_of_means(seen, RULE))
    return {
        "untrained": untrained,
        "steps": steps,
        "seen": everything,
        "epochs": epochs,
        "evals": evals,
        "naive": naive,
    }


class Silent(example.Ranker):
    """Logs no value of an epoch."""

    def log_all(self, losses: dict[str, MultiTaskLoss]) -> None:
        """Nothing."""


def views_of(metric: GlobalLoss, prefix: str) -> MetricCollection:
    """A metric for each key of the result, to be logged all at once."""
    keys = metric.keys()
    views: dict[str, Metric | MetricCollection] = {key: metric.scalar(key) for key in keys}
    return MetricCollection(views, prefix=prefix, compute_groups=False)


class Views(Silent):
    """Logs a view of each key, which Lightning computes and resets, one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.train_losses = views_of(self.loss.train_metric, "train/")
        self.eval_losses = views_of(self.loss.eval_metric, "eval/")

    def training_step(self, batch: list[Tensor], number: int) -> Tensor:
        """The example's, and the views."""
        loss = super().training_step(batch, number)
        self.log_dict(self.train_losses, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: list[Tensor], number: int) -> None:
        """The example's, and the views."""
        super().validation_step(batch, number)
        self.log_dict(self.eval_losses)


class OneKey(Views):
    """Logs one view of each metric."""

    def log(self, name: str, value: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Lightning's, for some of the names."""
        if name in ("train/loss", "eval/loss"):
            super().log(name, value, **kwargs)


class Windows(Views):
    """Reads one view every three steps and starts it anew, while Lightning logs another at the end of the epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.train_reply = self.loss.train_metric.scalar("loss/reply")

    def training_step(self, batch: list[Tensor], number: int) -> Tensor:
        """The example's, and a value of a window that does not end with the epoch."""
        loss = super().training_step(batch, number)
        if (self.trainer.global_step + 1) % 3 == 0:
            assert self.logger is not None
            self.logger.log_metrics({"window/reply": self.train_reply.compute().item()})
            self.train_reply.reset()
        return loss


class OnStep(Views):
    """Asks Lightning for the steps' values of a view."""

    def __init__(self) -> None:
        super().__init__()
        self.train_reply = self.loss.train_metric.scalar("loss/reply")

    def training_step(self, batch: list[Tensor], number: int) -> Tensor:
        """The example's, and a view by step."""
        loss = super().training_step(batch, number)
        self.log("train/reply", self.train_reply, on_step=True, on_epoch=True)
        return loss


class EveryStep(example.Ranker):
    """Logs each step over all ranks one step later, as the guide has it, while the epoch's sums go on."""

    def __init__(self) -> None:
        super().__init__()
        self.step_loss = self.loss.train_metric.scalar("loss")
        self.pending: PendingResult[Tensor] | None = None

    def on_train_batch_end(self, *_: Any) -> None:
        """Read the step before, and start this one's."""
        if self.pending is not None:
            self.log("every/loss", self.pending.wait())
        self.pending = self.step_loss.compute_async()
        self.step_loss.reset()


class Remembering(example.Ranker):
    """Remembers the logits and labels that its loss got, by mode, and the last of its kind."""

    last: Remembering

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[bool, list[tuple[Any, Any]]] = {True: [], False: []}
        self.dtypes: set[torch.dtype] = set()
        self.loss.register_forward_pre_hook(self._remember)
        type(self).last = self

    def _remember(self, module: torch.nn.Module, inputs: tuple[Tensor, Tensor]) -> None:
        logits, labels = inputs
        self.dtypes.add(logits.dtype)
        self.seen[module.training].append((logits.double().tolist(), labels.double().tolist()))


def run_example(**options: Any) -> tuple[dict[str, float], Recorder]:
    recorder = Recorder()
    with lightnings_own_warnings():
        options = {"logger": recorder, "log_every_n_steps": 1, "enable_model_summary": False, **options}
        return example.main(**options), recorder


def run_on_rank(rank: int, ranker: type[example.Ranker], precision: str) -> tuple[dict[str, float], Logged, Any]:
    """One rank's results, what it logged, and the logits and labels of its loss."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    with as_if_from_torchrun(), mock.patch.object(example, "Ranker", ranker):
        results, recorder = run_example(devices=world_size, precision=precision)
    remembered = Remembering.last if ranker is Remembering else None
    if remembered is not None:
        assert remembered.dtypes == {torch.bfloat16}
        for metric in (remembered.loss.train_metric, remembered.loss.eval_metric):
            assert metric.totals.dtype == torch.float64
    return results, recorder.logged, remembered and remembered.seen


Run = Callable[..., list[tuple[dict[str, float], Logged, Any]]]


@pytest.fixture(params=[1, 2], ids=["one process", "two processes"])
def run(request: pytest.FixtureRequest) -> Run:
    """Runs the example with a ranker in a precision; what each rank has to say."""
    return on_one_or_two(request, run_on_rank)


def values_of(logged: Logged, key: str) -> list[float]:
    return [values[key] for _, values in logged if key in values]


def close(values: Any, tolerance: float = 1e-12) -> Any:
    return pytest.approx(values, rel=tolerance)


def expect_epochs(logged: Logged, truth: dict[str, Any], keys: Sequence[str]) -> None:
    """The values of the epochs and evaluations, of which trainer.validate() is the first."""
    evals = [truth["untrained"], *truth["evals"]]
    for key in keys:
        assert values_of(logged, f"train/{key}") == close([losses[key] for losses in truth["epochs"]])
        assert values_of(logged, f"eval/{key}") == close([losses[key] for losses in evals])


def test_every_value_is_that_of_one_process_with_all_rows(run: Run) -> None:
    answers = run(example.Ranker, "64-true")
    truth = expected(len(answers))
    results, logged, _ = answers[0]
    expect_epochs(logged, truth, list(truth["untrained"]))
    for key in truth["steps"][0]:
        assert values_of(logged, f"step/{key}") == close([losses[key] for losses in truth["steps"]])
    for key in truth["untrained"]:
        last = {"untrained eval": truth["untrained"], "train": truth["epochs"][-1], "eval": truth["evals"][-1]}
        assert {mode: results[f"{mode}/{key}"] for mode in last} == close({mode: last[mode][key] for mode in last})
        # What the steps' values, averaged, would have been.
        assert all(abs(naive[key] / exact[key] - 1) > 1e-4 for naive, exact in zip(truth["naive"], truth["epochs"]))
    assert all(answer[0] == results for answer in answers)


def count_collectives(rank: int, ranker: type[example.Ranker]) -> int:
    """The collectives of one rank's run."""
    with CollectiveLog() as log:
        run_on_rank(rank, ranker, "64-true")
    return len(log.names)


@pytest.mark.parametrize(("ranker", "collectives"), [(example.Ranker, 1), (Views, 4)], ids=["by one call", "views"])
def test_what_the_values_of_an_epoch_cost(ranker: type[example.Ranker], collectives: int, two_ranks: RankPool) -> None:
    """Two epochs, five evaluations, and that of Lightning's sanity check, which is not logged."""
    counts, without = two_ranks.run(count_collectives, ranker), two_ranks.run(count_collectives, Silent)
    assert [count - other for count, other in zip(counts, without)] == [8 * collectives] * 2


def test_a_view_of_each_key(run: Run) -> None:
    answers = run(Views, "64-true")
    truth = expected(len(answers))
    expect_epochs(answers[0][1], truth, list(truth["untrained"]))


def test_one_key_alone(run: Run) -> None:
    answers = run(OneKey, "64-true")
    expect_epochs(answers[0][1], expected(len(answers)), ["loss"])


def test_views_that_start_anew_at_different_times(run: Run) -> None:
    answers = run(Windows, "64-true")
    truth = expected(len(answers))
    expect_epochs(answers[0][1], truth, ["loss", "loss/like"])
    windows = [reference.losses(together(truth["seen"][start : start + 3]), RULE) for start in range(0, 15, 3)]
    assert values_of(answers[0][1], "window/reply") == close([window["loss/reply"] for window in windows])


def test_every_step_is_logged_one_step_later(run: Run) -> None:
    answers = run(EveryStep, "64-true")
    truth = expected(len(answers))
    assert values_of(answers[0][1], "every/loss") == close([losses["loss"] for losses in truth["steps"][:-1]])
    expect_epochs(answers[0][1], truth, ["loss", "loss/like"])


def test_a_view_has_no_value_of_a_step(run: Run) -> None:
    """Why the example logs the steps by their tensors."""
    answers = run(OnStep, "64-true")
    truth = expected(len(answers))
    assert values_of(answers[0][1], "train/reply_step") == []
    assert values_of(answers[0][1], "train/reply_epoch") == close([losses["loss/reply"] for losses in truth["epochs"]])


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bfloat16_leaves_the_running_sums_in_float64(run: Run, precision: str) -> None:
    answers = run(Remembering, precision)
    results = answers[0][0]
    # The batches of the last epoch: 8 steps of training, 4 of evaluation.
    for mode, count in (("train", 8), ("eval", 4)):
        parts = [
            columns_of(logits, labels, None, example.TASKS, example.MISSING, [1.0] * len(example.TASKS))
            for _, _, seen in answers
            for logits, labels in seen[mode == "train"][-count:]
        ]
        truth = reference.losses(together(parts), RULE)
        for key in ("loss", "loss/like"):
            # Each row's loss is computed in float32 from bfloat16 logits.
            assert results[f"{mode}/{key}"] == close(truth[key], 1e-6)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_views_of_a_copied_model_read_the_copy(copied: Callable[[Views], Views]) -> None:
    """As a spawned process, or a callback that averages weights, makes one."""
    model = copied(Views())
    for views, metric in ((model.train_losses, model.loss.train_metric), (model.eval_losses, model.loss.eval_metric)):
        assert [view.owner for view in views.values(copy_state=False)] == [metric] * 4
    assert set(model.state_dict()) == {"heads.weight", "heads.bias"}


@pytest.mark.exhaustive
def test_as_a_script_that_starts_its_second_process() -> None:
    truth = expected(2)
    printed = command(sys.executable, example.__file__)
    for key in ("loss", "loss/like"):
        assert printed[f"untrained eval/{key}"] == pytest.approx(truth["untrained"][key], abs=2e-6)
        assert printed[f"train/{key}"] == pytest.approx(truth["epochs"][-1][key], abs=2e-6)
        assert printed[f"eval/{key}"] == pytest.approx(truth["evals"][-1][key], abs=2e-6)
