"""MultiTaskLoss and Loss with ``quality``: what forward sees is noted, by mode, and changes nothing else."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchmetrics.utilities.exceptions import TorchMetricsUserError

from tests.support import quality_reference
from tests.support.metrics import numbers_of_this_rank
from tests.support.pairwise import pairwise
from tests.support.quality_batches import TASKS, Rows, attached, columns, expected, random_rows, recent, train_and_eval
from tests.support.rank_pool import RankPool, eager_alone
from tests.support.results import assert_close, fed, numbers
from twloss import Loss, LossType, MultiTaskLoss, RankingQuality

pytestmark = pytest.mark.usefixtures("eager_and_fused")

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "pos_weights": {"pos_weights": [2.0, 27.3, 0.5]},
    "weights": {"mean_over": "weights", "task_weights": [1.0, 2.0, 3.0]},
    "missing": {"ignore_index": -1, "pos_weights": 3.0},
    "missing is NaN": {"ignore_index": math.nan, "mean_over": "weights"},
    "sum": {"task_loss_reduction": "sum", "global_reduction": "max", "global_batch": True},
    "callable": {"global_reduction": Tensor.sum, "global_batch": True, "pos_weights": 2.0},
}


@pairwise(
    "eager_and_fused",
    options=OPTIONS,
    weighted={"": False, "weighted": True},
    window={"": None, "window": 3},
    eager_and_fused={"eager": False, "fused": True},
)
def test_it_is_the_quality_of_what_forward_saw_in_each_mode(
    options: dict[str, Any], weighted: bool, window: int | None
) -> None:
    """Whatever the loss is made of: logloss is without pos_weight, and a mean over rows or weights is the loss's."""
    missing = options.get("ignore_index")
    batches = [random_rows(20 + step, step, weighted=weighted, missing=missing) for step in range(10)]
    by_hand = fed(RankingQuality(TASKS, ignore_index=missing), batches[:5])
    loss = attached(RankingQuality(TASKS, ignore_index=missing, window=window) if window else True, **options)
    for step, batch in enumerate(batches):
        loss.train(step < 5)
        loss(*batch)
    for metric, seen in zip(train_and_eval(loss), (batches[:5], batches[5:])):
        assert metric.update_count == 5
        found = numbers(metric.compute())
        assert_close(recent(found, window=False), expected(seen, missing=missing))
        if window is not None:
            assert_close(recent(found, window=True), expected(seen[-window:], missing=missing))
    assert_close(recent(numbers(train_and_eval(loss)[0].compute()), window=False), numbers(by_hand.compute()))
    assert train_and_eval(loss)[0].window == window


def test_of_a_plain_loss_the_log_loss_is_the_loss() -> None:
    loss, batch = attached(mean_over="weights"), random_rows(50, weighted=True)
    losses = loss(*batch)
    found = train_and_eval(loss)[0].compute()
    for task in TASKS:
        assert found[f"logloss/{task}"].item() == pytest.approx(losses[f"loss/{task}"].item(), rel=1e-12)


@pytest.mark.parametrize("options", [{}, {"pos_weight": 5.0}, {"ignore_index": math.nan}, {"mean_over": "weights"}])
@pytest.mark.parametrize("shape", [(12,), (3, 4), (12, 1)])
def test_the_loss_of_one_task(options: dict[str, Any], shape: tuple[int, ...]) -> None:
    loss = Loss("bce_with_logits", quality=True, **options)
    missing = options.get("ignore_index")
    parts = random_rows(12, 2, tasks=1, weighted=True, missing=missing)
    assert parts.weights is not None
    loss(parts.logits.view(shape), parts.labels.view(shape), parts.weights.view(shape))
    found = numbers(train_and_eval(loss)[0].compute())
    assert_close(found, quality_reference.quality(columns([parts], ["x"], missing)["x"]))
    assert not train_and_eval(loss)[1].update_called


def test_mappings_and_labels_of_integers() -> None:
    batch, loss = random_rows(20, 1), attached(pos_weights=2.0)
    loss(dict(zip(TASKS, batch.logits.unbind(1))), dict(zip(TASKS, batch.labels.long().unbind(1))))
    assert_close(numbers(train_and_eval(loss)[0].compute()), expected([batch]))


# What it must not change.


@pytest.mark.parametrize(
    "make", [lambda **k: attached(False, **k), lambda **k: MultiTaskLoss(LossType("bce_with_logits"), TASKS, **k)]
)
def test_without_it_there_is_none(make: Any) -> None:
    loss = make()
    for name in ("train_quality", "eval_quality"):
        for each in (loss, Loss("bce_with_logits")):
            assert not hasattr(each, name)
            with pytest.raises(AttributeError, match=f"{name}: .*quality=True"):
                getattr(each, name).compute()
    assert [name for name, _ in loss.named_children()] == ["train_metric", "eval_metric"]
    loss(*random_rows(5))
    assert list(loss.state_dict()) == []


def test_it_adds_no_buffer_parameter_or_entry_of_the_state_dict() -> None:
    loss = attached(RankingQuality(TASKS, window=5))
    loss(*random_rows(5))
    assert [*loss.buffers(), *loss.parameters(), *loss.state_dict()] == []


@pytest.mark.parametrize(
    ("options", "dtype", "eager_and_fused"),
    [
        *((options, torch.float32, False) for options in OPTIONS.values()),
        (OPTIONS["plain"], torch.float64, False),
        *((OPTIONS[name], torch.float32, True) for name in ("plain", "missing", "weights")),
        (OPTIONS["pos_weights"], torch.float64, True),
    ],
    indirect=["eager_and_fused"],
)
def test_losses_and_gradients_are_those_without_it(options: dict[str, Any], dtype: torch.dtype) -> None:
    batch = random_rows(30, weighted=True, missing=options.get("ignore_index"), dtype=dtype)
    gradients, losses = [], []
    for quality in (False, True):
        logits = batch.logits.clone().requires_grad_()
        result = attached(quality, **options)(logits, *batch[1:])
        result["loss"].backward()
        gradients.append(logits.grad)
        losses.append(numbers(result))
    assert torch.equal(*gradients)  # type: ignore[arg-type]
    assert repr(losses[0]) == repr(losses[1])


def test_second_derivatives_go_on() -> None:
    loss, batch = attached(), random_rows(6)
    logits = batch.logits.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: loss(x, batch.labels)["loss"], logits)


# A batch that raises.


def test_a_batch_whose_loss_raises_is_not_counted() -> None:
    loss = attached()
    loss(*random_rows(5))
    before = train_and_eval(loss)[0].totals.clone()
    good = random_rows(5)
    with pytest.raises(ValueError, match="labels"):
        loss(good.logits, good.labels[:, :2])
    with pytest.raises(TypeError, match="normalizer"):
        loss(*good, normalizer="3")  # type: ignore[arg-type]
    assert torch.equal(train_and_eval(loss)[0].totals, before)
    assert loss.train_metric.update_count == 1

    failing = MultiTaskLoss("bce_with_logits", TASKS, "mean", lambda losses: losses, global_batch=True, quality=True)
    with pytest.raises(ValueError, match="global_reduction"):
        failing(*good)
    assert not train_and_eval(failing)[0].update_called


def test_a_quality_that_is_synced_refuses_the_batch_before_the_loss_counts_it() -> None:
    """A step that raises and is run again must be in no sum twice."""
    quality = RankingQuality(TASKS, distributed_available_fn=lambda: True)
    loss = attached(quality)
    train_and_eval(loss)[0].sync()
    with pytest.raises(TorchMetricsUserError, match="between sync"):
        loss(*random_rows(5))
    train_and_eval(loss)[0].unsync()
    assert (loss.train_metric.update_count, train_and_eval(loss)[0].update_count) == (0, 0)


def test_a_loss_that_is_synced_refuses_the_batch_before_the_quality_counts_it() -> None:
    loss = attached()
    loss.train_metric.distributed_available_fn = lambda: True
    loss.train_metric.sync()
    with pytest.raises(TorchMetricsUserError, match="between sync"):
        loss(*random_rows(5))
    loss.train_metric.unsync()
    assert (loss.train_metric.update_count, train_and_eval(loss)[0].update_count) == (0, 0)


def test_a_batch_that_is_not_finite_leaves_the_sums_of_its_task_alone() -> None:
    batches = [random_rows(6, 1), random_rows(6, 2)]
    spoilt = batches[1].logits.clone()
    spoilt[3, 1] = math.nan
    loss = attached()
    loss(*batches[0])
    loss(spoilt, batches[1].labels)
    weights = torch.tensor([1.0, 0.0, 1.0]).expand(6, 3)
    with pytest.warns(UserWarning, match="RankingQuality: .* not finite: reply: 1$"):
        found = numbers(train_and_eval(loss)[0].compute())
    assert_close(found, expected([batches[0], batches[1]._replace(weights=weights)]))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("lets_in", ["loss", "quality"])
def test_a_loss_and_its_quality_each_have_a_rule_for_what_is_not_finite_in_each_mode(
    lets_in: str, training: bool
) -> None:
    loss = Loss("bce_with_logits", quality=True).train(training)
    metric = loss.train_metric if training else loss.eval_metric
    quality = train_and_eval(loss)[0 if training else 1]
    metric.nan_strategy = "disable" if lets_in == "loss" else "ignore"
    quality.nan_strategy = "disable" if lets_in == "quality" else "ignore"
    for logits in ([0.0, 0.0], [math.nan, 0.0]):
        loss(torch.tensor(logits), torch.tensor([1, 0]))
    own, of_quality = numbers(metric.compute()), numbers(quality.compute())
    finite, spoilt = pytest.approx(math.log(2), rel=1e-6), pytest.approx(math.nan, nan_ok=True)
    assert own["loss"] == (spoilt if lets_in == "loss" else finite)
    assert of_quality["logloss"] == (spoilt if lets_in == "quality" else finite)
    assert of_quality["weight"] == (4.0 if lets_in == "quality" else 2.0)


# Copies, and ranks.


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_of_the_whole_loss_go_on_alone(duplicate: Any) -> None:
    batches = [random_rows(9, step) for step in range(4)]
    loss = attached(RankingQuality(TASKS, window=2))
    for batch in batches[:2]:
        loss(*batch)
    twin = duplicate(loss)
    for batch in batches[2:]:
        twin(*batch)
    assert_close(recent(numbers(train_and_eval(twin)[0].compute()), window=False), expected(batches))
    assert_close(recent(numbers(train_and_eval(twin)[0].compute()), window=True), expected(batches[2:]))
    assert_close(recent(numbers(train_and_eval(loss)[0].compute()), window=False), expected(batches[:2]))


def test_a_model_is_cast_moved_and_made_empty_with_it() -> None:
    with torch.device("meta"):
        loss = attached(RankingQuality(TASKS, window=2), pos_weights=2.0)
    loss.to_empty(device="cpu").bfloat16()
    batches = [random_rows(5, step) for step in range(3)]
    for batch in batches:
        loss(*batch)
    found = numbers(train_and_eval(loss)[0].compute())
    assert_close(recent(found, window=False), expected(batches))
    assert_close(recent(found, window=True), expected(batches[1:]))


class Ranker(nn.Module):
    """Logits that are parameters' images, with the loss as a submodule."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.loss = attached(RankingQuality(TASKS, window=2, ignore_index=options.get("ignore_index")), **options)

    def forward(self, rows: Rows) -> Tensor:
        """The global loss."""
        loss: Tensor = self.loss(self.scale * rows.logits, *rows[1:])["loss"]
        return loss


def train_on_ranks(rank: int, batches: list[list[Rows]], options: dict[str, Any]) -> tuple[int, dict[str, float]]:
    warnings.simplefilter("ignore")
    model = Ranker(options)
    ddp = DistributedDataParallel(model)
    warnings.simplefilter("error")
    for batch in batches[rank]:
        ddp(batch).backward()
    quality = train_and_eval(model.loss)[0]
    return int(numbers_of_this_rank(quality)["weight/like"]), numbers(quality.compute())


@eager_alone
@pytest.mark.parametrize("options", [{}, {"global_batch": True}, {"global_batch": True, "pos_weights": 3.0}], ids=str)
def test_on_ranks_each_has_its_own_rows_and_compute_those_of_all(two_ranks: RankPool, options: dict[str, Any]) -> None:
    """With global_batch the loss is summed over ranks in forward; the quality's sums must not be so twice."""
    batches = [[random_rows(4 + 6 * rank, 10 * rank + step) for step in range(3)] for rank in range(2)]
    for rank, (weight, found) in enumerate(two_ranks.run(train_on_ranks, batches, options)):
        assert weight == 3 * (4 + 6 * rank)
        assert_close(recent(found, window=False), expected([*batches[0], *batches[1]]))
        assert_close(recent(found, window=True), expected([*batches[0][1:], *batches[1][1:]]))


def quality_over_a_group(rank: int) -> list[float]:
    """The weight over the ranks of the loss's group, which is of this rank alone."""
    groups = [torch.distributed.new_group([r]) for r in range(2)]
    weights = []
    for quality in (True, RankingQuality(TASKS)):
        loss = attached(quality, process_group=groups[rank])
        loss(*random_rows(3 + rank))
        weights.append(train_and_eval(loss)[0].compute()["weight/like"].item())
    return weights


@eager_alone
def test_a_quality_is_summed_over_the_losss_process_group(two_ranks: RankPool) -> None:
    assert two_ranks.run(quality_over_a_group) == [[3.0, 3.0], [4.0, 4.0]]
