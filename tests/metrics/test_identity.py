"""What a metric's sums are of is a part of them: sums of something else are not merged, loaded or shared."""

from __future__ import annotations

import functools
import math
import pickle
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection

from tests.support.metrics import Kind, Summing, expect_result_of, of_every_kind
from tests.support.results import compute_each, fed, forward_each, numbers
from twloss import GlobalLoss, Loss, LossType, MultiTaskLoss, RankingQuality

TASKS = ["like", "reply"]

# Merged as a ``metric_state``.


def strangers(kind: Kind) -> dict[str, tuple[Kind, str, str]]:
    """Kinds whose sums have the same shape and are of something else, with what a message has to show of both."""
    others: dict[str, tuple[Kind, str, str]] = {}
    if kind.tasks:
        others["other names"] = replace(kind, tasks=("a", "b", "c")), "b", "reply"
        others["another order"] = replace(kind, tasks=kind.tasks[::-1]), "reply", "share"
        others["one other name"] = replace(kind, tasks=(*kind.tasks[:2], "retweet")), "retweet", "share"
    if kind.window:
        others["another window"] = replace(kind, window=kind.window + 1), str(kind.window + 1), str(kind.window)
        others["no window"] = replace(kind, window=None), "None", str(kind.window)
    if kind.segments:
        first, second = kind.segments
        others["other segments"] = replace(kind, segments=(("country", ("DE", "FR")), second)), "FR", "US"
        others["segments in another order"] = replace(kind, segments=(second, first)), "surface", "country"
        others["no segments"] = replace(kind, segments=None), "segments", "expected"
    return others


@of_every_kind
@pytest.mark.parametrize("as_state", [True, False], ids=["metric_state", "metric"])
def test_sums_of_the_same_tasks_are_merged(kind: Kind, as_state: bool) -> None:
    ours, theirs = kind.batches(4), kind.batches(3, seed=10)
    metric, other = fed(kind.make(), ours), fed(kind.make(), theirs)
    metric.merge_state(other.metric_state if as_state else other)
    expect_result_of(kind, metric, ours, theirs, of=1)
    expect_result_of(kind, other, theirs)
    assert metric.update_count == 7
    later = kind.batches(2, seed=20)
    if not (kind.window or kind.window_rows):
        expect_result_of(kind, fed(metric, later), ours, theirs, later)


@of_every_kind
def test_a_state_says_whose_sums_it_holds(kind: Kind) -> None:
    metric = fed(kind.make(), kind.batches(2))
    state = metric.metric_state
    assert set(state) == {"totals", "sums_of"}
    received = kind.make()
    received.merge_state(pickle.loads(pickle.dumps(state)))
    expect_result_of(kind, received, kind.batches(2))


@of_every_kind
@pytest.mark.parametrize("as_state", [True, False], ids=["metric_state", "metric"])
def test_sums_of_something_else_are_not_merged(kind: Kind, as_state: bool) -> None:
    batches = kind.batches(3)
    metric = fed(kind.make(), batches)
    for name, (stranger, *shown) in strangers(kind).items():
        other = fed(stranger.make(), stranger.batches(2))
        with pytest.raises(ValueError, match="got") as caught:
            metric.merge_state(other.metric_state if as_state else other)
        assert all(text in str(caught.value) for text in shown), name
        expect_result_of(kind, metric, batches)
        expect_result_of(stranger, other, stranger.batches(2))


@of_every_kind
def test_sums_that_do_not_say_what_they_are_of_are_not_merged(kind: Kind) -> None:
    batches = kind.batches(3)
    metric = fed(kind.make(), batches)
    totals = fed(kind.make(), kind.batches(2)).metric_state["totals"]
    for state in ({"totals": totals}, {"totals": totals, "others": totals}, {"totals": totals, "sums_of": "like"}):
        with pytest.raises(ValueError, match="sums_of"):
            metric.merge_state(state)
        expect_result_of(kind, metric, batches)
    with pytest.raises(ValueError, match="as totals"):
        metric.merge_state({**metric.metric_state, "totals": 5})
    expect_result_of(kind, metric, batches)


# The rule of a loss.


def squared(logits: Tensor, labels: Tensor) -> Tensor:
    """A loss of the user's own."""
    return (logits - labels).square()


RULES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "mean over": ("mean_over", {"mean_over": "rows"}, {"mean_over": "weights"}),
    "pos_weights": ("pos_weight", {"pos_weights": [1.0, 2.0]}, {"pos_weights": [2.0, 1.0]}),
    "pos_weights or none": ("pos_weight", {}, {"pos_weights": [1.0, 2.0]}),
    "ignore_index": ("ignore_index", {"ignore_index": -1}, {"ignore_index": -2}),
    "ignore_index or none": ("ignore_index", {}, {"ignore_index": -1}),
    "ignore_index or NaN": ("ignore_index", {"ignore_index": -1}, {"ignore_index": math.nan}),
    "loss type": ("cross_entropy", {}, {"loss_type": "cross_entropy"}),
    "callable": ("squared", {}, {"loss_type": squared}),
    "given": ("given", {}, {"loss_type": "given"}),
    "given or classes": ("given", {"loss_type": "given"}, {"loss_type": "cross_entropy"}),
    "given and mean over": ("mean_over", {"loss_type": "given"}, {"loss_type": "given", "mean_over": "weights"}),
    "reduction over rows": ("task_loss_reduction", {}, {"task_loss_reduction": "sum"}),
}


def many(loss_type: Any = "bce_with_logits", **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return MultiTaskLoss(loss_type, TASKS, **options)


def one(loss_type: Any = "bce_with_logits", **options: Any) -> Any:
    if "pos_weights" in options:
        options["pos_weight"] = options.pop("pos_weights")[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return Loss(loss_type, options.pop("task_loss_reduction", "mean"), **options)


def trained(loss: Any, mode: bool = True) -> GlobalLoss:
    """The metric of a loss, fed and persistent."""
    loss.train(mode)
    tasks = () if isinstance(loss, Loss) else (2,)
    shape = (5, *tasks)
    logits = torch.arange(float(math.prod(shape)), dtype=torch.float64).view(shape)
    if loss.loss_type == "cross_entropy":
        loss(torch.stack([logits, -logits], -1), torch.zeros(shape, dtype=torch.int64))
    elif loss.loss_type == "given":
        loss.from_sums(logits.sum(0), 5)
    else:
        loss(logits, torch.ones(shape))
    metric: GlobalLoss = loss.train_metric if mode else loss.eval_metric
    metric.persistent(True)
    return metric


def persistent(loss: Any) -> Any:
    """A loss whose training sums are in its state_dict."""
    loss.train_metric.persistent(True)
    return loss


def sums_of(metric: GlobalLoss) -> Tensor:
    """What it has added and what it has loaded."""
    return metric.totals.sum(0)


both_ways = pytest.mark.parametrize("swap", [False, True], ids=["", "the other way"])


@both_ways
@pytest.mark.parametrize("make", [many, one])
@pytest.mark.parametrize(("shown", "first", "second"), RULES.values(), ids=RULES)
def test_sums_of_another_rule_are_neither_loaded_nor_merged(
    make: Callable[..., Any], shown: str, first: dict[str, Any], second: dict[str, Any], swap: bool
) -> None:
    saved, loaded = (make(**options) for options in ((second, first) if swap else (first, second)))
    trained(saved)
    metric = trained(loaded)
    before = metric.totals.clone()
    with pytest.raises(RuntimeError, match=shown):
        loaded.load_state_dict(saved.state_dict())
    for incoming in (saved.train_metric, saved.train_metric.metric_state):
        with pytest.raises(ValueError, match=shown):
            metric.merge_state(incoming)
    assert torch.equal(metric.totals, before)


SEGMENTS: dict[str, tuple[Any, str, str]] = {
    "another name": ({"country": ["DE", "FR"]}, "['DE', 'FR']", "segments['country']=['DE', 'US']"),
    "another order": (
        {"country": ["US", "DE"]},
        "segments['country']=['US', 'DE']",
        "segments['country']=['DE', 'US']",
    ),
    "one more": ({"country": ["DE", "US", "FR"]}, "['DE', 'US', 'FR']", "segments['country']=['DE', 'US']"),
    "a number": ({"country": 2}, "segments['country']=2", "segments['country']=['DE', 'US']"),
    "another dimension": ({"land": ["DE", "US"]}, "segments=['land']", "segments=['country']"),
    "none": (None, "no segments", "segments=['country']"),
}


@both_ways
@pytest.mark.parametrize("make", [many, one])
@pytest.mark.parametrize(("segments", "shown", "usual"), SEGMENTS.values(), ids=SEGMENTS)
def test_sums_of_other_segments_are_refused_by_name_whatever_their_shape(
    make: Callable[..., Any], segments: Any, shown: str, usual: str, swap: bool
) -> None:
    names = [usual, shown]
    saved, loaded = (persistent(make(segments=each)) for each in ({"country": ["DE", "US"]}, segments))
    if swap:
        saved, loaded, names = loaded, saved, names[::-1]
    expected = "got sums of .*{}, expected .*{}".format(*map(re.escape, names))
    with pytest.raises(RuntimeError, match=expected):
        loaded.load_state_dict(saved.state_dict())
    with pytest.raises(ValueError, match=expected):
        loaded.train_metric.merge_state(saved.train_metric)


EQUAL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "weights": ({"mean_over": "weights"}, {"mean_over": "weights"}),
    "pos_weights": ({"pos_weights": [2, 2]}, {"pos_weights": torch.tensor([2.0, 2.0])}),
    "ignore_index": ({"ignore_index": -1}, {"ignore_index": -1.0}),
    "NaN": ({"ignore_index": math.nan}, {"ignore_index": float("nan")}),
    "name": ({"loss_type": "cross_entropy"}, {"loss_type": "cross_entropy"}),
    "given": ({"loss_type": "given"}, {"loss_type": LossType.GIVEN}),
    "function": ({"loss_type": squared}, {"loss_type": squared}),
    "partial": (
        {"loss_type": functools.partial(F.mse_loss, reduction="none")},
        {"loss_type": functools.partial(F.mse_loss, reduction="none")},
    ),
    "module": ({"loss_type": nn.MSELoss(reduction="none")}, {"loss_type": nn.MSELoss(reduction="none")}),
}


@pytest.mark.parametrize("make", [many, one])
@pytest.mark.parametrize(("first", "second"), EQUAL.values(), ids=EQUAL)
def test_sums_of_the_same_rule_are_loaded_and_merged(
    make: Callable[..., Any], first: dict[str, Any], second: dict[str, Any]
) -> None:
    saved, loaded = make(**first), persistent(make(**second))
    totals = sums_of(trained(saved))
    loaded.load_state_dict(saved.state_dict())
    assert torch.equal(sums_of(loaded.train_metric), totals)
    loaded.train_metric.merge_state(saved.train_metric)
    loaded.train_metric.merge_state(saved.train_metric.metric_state)
    assert torch.equal(sums_of(loaded.train_metric), 3 * totals)


OTHERWISE: dict[str, dict[str, Any]] = {
    "task_weights": {"task_weights": [3.0, 4.0]},
    "reduction over tasks": {"global_reduction": "max"},
    "quality": {"quality": True},
    "global_batch": {"global_batch": True},
}


@pytest.mark.parametrize("options", OTHERWISE.values(), ids=OTHERWISE)
def test_what_is_made_of_the_sums_afterwards_is_no_part_of_the_rule(options: dict[str, Any]) -> None:
    saved, loaded = many(), persistent(many(**options))
    totals = sums_of(trained(saved))
    loaded.load_state_dict(saved.state_dict())
    assert torch.equal(sums_of(loaded.train_metric), totals)
    loaded.train_metric.merge_state(saved.train_metric)
    assert torch.equal(sums_of(loaded.train_metric), 2 * totals)


def test_sums_of_training_and_of_evaluation_are_of_one_rule() -> None:
    loss = many(mean_over="weights")
    both = trained(loss).totals + trained(loss, mode=False).totals
    loss.train_metric.merge_state(loss.eval_metric)
    assert torch.equal(loss.train_metric.totals, both)


GIVEN = {"like": "given", "reply": "bce_with_logits"}


@both_ways
@pytest.mark.parametrize("other", ["given", "bce_with_logits", {"like": "bce_with_logits", "reply": "given"}])
def test_which_tasks_are_given_is_part_of_the_rule(other: Any, swap: bool) -> None:
    saved, loaded = (many(loss_type) for loss_type in ((other, GIVEN) if swap else (GIVEN, other)))
    for loss in (saved, loaded):
        loss.train_metric.persistent(True)
        loss.from_sums(torch.tensor([6.0, 1.0]), 2)
    with pytest.raises(RuntimeError, match="given"):
        loaded.load_state_dict(saved.state_dict())
    with pytest.raises(ValueError, match="given"):
        loaded.train_metric.merge_state(saved.train_metric)
    assert loaded.train_metric.compute()["loss/like"].item() == 3.0


def test_a_loss_of_given_tasks_resumes() -> None:
    saved, loaded = persistent(many(GIVEN)), persistent(many(GIVEN))
    rows, given_sums = torch.zeros(4, 1), {"like": (torch.tensor(6.0), 2)}
    saved(rows, rows, given=given_sums)
    loaded.load_state_dict(saved.state_dict())
    loaded(rows, rows, given={"like": torch.tensor(3.0)})
    assert loaded.train_metric.compute()["loss/like"].item() == 3.0
    assert loaded.train_metric.update_count == 2


@both_ways
@pytest.mark.parametrize("make", [many, one])
def test_sums_whose_rule_nobody_knows_mix_with_any(make: Callable[..., Any], swap: bool) -> None:
    """A GlobalLoss that is fed by hand can't say how its sums were made."""
    metrics = [trained(make()), GlobalLoss(TASKS if make is many else None)]
    metrics[1].persistent(True)
    metrics[1].update(torch.ones(2 if make is many else 1), 1.0)
    into, other = metrics[::-1] if swap else metrics
    expected = sums_of(into) + sums_of(other)
    into.merge_state(other.metric_state)
    assert torch.equal(sums_of(into), expected)
    into.load_state_dict(other.state_dict())
    assert torch.equal(sums_of(into), sums_of(other))


@both_ways
@pytest.mark.parametrize("make", [many, one])
def test_a_sum_over_rows_is_never_taken_for_a_mean(make: Callable[..., Any], swap: bool) -> None:
    """Weights that cancel are data of a sum, which keeps their absolute values, and none of a mean."""
    tasks = TASKS if make is many else None
    total, mean = GlobalLoss(tasks, "sum"), trained(make())
    total.update(torch.ones(len(TASKS) if tasks else 1), -1.0)
    total.persistent(True)
    for one_mean in (mean, fed(GlobalLoss(tasks), [(torch.ones(len(TASKS) if tasks else 1), 2.0)])):
        one_mean.persistent(True)
        into, other = (one_mean, total) if swap else (total, one_mean)
        before = into.totals.clone()
        with pytest.raises(ValueError, match=r"got sums of task_loss_reduction='\w+', expected task_loss_reduction="):
            into.merge_state(other)
        with pytest.raises(RuntimeError, match=r"got sums of task_loss_reduction='\w+', expected task_loss_reduction="):
            into.load_state_dict(other.state_dict())
        assert torch.equal(into.totals, before)


# Sums that an update could not make.


@of_every_kind
def test_sums_that_are_not_finite_are_merged_where_they_may_be(kind: Kind) -> None:
    bad = fed(kind.make(nan_strategy="disable"), [kind.changed(kind.batch(0), 0, math.nan)])
    metric = fed(kind.make(), kind.batches(3))
    with pytest.raises(ValueError, match=r"incoming_state: got sums that are not finite, expected finite ones"):
        metric.merge_state(bad)
    expect_result_of(kind, metric, kind.batches(3))
    lenient = kind.make(nan_strategy="disable")
    lenient.merge_state(bad)
    assert repr(numbers(lenient.compute())) == repr(numbers(bad.compute()))


# Groups of a collection.

Batches = Sequence[tuple[Tensor, ...]]

LOGITS = torch.tensor([0.5, -1.0, 2.0, 0.25], dtype=torch.float64)
# In the first batch the metrics' sums are equal, so that they could be taken for the same.
OF_ONE_TASK: Batches = [
    (LOGITS, torch.tensor([1.0, 0.0, 1.0, 0.0])),
    (LOGITS, torch.tensor([0.5, 0.0, 1.0, 0.5])),
    (LOGITS, torch.tensor([1.0, 0.5, 0.0, 0.0])),
]
OF_SUMS: Batches = [
    (torch.tensor([3.0, 4.0]), torch.tensor([2.0, 1.0])),
    (torch.tensor([1.0, math.nan]), torch.tensor([2.0, 3.0])),
    (torch.tensor([5.0, 1.0]), torch.tensor([1.0, 3.0])),
]

COLLECTIONS: dict[str, tuple[Batches, dict[str, Callable[[], Summing]]]] = {
    "ignore_index": (
        OF_ONE_TASK,
        {"a": lambda: RankingQuality(None), "b": lambda: RankingQuality(None, ignore_index=0.5)},
    ),
    "windows": (
        OF_ONE_TASK,
        {
            "a": lambda: RankingQuality(None, window=2),
            "b": lambda: RankingQuality(None, window=1),
            "c": lambda: RankingQuality(None),
        },
    ),
    "nan_strategy": (
        OF_SUMS,
        {
            "a": lambda: GlobalLoss(TASKS, nan_strategy="ignore"),
            "b": lambda: GlobalLoss(TASKS, nan_strategy="disable"),
            "c": lambda: GlobalLoss(TASKS, nan_strategy="warn"),
        },
    ),
    "reductions": (
        OF_SUMS,
        {
            "a": lambda: GlobalLoss(TASKS, nan_strategy="ignore"),
            "b": lambda: GlobalLoss(TASKS, "sum", nan_strategy="ignore"),
            "c": lambda: GlobalLoss(TASKS, "mean", "max", nan_strategy="ignore"),
        },
    ),
    "task_weights": (
        OF_SUMS,
        {
            "a": lambda: GlobalLoss(TASKS, task_weights=[1.0, 2.0], nan_strategy="ignore"),
            "b": lambda: GlobalLoss(TASKS, task_weights=[2.0, 1.0], nan_strategy="ignore"),
        },
    ),
    "names": (
        OF_SUMS,
        {
            "a": lambda: GlobalLoss(TASKS, nan_strategy="ignore"),
            "b": lambda: GlobalLoss(TASKS[::-1], nan_strategy="ignore"),
        },
    ),
    "the same": (OF_ONE_TASK, {"a": lambda: RankingQuality(None), "b": lambda: RankingQuality(None)}),
}


def values_of(result: dict[str, Tensor]) -> str:
    """The values of a result in order, to the last bit, whatever a collection makes of the keys."""
    return repr([value.item() for value in result.values()])


def alone(makers: dict[str, Callable[[], Summing]], batches: Batches) -> str:
    """What each metric gives that has never been in a collection."""
    results = [fed(make(), batches).compute() for make in makers.values()]
    return repr([value.item() for result in results for value in result.values()])


@pytest.mark.filterwarnings("ignore:GlobalLoss. skipped updates that were not finite:UserWarning")
@pytest.mark.parametrize("first", ["update", "forward"])
@pytest.mark.parametrize("name", COLLECTIONS)
def test_metrics_in_a_collection_compute_as_alone(name: str, first: str) -> None:
    batches, makers = COLLECTIONS[name]
    collection = MetricCollection({name: make() for name, make in makers.items()})
    for batch in batches:
        if first == "update":
            collection.update(*batch)
        else:
            assert values_of(forward_each(collection, *batch)) == alone(makers, [batch])
    # Metrics whose sums can never differ may have one state; torchmetrics looks for them at the first update.
    are_one = first == "update" and name in ("the same", "task_weights")
    assert [len(group) for group in collection.compute_groups.values()] == ([2] if are_one else [1] * len(makers))
    assert values_of(compute_each(collection)) == alone(makers, batches)
    clone = collection.clone()
    clone.update(*batches[1])
    assert values_of(compute_each(clone)) == alone(makers, [*batches, batches[1]])
    assert values_of(compute_each(collection)) == alone(makers, batches)
    for each in (collection, clone):
        each.reset()
        each.update(*batches[2])
        each.update(*batches[1])
        assert values_of(compute_each(each)) == alone(makers, [batches[2], batches[1]])


@pytest.mark.parametrize("first", ["update", "forward"])
def test_of_two_qualities_the_one_leaves_missing_labels_out(first: str) -> None:
    """By hand: of twelve rows three have a label of 0.5."""
    collection = MetricCollection(COLLECTIONS["ignore_index"][1]["a"](), prefix="all/")
    both = MetricCollection({name: make() for name, make in COLLECTIONS["ignore_index"][1].items()})
    for batch in OF_ONE_TASK:
        for each in (collection, both):
            (each.update if first == "update" else each)(*batch)
    found = numbers(compute_each(both))
    assert found["a_weight"] == numbers(collection.compute())["all/weight"] == 12.0
    assert found["b_weight"] == 9.0
    labels = torch.cat([batch[1] for batch in OF_ONE_TASK]).double()
    rows = F.binary_cross_entropy_with_logits(LOGITS.repeat(3), labels, reduction="none")
    assert found["a_logloss"] == pytest.approx(rows.mean().item(), rel=1e-12)
    assert found["b_logloss"] == pytest.approx(rows[labels != 0.5].mean().item(), rel=1e-12)


def test_metrics_of_losses_are_in_groups_of_their_own() -> None:
    """Equal sums of two losses, of which one is trained on."""
    losses = many(), many(mean_over="weights")
    for loss in losses:
        trained(loss)
    collection = MetricCollection({"a": losses[0].train_metric, "b": losses[1].train_metric})
    collection.update(torch.ones(2), torch.ones(2))
    assert [len(group) for group in collection.compute_groups.values()] == [1, 1]


class Halved(GlobalLoss):
    """Half of the sums that it is given."""

    def _sum_batch(self, loss_sum: Tensor, weight: Tensor | float) -> Any:
        return super()._sum_batch(loss_sum / 2, weight)


def test_a_subclass_and_its_base_stay_apart_though_their_sums_are_equal_at_first() -> None:
    collection = MetricCollection({"a": GlobalLoss(["like"]), "b": Halved(["like"])})
    collection.update(torch.zeros(1), 1)
    collection.update(torch.ones(1), 1)
    found = numbers(compute_each(collection))
    assert (found["a_loss"], found["b_loss"]) == (0.5, 0.25)


@of_every_kind
def test_a_nan_strategy_that_was_set_keeps_a_metric_apart(kind: Kind) -> None:
    collection = MetricCollection({name: kind.make(nan_strategy="ignore") for name in "ab"})
    collection["b"].nan_strategy = "disable"
    collection.update(*kind.batch(0))
    collection.update(*kind.changed(kind.batch(1), 0, math.nan))
    found = numbers(compute_each(collection))
    clean = kind.expected([kind.batch(0), kind.without_last_task(kind.batch(1))])
    spoilt = {key[0] for key, value in found.items() if math.isnan(value) and not math.isnan(clean[key[2:]])}
    assert spoilt == {"b"}


# What becomes of sums that are not finite.


@of_every_kind
@pytest.mark.parametrize(
    ("bad", "error"), [("typo", ValueError), ("Warn", ValueError), (None, TypeError), (0, TypeError)]
)
def test_an_unknown_nan_strategy_can_not_be_set(kind: Kind, bad: Any, error: type[Exception]) -> None:
    for options in ({}, {"nan_strategy": "ignore"}):
        metric: Any = kind.make(**options)
        before = metric.nan_strategy
        with pytest.raises(error, match=r"^nan_strategy: got .*expected one of") as caught:
            metric.nan_strategy = bad
        with pytest.raises(error) as at_construction:
            kind.make(nan_strategy=bad)
        assert str(caught.value) == str(at_construction.value)
        assert metric.nan_strategy == before


@of_every_kind
def test_a_nan_strategy_that_is_set_is_that_of_the_next_update(kind: Kind) -> None:
    metric: Any = kind.make()
    good, bad = kind.batch(0, rows=6), kind.changed(kind.batch(1, rows=6), 0, math.nan)
    fed(metric, [good])
    metric.nan_strategy = "ignore"
    assert metric.nan_strategy == "ignore"
    fed(metric, [bad])
    left_out = numbers(metric.compute())
    assert metric.totals.isfinite().all()
    metric.nan_strategy = "error"
    with pytest.raises(RuntimeError, match="not finite"):
        metric.compute()
    metric.nan_strategy = "warn"
    with pytest.warns(UserWarning, match="not finite"):
        assert repr(numbers(metric.compute())) == repr(left_out)
    metric.nan_strategy = "disable"
    fed(metric, [bad])
    assert metric.totals.isnan().any()
    assert metric.clone().nan_strategy == pickle.loads(pickle.dumps(metric)).nan_strategy == "disable"


def test_the_metric_of_a_loss_has_a_nan_strategy_to_set() -> None:
    loss: Any = many()
    with pytest.raises(ValueError, match=r"^nan_strategy"):
        loss.train_metric.nan_strategy = "typo"
    loss.train_metric.nan_strategy = "disable"
    loss(torch.tensor([[0.0, math.nan]]), torch.ones(1, 2))
    assert loss.train_metric.compute()["loss/reply"].isnan()
    assert loss.train_metric.compute()["loss/like"].item() == pytest.approx(math.log(2))
