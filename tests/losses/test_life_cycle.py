"""What a loss goes through with its metrics and constants: modes, casts, the meta device, copies and checkpoints."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchmetrics import Metric

from tests.support import reference
from tests.support.casts import CASTS
from tests.support.rank_pool import RankPool, eager_alone
from tests.support.results import numbers
from twloss import GlobalLoss, Loss, MultiTaskLoss
from twloss._sums.ranks import group_from_state, group_to_state

pytestmark = pytest.mark.usefixtures("eager_and_fused")

TASKS = ["a", "b"]
DUPLICATES = [copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x))]


def test_forward_feeds_the_metric_of_the_mode() -> None:
    loss = Loss("bce_with_logits")
    loss(torch.zeros(3), torch.ones(3))
    loss.eval()
    loss(torch.full((2,), 100.0), torch.zeros(2))
    assert loss.train_metric.compute()["loss"].item() == pytest.approx(math.log(2))
    assert loss.eval_metric.compute()["loss"].item() == pytest.approx(100.0)
    loss.eval_metric.reset()
    assert loss.train_metric.update_called


# Where the sums are in the other mode's metric.

BATCH = torch.zeros(3, 2), torch.ones(3, 2)


def warning_of(metric: Metric) -> str:
    """What compute() without data says after what it says of every metric."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        metric.compute()
    (message,) = [str(warning.message) for warning in caught]
    of_all = f"{type(metric).__name__}.compute() was called before update() on any rank; without data, values are NaN"
    assert message.startswith(of_all)
    return message.removeprefix(of_all)


def fed_loss(updates: int, *, training: bool, **options: Any) -> MultiTaskLoss:
    loss = MultiTaskLoss("bce_with_logits", TASKS, quality=True, **options).train(training)
    for _ in range(updates):
        loss(*BATCH)
    return loss


@pytest.mark.parametrize("kind", ["metric", "quality"])
@pytest.mark.parametrize(("mode", "other", "training"), [("train", "eval", False), ("eval", "train", True)])
def test_a_metric_without_data_asks_for_the_mode_and_names_the_other_that_has_some(
    mode: str, other: str, training: bool, kind: str
) -> None:
    question = f"was the model put into {mode}()?"
    expected = f". It is the {mode}_{kind} of a loss, and {other}_{kind} has 2 updates on this rank: {question}"
    assert warning_of(getattr(fed_loss(2, training=training), f"{mode}_{kind}")) == expected
    expected = f". It is the {mode}_{kind} of a loss: {question}"
    assert warning_of(getattr(fed_loss(0, training=training), f"{mode}_{kind}")) == expected


def test_the_metric_of_a_single_loss_asks_too() -> None:
    assert warning_of(Loss("bce_with_logits").eval_metric).endswith("was the model put into eval()?")


def test_a_metric_of_no_loss_asks_nothing() -> None:
    assert warning_of(GlobalLoss(TASKS)) == ""
    # A copy is of no loss, though what was copied is.
    assert warning_of(copy.deepcopy(fed_loss(2, training=True).eval_metric)) == ""


@pytest.mark.parametrize("duplicate", DUPLICATES)
def test_the_metrics_of_a_copied_loss_know_each_other_and_not_those_of_the_first(duplicate: Any) -> None:
    loss = fed_loss(2, training=True)
    other = duplicate(loss)
    other(*BATCH)
    del loss
    gc.collect()
    for name, metric in (("metric", other.eval_metric), ("quality", other.eval_quality)):
        assert f"train_{name} has 3 updates" in warning_of(metric)


def test_knowing_each_other_is_no_part_of_a_loss() -> None:
    """No module, no state, and nothing that keeps a metric alive."""
    loss = fed_loss(1, training=True)
    assert [name for name, _ in loss.eval_metric.named_modules()] == [""]
    assert list(loss.state_dict()) == []
    metric = loss.eval_metric
    del loss
    gc.collect()
    assert warning_of(metric) == ". It is the eval_metric of a loss: was the model put into eval()?"


def compute_what_another_rank_fed_in_training(rank: int) -> str:
    """The first rank trains and all evaluate nothing."""
    return warning_of(fed_loss(2 if rank == 0 else 0, training=True).eval_metric)


@eager_alone
def test_a_rank_tells_of_its_own_updates(two_ranks: RankPool) -> None:
    first, second = two_ranks.run(compute_what_another_rank_fed_in_training)
    assert "train_metric has 2 updates on this rank" in first
    assert second == ". It is the eval_metric of a loss: was the model put into eval()?"


def test_a_loss_that_is_not_finite_stays_so_while_its_sums_are_left_out() -> None:
    """A gradient scaler has to see it."""
    loss = MultiTaskLoss("bce_with_logits", ["like", "reply"])
    result = loss(torch.tensor([[0.0, math.nan]]), torch.ones(1, 2))
    assert result["loss/like"].isfinite()
    assert result["loss"].isnan()
    with pytest.warns(UserWarning, match="not finite: reply: 1$"):
        assert loss.train_metric.compute()["loss"].item() == pytest.approx(math.log(2))


# Not in the state dict, and so not of a model's dtype either.


def test_nothing_is_a_registered_buffer_or_in_the_state_dict() -> None:
    loss = MultiTaskLoss("bce_with_logits", TASKS, pos_weights=[1, 2], task_weights=[1, 2], quality=True)
    assert [*loss.buffers(), *loss.parameters(), *loss.state_dict()] == []


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_casts_of_a_model_leave_sums_and_constants_alone(cast: Any) -> None:
    model = nn.ModuleDict(
        {"head": nn.Linear(2, 1), "loss": MultiTaskLoss("bce_with_logits", ["x"], pos_weights=[27.3])}
    )
    loss = model["loss"]
    assert isinstance(loss, MultiTaskLoss)
    exact = 1e8 + 1 / 3
    for _ in range(2):
        cast(model)
        loss.train_metric.update(torch.tensor([exact], dtype=torch.float64), 1)
    assert loss.train_metric.compute()["loss"].item() == exact
    loss.train_metric.reset()
    assert loss.train_metric.totals.dtype == torch.float64
    loss(torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1))
    assert loss.train_metric.compute()["loss"].item() == pytest.approx(27.3 * math.log(2), rel=1e-15)


def test_the_meta_device_ends_in_zeros_and_keeps_constants() -> None:
    with torch.device("meta"):
        loss = MultiTaskLoss("bce_with_logits", ["x"], pos_weights=[27.3], task_weights=[2.0])
    loss.to_empty(device="cpu")
    assert loss.train_metric.update_count == 0
    result = loss(torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1))
    assert result["loss"].item() == pytest.approx(2 * 27.3 * math.log(2), rel=1e-15)
    assert loss.train_metric.compute()["loss"].item() == result["loss"].item()
    loss.to("meta")
    loss.to_empty(device="cpu")
    assert loss.train_metric.update_count == 0
    loss.train_metric.reset()
    assert (loss.train_metric.totals == 0).all()


def test_the_first_batch_brings_constants_from_the_meta_device() -> None:
    logits = torch.randn(9, 2, dtype=torch.float64, requires_grad=True)
    labels = torch.rand(9, 2, dtype=torch.float64)
    with torch.device("meta"):
        loss = MultiTaskLoss("bce_with_logits", TASKS, pos_weights=[27.3, 2.0], task_weights=[2.0, 0.5])
    result = loss(logits, labels)
    columns = {
        task: [reference.Row(reference.bce_with_logits(x, y, p), reference.bce_slope(x, y, p)) for x, y in zip(*column)]
        for task, p, *column in zip(TASKS, [27.3, 2.0], logits.T.tolist(), labels.T.tolist())
    }
    rule = reference.Rule(task_weights=[2.0, 0.5])
    for losses in (result, loss.train_metric.compute()):
        assert {key: value.item() for key, value in losses.items()} == pytest.approx(
            reference.losses(columns, rule), rel=1e-12
        )
    (grad,) = torch.autograd.grad(result["loss"], logits)
    for slopes, column in zip(reference.gradients(columns, rule).values(), grad.T.tolist()):
        assert column == pytest.approx(slopes, rel=1e-12)
    # In a model's dtype too, which is not that of the sums.
    single = loss(logits.detach().float(), labels.float())
    assert single["loss"].item() == pytest.approx(result["loss"].item(), rel=1e-6)


# Copies and checkpoints of a model.


class Model(nn.Module):
    """A model with a loss whose sums are saved with it."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.Linear(3, 2)
        self.loss = MultiTaskLoss("bce_with_logits", TASKS, pos_weights=[2.0, 3.0])
        for metric in (self.loss.train_metric, self.loss.eval_metric):
            metric.persistent(True)

    def forward(self, features: Tensor) -> Tensor:
        """The global loss."""
        loss: Tensor = self.loss(self.heads(features), features[:, :2].sigmoid())["loss"]
        return loss


@pytest.mark.parametrize("duplicate", DUPLICATES)
def test_a_copy_in_the_middle_of_a_step_goes_on_alone(duplicate: Any) -> None:
    model = Model()
    features = torch.randn(5, 3)
    value = model(features)
    twin = duplicate(model)
    value.backward()
    if duplicate is not copy.copy:
        twin(features)
        assert twin.loss.train_metric.update_count == 2
    assert model.loss.train_metric.update_count == 1
    assert twin(features).item() == pytest.approx(value.item(), rel=1e-6)


def test_a_resumed_model_goes_on_as_one_that_never_stopped() -> None:
    batches = [torch.randn(7, 3) for _ in range(6)]
    steady, stopped = Model(), Model()
    stopped.load_state_dict(steady.state_dict())
    for features in batches[:3]:
        steady(features)
        stopped(features)
    file = io.BytesIO()
    torch.save(stopped.state_dict(), file)
    file.seek(0)
    resumed = Model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.load_state_dict(torch.load(file, weights_only=True))
        resumed.loss.train_metric.compute()
    for features in batches[3:]:
        steady(features)
        resumed(features)
    ours, theirs = resumed.loss.train_metric.compute(), steady.loss.train_metric.compute()
    assert numbers(ours) == pytest.approx(numbers(theirs), rel=1e-15)
    assert resumed.loss.train_metric.update_count == 6


def copies_with_a_group(rank: int) -> list[Any]:
    group = dist.new_group([0, 1])
    loss = MultiTaskLoss("bce_with_logits", TASKS, global_batch=True, process_group=group)
    loss(torch.zeros(2, 2), torch.ones(2, 2))
    twins = [copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))]
    same = [
        twin.process_group is group and twin.train_metric.process_group is group and twin.train_metric.update_called
        for twin in twins
    ]
    sums = [twin.train_metric.compute()["loss"].item() for twin in twins]
    return [same, sums, pickle.dumps(loss)]


@eager_alone
def test_copies_keep_the_process_group(two_ranks: RankPool) -> None:
    for same, sums, pickled in two_ranks.run(copies_with_a_group):
        assert same == [True, True]
        assert sums[0] == sums[1]
        with pytest.warns(UserWarning, match="process_group"):
            elsewhere = pickle.loads(pickled)
        assert elsewhere.process_group is None
        assert elsewhere.train_metric.update_count == 1


def find_groups(rank: int) -> list[bool]:
    """A group of the name with other ranks, as another run may have; with the same; and one that is gone."""
    group = dist.new_group([1, 2])
    loss = MultiTaskLoss("bce_with_logits", TASKS, process_group=group) if rank else None
    if loss is None:
        return []
    state = group_to_state({"process_group": group})
    name, ranks = state["process_group"]
    found = [group_from_state(state)["process_group"] is group]
    with pytest.warns(UserWarning, match="does not exist in this process"):
        found.append(group_from_state({"process_group": (name, [rank - 1 for rank in ranks])})["process_group"] is None)
    dist.destroy_process_group(group)
    with pytest.warns(UserWarning, match="does not exist in this process"):
        found.append(copy.deepcopy(loss).process_group is None)
    return found


@eager_alone
def test_a_group_of_another_run_is_never_taken_for_it(three_ranks: RankPool) -> None:
    assert three_ranks.run(find_groups) == [[], [True] * 3, [True] * 3]
